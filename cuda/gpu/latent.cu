// What latent attention in absorbed form has beside attention.cu: the cached latent, and the heads'
// products with both halves of kv_b, by which queries go into the latent's space and sums come out of it.
#include "device.h"

namespace localr1 {

constexpr int kProductThreads = 256;
constexpr int kProductColumns = 64;
constexpr int kSlices = kProductThreads / kWarp;  // of the depth, a warp each

static inline float rotated(const float* values, const float* cosine, const float* sine, int pairs, int i) {
  const int pair = i % pairs;
  const float first = values[pair], second = values[pairs + pair], c = cosine[pair], s = sine[pair];
  return i < pairs ? rounded_difference(rounded_product(first, c), rounded_product(second, s))
                   : rounded_sum(rounded_product(second, c), rounded_product(first, s));
}

// down: token t's latent and key part at t * stride, before norm and rope -> row *start + t of the cache
// [capacity, latent + rope]. One warp a token: a grid of (tokens).
LOCALR1_KERNEL(kWarp, 512)
latent_append(const float* down, int64_t stride, const float* norm, float eps, int latent,
              const float* cosine, const float* sine, int pairs, const int32_t* start, void* cache,
              int half) {
  const int lane = threadIdx.x, width = latent + 2 * pairs;
  const int64_t position = int64_t(*start) + blockIdx.x;
  const float* source = down + blockIdx.x * stride;
  float low = 0.0f, high = 0.0f;
#pragma unroll 4
  for (int i = lane; i < latent; i += kLanes) {
    low = rounded_sum(low, rounded_product(source[i], source[i]));
    if (i + kWarp < latent) {
      high = rounded_sum(high, rounded_product(source[i + kWarp], source[i + kWarp]));
    }
  }
  const float inverse = inverse_root_mean(fold_lanes(low, high), latent, eps);
  for (int i = lane; i < width; i += kWarp) {
    const float value = i < latent ? rounded_product(rounded_product(source[i], inverse), norm[i])
                                   : rotated(source + latent, cosine + position * pairs,
                                             sine + position * pairs, pairs, i - latent);
    if (half) {
      ((uint16_t*)cache)[position * width + i] = narrow_to_half(value);
    } else {
      ((float*)cache)[position * width + i] = value;
    }
  }
}

// This block's 64 columns of a [depth] times b [depth, columns], each of whose warps takes every eighth
// row of b; the sums of column `threadIdx.x`, in threads 0..63. sums: kSlices * 64.
template <ScaleType kType>
static inline float columns_of(const float* a, const void* b, int64_t first, int depth, int columns,
                               float* sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column = blockIdx.x * kProductColumns + lane;
  float low = 0.0f, high = 0.0f;
#pragma unroll 4
  for (int d = warp; d < depth; d += kSlices) {
    const int64_t row = first + int64_t(d) * columns;
    const float factor = a[d];
    if (column < columns) low = __fmaf_rn(factor, load_scale(b, row + column, kType), low);
    if (column + kWarp < columns) high = __fmaf_rn(factor, load_scale(b, row + column + kWarp, kType), high);
  }
  sums[warp * kProductColumns + lane] = low;
  sums[warp * kProductColumns + lane + kWarp] = high;
  __syncthreads();
  float total = 0.0f;
  if (threadIdx.x < kProductColumns) {
    for (int slice = 0; slice < kSlices; ++slice) total += sums[slice * kProductColumns + threadIdx.x];
  }
  return total;
}

static inline float column_of(const float* a, const void* b, int type, int64_t first, int depth,
                              int columns, float* sums) {
  if (type == kBfloat16) return columns_of<kBfloat16>(a, b, first, depth, columns, sums);
  if (type == kFloat16) return columns_of<kFloat16>(a, b, first, depth, columns, sums);
  return columns_of<kFloat32>(a, b, first, depth, columns, sums);
}

// queries: of token t and head h at t * stride + h * (key + rope), before rope; key_up [heads, key, latent]
// -> in_latent [tokens, heads, latent + rope], of which the last part is rotated. A grid of (ceil(latent /
// 64), heads, tokens).
LOCALR1_KERNEL(kProductThreads, 1024)
absorb_queries(const float* queries, int64_t stride, const void* key_up, int type, int key, int latent,
               const float* cosine, const float* sine, int pairs, const int32_t* start, float* in_latent) {
  __shared__ float sums[kSlices * kProductColumns];
  const int head = blockIdx.y, token = blockIdx.z, rope = 2 * pairs;
  const int64_t position = int64_t(*start) + token;
  const float* query = queries + token * stride + int64_t(head) * (key + rope);
  float* target = in_latent + (int64_t(token) * gridDim.y + head) * (latent + rope);
  const float value = column_of(query, key_up, type, int64_t(head) * key * latent, key, latent, sums);
  const int column = blockIdx.x * kProductColumns + threadIdx.x;
  if (threadIdx.x < kProductColumns && column < latent) target[column] = value;
  if (blockIdx.x > 0) return;
  for (int i = threadIdx.x; i < rope; i += kProductThreads) {
    target[latent + i] = rotated(query + key, cosine + position * pairs, sine + position * pairs, pairs, i);
  }
}

// sums_in_latent [tokens, heads, latent], value_up [heads, latent, value] -> out [tokens, heads, value]. A
// grid of (ceil(value / 64), heads, tokens).
LOCALR1_KERNEL(kProductThreads, 1024)
expand_values(const float* sums_in_latent, const void* value_up, int type, int latent, int value,
              float* out) {
  __shared__ float sums[kSlices * kProductColumns];
  const int head = blockIdx.y;
  const int64_t row = int64_t(blockIdx.z) * gridDim.y + head;
  const float total = column_of(sums_in_latent + row * latent, value_up, type,
                                int64_t(head) * latent * value, latent, value, sums);
  const int column = blockIdx.x * kProductColumns + threadIdx.x;
  if (threadIdx.x < kProductColumns && column < value) out[row * value + column] = total;
}

}  // namespace localr1
