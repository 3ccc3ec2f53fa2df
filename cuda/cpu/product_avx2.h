// Matrix products with AVX2: 8 rows in the lanes of a vector. `maddubs` adds pairs of products in 16
// bits: for 4 bits all of a group fits (8 * 2 * 15 * 127 = 30480 < 2^15), for 5 a half (4 * 2 * 31 * 127
// = 31496), for 6 a quarter (2 * 2 * 63 * 127 = 32004); for 8 bits a pair of |w| * q fits
// (2 * 128 * 127 = 32512) and is widened at once. So are those of NF4's values, which a shuffle of bytes looks up.
#pragma once

#include <immintrin.h>

#include "../dequant.h"
#include "unroll.h"

namespace {

constexpr int kRows = 8;

using namespace localr1;

template <ScaleType kType>
inline __m256 load_scales(const uint8_t* p) {
  if (kType == kBfloat16) {
    const __m128i bits = _mm_loadu_si128((const __m128i*)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  if (kType == kFloat16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  return _mm256_loadu_ps((const float*)p);
}

// Four activations, in every lane.
inline __m256i broadcast4(const int8_t* q) {
  int32_t word;
  memcpy(&word, q, 4);
  return _mm256_set1_epi32(word);
}

// -(offset of the codes + zero) * sum(q); 8-bit codes are made signed first and have no offset.
template <CodeType kCode, bool kZero>
inline __m256i sum_start(int32_t offset, const uint8_t* zeros) {
  const __m256i eight_sums = _mm256_set1_epi32(offset);
  __m256i sum = _mm256_setzero_si256();
  constexpr int kValueBits = value_bits_of(kCode);
  if (kValueBits < 8) sum = _mm256_slli_epi32(eight_sums, kValueBits - 4);
  if (kZero) {
    const __m256i zero = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)zeros));
    sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(zero, _mm256_srai_epi32(eight_sums, 3)));
  }
  return sum;
}

// Codes of 5 or 6 bits of columns 4c to 4c + 3 of every row, as bytes.
template <CodeType kCode, int c>
inline __m256i columns_of(const uint8_t* codes) {
  constexpr int kHigh = bits_of(kCode) - 4;        // bits of the second plane
  constexpr int kLeft = 4 - c * kHigh % 8;         // to where they belong
  const __m256i pair = _mm256_load_si256((const __m256i*)(codes + 32 * (c / 2)));
  const __m256i plane = _mm256_load_si256((const __m256i*)(codes + 32 * (4 + c * kHigh / 8)));
  const __m256i low = c % 2 ? _mm256_srli_epi16(pair, 4) : pair;
  const __m256i high = kLeft > 0 ? _mm256_slli_epi16(plane, kLeft > 0 ? kLeft : 0)
                                 : _mm256_srli_epi16(plane, kLeft < 0 ? -kLeft : 0);
  return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(15)),
                         _mm256_and_si256(high, _mm256_set1_epi8(((1 << kHigh) - 1) << 4)));
}

// Values of 8 bits, or NF4's, of columns 4c to 4c + 3 of every row.
template <CodeType kCode>
inline __m256i signed_bytes(const uint8_t* codes, int c) {
  const __m256i offset = _mm256_set1_epi8(char(0x80));
  if (kCode == kInt8) {
    return _mm256_xor_si256(_mm256_load_si256((const __m256i*)(codes + 32 * c)), offset);
  }
  const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)kNf4Values));
  const __m256i pair = _mm256_load_si256((const __m256i*)(codes + 32 * (c / 2)));
  const __m256i nibbles = c % 2 ? _mm256_srli_epi16(pair, 4) : pair;
  const __m256i index = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(_mm256_xor_si256(values, offset), index);
}

// The integer sums of one group for kTokens tokens.
template <CodeType kCode, int kTokens>
inline void group_sums(const uint8_t* codes, const int8_t* q, __m256i (&sum)[kTokens]) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (kCode == kInt4) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i pairs[kTokens];
    LOCALR1_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) pairs[t] = _mm256_setzero_si256();
    LOCALR1_UNROLL(4)
    for (int c = 0; c < 4; ++c) {
      const __m256i both = _mm256_load_si256((const __m256i*)(codes + 32 * c));
      const __m256i low = _mm256_and_si256(both, mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
      LOCALR1_UNROLL(4)
      for (int t = 0; t < kTokens; ++t) {
        const int8_t* part = q + t * kGroup + 8 * c;
        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(low, broadcast4(part)));
        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(high, broadcast4(part + 4)));
      }
    }
    LOCALR1_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) {
      sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(pairs[t], ones));
    }
    return;
  }
  if constexpr (kCode == kInt5 || kCode == kInt6) {
    constexpr int kSteps = 128 >> bits_of(kCode);  // that fit into 16 bits
    __m256i pairs[kTokens];
    each_of_eight([&](auto index) {
      constexpr int c = decltype(index)::value;
      const __m256i w = columns_of<kCode, c>(codes);
      LOCALR1_UNROLL(4)
      for (int t = 0; t < kTokens; ++t) {
        const __m256i products = _mm256_maddubs_epi16(w, broadcast4(q + t * kGroup + 4 * c));
        pairs[t] = c % kSteps ? _mm256_add_epi16(pairs[t], products) : products;
        if (c % kSteps == kSteps - 1) {
          sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(pairs[t], ones));
        }
      }
    });
    return;
  }
  LOCALR1_UNROLL(8)
  for (int c = 0; c < 8; ++c) {
    const __m256i w = signed_bytes<kCode>(codes, c);
    const __m256i magnitude = _mm256_abs_epi8(w);
    LOCALR1_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) {
      const __m256i signed_q = _mm256_sign_epi8(broadcast4(q + t * kGroup + 4 * c), w);
      const __m256i pairs = _mm256_maddubs_epi16(magnitude, signed_q);
      sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(pairs, ones));
    }
  }
}

