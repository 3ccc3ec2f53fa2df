// The contract's sums for many tokens, on the tensor cores, from the same blocked bytes as products.h.
//
// A block of 256 threads computes a tile: 16 rows for each of kRowWarps warps, 32 tokens for each of the
// others. Groups of 32 columns pass through shared memory, two at a time, of which a thread copies 16
// bytes each while the two before are computed. A warp multiplies the codes of its 16 rows with a group's
// activations, 8 tokens at a time: one instruction gives a thread the whole integer sums of two rows and
// two tokens.
//
// An output's 8 phases would take 8 registers for each of a thread's 16 outputs. They are summed up one
// after another instead, in the order in which the contract adds them (0 and 4, 2 and 6, 1 and 5, 3 and
// 7): then three are enough, and a place in shared memory for what waits longest. So groups are visited
// phase by phase: 0, 8, 16, ..., 4, 12, ...
//
// Integer sums become floats without a conversion, which has a quarter of the rate of a sum or less: they
// begin at the bits of a float that is so large that its last bit stands for 1 (8 bits, NF4) or, as the codes
// stay in the upper halves of their bytes, for 1/16 (4 bits). Less that float, the sum is exact.
#pragma once

#include "products.h"

namespace localr1 {

constexpr int kTileThreads = 256;
constexpr int kStages = 2;
constexpr int kStageGroups = 2;  // of one phase
constexpr int kWarpRows = 16, kWarpTokens = 32;
constexpr int kTurns = kWarpTokens / 8;  // of the tensor cores, a group and warp
constexpr int kHalfBlock = 8;            // rows of which shared memory has the codes together
constexpr int kPieceRows = 4;            // whose codes, scales or zero points a thread copies

// Where a stage has what of a group, in bytes. Codes: of each 8 rows 4 chunks of 8 columns [8
// rows][4 bytes], as row blocks of 8 have them; with 8 bits the odd chunks of 4 columns behind all even
// ones. So the 32 words that a warp reads at once are neighbours, and so are the activations of 4 tokens.
template <CodeType kCode, int kRowWarps>
struct Tile {
  static constexpr int kRowCount = kWarpRows * kRowWarps;
  static constexpr int kTokenCount = kWarpTokens * (kTileThreads / kWarp / kRowWarps);
  static constexpr int kPlane = kRowCount * 16;
  static constexpr int kActivations = kPlane * bits_of(kCode) / 4;
  static constexpr int kScales = kActivations + kTokenCount * kGroup;
  static constexpr int kSums = kScales + kTokenCount * 4;
  static constexpr int kWeightScales = kSums + kTokenCount * 4;  // 16 bytes for 4 rows
  static constexpr int kZeros = kWeightScales + kRowCount * 4;
  static constexpr int kGroupBytes = kZeros + kRowCount;
  static constexpr int kStageBytes = kStageGroups * kGroupBytes;
  static constexpr int kWaiting = kStages * kStageBytes;  // sums of four phases
  static constexpr int kBytes = kWaiting + kTileThreads * 4 * kTurns * 4;
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
template <CodeType kCode>
static inline TileRow tile_row(const MatrixLayout& matrix, const uint8_t* data, int64_t row) {
  const MatrixLayout m = compiled<kCode>(matrix);
  const int64_t block = row / kRows, last = num_row_blocks(m) - 1;
  return {m, data + (block < last ? block : last) * row_block_bytes(m)};
}

// What a thread copies of every group: `bytes` of them, 0 for none, from `from` + (group >> shift) * step
// to `to` of its stage.
struct Share {
  const uint8_t* from;
  int step, shift, to, bytes;

