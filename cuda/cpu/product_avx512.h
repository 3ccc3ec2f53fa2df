// Matrix products with AVX-512 VNNI: 16 rows in the lanes of a vector, `vpdpbusd` multiplies the
// unsigned codes with four broadcast activations. Sums start at -offset * sum(q), so that the codes
// stay unsigned. Those of NF4 are looked up by a shuffle of bytes and are of 8 bits from then on.
#pragma once

#include <immintrin.h>

#include "../dequant.h"
#include "unroll.h"

namespace {

constexpr int kRows = 16;

using namespace localr1;

template <ScaleType kType>
inline __m512 load_scales(const uint8_t* p) {
  if (kType == kBfloat16) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  if (kType == kFloat16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_loadu_ps(p);
}

// Four activations, in every lane.
inline __m512i broadcast4(const int8_t* q) {
  int32_t word;
  memcpy(&word, q, 4);
  return _mm512_set1_epi32(word);
}

// Where the data of one row block lies, group by group.
template <CodeType kCode, bool kZero, ScaleType kType>
struct RowBlock {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;
  int shift;  // group of 32 -> weight group

  RowBlock(const MatrixLayout& m, const uint8_t* row_block)
      : codes(row_block), scales(row_block + scales_offset(m)), zeros(row_block + zeros_offset(m)),
        shift(m.group == 32 ? 0 : m.group == 64 ? 1 : 2) {}

  const uint8_t* group(int64_t g) const { return codes + g * (bits_of(kCode) * 64); }
  __m512 scale(int64_t g) const {
    return load_scales<kType>(scales + (g >> shift) * (kRows * scale_bytes(kType)));
  }
  // The zero points as 16-bit integers in the low halves of the lanes.
  __m512i zero(int64_t g) const {
    if (!kZero) return _mm512_setzero_si512();
    const __m128i bytes = _mm_loadu_si128((const __m128i*)(zeros + (g >> shift) * kRows));
    return _mm512_and_si512(_mm512_cvtepi8_epi32(bytes), _mm512_set1_epi32(0xffff));
  }
  // -(2^(bits-1) + zero) * sum(q), bits of a value
  static __m512i start(int32_t offset, __m512i zero) {
    const __m512i eight_sums = _mm512_set1_epi32(offset);
    __m512i sum = _mm512_slli_epi32(eight_sums, value_bits_of(kCode) - 4);
    if (kZero) sum = _mm512_add_epi32(sum, _mm512_madd_epi16(zero, _mm512_srai_epi32(eight_sums, 3)));
    return sum;
  }
};

// Codes of 5 or 6 bits of columns 4c to 4c + 3 of every row, as bytes.
template <CodeType kCode, int c>
inline __m512i columns_of(const uint8_t* codes) {
  constexpr int kHigh = bits_of(kCode) - 4;  // bits of the second plane
  constexpr int kLeft = 4 - c * kHigh % 8;  // to where they belong
  const __m512i pair = _mm512_load_si512(codes + 64 * (c / 2));
  const __m512i plane = _mm512_load_si512(codes + 64 * (4 + c * kHigh / 8));
  const __m512i low = c % 2 ? _mm512_srli_epi16(pair, 4) : pair;
  const __m512i high = kLeft > 0 ? _mm512_slli_epi16(plane, kLeft > 0 ? kLeft : 0)
                                 : _mm512_srli_epi16(plane, kLeft < 0 ? -kLeft : 0);
  return _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi8(15)),
                         _mm512_and_si512(high, _mm512_set1_epi8(((1 << kHigh) - 1) << 4)));
}

// What a product multiplies with, of nibbles in the lower halves of bytes.
template <CodeType kCode>
inline __m512i values_of(__m512i nibbles) {
  if (kCode != kNf4) return nibbles;
  const __m128i values = _mm_loadu_si128((const __m128i*)kNf4Values);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), nibbles);
}

