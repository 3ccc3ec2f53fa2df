// The blocked layout of quantized matrices in memory, defined here once for the CPU kernels and the
// GPU's: RAM and VRAM hold the same bytes. Plain C++ without library calls.
//
// A matrix [rows, columns] is cut into row blocks of R rows; R is the vector width of the
// instruction set (16 for AVX-512, 8 otherwise) and a vector lane owns a row. One row block is one
// contiguous range of bytes:
//
//   codes    for each group of 32 columns: R * 4 * bits bytes, as `bits` chunks of R * 4 bytes.
//            Chunk c holds 4 bytes of every row, row after row:
//              8 bits: byte j = code of column 4c + j
//              4 bits: byte j = code of column 8c + j (low nibble) and of column 8c + 4 + j (high)
//              5, 6 bits: chunks 0 to 3 as 4 bits, of the lower 4 of each code; then
//              5 bits: bit k of byte j = the highest bit of column 4k + j
//              6 bits: chunk 4 + d, bits 2k and 2k + 1 of byte j = the 2 highest of column 16d + 4k + j
//   scales   for each weight group: R values, bfloat16, float16 or float32 as on disk
//   zeros    for each weight group: R signed bytes (only where the matrix has zero points)
//
// padded to a multiple of 64 bytes. A code is unsigned: value + 2^(bits-1), or of a codebook the index of
// its value there. Rows past the end of the matrix have codes for the value 0, scale 0 and zero point 0.
// Bits per weight: bits + 16/group (+ 8/group with zero points), before padding.
#pragma once

#ifndef __CUDACC_RTC__
#include <stdint.h>
#else
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
#endif

