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

}  // namespace localr1