// The integer sums of one group for one token.
template <CodeType kCode>
inline __m512i group_sum(const uint8_t* codes, const int8_t* q, __m512i start) {
  __m512i low = start, high = _mm512_setzero_si512();
  if constexpr (kCode == kInt4) {
    const __m512i low_mask = _mm512_set1_epi8(15), high_mask = _mm512_set1_epi8(char(0xf0));
    LOCALR1_UNROLL(4)
    for (int c = 0; c < 4; ++c) {
      const __m512i pair = _mm512_load_si512(codes + 64 * c);
      low = _mm512_dpbusd_epi32(low, _mm512_and_si512(pair, low_mask), broadcast4(q + 8 * c));
      high = _mm512_dpbusd_epi32(high, _mm512_and_si512(pair, high_mask), broadcast4(q + 8 * c + 4));
    }
    return _mm512_add_epi32(low, _mm512_srai_epi32(high, 4));  // high holds 16 times its sum
  }
  if constexpr (kCode == kNf4) {
    const __m512i mask = _mm512_set1_epi8(15);
    LOCALR1_UNROLL(4)
    for (int c = 0; c < 4; ++c) {
      const __m512i pair = _mm512_load_si512(codes + 64 * c);
      const __m512i first = values_of<kCode>(_mm512_and_si512(pair, mask));
      const __m512i second = values_of<kCode>(_mm512_and_si512(_mm512_srli_epi16(pair, 4), mask));
      low = _mm512_dpbusd_epi32(low, first, broadcast4(q + 8 * c));
      high = _mm512_dpbusd_epi32(high, second, broadcast4(q + 8 * c + 4));
    }
    return _mm512_add_epi32(low, high);
  }
  if constexpr (kCode == kInt5 || kCode == kInt6) {
    each_of_eight([&](auto index) {
      constexpr int c = decltype(index)::value;
      const __m512i w = columns_of<kCode, c>(codes);
      __m512i& sum = c % 2 ? high : low;
      sum = _mm512_dpbusd_epi32(sum, w, broadcast4(q + 4 * c));
    });
    return _mm512_add_epi32(low, high);
  }
  LOCALR1_UNROLL(4)
  for (int c = 0; c < 8; c += 2) {
    low = _mm512_dpbusd_epi32(low, _mm512_load_si512(codes + 64 * c), broadcast4(q + 4 * c));
    high = _mm512_dpbusd_epi32(high, _mm512_load_si512(codes + 64 * c + 64), broadcast4(q + 4 * c + 4));
  }
  return _mm512_add_epi32(low, high);
}

// One token, alone in its tile: 8 phase accumulators in registers, the weights are read once and in
// order.
template <CodeType kCode, bool kZero, ScaleType kType>
void one_token(const MatrixLayout& m, const uint8_t* row_block, const int8_t* q, const float* scale,
               const int32_t* offset, float* y) {
  const RowBlock<kCode, kZero, kType> block(m, row_block);
  const int64_t groups = m.columns / kGroup;
  const auto term = [&](int64_t g) {
    const __m512i sum =
        group_sum<kCode>(block.group(g), q + g * kGroup, block.start(offset[g], block.zero(g)));
    const __m512 scales = _mm512_mul_ps(block.scale(g), _mm512_set1_ps(scale[g]));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scales);
  };
  constexpr int kStepBytes = bits_of(kCode) * 64 + kRows * scale_bytes(kType);  // codes and scales of a group
  __m512 a[kPhases];
  LOCALR1_UNROLL(8)
  for (int p = 0; p < kPhases; ++p) a[p] = _mm512_setzero_ps();
  const char* ahead = (const char*)row_block + kPrefetchBytes;
  const char* const ahead_end = ahead + row_block_bytes(m);
  int64_t g = 0;
  for (; g + kPhases <= groups; g += kPhases) {
    LOCALR1_UNROLL(8)
    for (int p = 0; p < kPhases; ++p) {
      LOCALR1_UNROLL(9)
      for (int byte = 0; byte < kStepBytes; byte += 64) {  // across row blocks
        _mm_prefetch(ahead + p * kStepBytes + byte, _MM_HINT_T0);
      }
      a[p] = _mm512_add_ps(a[p], term(g + p));
    }
    ahead += kPhases * kStepBytes;
  }
  for (; ahead < ahead_end; ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
  LOCALR1_UNROLL(8)
  for (int p = 0; p < kPhases - 1; ++p) {
    if (g + p < groups) a[p] = _mm512_add_ps(a[p], term(g + p));
  }
  const __m512 even = _mm512_add_ps(_mm512_add_ps(a[0], a[4]), _mm512_add_ps(a[2], a[6]));
  const __m512 odd = _mm512_add_ps(_mm512_add_ps(a[1], a[5]), _mm512_add_ps(a[3], a[7]));
  _mm512_storeu_ps(y, _mm512_add_ps(even, odd));
}

