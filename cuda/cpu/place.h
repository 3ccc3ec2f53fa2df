// Reorders codes from rows, as they are on disk, into the row blocks of blocks.h. Included once an
// instruction set, after its vector types; experts that are read while a model runs pass through here,
// so it has to keep up with the drive that they come from.
#pragma once

#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../blocks.h"

namespace localr1 {
namespace {

// 4 bits: bytes c0|c1 c2|c3 c4|c5 c6|c7 (low nibble first) -> c0|c4 c1|c5 c2|c6 c3|c7.
inline uint32_t interleave_nibbles(uint32_t word) {
  const auto spread = [](uint32_t four) {  // four nibbles -> the low halves of four bytes
    four = (four | four << 8) & 0x00ff00ffu;
    return (four | four << 4) & 0x0f0f0f0fu;
  };
  return spread(word & 0xffffu) | spread(word >> 16) << 4;
}

// One group of 5 or 6 bits of one row, `bits` words -> its bytes of the chunks of blocks.h, `stride` bytes
// apart.
inline void place_group(const uint8_t* codes, int bits, uint8_t* out, int64_t stride) {
  uint32_t four[8];  // columns 4c to 4c + 3, a byte each
  for (int c = 0; c < 8; ++c) {
    // From a byte on or, of 5 bits, the middle of one: 24 bits at most.
    uint32_t value = 0;
    const int first = 4 * bits * c;
    memcpy(&value, codes + first / 8, 3);
    value >>= first % 8;
    four[c] = 0;
    for (int j = 0; j < 4; ++j) four[c] |= (value >> bits * j & ((1u << bits) - 1)) << 8 * j;
  }
  for (int c = 0; c < 4; ++c) {
    const uint32_t pair = (four[2 * c] & 0x0f0f0f0fu) | (four[2 * c + 1] & 0x0f0f0f0fu) << 4;
    memcpy(out + c * stride, &pair, 4);
  }
  const int high = bits - 4;  // bits of the second plane
  const uint32_t mask = 0x01010101u * ((1u << high) - 1);
  for (int d = 0; d < high; ++d) {
    uint32_t plane = 0;
    for (int k = 0; k < 8 / high; ++k) plane |= (four[d * 8 / high + k] >> 4 & mask) << high * k;
    memcpy(out + (4 + d) * stride, &plane, 4);
  }
}

// All groups of every row; rows past the end are zero weights.
inline void place_planes(const MatrixLayout& m, const uint8_t* codes, int64_t rows, uint8_t* block) {
  const int bits = bits_of(m.code);
  const int64_t group = 4 * bits, groups = m.columns / kGroup, lanes = m.rows_per_block;
  // Codes of 16 or 32 are nibbles of 0 and the highest bit set.
  const uint32_t highest = bits == 5 ? 0xffffffffu : 0xaaaaaaaau;
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* target = block + g * group * lanes;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (lane < rows) {
        place_group(codes + (lane * groups + g) * group, bits, target + lane * 4, lanes * 4);
        continue;
      }
      for (int c = 0; c < bits; ++c) {
        const uint32_t value = c < 4 ? 0 : highest;
        memcpy(target + (c * lanes + lane) * 4, &value, 4);
      }
    }
  }
}

// One word of every row from `word` on; rows past the end are zero weights.
inline void place_words(const MatrixLayout& m, const uint8_t* codes, int64_t rows, int64_t word,
                        int64_t end, uint8_t* block) {
  const int bits = bits_of(m.code);
  const int64_t words = m.columns * bits / 32, lanes = m.rows_per_block;
  const uint32_t zero = m.code == kNf4 ? 0x11111111u * kNf4Zero : bits == 4 ? 0x88888888u : 0x80808080u;
  for (; word < end; ++word) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      uint32_t value = zero;
      if (lane < rows) {
        memcpy(&value, codes + (lane * words + word) * 4, 4);
        if (bits == 4) value = interleave_nibbles(value);
      }
      memcpy(block + (word * lanes + lane) * 4, &value, 4);
    }
  }
}

#ifdef __AVX2__
inline __m256i interleave_nibbles(__m256i words) {
  const __m256i bytes = _mm256_set1_epi32(0x00ff00ff), nibbles = _mm256_set1_epi32(0x0f0f0f0f);
  const auto spread = [&](__m256i four) {
    four = _mm256_and_si256(_mm256_or_si256(four, _mm256_slli_epi32(four, 8)), bytes);
    return _mm256_and_si256(_mm256_or_si256(four, _mm256_slli_epi32(four, 4)), nibbles);
  };
  const __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
  return _mm256_or_si256(spread(low), _mm256_slli_epi32(spread(_mm256_srli_epi32(words, 16)), 4));
}

// 8 words of 8 whole rows: out[word * stride + row].
inline void place_square(const uint8_t* codes, int64_t row_bytes, bool four_bits, uint8_t* out,
                         int64_t stride) {
  __m256i r[8];
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * row_bytes));
    if (four_bits) r[i] = interleave_nibbles(r[i]);
  }
  __m256i pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m256i low = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
    const __m256i high = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * stride), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i + 4) * stride), high);
  }
}
#endif

// Codes of one row block: `rows` real ones, at most rows_per_block, from `codes` on.
void place_codes(const MatrixLayout& m, const uint8_t* codes, int64_t rows, uint8_t* block) {
  const int bits = bits_of(m.code);
  if (bits == 5 || bits == 6) return place_planes(m, codes, rows, block);
  const int64_t words = m.columns * bits / 32;
  int64_t word = 0;
#ifdef __AVX2__
  const int64_t lanes = m.rows_per_block;
  if (rows == lanes) {
    for (; word + 8 <= words; word += 8) {
      for (int64_t lane = 0; lane < lanes; lane += 8) {
        place_square(codes + (lane * words + word) * 4, words * 4, bits == 4,
                     block + (word * lanes + lane) * 4, lanes * 4);
      }
    }
  }
#endif
  place_words(m, codes, rows, word, words, block);
}

}  // namespace
}  // namespace localr1
