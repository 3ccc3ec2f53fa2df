// The contract's sums for many tokens, on the tensor cores, from the same blocked bytes as products.h.
//
// A block of 256 threads computes a tile: 16 rows for each of kRowWarps warps, 32 tokens for each of the
// others. Groups of 32 columns pass through shared memory, fetched kStages - 1 ahead, 16 bytes a thread. A warp
// multiplies the codes of its 16 rows with the group's activations, 8 tokens at a time: one instruction gives
// a thread the whole integer sums of two rows and two tokens.
//
// A row's 8 phases would take 8 registers for each of a thread's 16 outputs. They are summed up one
// after another instead, in the order in which the contract adds them (0 and 4, 2 and 6, 1 and 5, 3 and
// 7): then four are enough. So groups are visited phase by phase: 0, 8, 16, ..., 4, 12, ...
//
// Integer sums become floats without a conversion, which has a quarter of the rate of a sum or less: they
// are added onto the bits of a float that is so large that its last bit stands for 1 (8 bits) or, as the
// codes stay in the upper halves of their bytes, for 1/16 (4 bits). Less that float, the sum is exact.
#pragma once

#include "products.h"

namespace localr1 {

constexpr int kTileThreads = 256;
constexpr int kStages = 4;
constexpr int kWarpRows = 16, kWarpTokens = 32;
constexpr int kTurns = kWarpTokens / 8;  // of the tensor cores, a group and warp
constexpr int kHalfBlock = 8;            // rows of which shared memory has the codes together
constexpr int kPieceRows = 4;            // whose codes, scales or zero points a thread copies

// Where a stage, which is one group, has what; in bytes. Codes: of each 8 rows 4 chunks of 8 columns [8
// rows][4 bytes], as row blocks of 8 have them; with 8 bits the odd chunks of 4 columns behind all even
// ones. So the 32 words that a warp reads at once are neighbours, and so are the activations of 4 tokens.
template <int kBits, int kRowWarps>
struct Tile {
  static constexpr int kRowCount = kWarpRows * kRowWarps;
  static constexpr int kTokenCount = kWarpTokens * (kTileThreads / kWarp / kRowWarps);
  static constexpr int kPlane = kRowCount * 16;
  static constexpr int kActivations = kPlane * kBits / 4;
  static constexpr int kScales = kActivations + kTokenCount * kGroup;
  static constexpr int kSums = kScales + kTokenCount * 4;
  static constexpr int kWeightScales = kSums + kTokenCount * 4;  // 16 bytes for 4 rows
  static constexpr int kZeros = kWeightScales + kRowCount * 4;
  static constexpr int kStageBytes = kZeros + kRowCount;
  static constexpr int kBytes = kStages * kStageBytes;
};

// Activations in the order of positions, which are tokens or what `by_group` was told: scale and sum are
// [groups, stride] of positions, and a tile's begin at a multiple of its tokens.
struct TileActivations {
  const int8_t* q;  // [rows, groups, 32]
  const float* scale;
  const int32_t* sum;
  int64_t stride;
  int groups;
};

// The row block that a row of a tile lies in, and its matrix.
struct TileRow {
  MatrixLayout matrix;
  const uint8_t* row_block;
};

// Row `row` of a matrix; one behind the last row block is one of that, whose sums nobody wants.
template <int kBits>
static inline TileRow tile_row(const MatrixLayout& matrix, const uint8_t* data, int64_t row) {
  const MatrixLayout m = compiled<kBits>(matrix);
  const int64_t block = row / kRows, last = num_row_blocks(m) - 1;
  return {m, data + (block < last ? block : last) * row_block_bytes(m)};
}

// What a thread copies of every group: `bytes` of them, 0 for none, from `from` + (group >> shift) * step to
// `to` of its stage.
struct Share {
  const uint8_t* from;
  int step, shift, to, bytes;
};

// row_of: TileRow of a row of the tile. q_of: the activations of one of its tokens, [groups, 32]. first: the
// tile's first position.
template <class T, int kBits, class RowOf, class QOf>
static inline Share share_of(const RowOf& row_of, const QOf& q_of, const TileActivations& a, int64_t first) {
  int piece = threadIdx.x;
  if (piece < T::kRowCount) {
    const int within = piece % 8, row = piece / 8 * kHalfBlock + within % 2 * kPieceRows;
    const int chunk = within / 2 * (kBits / 4);
    const TileRow r = row_of(row);
    return {r.row_block + (chunk * kQuads + row % kRows / kPieceRows) * 16, int(group_bytes(r.matrix)), 0,
            piece * 16, 16};
  }
  piece -= T::kRowCount;
  if (piece < 2 * T::kTokenCount) {
    const uint8_t* q = (const uint8_t*)q_of(piece / 2);
    return {q + piece % 2 * 16, kGroup, 0, T::kActivations + piece * 16, 16};
  }
  piece -= 2 * T::kTokenCount;
  constexpr int kTokenPieces = T::kTokenCount / 4, kRowPieces = T::kRowCount / kPieceRows;
  if (piece < 2 * kTokenPieces) {
    const bool is_scale = piece < kTokenPieces;
    const void* values = is_scale ? (const void*)a.scale : a.sum;
    return {(const uint8_t*)values + (first + piece % kTokenPieces * 4) * 4, int(a.stride) * 4, 0,
            T::kScales + piece * 16, 16};
  }
  piece -= 2 * kTokenPieces;
  if (piece < kRowPieces) {
    const TileRow r = row_of(piece * kPieceRows);
    const int size = scale_bytes(r.matrix.scale_type);
    return {r.row_block + scales_offset(r.matrix) + piece * kPieceRows % kRows * size, kRows * size,
            weight_group_shift(r.matrix), T::kWeightScales + piece * 16, kPieceRows * size};
  }
  piece -= kRowPieces;
  if (piece >= kRowPieces / 2) return {nullptr, 0, 0, 0, 0};
  const TileRow r = row_of(piece * 8);
  return {r.row_block + zeros_offset(r.matrix) + piece * 8 % kRows, kRows, weight_group_shift(r.matrix),
          T::kZeros + piece * 8, r.matrix.has_zero ? 8 : 0};
}

template <class T, int kBits>
static inline void fetch_group(const Share& share, int group, uint8_t* stage) {
  static_assert(T::kRowCount * 5 / 4 + T::kRowCount / 8 + 2 * T::kTokenCount + T::kTokenCount / 2 <=
                    kTileThreads,
                "a thread copies one piece");
  const uint8_t* from = share.from + int64_t(group >> share.shift) * share.step;
  if (share.bytes == 16) copy_async<16>(stage + share.to, from);
  if (share.bytes == 8) copy_async<8>(stage + share.to, from);
  if (kBits == 8 && threadIdx.x < T::kRowCount) {
    copy_async<16>(stage + T::kPlane + share.to, from + 16 * kQuads);
  }
}

// Groups phase by phase, in the order in which phases are added. turn: 8 behind the last group.
struct GroupWalk {
  int turn, group;

