// The contract's sums on a GPU, read from the CPU's blocked bytes.
//
// A unit is 16 rows (one row block of 16 or two of 8) and is computed by 128 threads, one for each
// (row, phase). A row block's 8 phases are shared by R/4 warps of 32/R phases each. A warp reads the
// 32/R groups of its phases at once, 16 bytes a lane, which are contiguous in memory:
//
//   lane        0 .. R-1: first group       R .. 2R-1: second group    ...
//   16 bytes    4 rows (quad) of chunk c    piece = c * R/4 + quad, as they lie in the row block
//
// A lane so has integer sums of 4 rows over 8 columns, and three shuffles among the 4 lanes of a quad
// leave each with the whole sum of one row. The group sums are exact, so this order is free. (With 8
// bits a lane reads chunk c and chunk c + 4.)
//
// Activations come from the first-level cache: the lanes of a warp read 32/R contiguous groups.
#pragma once

#include "device.h"

#ifndef LOCALR1_ROWS_PER_BLOCK
#error "LOCALR1_ROWS_PER_BLOCK: 16 or 8, as the CPU's kernels lay their row blocks out"
#endif

namespace localr1 {

constexpr int kRows = LOCALR1_ROWS_PER_BLOCK;
static_assert(kRows == 16 || kRows == 8, "the row blocks of cuda/blocks.h");

constexpr int kUnit = 16;                        // rows
constexpr int kUnitThreads = kUnit * kPhases;    // one for each (row, phase)
constexpr int kQuads = kRows / 4;                // lanes that read one chunk of one group
constexpr int kBlockWarps = kRows / 4;           // warps that share a row block
constexpr int kWarpPhases = kWarp / kRows;       // groups that a warp reads at once

// Where the sums of a unit's phases lie between the threads that make them and those that add them up:
// [row block][phase][row], row blocks and tokens 8 and 16 banks apart, so that 32 neighbours never
// meet in a bank.
constexpr int kBlockStride = kRows * kPhases + kRows;
constexpr int kTokenStride = kUnit / kRows * kBlockStride;

struct Place {
  int block;  // row block of the unit
  int phase;
  int chunk;  // of 8 columns (4 bits) or 4 (8 bits)
  int piece;  // of 16 bytes, in a group
  int row;    // of the row block, whose sums this thread ends up with
};

// thread: 0..127 of the unit.
static inline Place place_of(int thread) {
  const int lane = thread % kWarp, warp = thread / kWarp, piece = lane % kRows;
  const int chunk = piece / kQuads, quad = piece % kQuads;
  return {warp / kBlockWarps, warp % kBlockWarps * kWarpPhases + lane / kRows, chunk, piece,
          4 * quad + chunk};
}

// What a kernel knows of a matrix when it is compiled, so that its offsets are shifts.
template <CodeType kCode>
static inline MatrixLayout compiled(const MatrixLayout& matrix) {
  MatrixLayout m = matrix;
  m.code = kCode;
  m.rows_per_block = kRows;
  return m;
}

static inline int dot4(uint32_t weights, uint32_t activations, int sum) {
  return __dp4a(int(weights), int(activations), sum);
}

// Whether sums are of 16 times the values, as codes of 4 bits stay in the upper halves of their bytes.
static constexpr bool stays_upper(CodeType type) { return type == kInt4; }

// Four of NF4's values as signed bytes, from index 4 * part on.
static constexpr uint32_t nf4_word(int part) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= uint32_t(kNf4Values[4 * part + i] ^ 128u) << 8 * i;
  return word;
}

// NF4's values of the four nibbles in the lower half of `indices`, in their order, each a signed byte. A byte
// is chosen by three bits of its nibble among 8 of the table, and by the fourth between two of these choices.
static inline uint32_t nf4_values(uint32_t indices) {
  constexpr uint32_t kTable[4] = {nf4_word(0), nf4_word(1), nf4_word(2), nf4_word(3)};
  const uint32_t lower = __byte_perm(kTable[0], kTable[1], indices);
  const uint32_t upper = __byte_perm(kTable[2], kTable[3], indices);
  return __byte_perm(lower, upper, 0x3210u | (indices & 0x8888u) >> 1);
}

// The sums of this thread's 4 rows over its columns: `sums` gains value * q, or as `stays_upper` says.
template <CodeType kCode>
static inline void add_piece(const uint4 (&codes)[bits_of(kCode) / 4], const int8_t* q, int chunk, int (&sums)[4]) {
  if constexpr (kCode == kNf4) {
    const uint2 columns = __ldg((const uint2*)(q + 8 * chunk));
    // Nibbles of a byte are 4 columns apart: the activations are brought into their order, once for 4 rows.
    const uint32_t first = __byte_perm(columns.x, columns.y, 0x5140u);
    const uint32_t second = __byte_perm(columns.x, columns.y, 0x7362u);
    const uint32_t words[4] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w};
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      sums[row] = dot4(nf4_values(words[row]), first, sums[row]);
      sums[row] = dot4(nf4_values(words[row] >> 16), second, sums[row]);
    }
  } else if constexpr (kCode == kInt4) {
    const uint2 columns = __ldg((const uint2*)(q + 8 * chunk));
    const uint32_t words[4] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w};
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const uint32_t pair = words[row] ^ 0x88888888u;  // two's complement nibbles
      sums[row] = dot4(pair << 4 & 0xf0f0f0f0u, columns.x, sums[row]);
      sums[row] = dot4(pair & 0xf0f0f0f0u, columns.y, sums[row]);
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t columns = __ldg((const uint32_t*)(q + 16 * half + 4 * chunk));
      const uint32_t words[4] = {codes[half].x, codes[half].y, codes[half].z, codes[half].w};
