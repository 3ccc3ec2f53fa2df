// Matrix products in plain C++: 8 rows in the lanes of a loop of fixed length. Codes are made signed
// first, those of NF4 by their table into 8 bits; a sum of two products of 8 bits (2 * 128 * 127 = 32512), 8 of 6 bits, 16 of 5 and 32 of 4
// (32 * 8 * 127 = 32512) fits in 16 bits, which is what baseline vector units multiply.
#pragma once

#include "../dequant.h"
#include "unroll.h"

namespace {

constexpr int kRows = 8;

using namespace localr1;

// One group of codes as signed 16-bit values [column][row].
template <CodeType kCode>
inline void unpack_group(const uint8_t* codes, int16_t (&w)[kGroup][kRows]) {
  constexpr int kBits = bits_of(kCode), kOffset = 1 << (kBits - 1);
  const auto value_of = [](int code) { return int16_t(kCode == kNf4 ? kNf4Values[code] - 128 : code - kOffset); };
  for (int c = 0; c < (kBits == 8 ? 8 : 4); ++c) {
    for (int row = 0; row < kRows; ++row) {
      for (int j = 0; j < 4; ++j) {
        const int code = codes[(c * kRows + row) * 4 + j];
        if (kBits == 8) {
          w[4 * c + j][row] = value_of(code);
        } else {
          w[8 * c + j][row] = value_of(code & 15);
          w[8 * c + 4 + j][row] = value_of(code >> 4);
        }
      }
    }
  }
  if (kBits == 4 || kBits == 8) return;
  constexpr int kHigh = kBits - 4;  // bits of the second plane, of 8 / kHigh columns in a byte
  for (int c = 0; c < 8; ++c) {
    const uint8_t* plane = codes + (4 + c * kHigh / 8) * kRows * 4;
    for (int row = 0; row < kRows; ++row) {
      for (int j = 0; j < 4; ++j) {
        const int high = plane[row * 4 + j] >> c * kHigh % 8 & ((1 << kHigh) - 1);
        w[4 * c + j][row] = int16_t(w[4 * c + j][row] + 16 * high);
      }
    }
  }
}

template <CodeType kCode>
inline void group_sum(const int16_t (&w)[kGroup][kRows], const int8_t* q, int32_t (&sum)[kRows]) {
  constexpr int kStep = 512 >> value_bits_of(kCode);
  for (int row = 0; row < kRows; ++row) sum[row] = 0;
  for (int first = 0; first < kGroup; first += kStep) {
    int16_t part[kRows] = {};
    for (int c = first; c < first + kStep; ++c) {
      for (int row = 0; row < kRows; ++row) part[row] = int16_t(part[row] + w[c][row] * q[c]);
    }
    for (int row = 0; row < kRows; ++row) sum[row] += part[row];
  }
}

// Any number of tokens up to 16: a group of weights is unpacked once for all of them.
template <CodeType kCode, bool kZero, ScaleType kType, int kTokens>
void many_tokens(const MatrixLayout& m, const uint8_t* row_block, const int8_t* q, const float* scale,
                 const int32_t* offset, int64_t stride, float* y) {
  const int64_t groups = m.columns / kGroup;
  const uint8_t* scales = row_block + scales_offset(m);
  const int8_t* zeros = (const int8_t*)(row_block + zeros_offset(m));
  float acc[kPhases][kTokens][kRows] = {};
  for (int64_t g = 0; g < groups; ++g) {
    int16_t w[kGroup][kRows];
    unpack_group<kCode>(row_block + g * group_bytes(m), w);
    const int64_t weight_group = g * kGroup / m.group * kRows;
    float weight_scale[kRows];
    for (int row = 0; row < kRows; ++row) {
      weight_scale[row] = load_scale(scales, weight_group + row, kType);
    }
    for (int t = 0; t < kTokens; ++t) {
      int32_t sum[kRows];
      group_sum<kCode>(w, q + (g * stride + t) * kGroup, sum);
      if (kZero) {
        const int32_t negative_sum = offset[g * stride + t] / 8;
        for (int row = 0; row < kRows; ++row) sum[row] += zeros[weight_group + row] * negative_sum;
      }
      float* a = acc[g % kPhases][t];
      const float token_scale = scale[g * stride + t];
      for (int row = 0; row < kRows; ++row) {
        a[row] = a[row] + float(sum[row]) * (weight_scale[row] * token_scale);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int row = 0; row < kRows; ++row) {
      const auto a = [&](int p) { return acc[p][t][row]; };
      y[t * kUnitRows + row] =
          ((a(0) + a(4)) + (a(2) + a(6))) + ((a(1) + a(5)) + (a(3) + a(7)));
    }
  }
}

template <CodeType kCode, bool kZero, ScaleType kType>
void one_token(const MatrixLayout& m, const uint8_t* row_block, const int8_t* q, const float* scale,
               const int32_t* offset, float* y) {
  many_tokens<kCode, kZero, kType, 1>(m, row_block, q, scale, offset, 1, y);
}

// One token tile of more than one token and all its row blocks; no use is made of `first`, see
// product_avx512.h.
template <CodeType kCode, bool kZero, ScaleType kType>
void token_tile(const MatrixLayout& m, const uint8_t* row_block, int64_t blocks, const int8_t* q,
                const float* scale, const int32_t* offset, int64_t width, bool /*first*/,
                float* y) {
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* source = row_block + block * row_block_bytes(m);
    float* target = y + block * kRows;
    int64_t t = 0;
    const auto steps = [&](auto kernel, int count) {
      for (; t + count <= width; t += count) {
        kernel(m, source, q + t * kGroup, scale + t, offset + t, width, target + t * kUnitRows);
      }
    };
    steps(many_tokens<kCode, kZero, kType, 4>, 4);
    steps(many_tokens<kCode, kZero, kType, 1>, 1);
  }
}

}  // namespace