// kTokens tokens of one row block: phase by phase, so that the accumulators of all tokens fit in
// registers; a group of weights is unpacked once for all of them.
template <CodeType kCode, bool kZero, ScaleType kType, int kTokens>
void many_tokens(const MatrixLayout& m, const uint8_t* row_block, const int8_t* q, const float* scale,
                 const int32_t* offset, int64_t stride, float* y) {
  constexpr int kBits = bits_of(kCode);
  constexpr bool kPlanes = kBits == 5 || kBits == 6;
  const RowBlock<kCode, kZero, kType> block(m, row_block);
  const int64_t groups = m.columns / kGroup;
  alignas(64) float sums[kPhases][kTokens][kRows];
  for (int p = 0; p < kPhases; ++p) {
    __m512 acc[kTokens];
    LOCALR1_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) acc[t] = _mm512_setzero_ps();
    for (int64_t g = p; g < groups; g += kPhases) {
      __m512i w[8];
      if constexpr (kPlanes) {
        each_of_eight([&](auto index) {
          constexpr int c = decltype(index)::value;
          w[c] = columns_of<kCode, c>(block.group(g));
        });
      }
      LOCALR1_UNROLL(8)
      for (int c = 0; c < (kPlanes ? 0 : kBits); ++c) {
        const __m512i codes = _mm512_load_si512(block.group(g) + 64 * c);
        if (kBits == 4) {
          const __m512i mask = _mm512_set1_epi8(15);
          w[2 * c] = values_of<kCode>(_mm512_and_si512(codes, mask));
          w[2 * c + 1] = values_of<kCode>(_mm512_and_si512(_mm512_srli_epi16(codes, 4), mask));
        } else {
          w[c] = codes;
        }
      }
      const __m512 weight_scale = block.scale(g);
      const __m512i zero = block.zero(g);
      const int8_t* group_q = q + g * stride * kGroup;
      __m512i sum[kTokens];
      LOCALR1_UNROLL(4)
      for (int t = 0; t < kTokens; ++t) sum[t] = block.start(offset[g * stride + t], zero);
      LOCALR1_UNROLL(8)
      for (int c = 0; c < 8; ++c) {
        LOCALR1_UNROLL(4)
        for (int t = 0; t < kTokens; ++t) {
          sum[t] = _mm512_dpbusd_epi32(sum[t], w[c], broadcast4(group_q + t * kGroup + 4 * c));
        }
      }
      LOCALR1_UNROLL(4)
      for (int t = 0; t < kTokens; ++t) {
        const __m512 scales = _mm512_mul_ps(weight_scale, _mm512_set1_ps(scale[g * stride + t]));
        acc[t] = _mm512_add_ps(acc[t], _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t]), scales));
      }
    }
    LOCALR1_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) _mm512_store_ps(sums[p][t], acc[t]);
  }
  for (int t = 0; t < kTokens; ++t) {
    const auto a = [&](int p) { return _mm512_load_ps(sums[p][t]); };
    const __m512 even = _mm512_add_ps(_mm512_add_ps(a(0), a(4)), _mm512_add_ps(a(2), a(6)));
    const __m512 odd = _mm512_add_ps(_mm512_add_ps(a(1), a(5)), _mm512_add_ps(a(3), a(7)));
    _mm512_storeu_ps(y + t * kUnitRows, _mm512_add_ps(even, odd));
  }
}

