// A mixture's experts for a few tokens: every (token, expert) pair by itself, through a table of where the
// experts lie. Pairs whose expert lies elsewhere are left alone; another computes them.
#include "products.h"

namespace localr1 {

constexpr int kGateUpThreads = 4 * kUnitThreads;  // 32 rows of gate and the same of up

// table [experts]: the first byte of each, null where it is not here. chosen [pairs]: negative for none.
static inline const uint8_t* expert_of(const uint8_t* const* table, const int32_t* chosen, int pair) {
  const int expert = chosen[pair];
  return expert < 0 ? nullptr : table[expert];
}

// silu(gate) * up of 32 rows of one pair, quantized as one group of the next product's activations. A
// grid of (inner / 32, pairs). a [tokens]; q, scale and sum [pairs, inner]; 4 * kTokenStride phases.
template <CodeType kCode>
static inline void gate_up(const ExpertLayout& expert, const uint8_t* const* table, const int32_t* chosen,
                           int per_token, const Quantized& a, int8_t* q, float* scale, int32_t* sum,
                           float* phases) {
  static_assert(2 * kUnit == kGroup, "two units are one group of activations");
  const int pair = blockIdx.y;
  const uint8_t* data = expert_of(table, chosen, pair);
  if (!data) return;
  ExpertLayout e = expert;
  e.gate = compiled<kCode>(expert.gate);
  const int part = threadIdx.x / kUnitThreads;  // gate, gate, up, up
  const int64_t unit = int64_t(blockIdx.x) * 2 + part % 2;
  MatrixLayout m = e.gate;  // up has its rows and columns
  if (part >= 2) {
    m.group = e.up.group;
    m.scale_type = e.up.scale_type;
    m.has_zero = e.up.has_zero;
  }
  const Place place = place_of(threadIdx.x % kUnitThreads);
  const uint8_t* row_block =
      row_block_of<kCode>(m, part < 2 ? data : data + up_offset(e), unit, place.block);
  const int token = pair / per_token;
  float acc[1];
  phase_sums<kCode, 1>(m, row_block, a, token, token + 1, place, acc);
  store_phase(phases + part * kTokenStride, place, acc[0]);
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const int lane = threadIdx.x, half = lane / kUnit, row = lane % kUnit;
  const float gate = add_phases(phases + half * kTokenStride, row);
  const float up = add_phases(phases + (2 + half) * kTokenStride, row);
  const int64_t group = int64_t(pair) * gridDim.x + blockIdx.x;
  quantize_group(rounded_product(silu_of(gate), up), lane, q + group * kGroup, scale + group, sum + group);
}

// One unit of 16 rows of one pair: a grid of (units of hidden, pairs). a [pairs]; out [pairs, hidden].
template <CodeType kCode>
static inline void down(const ExpertLayout& expert, const uint8_t* const* table, const int32_t* chosen,
                        const Quantized& a, float* out, float* phases) {
  const int pair = blockIdx.y;
  const uint8_t* data = expert_of(table, chosen, pair);
  if (!data) return;
  ExpertLayout e = expert;
  e.gate.rows_per_block = e.up.rows_per_block = kRows;
  e.down = compiled<kCode>(expert.down);
  const Place place = place_of(threadIdx.x);
  const uint8_t* row_block =
      row_block_of<kCode>(e.down, data + down_offset(e), blockIdx.x, place.block);
  if (row_block) {
    float acc[1];
    phase_sums<kCode, 1>(e.down, row_block, a, pair, pair + 1, place, acc);
    store_phase(phases, place, acc[0]);
  }
  __syncthreads();
  const int64_t row = int64_t(blockIdx.x) * kUnit + threadIdx.x;
  if (threadIdx.x >= kUnit || row >= e.down.rows) return;
  out[pair * e.down.rows + row] = add_phases(phases, threadIdx.x);
}

#define LOCALR1_EXPERTS(name, code)                                                                            \
  LOCALR1_KERNEL(kGateUpThreads, 1024)                                                                         \
  gate_up_##name(ExpertLayout expert, const uint8_t* const* table, const int32_t* chosen,             \
                    int per_token, const int8_t* q, const float* scale, const int32_t* sum,              \
                    int8_t* gated_q, float* gated_scale, int32_t* gated_sum) {                           \
    __shared__ float phases[4 * kTokenStride];                                                           \
    const Quantized a{q, scale, sum, int(expert.gate.columns / kGroup)};                                 \
    gate_up<code>(expert, table, chosen, per_token, a, gated_q, gated_scale, gated_sum, phases);         \
  }                                                                                                      \
  LOCALR1_KERNEL(kUnitThreads, 1024)                                                                           \
  down_##name(ExpertLayout expert, const uint8_t* const* table, const int32_t* chosen,                \
                 const int8_t* q, const float* scale, const int32_t* sum, float* out) {                  \
    __shared__ float phases[kTokenStride];                                                               \
    const Quantized a{q, scale, sum, int(expert.down.columns / kGroup)};                                 \
    down<code>(expert, table, chosen, a, out, phases);                                                   \
  }

LOCALR1_EXPERTS(int4, kInt4)
LOCALR1_EXPERTS(int8, kInt8)
LOCALR1_EXPERTS(nf4, kNf4)

// outputs [pairs, hidden] gain those of pairs whose expert is not here, from memory that may be the host's:
// only what is missing crosses the link. A grid of (ceil(hidden / 256), pairs).
LOCALR1_KERNEL(256, 1024)
fetch_outputs(const float* elsewhere, const uint8_t* const* table, const int32_t* chosen, int64_t hidden,
              float* outputs) {
  const int64_t column = int64_t(blockIdx.x) * 256 + threadIdx.x;
  const int pair = blockIdx.y;
  if (column >= hidden || expert_of(table, chosen, pair)) return;
  outputs[pair * hidden + column] = elsewhere[pair * hidden + column];
}

// residual [tokens, hidden] gains the outputs [tokens, per_token, hidden] times weights [tokens,
// per_token], added from the first choice on, wherever each was computed. A grid of (ceil(hidden / 256),
// tokens).
LOCALR1_KERNEL(256, 1024)
combine_experts(const float* outputs, const float* weights, int per_token, int64_t hidden, float* residual) {
  const int64_t column = int64_t(blockIdx.x) * 256 + threadIdx.x, token = blockIdx.y;
  if (column >= hidden) return;
  const float* y = outputs + token * per_token * hidden + column;
  const float* weight = weights + token * per_token;
  float total = rounded_product(y[0], weight[0]);
#pragma unroll 4
  for (int i = 1; i < per_token; ++i) {
    total = rounded_sum(total, rounded_product(y[i * hidden], weight[i]));
  }
  float* target = residual + token * hidden + column;
  *target = rounded_sum(*target, total);
}

}  // namespace localr1
