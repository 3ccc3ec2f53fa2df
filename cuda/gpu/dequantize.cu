// Quantized matrices as floats: rows of an embedding, and whole matrices for a library's product in prefill.
#include "products.h"

namespace localr1 {

constexpr int kDequantizeThreads = 256;

static inline uint16_t narrow_to_bfloat16(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);  // NaN stays one
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float weight_of(const MatrixLayout& m, const uint8_t* row_block, int row, int64_t column) {
  const int64_t index = (column / kGroup >> weight_group_shift(m)) * kRows + row;
  int value = load_value(row_block, m, row, column);
  if (m.has_zero) value -= ((const int8_t*)(row_block + zeros_offset(m)))[index];
  return rounded_product(float(value), load_scale(row_block + scales_offset(m), index, m.scale_type));
}

// out [rows, columns] of type `type`, rounded to nearest even. Threads have neighbouring columns: a grid
// of (ceil(columns / 256), rows).
LOCALR1_KERNEL(kDequantizeThreads, 1024)
dequantize(MatrixLayout matrix, const uint8_t* data, int type, void* out) {
  MatrixLayout m = matrix;
  m.rows_per_block = kRows;
  const int64_t column = int64_t(blockIdx.x) * kDequantizeThreads + threadIdx.x, row = blockIdx.y;
  if (column >= m.columns) return;
  const float value = weight_of(m, data + row / kRows * row_block_bytes(m), int(row % kRows), column);
  const int64_t index = row * m.columns + column;
  if (type == kFloat32) {
    ((float*)out)[index] = value;
  } else {
    ((uint16_t*)out)[index] = type == kBfloat16 ? narrow_to_bfloat16(value) : narrow_to_half(value);
  }
}

// The rows `ids` of a matrix -> out [tokens, columns]. A grid of (ceil(columns / 256), tokens).
LOCALR1_KERNEL(kDequantizeThreads, 1024)
embedding(MatrixLayout matrix, const uint8_t* data, const int32_t* ids, float* out) {
  MatrixLayout m = matrix;
  m.rows_per_block = kRows;
  const int64_t column = int64_t(blockIdx.x) * kDequantizeThreads + threadIdx.x;
  if (column >= m.columns) return;
  const int id = ids[blockIdx.y];
  const uint8_t* row_block = data + int64_t(id / kRows) * row_block_bytes(m);
  out[blockIdx.y * m.columns + column] = weight_of(m, row_block, id % kRows, column);
}

}  // namespace localr1