  inline const uint8_t* of(int group) const { return from + int64_t(group >> shift) * step; }
  inline int to_next_of_phase() const { return step * (kPhases >> shift); }
};

// row_of: TileRow of a row of the tile. q_of: the activations of one of its tokens, [groups, 32]. first:
// the tile's first position.
template <class T, CodeType kCode, class RowOf, class QOf>
static inline Share share_of(const RowOf& row_of, const QOf& q_of, const TileActivations& a,
                             int64_t first) {
  int piece = threadIdx.x;
  if (piece < T::kRowCount) {
    const int within = piece % 8, row = piece / 8 * kHalfBlock + within % 2 * kPieceRows;
    const int chunk = within / 2 * (bits_of(kCode) / 4);
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

template <class T, CodeType kCode>
static inline void fetch_group(const Share& share, const uint8_t* from, uint8_t* target) {
  static_assert(T::kRowCount * 5 / 4 + T::kRowCount / 8 + 2 * T::kTokenCount + T::kTokenCount / 2 <=
                    kTileThreads,
                "a thread copies one piece");
  if (share.bytes == 16) copy_async<16>(target + share.to, from);
  if (share.bytes == 8) copy_async<8>(target + share.to, from);
  if (kCode == kInt8 && threadIdx.x < T::kRowCount) {
    copy_async<16>(target + T::kPlane + share.to, from + 16 * kQuads);
  }
}

// The phase that is the turn-th to be summed up.
static inline int phase_of(int turn) { return turn % 2 * 4 + turn / 2 % 2 * 2 + turn / 4; }

// The groups of all stages, one after another. turn: kPhases behind the last.
struct Walk {
  int turn, group;
  const uint8_t* from;  // of this thread's share
};

template <class T, CodeType kCode>
static inline void fetch_stage(const Share& share, int groups, Walk& walk, uint8_t* stage) {
  if (walk.turn >= kPhases) return;
  const int distance = share.to_next_of_phase();
#pragma unroll
  for (int i = 0; i < kStageGroups; ++i) {
    if (walk.group < groups) fetch_group<T, kCode>(share, walk.from, stage + i * T::kGroupBytes);
    walk.group += kPhases;
    walk.from += distance;
  }
  if (walk.group < groups) return;
  do {
    walk.group = phase_of(++walk.turn);
  } while (walk.turn < kPhases && walk.group >= groups);
  walk.from = share.of(walk.group);
}

// A thread's outputs: rows lane / 4 and 8 below, tokens 8 * turn + 2 * (lane % 4) and the next, as the
// tensor cores have them.
using TileSums = float[kTurns][4];

// Where a lane has its codes, of row `row` + lane / 4, and its activations, of token `token` + lane / 4.
static inline int place_of_codes(int row, int lane) { return row * 16 + (lane % 4 * 8 + lane / 4) * 4; }
template <class T>
static inline int place_of_activations(int token, int lane) {
  return T::kActivations + (token + lane / 4) * kGroup + lane % 4 * 8;
}

// Where in a stage a lane reads, of its warp's first row and token.
struct Lane {
  int codes, activations, scales, weight_scales, zeros;
};

template <class T>
static inline Lane lane_of(int row, int token, ScaleType type) {
  const int lane = threadIdx.x % kWarp, own = row + lane / 4;
  return {place_of_codes(row, lane), place_of_activations<T>(token, lane),
          T::kScales + (token + lane % 4 * 2) * 4,
          T::kWeightScales + own / 4 * 16 + own % 4 * scale_bytes(type), T::kZeros + own};
}

// sums += those of one group: float(s) * (weight scale * activation scale), each product rounded. group:
// where it lies in shared memory.
template <class T, CodeType kCode, bool kZero>
static inline void add_group(const uint8_t* group, const Lane& lane, ScaleType type, TileSums& sums) {
  constexpr uint32_t kLargeBits = stays_upper(kCode) ? 0x49400000u : 0x4b400000u;  // 1.5 * 2^19, 1.5 * 2^23
  uint32_t a[4];
  float weight_scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint8_t* codes = group + lane.codes + half * 8 * 16;
    if constexpr (kCode == kNf4) {
      const uint32_t pairs = *(const uint32_t*)codes;
      const uint32_t first = nf4_values(pairs), second = nf4_values(pairs >> 16);
      a[half] = __byte_perm(first, second, 0x6420u);
      a[half + 2] = __byte_perm(first, second, 0x7531u);
    } else if constexpr (kCode == kInt4) {
      const uint32_t pair = *(const uint32_t*)codes ^ 0x88888888u;  // two's complement nibbles
      a[half] = pair << 4 & 0xf0f0f0f0u;
      a[half + 2] = pair & 0xf0f0f0f0u;
    } else {
      a[half] = *(const uint32_t*)codes ^ 0x80808080u;
      a[half + 2] = *(const uint32_t*)(codes + T::kPlane) ^ 0x80808080u;
    }
    weight_scale[half] = load_scale(group + lane.weight_scales + half * 8 * 4, 0, type);
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    // Which column of b meets which of a is free, as a group's sum is whole: a lane's 8 columns are
    // neighbours.
    const uint2 b = *(const uint2*)(group + lane.activations + turn * 8 * kGroup);
    const uint8_t* scales = group + lane.scales + turn * 8 * 4;
    const float2 scale = *(const float2*)scales;
    int s[4] = {int(kLargeBits), int(kLargeBits), int(kLargeBits), int(kLargeBits)};
    if constexpr (kZero) {
      const int8_t* zeros = (const int8_t*)(group + lane.zeros);
      const int2 sum = *(const int2*)(scales + T::kSums - T::kScales);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[i] -= zeros[i / 2 * 8] * (i % 2 ? sum.y : sum.x) * (stays_upper(kCode) ? 16 : 1);
      }
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

template <class T, CodeType kCode, bool kZero>
static inline void add_stage(const uint8_t* stage, bool both, const Lane& lane, ScaleType type,
                             TileSums& sums) {
  static_assert(kStageGroups == 2, "both");
  add_group<T, kCode, kZero>(stage, lane, type, sums);
  if (both) add_group<T, kCode, kZero>(stage + T::kGroupBytes, lane, type, sums);
}

// What waits for the sums that it is added to: in registers, or in shared memory where there are too few.
static inline void keep(const TileSums& sums, TileSums& kept) {
#pragma unroll
  for (int i = 0; i < 4 * kTurns; ++i) kept[i / 4][i % 4] = sums[i / 4][i % 4];
}
static inline void keep(const TileSums& sums, float* kept) {
#pragma unroll
  for (int i = 0; i < 4 * kTurns; ++i) kept[i * kTileThreads + threadIdx.x] = sums[i / 4][i % 4];
}
static inline void add(const TileSums& kept, TileSums& sums) {
#pragma unroll
  for (int i = 0; i < 4 * kTurns; ++i) {
    sums[i / 4][i % 4] = rounded_sum(kept[i / 4][i % 4], sums[i / 4][i % 4]);
  }
}
static inline void add(const float* kept, TileSums& sums) {
#pragma unroll
  for (int i = 0; i < 4 * kTurns; ++i) {
    sums[i / 4][i % 4] = rounded_sum(kept[i * kTileThreads + threadIdx.x], sums[i / 4][i % 4]);
  }
}

// y = this thread's outputs of a tile, the contract's. stages: T::kBytes of shared memory. active: of the
// warp, whether anybody wants its tokens.
template <class T, CodeType kCode, class RowOf, class QOf>
static inline void tile_sums(const RowOf& row_of, const QOf& q_of, const TileActivations& a, int64_t first,
                             bool active, uint8_t* stages, TileSums& y) {
  const int warp = threadIdx.x / kWarp;
  constexpr int kTokenWarps = T::kTokenCount / kWarpTokens;
  const int row = warp / kTokenWarps * kWarpRows, token = warp % kTokenWarps * kWarpTokens;
  const Share share = share_of<T, kCode>(row_of, q_of, a, first);
  const MatrixLayout m = row_of(row).matrix;
  const Lane lane = lane_of<T>(row, token, m.scale_type);
  Walk walk{0, 0, share.from};
  fetch_stage<T, kCode>(share, a.groups, walk, stages);
  end_group();
  int stage = 0;      // where it begins
  TileSums one, two;  // that wait for the phase or the two that they are added to; and for four:
  float* four = (float*)(stages + T::kWaiting);
  for (int turn = 0; turn < kPhases; ++turn) {
#pragma unroll
    for (int i = 0; i < 4 * kTurns; ++i) y[i / 4][i % 4] = 0.0f;
    for (int group = phase_of(turn); group < a.groups; group += kStageGroups * kPhases) {
      await_groups<0>();
      __syncthreads();  // the stage is there, and nobody reads the one before it any more
      fetch_stage<T, kCode>(share, a.groups, walk, stages + (T::kStageBytes - stage));
      end_group();
      const bool both = group + kPhases < a.groups;
      if (active && m.has_zero) {
        add_stage<T, kCode, true>(stages + stage, both, lane, m.scale_type, y);
      } else if (active) {
        add_stage<T, kCode, false>(stages + stage, both, lane, m.scale_type, y);
      }
      stage = T::kStageBytes - stage;
    }
    if (turn % 2 == 0) {
      keep(y, one);
      continue;
    }
    add(one, y);
    if (turn % 4 == 1) {
      keep(y, two);
      continue;
    }
    add(two, y);
    if (turn == 3) {
      keep(y, four);
    } else {
      add(four, y);
    }
  }
}

}  // namespace localr1