#pragma unroll
      for (int row = 0; row < 4; ++row) sums[row] = dot4(words[row] ^ 0x80808080u, columns, sums[row]);
    }
  }
}

// sums of 4 rows in each of 4 lanes -> the sum over these lanes of row `chunk`.
static inline int sum_of_row(const int (&sums)[4], int chunk) {
  const bool upper = chunk & 2, odd = chunk & 1;
  int first = upper ? sums[2] : sums[0], second = upper ? sums[3] : sums[1];
  first += __shfl_xor_sync(kAllLanes, upper ? sums[0] : sums[2], 2 * kQuads);
  second += __shfl_xor_sync(kAllLanes, upper ? sums[1] : sums[3], 2 * kQuads);
  return (odd ? second : first) + __shfl_xor_sync(kAllLanes, odd ? first : second, kQuads);
}

// acc[t] = the sum over the groups of this thread's phase, in order, for its row and the tokens
// first_token + t; those past the last token repeat the first. All 32 lanes of a warp must call it.
template <CodeType kCode, int kTokens>
static inline void phase_sums(const MatrixLayout& matrix, const uint8_t* row_block, const Quantized& a,
                              int first_token, int num_tokens, const Place& place, float (&acc)[kTokens]) {
  constexpr int kPieces = bits_of(kCode) / 4;  // of 16 bytes, a group and lane
  // Groups whose loads are under way: fewer where the tokens, or looking values up, take the registers.
  constexpr int kAlone = kCode == kNf4 ? 3 : 4 / kPieces;
  constexpr int kAhead = kTokens == 1 ? kAlone : kTokens < 8 ? 2 / kPieces : 1;
  const MatrixLayout m = compiled<kCode>(matrix);
  const int groups = a.groups, shift = weight_group_shift(m);
  const uint8_t* scales = row_block + scales_offset(m);
  const int8_t* zeros = (const int8_t*)(row_block + zeros_offset(m));
#pragma unroll
  for (int t = 0; t < kTokens; ++t) acc[t] = 0.0f;
  for (int base = 0; base < groups; base += kPhases * kAhead) {
    uint4 codes[kAhead][kPieces];
    float weight_scale[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int g = base + i * kPhases + place.phase;
      weight_scale[i] = 0.0f;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) codes[i][piece] = {0u, 0u, 0u, 0u};
      if (g >= groups) continue;
      const uint8_t* group = row_block + g * group_bytes(m) + 16 * place.piece;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        codes[i][piece] = __ldcs((const uint4*)(group + piece * 16 * kRows));
      }
      weight_scale[i] = load_scale(scales, (g >> shift) * kRows + place.row, m.scale_type);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i * kPhases >= groups) break;
      const int g = base + i * kPhases + place.phase, within = g < groups ? g : 0;
      const int64_t token_at = int64_t(first_token) * groups + within;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const int64_t at = token_at + (first_token + t < num_tokens ? t * groups : 0);
        int sums[4] = {0, 0, 0, 0};
        add_piece<kCode>(codes[i], a.q + at * kGroup, place.chunk, sums);
        int sum = sum_of_row(sums, place.chunk);
        if (stays_upper(kCode)) sum >>= 4;
        if (m.has_zero) sum -= zeros[(within >> shift) * kRows + place.row] * a.sum[at];
        if (g < groups) {
          const float scale = rounded_product(weight_scale[i], __ldg(a.scale + at));
          acc[t] = rounded_sum(acc[t], rounded_product(float(sum), scale));
        }
      }
    }
  }
}

static inline void store_phase(float* phases, const Place& place, float sum) {
  phases[place.block * kBlockStride + place.phase * kRows + place.row] = sum;
}

// y of one row of a unit, from all its phases.
static inline float add_phases(const float* phases, int row) {
  const float* a = phases + row / kRows * kBlockStride + row % kRows;
  const float even = rounded_sum(rounded_sum(a[0], a[4 * kRows]), rounded_sum(a[2 * kRows], a[6 * kRows]));
  const float odd =
      rounded_sum(rounded_sum(a[kRows], a[5 * kRows]), rounded_sum(a[3 * kRows], a[7 * kRows]));
  return rounded_sum(even, odd);
}

// Row block `block` of a unit; null where the matrix ends before it.
template <CodeType kCode>
static inline const uint8_t* row_block_of(const MatrixLayout& matrix, const uint8_t* data, int64_t unit,
                                          int block) {
  const MatrixLayout m = compiled<kCode>(matrix);
  const int64_t index = unit * (kUnit / kRows) + block;
  return index < num_row_blocks(m) ? data + index * row_block_bytes(m) : nullptr;
}

}  // namespace localr1
