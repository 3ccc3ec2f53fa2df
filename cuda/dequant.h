// Scalar conversions and the contract's exponential, shared by CPU and GPU code. Every operation
// rounds by itself (docs/arithmetic.md): compile with contraction off.
#pragma once

#include "blocks.h"

#ifndef __CUDACC_RTC__
#include <string.h>
#endif

namespace localr1 {

// exp(x) = 2^n * e^r; localr1/kernels/reference.py has the derivation and the same values.
constexpr float kExpLow = -87.0f, kExpHigh = 88.0f;
constexpr float kLog2E = 1.4426950216293335f;
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -0.00021219444f;
constexpr float kExp0 = 0.000197902977f, kExp1 = 0.00139447034f, kExp2 = 0.00833349768f;
constexpr float kExp3 = 0.0416662954f, kExp4 = 0.166666657f, kExp5 = 0.5f;

static inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_from_bfloat16(uint16_t bits) {
  return float_from_bits(uint32_t(bits) << 16);
}

static inline float float_from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u, mantissa = half & 1023u;
  if (exponent == 31u) return float_from_bits(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0u) {  // zero or subnormal: mantissa * 2^-24 is exact
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return float_from_bits(sign | bits_from_float(magnitude));
  }
  return float_from_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
}

// Round to nearest even; above the range of float16: infinity, as the hardware conversion does.
static inline uint16_t half_from_float(float value) {
  const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the integer in the low bits
    return uint16_t(sign | (bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | (rounded - 0x38000000u) >> 13);
}

#ifdef __CUDACC_RTC__
// One instruction each on a GPU. A compiler may not contract these, whatever its options.
static inline float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
static inline float rounded_difference(float a, float b) { return __fsub_rn(a, b); }
static inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
static inline float rounded_quotient(float a, float b) { return __fdiv_rn(a, b); }
static inline float widen_half(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
static inline uint16_t narrow_to_half(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
#else
static inline float rounded_sum(float a, float b) { return a + b; }
static inline float rounded_difference(float a, float b) { return a - b; }
static inline float rounded_product(float a, float b) { return a * b; }
static inline float rounded_quotient(float a, float b) { return a / b; }
static inline float widen_half(uint16_t half) { return float_from_half(half); }
static inline uint16_t narrow_to_half(float value) { return half_from_float(value); }
#endif

// Half to even for |x| < 2^22, by the rounding of the addition itself.
static inline float round_half_even(float x) {
  return rounded_difference(rounded_sum(x, 12582912.0f), 12582912.0f);
}

// The contract's exponential of one float; cpu/rowwise.h has it for a vector.
static inline float scalar_exp(float x) {
  x = x < kExpLow ? kExpLow : x;  // NaN passes
  x = x > kExpHigh ? kExpHigh : x;
  const float n = round_half_even(rounded_product(x, kLog2E));
  const float r = rounded_difference(rounded_difference(x, rounded_product(n, kLn2High)), rounded_product(n, kLn2Low));
  float p = rounded_sum(rounded_product(kExp0, r), kExp1);
  p = rounded_sum(rounded_product(p, r), kExp2);
  p = rounded_sum(rounded_product(p, r), kExp3);
  p = rounded_sum(rounded_product(p, r), kExp4);
  p = rounded_sum(rounded_product(p, r), kExp5);
  p = rounded_sum(rounded_sum(rounded_product(p, rounded_product(r, r)), r), 1.0f);
  const int exponent = n == n ? int(n) : 0;  // NaN: any power will do
  return rounded_product(p, float_from_bits(uint32_t(exponent + 127) << 23));
}

static inline float sigmoid_of(float x) { return rounded_quotient(1.0f, rounded_sum(1.0f, scalar_exp(-x))); }

static inline float silu_of(float x) { return rounded_quotient(x, rounded_sum(1.0f, scalar_exp(-x))); }

static inline float load_scale(const void* scales, int64_t index, ScaleType type) {
  if (type == kFloat32) return ((const float*)scales)[index];
  const uint16_t bits = ((const uint16_t*)scales)[index];
  return type == kBfloat16 ? float_from_bfloat16(bits) : widen_half(bits);
}

// Unsigned code of (row of the block, column), see blocks.h.
static inline int load_code(const uint8_t* row_block, const MatrixLayout& m, int row, int64_t column) {
  const uint8_t* group = row_block + column / kGroup * group_bytes(m);
  const int within = int(column % kGroup);
  const int chunk_bytes = m.rows_per_block * 4;
  const int bits = bits_of(m.code);
  if (bits == 8) return group[within / 4 * chunk_bytes + row * 4 + within % 4];
  const uint8_t* bytes = group + row * 4 + within % 4;
  const uint8_t pair = bytes[within / 8 * chunk_bytes];
  const int low = within % 8 < 4 ? pair & 15 : pair >> 4;
  if (bits == 4) return low;
  if (bits == 5) return low | (bytes[4 * chunk_bytes] >> within / 4 & 1) << 4;
  return low | (bytes[(4 + within / 16) * chunk_bytes] >> within % 16 / 4 * 2 & 3) << 4;
}

// The value of that code, less no zero point.
static inline int load_value(const uint8_t* row_block, const MatrixLayout& m, int row, int64_t column) {
  const int code = load_code(row_block, m, row, column);
  return m.code == kNf4 ? kNf4Values[code] - 128 : code - (1 << (bits_of(m.code) - 1));
}

}  // namespace localr1
