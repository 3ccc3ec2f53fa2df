// Vectors of 8 floats as plain arrays: for processors without a build of their own. The loops have
// fixed bounds, so that a compiler can use whatever baseline vectors there are.
#pragma once

#include <math.h>

#include "../dequant.h"

namespace {

struct Simd {
  struct F {
    float v[8];
  };
  static constexpr int kWidth = 8;
  static constexpr int kTileRows = 2, kTileVectors = 1;  // register tile of attention

  template <class Operation>
  static F map(Operation operation) {
    F out;
    for (int i = 0; i < 8; ++i) out.v[i] = operation(i);
    return out;
  }
  static F zero() { return set1(0.0f); }
  static F set1(float x) {
    return map([&](int) { return x; });
  }
  static F load(const float* p) {
    return map([&](int i) { return p[i]; });
  }
  static void store(float* p, F x) {
    for (int i = 0; i < 8; ++i) p[i] = x.v[i];
  }
  static F load_n(const float* p, int64_t n) {
    return map([&](int i) { return i < n ? p[i] : 0.0f; });
  }
  static void store_n(float* p, F x, int64_t n) {
    for (int i = 0; i < 8 && i < n; ++i) p[i] = x.v[i];
  }
  static F keep_n(F x, F other, int64_t n) {
    return map([&](int i) { return i < n ? x.v[i] : other.v[i]; });
  }

  static F add(F a, F b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(F a, F b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  // Outside the contract only; rounds twice, as a fused operation without hardware is very slow.
  static F fma(F a, F b, F c) { return add(mul(a, b), c); }
  static F max(F a, F b) {  // b where either is NaN
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F min(F a, F b) {  // b where either is NaN
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F negate(F a) {
    return map([&](int i) { return -a.v[i]; });
  }
  // Half to even for |x| < 2^22, by the rounding of the addition itself.
  static float round1(float x) { return (x + 12582912.0f) - 12582912.0f; }
  static F round(F a) {
    return map([&](int i) { return round1(a.v[i]); });
  }
  static F pow2(F n) {
    return map([&](int i) {
      const int exponent = n.v[i] == n.v[i] ? int(n.v[i]) : 0;  // NaN: any power will do
      return localr1::float_from_bits(uint32_t(exponent + 127) << 23);
    });
  }
  static float reduce_add(F a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
  }
  static float reduce_max(F a) {
    float best = a.v[0];
    for (int i = 1; i < 8; ++i) best = best > a.v[i] ? best : a.v[i];
    return best;
  }

  static F load_half(const uint16_t* p) {
    return map([&](int i) { return localr1::float_from_half(p[i]); });
  }
  static F load_half_n(const uint16_t* p, int64_t n) {
    return map([&](int i) { return i < n ? localr1::float_from_half(p[i]) : 0.0f; });
  }
  static F load_bfloat16_n(const uint16_t* p, int64_t n) {
    return map([&](int i) { return i < n ? localr1::float_from_bfloat16(p[i]) : 0.0f; });
  }
  static F load_int8_n(const int8_t* p, int64_t n) {
    return map([&](int i) { return i < n ? float(p[i]) : 0.0f; });
  }
  static void store_half_n(uint16_t* p, F x, int64_t n) {
    for (int i = 0; i < 8 && i < n; ++i) p[i] = localr1::half_from_float(x.v[i]);
  }

  // Largest magnitude of 32 floats; compared as integers, so that NaN counts as the largest.
  static float group_absmax(const float* x) {
    uint32_t largest = 0;
    for (int i = 0; i < 32; ++i) {
      const uint32_t bits = localr1::bits_from_float(x[i]) & 0x7fffffffu;
      largest = largest > bits ? largest : bits;
    }
    return localr1::float_from_bits(largest);
  }
  // q = round-half-even(x * inverse) for 32 floats; returns the sum of q.
  static int32_t group_quantize(const float* x, float inverse, int8_t* q) {
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) {
      const int32_t value = int32_t(round1(x[i] * inverse));
      q[i] = int8_t(value);
      sum += value;
    }
    return sum;
  }

  static void transpose(F (&v)[8]) {
    for (int i = 0; i < 8; ++i) {
      for (int j = i + 1; j < 8; ++j) {
        const float x = v[i].v[j];
        v[i].v[j] = v[j].v[i];
        v[j].v[i] = x;
      }
    }
  }
};

}  // namespace