// acc += float(sum) * (weight scale * activation scale) for group g and kTokens tokens.
template <CodeType kCode, bool kZero, ScaleType kType, int kTokens>
inline void add_group(const MatrixLayout& m, const uint8_t* row_block, int64_t g, const int8_t* q,
                      const float* scale, const int32_t* offset, int64_t stride, __m256* acc) {
  const int64_t weight_group = m.group == 32 ? g : m.group == 64 ? g >> 1 : g >> 2;
  const uint8_t* zeros = row_block + zeros_offset(m) + weight_group * kRows;
  __m256i sum[kTokens];
  LOCALR1_UNROLL(4)
  for (int t = 0; t < kTokens; ++t) sum[t] = sum_start<kCode, kZero>(offset[g * stride + t], zeros);
  group_sums<kCode, kTokens>(row_block + g * (bits_of(kCode) * 32), q + g * stride * kGroup, sum);
  const __m256 weight_scale = load_scales<kType>(row_block + scales_offset(m) +
                                                 weight_group * (kRows * scale_bytes(kType)));
  LOCALR1_UNROLL(4)
  for (int t = 0; t < kTokens; ++t) {
    const __m256 scales = _mm256_mul_ps(weight_scale, _mm256_set1_ps(scale[g * stride + t]));
    acc[t] = _mm256_add_ps(acc[t], _mm256_mul_ps(_mm256_cvtepi32_ps(sum[t]), scales));
  }
}

// One token, alone in its tile: 8 phase accumulators in registers, the weights are read once and in
// order.
template <CodeType kCode, bool kZero, ScaleType kType>
void one_token(const MatrixLayout& m, const uint8_t* row_block, const int8_t* q, const float* scale,
               const int32_t* offset, float* y) {
  const int64_t groups = m.columns / kGroup;
  constexpr int kStepBytes = bits_of(kCode) * 32 + kRows * scale_bytes(kType);  // codes and scales of a group
  __m256 a[kPhases];
  LOCALR1_UNROLL(8)
  for (int p = 0; p < kPhases; ++p) a[p] = _mm256_setzero_ps();
  const char* ahead = (const char*)row_block + kPrefetchBytes;
  const char* const ahead_end = ahead + row_block_bytes(m);
  int64_t g = 0;
  for (; g + kPhases <= groups; g += kPhases) {
    LOCALR1_UNROLL(8)
    for (int p = 0; p < kPhases; ++p) {
      LOCALR1_UNROLL(5)
      for (int byte = 0; byte < kStepBytes; byte += 64) {  // across row blocks
        _mm_prefetch(ahead + p * kStepBytes + byte, _MM_HINT_T0);
      }
      add_group<kCode, kZero, kType, 1>(m, row_block, g + p, q, scale, offset, 1, a + p);
    }
    ahead += kPhases * kStepBytes;
  }
  for (; ahead < ahead_end; ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
  LOCALR1_UNROLL(8)
  for (int p = 0; p < kPhases - 1; ++p) {
    if (g + p < groups) {
      add_group<kCode, kZero, kType, 1>(m, row_block, g + p, q, scale, offset, 1, a + p);
    }
  }
  const __m256 even = _mm256_add_ps(_mm256_add_ps(a[0], a[4]), _mm256_add_ps(a[2], a[6]));
  const __m256 odd = _mm256_add_ps(_mm256_add_ps(a[1], a[5]), _mm256_add_ps(a[3], a[7]));
  _mm256_storeu_ps(y, _mm256_add_ps(even, odd));
}

// kTokens tokens: phase by phase, so that the accumulators of all tokens fit in registers; a group
// of weights is unpacked once for all of them.
template <CodeType kCode, bool kZero, ScaleType kType, int kTokens>
void many_tokens(const MatrixLayout& m, const uint8_t* row_block, const int8_t* q, const float* scale,
                 const int32_t* offset, int64_t stride, float* y) {
  const int64_t groups = m.columns / kGroup;
  alignas(32) float sums[kPhases][kTokens][kRows];
  for (int p = 0; p < kPhases; ++p) {
    __m256 acc[kTokens];
    LOCALR1_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) acc[t] = _mm256_setzero_ps();
    for (int64_t g = p; g < groups; g += kPhases) {
      add_group<kCode, kZero, kType, kTokens>(m, row_block, g, q, scale, offset, stride, acc);
    }
    LOCALR1_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) _mm256_store_ps(sums[p][t], acc[t]);
  }
  for (int t = 0; t < kTokens; ++t) {
    const auto a = [&](int p) { return _mm256_load_ps(sums[p][t]); };
    const __m256 even = _mm256_add_ps(_mm256_add_ps(a(0), a(4)), _mm256_add_ps(a(2), a(6)));
    const __m256 odd = _mm256_add_ps(_mm256_add_ps(a(1), a(5)), _mm256_add_ps(a(3), a(7)));
    _mm256_storeu_ps(y + t * kUnitRows, _mm256_add_ps(even, odd));
  }
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
    steps(many_tokens<kCode, kZero, kType, 2>, 2);
    steps(many_tokens<kCode, kZero, kType, 1>, 1);
  }
}

}  // namespace
