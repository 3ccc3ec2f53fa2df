// A mixture's experts for many tokens, on the tensor cores: the pairs of tokens and experts stand in the
// order of their experts, and 32 of one expert are a tile, so that an expert is read once for 32 of its
// tokens.
#include "tiles.h"

namespace localr1 {

constexpr int kExpertRowWarps = 8;  // 128 rows, of gate and up 64 each, and 32 tokens
constexpr int kGatedRows = 64;

// Where pairs stand: position p has pair order[p], a negative number where a tile is not full; tile t has
// 32 positions, of expert experts[t].
struct PairOrder {
  const int32_t* order;
  const int32_t* experts;
};

// table as in experts.cu. Null where the expert of this block's tile is not here.
static inline const uint8_t* expert_of_tile(const uint8_t* const* table, const PairOrder& pairs) {
  const int expert = pairs.experts[blockIdx.x];
  return expert < 0 ? nullptr : table[expert];
}

// A tile's outputs in shared memory, [token][row], between the threads that make them and those that go on:
// tokens 4 banks apart, so that 32 that store at once never meet in a bank.
constexpr int kTokenPitch = kWarpRows * kExpertRowWarps + 4;
// silu(gate) * up of 64 rows and 32 positions, quantized as two groups of the next product's activations. A
// grid of (tiles, ceil(inner / 64)). a.q: of tokens; q [positions, inner]; scale and sum [inner / 32,
// a.stride].
template <CodeType kCode>
static inline void gate_up_tile(const ExpertLayout& expert, const uint8_t* const* table,
                                const PairOrder& pairs, int per_token, const TileActivations& a, int8_t* q,
                                float* scale, int32_t* sum, uint8_t* memory) {
  using T = Tile<kCode, kExpertRowWarps>;
  const uint8_t* data = expert_of_tile(table, pairs);
  if (!data) return;
  ExpertLayout e = expert;
  e.gate = compiled<kCode>(expert.gate);
  const int64_t first = int64_t(blockIdx.x) * kWarpTokens, first_row = int64_t(blockIdx.y) * kGatedRows;
  const auto row_of = [&](int row) {
    MatrixLayout m = e.gate;  // up has its rows and columns
    const bool is_up = row >= kGatedRows;
    if (is_up) {
      m.group = e.up.group;
      m.scale_type = e.up.scale_type;
      m.has_zero = e.up.has_zero;
    }
    return tile_row<kCode>(m, is_up ? data + up_offset(e) : data, first_row + row % kGatedRows);
  };
  const auto q_of = [&](int token) {
    const int pair = pairs.order[first + token];
    return a.q + int64_t(pair < 0 ? 0 : pair / per_token) * a.groups * kGroup;
  };
  TileSums y;
  tile_sums<T, kCode>(row_of, q_of, a, first, true, memory, y);
  static_assert(kWarpTokens * kTokenPitch * 4 <= T::kBytes, "what was the stages'");
  __syncthreads();  // the stages are read
  float* values = (float*)memory;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < 4 * kTurns; ++i) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = warp * kWarpRows + lane / 4 + i % 4 / 2 * 8;
    values[token * kTokenPitch + row] = y[i / 4][i % 4];
  }
  __syncthreads();
  const int groups = int(e.gate.rows / kGroup);
  for (int i = warp; i < kWarpTokens * (kGatedRows / kGroup); i += kTileThreads / kWarp) {
    const int token = i % kWarpTokens, half = i / kWarpTokens;
    const int group = blockIdx.y * (kGatedRows / kGroup) + half;
    if (group >= groups) return;
    const float* gate = values + token * kTokenPitch + half * kGroup;
    const int64_t position = first + token, at = group * a.stride + position;
    quantize_group(rounded_product(silu_of(gate[lane]), gate[kGatedRows + lane]), lane,
                   q + (position * groups + group) * kGroup, scale + at, sum + at);
  }
}

// 128 rows of 32 positions: a grid of (tiles, ceil(hidden / 128)). a.q [positions, inner]; out [pairs,
// hidden].
template <CodeType kCode>
static inline void down_tile(const ExpertLayout& expert, const uint8_t* const* table,
                             const PairOrder& pairs, const TileActivations& a, float* out,
                             uint8_t* memory) {
  using T = Tile<kCode, kExpertRowWarps>;
  const uint8_t* data = expert_of_tile(table, pairs);
  if (!data) return;
  ExpertLayout e = expert;
  e.gate.rows_per_block = e.up.rows_per_block = kRows;
  const int64_t first = int64_t(blockIdx.x) * kWarpTokens, first_row = int64_t(blockIdx.y) * T::kRowCount;
  const uint8_t* matrix = data + down_offset(e);
  const auto row_of = [&](int row) { return tile_row<kCode>(e.down, matrix, first_row + row); };
  const auto q_of = [&](int token) { return a.q + (first + token) * a.groups * kGroup; };
  TileSums y;
  tile_sums<T, kCode>(row_of, q_of, a, first, true, memory, y);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < 4 * kTurns; ++i) {
    const int64_t row = first_row + warp * kWarpRows + lane / 4 + i % 4 / 2 * 8;
    const int pair = pairs.order[first + i / 4 * 8 + lane % 4 * 2 + i % 2];
    if (row < e.down.rows && pair >= 0) out[pair * e.down.rows + row] = y[i / 4][i % 4];
  }
}

// scale, sum: as `by_group` makes them, of positions, `stride` apart.
#define LOCALR1_EXPERT_TILES(name, code)                                                                        \
  LOCALR1_KERNEL(kTileThreads, 512)                                                                       \
  gate_up_tiles_##name(ExpertLayout expert, const uint8_t* const* table, const int32_t* order,         \
                          const int32_t* experts, int per_token, const int8_t* q, const float* scale,     \
                          const int32_t* sum, int64_t stride, int8_t* gated_q, float* gated_scale,        \
                          int32_t* gated_sum) {                                                           \
    __shared__ __align__(16) uint8_t memory[Tile<code, kExpertRowWarps>::kBytes];                         \
    const TileActivations a{q, scale, sum, stride, int(expert.gate.columns / kGroup)};                    \
    gate_up_tile<code>(expert, table, {order, experts}, per_token, a, gated_q, gated_scale, gated_sum,    \
                       memory);                                                                           \
  }                                                                                                       \
  LOCALR1_KERNEL(kTileThreads, 512)                                                                       \
  down_tiles_##name(ExpertLayout expert, const uint8_t* const* table, const int32_t* order,            \
                       const int32_t* experts, const int8_t* q, const float* scale, const int32_t* sum,   \
                       int64_t stride, float* out) {                                                      \
    __shared__ __align__(16) uint8_t memory[Tile<code, kExpertRowWarps>::kBytes];                         \
    const TileActivations a{q, scale, sum, stride, int(expert.down.columns / kGroup)};                    \
    down_tile<code>(expert, table, {order, experts}, a, out, memory);                                     \
  }

LOCALR1_EXPERT_TILES(int4, kInt4)
LOCALR1_EXPERT_TILES(int8, kInt8)
LOCALR1_EXPERT_TILES(nf4, kNf4)

}  // namespace localr1
