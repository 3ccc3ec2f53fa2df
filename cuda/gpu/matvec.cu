// Products of a quantized matrix with 1 to 8 tokens, and more by reading the weights once for every 8.
#include "products.h"

namespace localr1 {

// One unit of 16 rows and kTokens tokens a block; a grid of (units, ceil(tokens / kTokens)).
// out: row r of token t at t * stride + r. bias [rows] or null. accumulate: out += y + bias.
template <CodeType kCode, int kTokens>
static inline void matvec(const MatrixLayout& m, const uint8_t* data, const Quantized& a, int tokens,
                          const float* bias, float* out, int64_t stride, int accumulate, float* phases) {
  const Place place = place_of(threadIdx.x);
  const int first_token = blockIdx.y * kTokens;
  const uint8_t* row_block = row_block_of<kCode>(m, data, blockIdx.x, place.block);
  if (row_block) {
    float acc[kTokens];
    phase_sums<kCode, kTokens>(m, row_block, a, first_token, tokens, place, acc);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) store_phase(phases + t * kTokenStride, place, acc[t]);
  }
  __syncthreads();
  const int token = threadIdx.x / kUnit, within = threadIdx.x % kUnit;
  const int64_t row = int64_t(blockIdx.x) * kUnit + within;
  if (token >= kTokens || first_token + token >= tokens || row >= m.rows) return;
  float y = add_phases(phases + token * kTokenStride, within);
  if (bias) y = rounded_sum(y, bias[row]);
  float* target = out + (first_token + token) * stride + row;
  *target = accumulate ? rounded_sum(*target, y) : y;
}

#define LOCALR1_MATVEC(name, code, tokens)                                                                     \
  LOCALR1_KERNEL(kUnitThreads, (tokens) <= 2 ? 1024 : 512)                                                                           \
  matvec_##name##_t##tokens(MatrixLayout m, const uint8_t* data, const int8_t* q, const float* scale, \
                               const int32_t* sum, int num_tokens, const float* bias, float* out,        \
                               int64_t stride, int accumulate) {                                         \
    __shared__ float phases[tokens * kTokenStride];                                                      \
    const Quantized a{q, scale, sum, int(m.columns / kGroup)};                                           \
    matvec<code, tokens>(m, data, a, num_tokens, bias, out, stride, accumulate, phases);                 \
  }

LOCALR1_MATVEC(int4, kInt4, 1)
LOCALR1_MATVEC(int4, kInt4, 2)
LOCALR1_MATVEC(int4, kInt4, 4)
LOCALR1_MATVEC(int4, kInt4, 8)
LOCALR1_MATVEC(int8, kInt8, 1)
LOCALR1_MATVEC(int8, kInt8, 2)
LOCALR1_MATVEC(int8, kInt8, 4)
LOCALR1_MATVEC(int8, kInt8, 8)
LOCALR1_MATVEC(nf4, kNf4, 1)
LOCALR1_MATVEC(nf4, kNf4, 2)
LOCALR1_MATVEC(nf4, kNf4, 4)
LOCALR1_MATVEC(nf4, kNf4, 8)

}  // namespace localr1