namespace localr1 {

constexpr int kGroup = 32;      // columns that share one activation scale
constexpr int kPhases = 8;      // accumulators of one output; group g goes to g mod 8
constexpr int kUnitRows = 32;   // rows computed together: a group of the next product's activations
constexpr int kTokenTile = 16;  // tokens interleaved in the activation layout
constexpr int kAlignment = 64;

enum ScaleType : int { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// What codes are: integers of so many bits, or the 16 numbers of NF4 (docs/sources.md), which have no zero
// points. The lower four bits of each are those of a code.
enum CodeType : int { kInt4 = 4, kInt5 = 5, kInt6 = 6, kInt8 = 8, kNf4 = 16 + kInt4 };

static constexpr int bits_of(CodeType type) { return type & 15; }

// Bits of what a product multiplies with: a code, or the value of a codebook in a byte as of 8 bits.
static constexpr int value_bits_of(CodeType type) { return type == kNf4 ? 8 : bits_of(type); }

// NF4's numbers in steps, as localr1/qtypes.py has them, each plus 128: the code of that value in 8 bits.
constexpr uint8_t kNf4Values[16] = {4,   42,  63,  79,  93,  105, 117, 128,
                                    138, 148, 159, 170, 183, 198, 218, 252};
constexpr int kNf4Zero = 7;  // where it has 0
static_assert(kNf4Values[kNf4Zero] == 128, "the value 0");

struct MatrixLayout {
  int64_t rows, columns;
  int rows_per_block;  // R
  CodeType code;
  int group;           // columns per weight scale: 32, 64 or 128
  ScaleType scale_type;
  int has_zero;  // 0 or 1
};

// Static (not inline) so that no two instruction sets share one compiled copy.
static constexpr int scale_bytes(ScaleType type) { return type == kFloat32 ? 4 : 2; }

static constexpr int64_t num_row_blocks(const MatrixLayout& m) {
  return (m.rows + m.rows_per_block - 1) / m.rows_per_block;
}

// Bytes of the codes of one group of 32 columns in one row block.
static constexpr int64_t group_bytes(const MatrixLayout& m) {
  return int64_t(m.rows_per_block) * kGroup * bits_of(m.code) / 8;
}

static constexpr int64_t scales_offset(const MatrixLayout& m) {
  return m.columns / kGroup * group_bytes(m);
}

// A group of 32 columns counts as weight group g >> weight_group_shift(m). Shifts, because a division
// by a number that is not known in advance costs a GPU a hundred instructions.
static constexpr int weight_group_shift(const MatrixLayout& m) { return m.group >> 6; }

static constexpr int64_t num_weight_groups(const MatrixLayout& m) {
  return m.columns / kGroup >> weight_group_shift(m);
}

static constexpr int64_t zeros_offset(const MatrixLayout& m) {
  return scales_offset(m) + num_weight_groups(m) * m.rows_per_block * scale_bytes(m.scale_type);
}

static constexpr int64_t row_block_bytes(const MatrixLayout& m) {
  return (zeros_offset(m) + m.has_zero * num_weight_groups(m) * m.rows_per_block + kAlignment - 1) /
         kAlignment * kAlignment;
}

static constexpr int64_t matrix_bytes(const MatrixLayout& m) {
  return num_row_blocks(m) * row_block_bytes(m);
}

// One expert of a mixture: its matrices one after another, a single contiguous range of bytes, so that
// an expert is read, copied and kept as a whole.
struct ExpertLayout {
  MatrixLayout gate, up;  // [inner, hidden]
  MatrixLayout down;      // [hidden, inner]
};

static constexpr int64_t up_offset(const ExpertLayout& e) { return matrix_bytes(e.gate); }

static constexpr int64_t down_offset(const ExpertLayout& e) {
  return up_offset(e) + matrix_bytes(e.up);
}

static constexpr int64_t expert_bytes(const ExpertLayout& e) {
  return down_offset(e) + matrix_bytes(e.down);
}

constexpr MatrixLayout kExampleInt4{576, 576, 16, kInt4, 32, kBfloat16, 0};
constexpr MatrixLayout kExampleInt6{576, 576, 16, kInt6, 32, kBfloat16, 0};
constexpr MatrixLayout kExampleInt8{33, 128, 8, kInt8, 64, kFloat32, 1};
static_assert(group_bytes(kExampleInt4) == 256, "16 rows of 32 nibbles: four 64-byte vectors");
static_assert(row_block_bytes(kExampleInt4) == 18 * (256 + 32), "4.5 bits a weight, no padding");
static_assert(matrix_bytes(kExampleInt6) == 576 * 576 * 13 / 16, "6.5 bits a weight");
static_assert(matrix_bytes(kExampleInt4) == 576 * 576 * 9 / 16, "4.5 bits a weight");
static_assert(expert_bytes({kExampleInt4, kExampleInt4, kExampleInt4}) == 3 * 576 * 576 * 9 / 16,
              "an expert is its three matrices");
static_assert(weight_group_shift({1, 128, 8, kInt4, 32, kBfloat16, 0}) == 0 &&
                  weight_group_shift({1, 128, 8, kInt4, 64, kBfloat16, 0}) == 1 &&
                  weight_group_shift({1, 128, 8, kInt4, 128, kBfloat16, 0}) == 2,
              "a weight group is 1, 2 or 4 groups of 32 columns");
static_assert(sizeof(MatrixLayout) == 40, "as localr1/kernels/gpu_layout.py passes it to a GPU");
static_assert(num_row_blocks(kExampleInt8) == 5, "the last row block holds one row");
static_assert(row_block_bytes(kExampleInt8) == 8 * 128 + 2 * 8 * 4 + 64, "zeros padded to 64");

// The CPU's quantized activations [tokens, columns] in tiles of 16 tokens (the last tile may be narrower);
// with w tokens in tile i, token t of the tile, group g, everything below is contiguous in g, t:
//   q       int8  [tile][group][t][32]   at (16 * i * groups + g * w + t) * 32
//   scale   float [tile][group][t]       at  16 * i * groups + g * w + t
//   offset  int32 [tile][group][t]       -8 * (sum of the group's q), which turns unsigned codes
//                                        into signed values without touching the weights
struct Activations {
  int8_t* q;
  float* scale;
  int32_t* offset;
  int64_t tokens, groups;
};

static constexpr int64_t tile_width(const Activations& a, int64_t tile) {
  return a.tokens - tile * kTokenTile < kTokenTile ? a.tokens - tile * kTokenTile : kTokenTile;
}

}  // namespace localr1
