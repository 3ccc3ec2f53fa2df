// Vectors of 8 floats for AVX2 + FMA + F16C. Included only by the file built with those flags.
#pragma once

#include <immintrin.h>

#include "../dequant.h"

namespace {

struct Simd {
  using F = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kTileRows = 4, kTileVectors = 2;  // register tile of attention: 8 + 3 of 16

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static __m256i first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : int(n)), lane);
  }
  static F load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_n(float* p, F x, int64_t n) { _mm256_maskstore_ps(p, first(n), x); }
  static F keep_n(F x, F other, int64_t n) {
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(first(n)));
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }  // outside the contract only
  static F max(F a, F b) { return _mm256_max_ps(a, b); }            // b where either is NaN
  static F min(F a, F b) { return _mm256_min_ps(a, b); }            // b where either is NaN
  static F negate(F a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F pow2(F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static float reduce_add(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float reduce_max(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static F load_half_n(const uint16_t* p, int64_t n) {
    if (n >= 8) return load_half(p);
    uint16_t part[8] = {};
    memcpy(part, p, size_t(n) * 2);
    return load_half(part);
  }
  static F load_bfloat16_n(const uint16_t* p, int64_t n) {
    uint16_t part[8] = {};
    if (n < 8) {
      memcpy(part, p, size_t(n) * 2);
      p = part;
    }
    const __m128i bits = _mm_loadu_si128((const __m128i*)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static F load_int8_n(const int8_t* p, int64_t n) {
    int8_t part[8] = {};
    memcpy(part, p, size_t(n < 8 ? n : 8));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)part)));
  }
  static void store_half_n(uint16_t* p, F x, int64_t n) {
    const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (n >= 8) return _mm_storeu_si128((__m128i*)p, half);
    uint16_t part[8];
    _mm_storeu_si128((__m128i*)part, half);
    memcpy(p, part, size_t(n) * 2);
  }

  // Largest magnitude of 32 floats; compared as integers, so that NaN counts as the largest.
  static float group_absmax(const float* x) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    const __m256i* p = (const __m256i*)x;
    const __m256i a = _mm256_max_epi32(_mm256_and_si256(_mm256_loadu_si256(p), magnitude),
                                       _mm256_and_si256(_mm256_loadu_si256(p + 1), magnitude));
    const __m256i b = _mm256_max_epi32(_mm256_and_si256(_mm256_loadu_si256(p + 2), magnitude),
                                       _mm256_and_si256(_mm256_loadu_si256(p + 3), magnitude));
    const __m256i c = _mm256_max_epi32(a, b);
    __m128i d = _mm_max_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
    d = _mm_max_epi32(d, _mm_shuffle_epi32(d, 0x4e));
    d = _mm_max_epi32(d, _mm_shuffle_epi32(d, 0xb1));
    return localr1::float_from_bits(uint32_t(_mm_cvtsi128_si32(d)));
  }
  // q = round-half-even(x * inverse) for 32 floats; returns the sum of q.
  static int32_t group_quantize(const float* x, float inverse, int8_t* q) {
    const F factor = set1(inverse);
    const __m256i a = _mm256_cvtps_epi32(mul(load(x), factor));
    const __m256i b = _mm256_cvtps_epi32(mul(load(x + 8), factor));
    const __m256i c = _mm256_cvtps_epi32(mul(load(x + 16), factor));
    const __m256i d = _mm256_cvtps_epi32(mul(load(x + 24), factor));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undo the packs' interleaving
    _mm256_storeu_si256((__m256i*)q, _mm256_permutevar8x32_epi32(bytes, order));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
  }

  // 8 vectors of 8 -> the transposed 8 vectors, in place.
  static void transpose(F (&v)[8]) {
    F t[8];
    for (int i = 0; i < 8; i += 4) {
      const F a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
      const F c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
      t[i] = _mm256_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
      t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
      v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
  }
};

}  // namespace
