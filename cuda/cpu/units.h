// How a product is cut into units of rows and tiles of tokens.
#pragma once

#include "kernels.h"

namespace localr1 {

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t num_tiles(const Activations& a) { return (a.tokens + kTokenTile - 1) / kTokenTile; }

// A unit is kUnitRows rows, or what is left of them: the row blocks that are computed together.
inline int64_t num_units(const MatrixLayout& layout) { return (layout.rows + kUnitRows - 1) / kUnitRows; }

// y [tokens of the tile, kUnitRows]; returns the number of rows. data: the matrix's first row block.
inline int64_t unit_product(const KernelTable& table, const MatrixLayout& layout, const uint8_t* data,
                            int64_t unit, const Activations& a, int64_t tile, float* y) {
  const int64_t per_unit = kUnitRows / layout.rows_per_block, first = unit * per_unit;
  const int64_t blocks = minimum(per_unit, num_row_blocks(layout) - first);
  table.product(layout, data + first * row_block_bytes(layout), blocks, a, tile, y);
  return minimum(kUnitRows, layout.rows - unit * kUnitRows);
}

}  // namespace localr1
