// Weights to codes and scales by quant/methods/rtn.py, which says what is computed and in which order.
#pragma once

#include "../blocks.h"

namespace localr1 {

class Pool;
struct KernelTable;

enum WeightType : int { kWeightBfloat16 = 0, kWeightFloat16 = 1, kWeightFloat32 = 2, kWeightFp8 = 3 };

constexpr int kMaxWeightGroup = 128;
constexpr int kSumPhases = 4;  // value i of a group is added to sum i mod 4; then (0 + 2) + (1 + 3)

// Rows of a matrix, row-major. Of kWeightFp8 (E4M3, no infinities) value = code * the scale of its block
// of block_rows x block_columns, blocks counted from row 0 of the matrix, which `values` may begin
// behind: at its row first_row.
struct WeightRows {
  const void* values;
  WeightType type;
  int64_t rows, columns;
  const float* block_scales;  // [.., scale_columns], of the whole matrix
  int64_t first_row, block_rows, block_columns, scale_columns;
};

struct Rounding {
  int bits, group;
  ScaleType scale_type;    // kBfloat16 or kFloat16
  const float* positions;  // [num_positions]: where candidates put a group's largest weight, in codes
  int64_t num_positions;
  const float* importance;  // [columns] or null: what the square of a column's error counts
};

// packed [rows, columns * bits / 32] and scale [rows, columns / group] as on disk (pack-quantized);
// error and energy [rows]: sums of (weight - read back)^2 and weight^2. The latter is not finite where a
// weight is none, and then the row's codes and scales are any.
struct QuantizedRows {
  uint32_t* packed;
  uint16_t* scale;
  double* error;
  double* energy;
};

void quantize_rows(Pool& pool, const KernelTable& table, const WeightRows& source,
                      const Rounding& rounding, const QuantizedRows& out);

}  // namespace localr1
