// Chooses the product of a matrix by its bits, zero points and scale type. Included after
// product_<isa>.h.
#pragma once

namespace {

template <int kBits, bool kZero, ScaleType kType>
void product_of(const MatrixLayout& m, const uint8_t* row_block, int64_t blocks, const Activations& a,
                int64_t tile, float* y) {
  const int64_t width = tile_width(a, tile), base = tile * kTokenTile * a.groups;
  const int8_t* q = a.q + base * kGroup;
  const float* scale = a.scale + base;
  const int32_t* offset = a.offset + base;
  if (width > 1) {
    token_tile<kBits, kZero, kType>(m, row_block, blocks, q, scale, offset, width,
                                    tile % kTaskTiles == 0, y);
    return;
  }
  for (int64_t block = 0; block < blocks; ++block) {
    one_token<kBits, kZero, kType>(m, row_block + block * row_block_bytes(m), q, scale, offset,
                                   y + block * kRows);
  }
}

template <int kBits, bool kZero>
void product_scaled(const MatrixLayout& m, const uint8_t* row_block, int64_t blocks,
                    const Activations& a, int64_t tile, float* y) {
  switch (m.scale_type) {
    case kBfloat16:
      return product_of<kBits, kZero, kBfloat16>(m, row_block, blocks, a, tile, y);
    case kFloat16:
      return product_of<kBits, kZero, kFloat16>(m, row_block, blocks, a, tile, y);
    case kFloat32:
      return product_of<kBits, kZero, kFloat32>(m, row_block, blocks, a, tile, y);
  }
}

template <int kBits>
void product_zeroed(const MatrixLayout& m, const uint8_t* row_block, int64_t blocks,
                    const Activations& a, int64_t tile, float* y) {
  return m.has_zero ? product_scaled<kBits, true>(m, row_block, blocks, a, tile, y)
                    : product_scaled<kBits, false>(m, row_block, blocks, a, tile, y);
}

void product(const MatrixLayout& m, const uint8_t* row_block, int64_t blocks, const Activations& a,
             int64_t tile, float* y) {
  switch (m.bits) {
    case 4:
      return product_zeroed<4>(m, row_block, blocks, a, tile, y);
    case 5:
      return product_zeroed<5>(m, row_block, blocks, a, tile, y);
    case 6:
      return product_zeroed<6>(m, row_block, blocks, a, tile, y);
    default:
      return product_zeroed<8>(m, row_block, blocks, a, tile, y);
  }
}

}  // namespace