  inline int phase() const { return turn % 2 * 4 + turn / 2 % 2 * 2 + turn / 4; }
  inline void next(int groups) {
    group += kPhases;
    while (group >= groups && ++turn < kPhases) group = phase();
  }
};

// A thread's outputs: rows lane / 4 and 8 below, tokens 8 * turn + 2 * (lane % 4) and the next, as the tensor
// cores have them.
using TileSums = float[kTurns][4];

// Where in a stage a lane has its codes of row `row` + lane / 4, and its activations of token `token` + lane / 4.
static inline int place_of_codes(int row, int lane) { return row * 16 + (lane % 4 * 8 + lane / 4) * 4; }
template <class T>
static inline int place_of_activations(int token, int lane) {
  return T::kActivations + (token + lane / 4) * kGroup + lane % 4 * 8;
}

// sums += those of one group: float(s) * (weight scale * activation scale), each product rounded. stage: where
// the group lies; row, token: of the tile, the warp's first.
template <class T, int kBits>
static inline void add_group(const uint8_t* stage, int row, int token, ScaleType type, bool has_zero,
                             TileSums& sums) {
  constexpr uint32_t kLargeBits = kBits == 4 ? 0x49400000u : 0x4b400000u;  // 1.5 * 2^19, 1.5 * 2^23
  const int lane = threadIdx.x % kWarp, group_row = lane / 4, quad = lane % 4;
  uint32_t a[4];
  float weight_scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint8_t* codes = stage + place_of_codes(row + half * 8, lane);
    if constexpr (kBits == 4) {
      const uint32_t pair = *(const uint32_t*)codes ^ 0x88888888u;  // two's complement nibbles
      a[half] = pair << 4 & 0xf0f0f0f0u;
      a[half + 2] = pair & 0xf0f0f0f0u;
    } else {
      a[half] = *(const uint32_t*)codes ^ 0x80808080u;
      a[half + 2] = *(const uint32_t*)(codes + T::kPlane) ^ 0x80808080u;
    }
    const int r = row + half * 8 + group_row;
    weight_scale[half] = load_scale(stage + T::kWeightScales + r / 4 * 16, r % 4, type);
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int first = token + turn * 8;
    // Which column of b meets which of a is free, as a group's sum is whole: a lane's 8 columns are neighbours.
    const uint2 b = *(const uint2*)(stage + place_of_activations<T>(first, lane));
    const float2 scale = *(const float2*)(stage + T::kScales + (first + quad * 2) * 4);
    int s[4] = {int(kLargeBits), int(kLargeBits), int(kLargeBits), int(kLargeBits)};
    if (has_zero) {
      const int8_t* zeros = (const int8_t*)stage + T::kZeros + row + group_row;
      const int2 sum = *(const int2*)(stage + T::kSums + (first + quad * 2) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] -= (zeros[i / 2 * 8] * (i % 2 ? sum.y : sum.x)) << (kBits == 4 ? 4 : 0);
    }
    multiply_16x8x32(a, b, s);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float exact = rounded_difference(float_from_bits(uint32_t(s[i])), float_from_bits(kLargeBits));
      const float factor = rounded_product(weight_scale[i / 2], i % 2 ? scale.y : scale.x);
      sums[turn][i] = rounded_sum(sums[turn][i], rounded_product(exact, factor));
    }
  }
}

