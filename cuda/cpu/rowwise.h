// Operations on rows of floats, written once over the `Simd` of the including file. All but the
// attention follow the reference operation for operation, so they return its bits.
#pragma once

namespace {

using namespace localr1;
using F = Simd::F;
constexpr int kWidth = Simd::kWidth;

inline F contract_exp(F x) {
  x = Simd::min(Simd::set1(kExpHigh), Simd::max(Simd::set1(kExpLow), x));  // NaN passes
  const F n = Simd::round(Simd::mul(x, Simd::set1(kLog2E)));
  const F r = Simd::sub(Simd::sub(x, Simd::mul(n, Simd::set1(kLn2High))),
                        Simd::mul(n, Simd::set1(kLn2Low)));
  F p = Simd::add(Simd::mul(Simd::set1(kExp0), r), Simd::set1(kExp1));
  p = Simd::add(Simd::mul(p, r), Simd::set1(kExp2));
  p = Simd::add(Simd::mul(p, r), Simd::set1(kExp3));
  p = Simd::add(Simd::mul(p, r), Simd::set1(kExp4));
  p = Simd::add(Simd::mul(p, r), Simd::set1(kExp5));
  p = Simd::add(Simd::add(Simd::mul(p, Simd::mul(r, r)), r), Simd::set1(1.0f));
  return Simd::mul(p, Simd::pow2(n));
}

void quantize(const float* x, int64_t first, int64_t count, const Activations& a, int64_t token) {
  const int64_t tile = token / kTokenTile, within = token % kTokenTile;
  const int64_t width = tile_width(a, tile), base = tile * kTokenTile * a.groups + within;
  for (int64_t g = 0; g < count; ++g) {
    const int64_t index = base + (first + g) * width;
    const float absmax = Simd::group_absmax(x + g * kGroup);
    const float inverse = 127.0f / absmax;
    int32_t sum = 0;
    if (inverse > 0.0f && inverse < float_from_bits(0x7f800000u)) {
      sum = Simd::group_quantize(x + g * kGroup, inverse, a.q + index * kGroup);
    } else {  // zero, too small, or holding NaN or Inf, which the scale carries on
      memset(a.q + index * kGroup, 0, kGroup);
    }
    a.scale[index] = absmax / 127.0f;
    a.offset[index] = -8 * sum;
  }
}

// The sum of term(i, n) over i = 0, kWidth, ...: values i..i+n-1 in the first n <= kWidth lanes and 0 in
// the others. Value i is added to lane i mod 64, then the lanes are folded by halves.
template <class Term>
inline float lane_sum(int64_t n, const Term& term) {
  constexpr int kLanes = 64, kVectors = kLanes / kWidth;
  F lanes[kVectors];
  LOCALR1_UNROLL(8)
  for (int i = 0; i < kVectors; ++i) lanes[i] = Simd::zero();
  int64_t first = 0;
  for (; first + kLanes <= n; first += kLanes) {
    LOCALR1_UNROLL(8)
    for (int i = 0; i < kVectors; ++i) {
      lanes[i] = Simd::add(lanes[i], term(first + i * kWidth, int64_t(kWidth)));
    }
  }
  for (int i = 0; i < kVectors && first + i * kWidth < n; ++i) {
    const int64_t left = n - first - i * kWidth;
    lanes[i] = Simd::add(lanes[i], term(first + i * kWidth, left < kWidth ? left : kWidth));
  }
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = Simd::add(lanes[i], lanes[i + half]);
  }
  float sums[kWidth];
  Simd::store(sums, lanes[0]);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
  }
  return sums[0];
}

float lane_dot(const float* x, const float* weight, int64_t n) {
  return lane_sum(n, [&](int64_t i, int64_t count) {
    if (count == kWidth) return Simd::mul(Simd::load(x + i), Simd::load(weight + i));
    return Simd::mul(Simd::load_n(x + i, count), Simd::load_n(weight + i, count));
  });
}

float exp_sum(const float* x, float highest, int64_t n, float* out) {
  return lane_sum(n, [&](int64_t i, int64_t count) {
    const F e = contract_exp(Simd::sub(Simd::load_n(x + i, count), Simd::set1(highest)));
    Simd::store_n(out + i, e, count);
    return Simd::keep_n(e, Simd::zero(), count);
  });
}