// Two row blocks at once: every broadcast of activations serves both. The accumulators of kTokens
// tokens, whole and floating, take 4 * kTokens of the 32 registers.
template <CodeType kCode, bool kZero, ScaleType kType, int kTokens>
void many_tokens_pair(const MatrixLayout& m, const uint8_t* row_block, const int8_t* q,
                      const float* scale, const int32_t* offset, int64_t stride, const char* ahead,
                      float* y) {
  using Block = RowBlock<kCode, kZero, kType>;
  constexpr int kBits = bits_of(kCode);
  constexpr bool kPlanes = kBits == 5 || kBits == 6;
  constexpr int kStepBytes = bits_of(kCode) * 64 + kRows * scale_bytes(kType);  // codes and scales of a group
  const Block blocks[2] = {Block(m, row_block), Block(m, row_block + row_block_bytes(m))};
  const int64_t groups = m.columns / kGroup;
  alignas(64) float sums[kPhases][2][kTokens][kRows];
  for (int p = 0; p < kPhases; ++p) {
    __m512 acc[2][kTokens];
    LOCALR1_UNROLL(2)
    for (int b = 0; b < 2; ++b) {
      LOCALR1_UNROLL(8)
      for (int t = 0; t < kTokens; ++t) acc[b][t] = _mm512_setzero_ps();
    }
    for (int64_t g = p; g < groups; g += kPhases) {
      if (ahead) {
        LOCALR1_UNROLL(18)
        for (int byte = 0; byte < 2 * kStepBytes; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T1);
        ahead += 2 * kStepBytes;
      }
      const int8_t* group_q = q + g * stride * kGroup;
      const uint8_t* codes[2] = {blocks[0].group(g), blocks[1].group(g)};
      __m512i sum[2][kTokens];
      LOCALR1_UNROLL(2)
      for (int b = 0; b < 2; ++b) {
        const __m512i zero = blocks[b].zero(g);
        LOCALR1_UNROLL(8)
        for (int t = 0; t < kTokens; ++t) sum[b][t] = Block::start(offset[g * stride + t], zero);
      }
      const auto multiply = [&](__m512i first, __m512i second, int column) {
        LOCALR1_UNROLL(8)
        for (int t = 0; t < kTokens; ++t) {
          const __m512i four = broadcast4(group_q + t * kGroup + column);
          sum[0][t] = _mm512_dpbusd_epi32(sum[0][t], first, four);
          sum[1][t] = _mm512_dpbusd_epi32(sum[1][t], second, four);
        }
      };
      if constexpr (kPlanes) {
        each_of_eight([&](auto index) {
          constexpr int c = decltype(index)::value;
          multiply(columns_of<kCode, c>(codes[0]), columns_of<kCode, c>(codes[1]), 4 * c);
        });
      }
      LOCALR1_UNROLL(8)
      for (int c = 0; c < (kPlanes ? 0 : kBits); ++c) {
        const __m512i first = _mm512_load_si512(codes[0] + 64 * c);
        const __m512i second = _mm512_load_si512(codes[1] + 64 * c);
        if (kBits == 4) {
          const __m512i mask = _mm512_set1_epi8(15);
          const auto values = [&](__m512i codes_of_two) {
            return values_of<kCode>(_mm512_and_si512(codes_of_two, mask));
          };
          multiply(values(first), values(second), 8 * c);
          multiply(values(_mm512_srli_epi16(first, 4)), values(_mm512_srli_epi16(second, 4)), 8 * c + 4);
        } else {
          multiply(first, second, 4 * c);
        }
      }
      const __m512 weight_scale[2] = {blocks[0].scale(g), blocks[1].scale(g)};
      LOCALR1_UNROLL(8)
      for (int t = 0; t < kTokens; ++t) {
        const __m512 token_scale = _mm512_set1_ps(scale[g * stride + t]);
        LOCALR1_UNROLL(2)
        for (int b = 0; b < 2; ++b) {
          const __m512 scales = _mm512_mul_ps(weight_scale[b], token_scale);
          const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[b][t]), scales);
          acc[b][t] = _mm512_add_ps(acc[b][t], term);
        }
      }
    }
    LOCALR1_UNROLL(2)
    for (int b = 0; b < 2; ++b) {
      LOCALR1_UNROLL(8)
      for (int t = 0; t < kTokens; ++t) _mm512_store_ps(sums[p][b][t], acc[b][t]);
    }
  }
  for (int b = 0; b < 2; ++b) {
    for (int t = 0; t < kTokens; ++t) {
      const auto a = [&](int p) { return _mm512_load_ps(sums[p][b][t]); };
      const __m512 even = _mm512_add_ps(_mm512_add_ps(a(0), a(4)), _mm512_add_ps(a(2), a(6)));
      const __m512 odd = _mm512_add_ps(_mm512_add_ps(a(1), a(5)), _mm512_add_ps(a(3), a(7)));
      _mm512_storeu_ps(y + t * kUnitRows + b * kRows, _mm512_add_ps(even, odd));
    }
  }
}

// One token tile of more than one token and one or two row blocks. first: of the tiles that read them
// one after another; the row blocks behind them, which come next, are then fetched from memory.
template <CodeType kCode, bool kZero, ScaleType kType>
void token_tile(const MatrixLayout& m, const uint8_t* row_block, int64_t blocks, const int8_t* q,
                const float* scale, const int32_t* offset, int64_t width, bool first, float* y) {
  int64_t t = 0;
  if (blocks == 2) {
    const char* ahead = first ? (const char*)row_block + 2 * row_block_bytes(m) : nullptr;
    const auto steps = [&](auto kernel, int count) {
      for (; t + count <= width; t += count) {
        kernel(m, row_block, q + t * kGroup, scale + t, offset + t, width, ahead, y + t * kUnitRows);
        ahead = nullptr;
      }
    };
    steps(many_tokens_pair<kCode, kZero, kType, 6>, 6);
    steps(many_tokens_pair<kCode, kZero, kType, 4>, 4);
    steps(many_tokens_pair<kCode, kZero, kType, 3>, 3);
    steps(many_tokens_pair<kCode, kZero, kType, 2>, 2);
    steps(many_tokens_pair<kCode, kZero, kType, 1>, 1);
    return;
  }
  const auto steps = [&](auto kernel, int count) {
    for (; t + count <= width; t += count) {
      kernel(m, row_block, q + t * kGroup, scale + t, offset + t, width, y + t * kUnitRows);
    }
  };
  steps(many_tokens<kCode, kZero, kType, 4>, 4);
  steps(many_tokens<kCode, kZero, kType, 2>, 2);
  steps(many_tokens<kCode, kZero, kType, 1>, 1);
}

}  // namespace
