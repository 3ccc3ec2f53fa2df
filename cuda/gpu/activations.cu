// Activations of one product: quantization by itself, and behind a norm or a gate.
#include "device.h"

namespace localr1 {

constexpr int kGroupsOfBlock = 8;  // a warp each
constexpr int kNormThreads = 256;
constexpr int kNormTile = 2048;  // values of a row that lie in shared memory at a time

// x [count, 32] -> q, scale and sum of each group. A grid of count / 8 blocks.
LOCALR1_KERNEL(256, 1024)
quantize_activations(const float* x, int64_t count, int8_t* q, float* scale, int32_t* sum) {
  const int lane = threadIdx.x % kWarp;
  const int64_t group = int64_t(blockIdx.x) * kGroupsOfBlock + threadIdx.x / kWarp;
  if (group >= count) return;
  quantize_group(__ldg(x + group * kGroup + lane), lane, q + group * kGroup, scale + group, sum + group);
}

// silu(gate) * up of a group of 32, then quantized; gate and up [count, 32].
LOCALR1_KERNEL(256, 1024)
silu_quantize(const float* gate, const float* up, int64_t count, int8_t* q, float* scale, int32_t* sum) {
  const int lane = threadIdx.x % kWarp;
  const int64_t group = int64_t(blockIdx.x) * kGroupsOfBlock + threadIdx.x / kWarp;
  if (group >= count) return;
  const int64_t index = group * kGroup + lane;
  const float value = rounded_product(silu_of(__ldg(gate + index)), __ldg(up + index));
  quantize_group(value, lane, q + group * kGroup, scale + group, sum + group);
}

// The RMS norm of one row a block. x: row r at r * stride. y [rows, n], or null; q, scale and sum of y,
// or q null. n: a multiple of 32 where q is given.
LOCALR1_KERNEL(kNormThreads, 1024)
rms_norm(const float* x, int64_t stride, const float* weight, float eps, int n, float* y, int8_t* q,
         float* scale, int32_t* sum) {
  __shared__ float tile[kNormTile];
  __shared__ float factor;
  const float* row = x + blockIdx.x * stride;
  const int thread = threadIdx.x;
  // The 64 lanes are added up by the first warp, in order; the others only fetch.
  float low = 0.0f, high = 0.0f;
  for (int first = 0; first < n; first += kNormTile) {
    const int count = n - first < kNormTile ? n - first : kNormTile;
    for (int i = thread; i < count; i += kNormThreads) tile[i] = row[first + i];
    __syncthreads();
    if (thread < kWarp) {
#pragma unroll 4
      for (int i = thread; i < count; i += kLanes) {
        low = rounded_sum(low, rounded_product(tile[i], tile[i]));
        const float other = i + kWarp < count ? tile[i + kWarp] : 0.0f;
        high = rounded_sum(high, rounded_product(other, other));
      }
    }
    __syncthreads();
  }
  if (thread < kWarp) {
    const float inverse = inverse_root_mean(fold_lanes(low, high), n, eps);
    if (thread == 0) factor = inverse;
  }
  __syncthreads();
  const float inverse = factor;
  // Whole groups of 32, a lane each, so that a warp quantizes what it has normed.
  const int64_t groups = (n + kGroup - 1) / kGroup;
  for (int i = thread; i < groups * kGroup; i += kNormThreads) {
    const float value = i < n ? rounded_product(rounded_product(row[i], inverse), weight[i]) : 0.0f;
    const int64_t group = blockIdx.x * groups + i / kGroup;
    if (q) quantize_group(value, thread % kWarp, q + group * kGroup, scale + group, sum + group);
    if (y && i < n) y[int64_t(blockIdx.x) * n + i] = value;
  }
}

}  // namespace localr1
