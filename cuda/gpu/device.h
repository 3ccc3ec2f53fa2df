// What every GPU kernel is written in. No CUDA header is included, so that NVRTC alone compiles the
// kernels (docs/gpu.md); tests/cuda_model plays what is used here on a CPU.
#pragma once

#include "../dequant.h"

// threads: of a block. resident: threads that an SM shall be able to hold, 1024 or 512, which leaves each
// 64 or 128 registers. (Left to itself the assembler aims at a number of its own and may spill for it.)
// Blocks of one warp: 512, as some SMs hold 16 blocks only.
#define LOCALR1_KERNEL(threads, resident) \
  extern "C" __global__ void __launch_bounds__(threads, (resident) / (threads))

namespace localr1 {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLanes = 64;  // partial sums of one lane sum; a thread holds two

// Activations as the products read them: q [tokens, groups, 32], scale and sum [tokens, groups]. sum:
// of the group's q, which zero points need.
struct Quantized {
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
  int groups;
};

static inline float warp_max(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// The contract's lane sum: this thread's two of 64 lanes (element i of a row belongs to lane i mod 64)
// are folded by halves, 32 first. Every thread gets the sum.
static inline float fold_lanes(float low, float high) {
  float sum = rounded_sum(low, high);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum = rounded_sum(sum, __shfl_xor_sync(kAllLanes, sum, distance));
  }
  return sum;
}

static inline float inverse_root_mean(float sum_of_squares, int n, float eps) {
  const float mean = rounded_quotient(sum_of_squares, float(n));
  return rounded_quotient(1.0f, __fsqrt_rn(rounded_sum(mean, eps)));
}

// One group of 32 activations, a value a lane -> q [32], scale and sum of the group.
static inline void quantize_group(float value, int lane, int8_t* q, float* scale, int32_t* sum) {
  // Magnitudes are compared as integers, so that NaN counts as the largest.
  uint32_t largest = bits_from_float(value) & 0x7fffffffu;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, distance);
    largest = other > largest ? other : largest;
  }
  const float absmax = float_from_bits(largest);
  const float inverse = rounded_quotient(127.0f, absmax);
  // Zero, too small, or holding NaN or Inf: integers of 0, and the scale carries NaN or Inf on.
  const bool usable = inverse > 0.0f && inverse < float_from_bits(0x7f800000u);
  const int code = usable ? __float2int_rn(rounded_product(value, inverse)) : 0;
  q[lane] = int8_t(code);
  int total = code;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(kAllLanes, total, distance);
  }
  if (lane == 0) {
    *scale = rounded_quotient(absmax, 127.0f);
    *sum = total;
  }
}

#ifdef __CUDACC_RTC__

// The tensor cores: sums [16, 8] gain the product of a [16, 32] and b [32, 8], int8 and exact. Of a a lane
// has rows lane / 4 (words 0 and 2) and 8 below (1 and 3), columns 4 * (lane % 4) .. + 3 (0 and 1) and 16
// behind (2 and 3); of b column lane / 4, rows as a's columns; of the sums rows as a's, columns 2 * (lane
// % 4) and the next (PTX ISA, "Matrix Fragments for mma.m16n8k32"). All lanes of a warp must call it.
static inline void multiply_16x8x32(const uint32_t (&a)[4], uint2 b, int (&sums)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
#else  // Turing has a quarter of it in one instruction; its fragments are the same words.
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int half = quarter % 2;  // of the rows
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(sums[2 * half]), "+r"(sums[2 * half + 1])
        : "r"(a[quarter]), "r"(quarter < 2 ? b.x : b.y));
  }
#endif
}

// Copies of 8 or 16 bytes from global to shared memory, both so aligned, that go on while the thread does.
// end_group: those since the last one are a group; await_groups: until all of this thread's but the last
// kMost groups are done. Before Ampere a copy is done at once.
template <int kBytes>
static inline void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const uint32_t target = uint32_t(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(target), "l"(global) : "memory");
  }
#else
  if constexpr (kBytes == 16) {
    *(uint4*)shared = *(const uint4*)global;
  } else {
    *(uint2*)shared = *(const uint2*)global;
  }
#endif
}
static inline void end_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kMost>
static inline void await_groups() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kMost) : "memory");
#endif
}

#else
using cuda_model::await_groups;
using cuda_model::copy_async;
using cuda_model::end_group;
using cuda_model::multiply_16x8x32;
#endif

}  // namespace localr1