void sigmoid(const float* x, int64_t n, float* out) {
  const F one = Simd::set1(1.0f);
  for (int64_t i = 0; i < n; i += kWidth) {
    const F e = contract_exp(Simd::negate(Simd::load_n(x + i, n - i)));
    Simd::store_n(out + i, Simd::div(one, Simd::add(one, e)), n - i);
  }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  const float inverse = 1.0f / sqrtf(lane_dot(x, x, n) / float(n) + eps);
  const F factor = Simd::set1(inverse);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    Simd::store(y + i, Simd::mul(Simd::mul(Simd::load(x + i), factor), Simd::load(weight + i)));
  }
  if (i < n) {
    const F scaled = Simd::mul(Simd::load_n(x + i, n - i), factor);
    Simd::store_n(y + i, Simd::mul(scaled, Simd::load_n(weight + i, n - i)), n - i);
  }
}

inline F with_bias(const float* y, const float* bias, int64_t i, int64_t n) {
  const F value = Simd::load_n(y + i, n - i);
  return bias ? Simd::add(value, Simd::load_n(bias + i, n - i)) : value;
}

void store(const float* y, const float* bias, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kWidth) Simd::store_n(out + i, with_bias(y, bias, i, n), n - i);
}

void accumulate(const float* y, const float* bias, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const F before = Simd::load_n(out + i, n - i);
    Simd::store_n(out + i, Simd::add(before, with_bias(y, bias, i, n)), n - i);
  }
}

void silu_multiply(const float* gate, const float* gate_bias, const float* up, const float* up_bias,
                   int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const F g = with_bias(gate, gate_bias, i, n);
    const F one_plus = Simd::add(Simd::set1(1.0f), contract_exp(Simd::negate(g)));
    Simd::store_n(out + i, Simd::mul(Simd::div(g, one_plus), with_bias(up, up_bias, i, n)), n - i);
  }
}

void combine(const float* y, int64_t stride, const int64_t* rows, const float* weights, int64_t count,
             int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kWidth) {
    F total = Simd::mul(Simd::load(y + rows[0] * stride + i), Simd::set1(weights[0]));
    for (int64_t j = 1; j < count; ++j) {
      const F row = Simd::load(y + rows[j] * stride + i);
      total = Simd::add(total, Simd::mul(row, Simd::set1(weights[j])));
    }
    Simd::store_n(out + i, Simd::add(Simd::load_n(out + i, n - i), total), n - i);
  }
}

void rotate(float* x, const float* cosine, const float* sine, int64_t pairs) {
  for (int64_t i = 0; i < pairs; i += kWidth) {
    const int64_t n = pairs - i;
    const F c = Simd::load_n(cosine + i, n), s = Simd::load_n(sine + i, n);
    const F first = Simd::load_n(x + i, n), second = Simd::load_n(x + pairs + i, n);
    Simd::store_n(x + i, Simd::sub(Simd::mul(first, c), Simd::mul(second, s)), n);
    Simd::store_n(x + pairs + i, Simd::add(Simd::mul(second, c), Simd::mul(first, s)), n);
  }
}

// 8 bits: per group s = float16(largest magnitude / 127), codes round-half-even(x * (1 / s)). A group
// that holds NaN or Inf has such a scale, and is read as NaN.
void quantize_cache_row(const float* x, int64_t n, int8_t* codes) {
  for (int64_t first = 0; first < n; first += kCacheGroup) {
    const int64_t end = first + kCacheGroup < n ? first + kCacheGroup : n;
    uint32_t largest = 0;  // Compared as integers, so that NaN counts as the largest.
    for (int64_t i = first; i < end; ++i) {
      const uint32_t magnitude = bits_from_float(x[i]) & 0x7fffffffu;
      largest = largest > magnitude ? largest : magnitude;
    }
    const uint16_t scale = half_from_float(float_from_bits(largest) / 127.0f);
    memcpy(codes + n + 2 * (first / kCacheGroup), &scale, 2);
    const float wide = float_from_half(scale);
    const bool usable = wide > 0.0f && wide <= 65504.0f;
    const float inverse = usable ? 1.0f / wide : 0.0f;
    for (int64_t i = first; i < end; ++i) {
      // Where x is NaN or Inf, the scale is, and the code does not matter.
      const float code = usable ? nearbyintf(x[i] * inverse) : 0.0f;
      codes[i] = (int8_t)(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
    }
  }
}

void store_cache_row(const float* x, int64_t n, CacheType type, void* row) {
  if (type == kCacheInt8) return quantize_cache_row(x, n, (int8_t*)row);
  for (int64_t i = 0; i < n; i += kWidth) {
    const F values = Simd::load_n(x + i, n - i);
    if (type == kCacheFloat16) {
      Simd::store_half_n((uint16_t*)row + i, values, n - i);
    } else {
      Simd::store_n((float*)row + i, values, n - i);
    }
  }
}

}  // namespace
