// Products of a quantized matrix with many tokens: a prompt's.
#include "tiles.h"

namespace localr1 {

constexpr int kMatmulRowWarps = 4;  // 64 rows and 64 tokens
constexpr int kTransposed = 32;     // rows and columns that pass through shared memory at once

// Scales and sums [rows, groups] in the order of tiles, [groups, stride]: position p has row order[p] /
// per_token, or row p where order is null; one that is negative or behind `count` has 0. stride: a
// multiple of 32. A grid of (ceil(groups / 32), stride / 32).
LOCALR1_KERNEL(kTileThreads, 1024)
by_group(const float* scale, const int32_t* sum, int groups, const int32_t* order, int per_token, int count,
         int64_t stride, float* scale_out, int32_t* sum_out) {
  __shared__ float scales[kTransposed][kTransposed + 1];
  __shared__ int32_t sums[kTransposed][kTransposed + 1];
  const int within = threadIdx.x % kTransposed, first = threadIdx.x / kTransposed;
  const int group = blockIdx.x * kTransposed + within;
  for (int i = first; i < kTransposed; i += kTileThreads / kTransposed) {
    const int position = blockIdx.y * kTransposed + i;
    int row = position < count ? position : -1;
    if (order && row >= 0) row = order[position] < 0 ? -1 : order[position] / per_token;
    const bool is_there = row >= 0 && group < groups;
    const int64_t at = int64_t(row) * groups + group;
    scales[i][within] = is_there ? scale[at] : 0.0f;
    sums[i][within] = is_there ? sum[at] : 0;
  }
  __syncthreads();
  for (int i = first; i < kTransposed; i += kTileThreads / kTransposed) {
    const int target = blockIdx.x * kTransposed + i;
    if (target >= groups) return;
    const int64_t at = target * stride + blockIdx.y * kTransposed + within;
    scale_out[at] = scales[within][i];
    sum_out[at] = sums[within][i];
  }
}

// As `matvec`, for any number of tokens: a grid of (ceil(tokens / 64), ceil(rows / 64)), so that blocks
// that run at the same time read the same weights. scale and sum: as `by_group` makes them, of
// by_group_stride.
template <CodeType kCode>
static inline void matmul(const MatrixLayout& m, const uint8_t* data, const TileActivations& a, int tokens,
                          const float* bias, float* out, int64_t stride, int accumulate, uint8_t* stages) {
  using T = Tile<kCode, kMatmulRowWarps>;
  const int64_t first_row = int64_t(blockIdx.y) * T::kRowCount;
  const int first_token = blockIdx.x * T::kTokenCount;
  const auto row_of = [&](int row) { return tile_row<kCode>(m, data, first_row + row); };
  const auto q_of = [&](int token) {
    const int last = tokens - 1, index = first_token + token < last ? first_token + token : last;
    return a.q + int64_t(index) * a.groups * kGroup;
  };
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  constexpr int kTokenWarps = T::kTokenCount / kWarpTokens;
  const int row_warp = warp / kTokenWarps, token = first_token + warp % kTokenWarps * kWarpTokens;
  TileSums y;
  tile_sums<T, kCode>(row_of, q_of, a, first_token, token < tokens, stages, y);
#pragma unroll
  for (int i = 0; i < 4 * kTurns; ++i) {
    const int64_t row = first_row + row_warp * kWarpRows + lane / 4 + i % 4 / 2 * 8;
    const int t = token + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row >= m.rows || t >= tokens) continue;
    float sum = y[i / 4][i % 4];
    if (bias) sum = rounded_sum(sum, bias[row]);
    float* target = out + t * stride + row;
    *target = accumulate ? rounded_sum(*target, sum) : sum;
  }
}

#define LOCALR1_MATMUL(name, code)                                                                            \
  LOCALR1_KERNEL(kTileThreads, 512)                                                                     \
  matmul_##name(MatrixLayout m, const uint8_t* data, const int8_t* q, const float* scale,            \
                   const int32_t* sum, int64_t by_group_stride, int tokens, const float* bias,          \
                   float* out, int64_t stride, int accumulate) {                                        \
    __shared__ __align__(16) uint8_t stages[Tile<code, kMatmulRowWarps>::kBytes];                       \
    const TileActivations a{q, scale, sum, by_group_stride, int(m.columns / kGroup)};                   \
    matmul<code>(m, data, a, tokens, bias, out, stride, accumulate, stages);                            \
  }

LOCALR1_MATMUL(int4, kInt4)
LOCALR1_MATMUL(int8, kInt8)
LOCALR1_MATMUL(nf4, kNf4)

}  // namespace localr1
