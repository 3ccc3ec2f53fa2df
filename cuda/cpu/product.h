// Chooses the product of a matrix by its codes, zero points and scale type. Included after
// product_<isa>.h.
#pragma once

namespace {

template <CodeType kCode, bool kZero, ScaleType kType>
void product_of(const MatrixLayout& m, const uint8_t* row_block, int64_t blocks, const Activations& a,
                int64_t tile, float* y) {
  const int64_t width = tile_width(a, tile), base = tile * kTokenTile * a.groups;
  const int8_t* q = a.q + base * kGroup;
  const float* scale = a.scale + base;
  const int32_t* offset = a.offset + base;
  if (width > 1) {
    token_tile<kCode, kZero, kType>(m, row_block, blocks, q, scale, offset, width,
                                    tile % kTaskTiles == 0, y);
    return;
  }
  for (int64_t block = 0; block < blocks; ++block) {
    one_token<kCode, kZero, kType>(m, row_block + block * row_block_bytes(m), q, scale, offset,
                                   y + block * kRows);
  }
}

template <CodeType kCode, bool kZero>
void product_scaled(const MatrixLayout& m, const uint8_t* row_block, int64_t blocks,
                    const Activations& a, int64_t tile, float* y) {
  switch (m.scale_type) {
    case kBfloat16:
      return product_of<kCode, kZero, kBfloat16>(m, row_block, blocks, a, tile, y);
    case kFloat16:
      return product_of<kCode, kZero, kFloat16>(m, row_block, blocks, a, tile, y);
    case kFloat32:
      return product_of<kCode, kZero, kFloat32>(m, row_block, blocks, a, tile, y);
  }
}

template <CodeType kCode>
void product_zeroed(const MatrixLayout& m, const uint8_t* row_block, int64_t blocks,
                    const Activations& a, int64_t tile, float* y) {
  return m.has_zero ? product_scaled<kCode, true>(m, row_block, blocks, a, tile, y)
                    : product_scaled<kCode, false>(m, row_block, blocks, a, tile, y);
}

void product(const MatrixLayout& m, const uint8_t* row_block, int64_t blocks, const Activations& a,
             int64_t tile, float* y) {
  switch (m.code) {
    case kInt4:
      return product_zeroed<kInt4>(m, row_block, blocks, a, tile, y);
    case kInt5:
      return product_zeroed<kInt5>(m, row_block, blocks, a, tile, y);
    case kInt6:
      return product_zeroed<kInt6>(m, row_block, blocks, a, tile, y);
    case kInt8:
      return product_zeroed<kInt8>(m, row_block, blocks, a, tile, y);
    case kNf4:
      return product_scaled<kNf4, false>(m, row_block, blocks, a, tile, y);
  }
}

}  // namespace