// y = this thread's outputs of a tile, the contract's. stages: T::kBytes of shared memory. active: of the
// warp, whether anybody wants its tokens.
template <class T, int kBits, class RowOf, class QOf>
static inline void tile_sums(const RowOf& row_of, const QOf& q_of, const TileActivations& a, int64_t first,
                             bool active, uint8_t* stages, TileSums& y) {
  const int warp = threadIdx.x / kWarp;
  constexpr int kTokenWarps = T::kTokenCount / kWarpTokens;
  const int row = warp / kTokenWarps * kWarpRows, token = warp % kTokenWarps * kWarpTokens;
  const Share share = share_of<T, kBits>(row_of, q_of, a, first);
  const MatrixLayout m = row_of(row).matrix;
  GroupWalk ahead{0, 0};
  for (int i = 0; i < kStages - 1; ++i) {
    if (ahead.turn < kPhases) {
      fetch_group<T, kBits>(share, ahead.group, stages + i * T::kStageBytes);
      ahead.next(a.groups);
    }
    end_group();
  }
  int stage = 0;
  TileSums one, two, four;  // that wait for the phase, the two or the four that they are added to
  for (int turn = 0; turn < kPhases; ++turn) {
#pragma unroll
    for (int i = 0; i < 4 * kTurns; ++i) y[i / 4][i % 4] = 0.0f;
    for (int group = GroupWalk{turn, 0}.phase(); group < a.groups; group += kPhases) {
      await_groups<kStages - 2>();
      __syncthreads();  // the group is there, and nobody reads the one before it any more
      if (ahead.turn < kPhases) {
        const int target = stage ? stage - 1 : kStages - 1;
        fetch_group<T, kBits>(share, ahead.group, stages + target * T::kStageBytes);
        ahead.next(a.groups);
      }
      end_group();
      if (active) {
        add_group<T, kBits>(stages + stage * T::kStageBytes, row, token, m.scale_type, m.has_zero, y);
      }
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }
#pragma unroll
    for (int i = 0; i < 4 * kTurns; ++i) {
      float& sum = y[i / 4][i % 4];
      float &first_of_two = one[i / 4][i % 4], &first_two = two[i / 4][i % 4], &even = four[i / 4][i % 4];
      if (turn % 2 == 0) {
        first_of_two = sum;
        continue;
      }
      sum = rounded_sum(first_of_two, sum);
      if (turn % 4 == 1) {
        first_two = sum;
        continue;
      }
      sum = rounded_sum(first_two, sum);
      if (turn == 3) even = sum;
      if (turn == 7) sum = rounded_sum(even, sum);
    }
  }
}

}  // namespace localr1
