// Codes and scales of groups of weights, written once over the `Simd` of the including file. A vector
// lane owns a group, so every sum of a group runs in one lane, in the same order for every width.
#pragma once

namespace {

using namespace localr1;

// kWidth groups side by side: value k of the group in lane j is at [k * kWidth + j].
using Lanes = float[kMaxWeightGroup * kWidth];

struct Tile {
  alignas(64) Lanes weights;
  alignas(64) Lanes importance;
  alignas(64) Lanes weighted;  // importance * weight
  alignas(64) Lanes codes[2];
};

// x + 1.5 * 2^23 rounds x half to even, for |x| < 2^22, and its lowest bits are those of the code.
constexpr float kMagic = 12582912.0f;
constexpr float kInfinity = HUGE_VALF, kSmallest = 1.40129846e-45f, kSmallestNormal = 1.17549435e-38f;

// Codes of no less than `least` and no more than `most`.
struct Ends {
  float least, most;

  explicit Ends(int bits) : least(-float(1 << (bits - 1))), most(-least - 1.0f) {}
};

inline F magnitude(F x) { return Simd::max(x, Simd::negate(x)); }

// The nearest code; beyond 2^22 the sum is not exact, but on the right side of the ends. NaN passes.
// kLow, kHigh: whether x may lie beyond the least code, or the greatest.
template <bool kLow = true, bool kHigh = true>
inline F nearest_code(F x, const Ends& ends) {
  const F magic = Simd::set1(kMagic);
  F sum = Simd::add(x, magic);
  if (kLow) sum = Simd::max(Simd::set1(kMagic + ends.least), sum);
  if (kHigh) sum = Simd::min(Simd::set1(kMagic + ends.most), sum);
  return Simd::sub(sum, magic);
}

struct PhaseSum {
  F phase[kSumPhases];

  PhaseSum() {
    LOCALR1_UNROLL(4)
    for (int j = 0; j < kSumPhases; ++j) phase[j] = Simd::zero();
  }
  F total() const { return Simd::add(Simd::add(phase[0], phase[2]), Simd::add(phase[1], phase[3])); }
};

// <weight, codes> and <codes, codes>, each product times the importance.
struct Dots {
  F dot, square;
};

template <bool kWeighted>
struct DotSums {
  PhaseSum dot, square;

  void add(const Tile& tile, int k, int j, F weight, F code) {
    if (kWeighted) {
      const F heavy = Simd::mul(Simd::load(tile.importance + k * kWidth), code);
      const F product = Simd::mul(Simd::load(tile.weighted + k * kWidth), code);
      dot.phase[j] = Simd::add(dot.phase[j], product);
      square.phase[j] = Simd::add(square.phase[j], Simd::mul(heavy, code));
    } else {
      dot.phase[j] = Simd::add(dot.phase[j], Simd::mul(weight, code));
      // Sums of integers below 2^24 are exact, fused or not.
      square.phase[j] = Simd::fma(code, code, square.phase[j]);
    }
  }
  Dots total() const {
    const F least = Simd::set1(kWeighted ? kSmallestNormal : 1.0f);
    return {dot.total(), Simd::max(least, square.total())};  // NaN passes
  }
};

template <bool kWeighted, bool kLow, bool kHigh>
Dots candidate(const Tile& tile, int group, F factor, const Ends& ends) {
  DotSums<kWeighted> sums;
  for (int first = 0; first < group; first += kSumPhases) {
    LOCALR1_UNROLL(4)
    for (int j = 0; j < kSumPhases; ++j) {
      const F weight = Simd::load(tile.weights + (first + j) * kWidth);
      sums.add(tile, first + j, j, weight, nearest_code<kLow, kHigh>(Simd::mul(weight, factor), ends));
    }
  }
  return sums.total();
}

// The sums of one candidate, without the ends of the codes that no weight of it reaches: a fifth of the
// work. position: where the largest weight comes to lie, but for three roundings; unless is_bounded
// not even that is known.
template <bool kWeighted>
Dots candidate_at(const Tile& tile, int group, F factor, float position, bool is_bounded, const Ends& ends) {
  const float reach = is_bounded ? fabsf(position) + 0.01f : kInfinity;
  if (reach > -ends.least + 0.5f) return candidate<kWeighted, true, true>(tile, group, factor, ends);
  if (reach > ends.most + 0.5f) return candidate<kWeighted, false, true>(tile, group, factor, ends);
  return candidate<kWeighted, false, false>(tile, group, factor, ends);
}

// The least-squares scale of the best candidate; 0 where the group is zero.
template <bool kWeighted>
F search(const Tile& tile, const Rounding& rounding, const Ends& ends) {
  F high = Simd::load(tile.weights), low = high;
  for (int k = 1; k < rounding.group; ++k) {
    const F weight = Simd::load(tile.weights + k * kWidth);
    high = Simd::max(high, weight);
    low = Simd::min(low, weight);
  }
  const F zero = Simd::zero(), one = Simd::set1(1.0f);
  const F lowest = Simd::negate(low);
  const F extreme = Simd::greater(lowest, high, low, high);
  F per_weight = Simd::div(one, extreme);
  // 1 / extreme overflows below 2^-128: such a group is treated as zero.
  per_weight = Simd::greater(Simd::set1(kInfinity), magnitude(per_weight), per_weight, zero);
  // Times a position it may overflow all the same, and weights with it.
  const bool is_bounded = Simd::reduce_max(magnitude(per_weight)) < 1e36f;
  F best_gain = zero, best_dot = zero, best_square = one;
  for (int64_t i = 0; i < rounding.num_positions; ++i) {
    const float position = rounding.positions[i];
    const F factor = Simd::mul(per_weight, Simd::set1(position));
    const Dots sums = candidate_at<kWeighted>(tile, rounding.group, factor, position, is_bounded, ends);
    const F gain = Simd::div(Simd::mul(sums.dot, sums.dot), sums.square);
    best_dot = Simd::greater(gain, best_gain, sums.dot, best_dot);
    best_square = Simd::greater(gain, best_gain, sums.square, best_square);
    best_gain = Simd::greater(gain, best_gain, gain, best_gain);
  }
  return Simd::div(best_dot, best_square);
}

struct Assigned {
  Dots sums;
  F error;   // sum of squares
  F choice;  // the same, each times the importance
};

template <bool kWeighted>
Assigned assign(const Tile& tile, int group, F scale, const Ends& ends, float* codes) {
  DotSums<kWeighted> sums;
  PhaseSum error, choice;
  const F negative = Simd::negate(scale);
  for (int first = 0; first < group; first += kSumPhases) {
    LOCALR1_UNROLL(4)
    for (int j = 0; j < kSumPhases; ++j) {
      const int k = first + j;
      const F weight = Simd::load(tile.weights + k * kWidth);
      const F code = nearest_code(Simd::div(weight, scale), ends);
      Simd::store(codes + k * kWidth, code);
      sums.add(tile, k, j, weight, code);
      const F left = Simd::add(Simd::mul(code, negative), weight);
      error.phase[j] = Simd::add(error.phase[j], Simd::mul(left, left));
      if (kWeighted) {
        const F heavy = Simd::mul(Simd::load(tile.importance + k * kWidth), left);
        choice.phase[j] = Simd::add(choice.phase[j], Simd::mul(heavy, left));
      }
    }
  }
  const F total = error.total();
  return {sums.total(), total, kWeighted ? choice.total() : total};
}

inline F rounded_to(ScaleType type, F x) {
  if (type == kFloat16) {
    uint16_t halves[kWidth];
    Simd::store_half_n(halves, x, kWidth);
    return Simd::load_half(halves);
  }
  float values[kWidth];
  Simd::store(values, x);
  for (int j = 0; j < kWidth; ++j) {
    const uint32_t bits = bits_from_float(values[j]);
    values[j] = float_from_bits((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  }
  return Simd::load(values);
}

// As it will be read back: never zero, subnormal or infinite. NaN passes.
inline F storable(ScaleType type, F scale) {
  const F tiny = Simd::set1(type == kFloat16 ? 6.103515625e-05f : kSmallestNormal);
  const F largest = Simd::set1(type == kFloat16 ? 65504.0f : 3.38953139e38f);
  const F size = magnitude(scale);
  const F least = Simd::greater(scale, Simd::zero(), tiny, Simd::negate(tiny));
  F usable = Simd::greater(tiny, size, least, scale);
  usable = rounded_to(type, Simd::min(largest, Simd::max(Simd::negate(largest), usable)));
  return Simd::greater(Simd::set1(kSmallest), size, Simd::set1(1.0f), usable);
}

// E4M3 has float16's sign and three of its mantissa bits, with an exponent that is 8 smaller.
inline void widen_fp8(const uint8_t* codes, int64_t count, float scale, float* out) {
  uint16_t halves[kMaxWeightGroup];
  int has_nan = 0;
  for (int64_t i = 0; i < count; ++i) {
    halves[i] = uint16_t((codes[i] & 0x80) << 8 | (codes[i] & 0x7f) << 7);
    has_nan |= (codes[i] & 0x7f) == 0x7f;
  }
  const F bias = Simd::set1(256.0f), factor = Simd::set1(scale);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    Simd::store(out + i, Simd::mul(Simd::mul(Simd::load_half(halves + i), bias), factor));
  }
  if (i < count) {  // a block's last columns, where its width is no multiple of 16
    const F value = Simd::mul(Simd::load_half_n(halves + i, count - i), bias);
    Simd::store_n(out + i, Simd::mul(value, factor), count - i);
  }
  if (!has_nan) return;
  for (int64_t i = 0; i < count; ++i) {
    if ((codes[i] & 0x7f) == 0x7f) out[i] = kInfinity - kInfinity;
  }
}

// The weights of group `index` of all the source's.
inline void widen(const WeightRows& source, int group, int64_t index, float* out) {
  const int64_t begin = index * group;
  switch (source.type) {
    case kWeightFloat32:
      memcpy(out, static_cast<const float*>(source.values) + begin, size_t(group) * sizeof(float));
      return;
    case kWeightFloat16:
      for (int i = 0; i < group; i += kWidth) {
        Simd::store(out + i, Simd::load_half(static_cast<const uint16_t*>(source.values) + begin + i));
      }
      return;
    case kWeightBfloat16:
      for (int i = 0; i < group; i += kWidth) {
        const uint16_t* values = static_cast<const uint16_t*>(source.values) + begin + i;
        Simd::store(out + i, Simd::load_bfloat16_n(values, kWidth));
      }
      return;
    case kWeightFp8:
      break;
  }
  const int64_t row = source.first_row + begin / source.columns;
  const float* scales = source.block_scales + row / source.block_rows * source.scale_columns;
  for (int64_t column = begin % source.columns, done = 0; done < group;) {
    const int64_t block = column / source.block_columns;
    const int64_t left = (block + 1) * source.block_columns - column;
    const int64_t count = left < group - done ? left : group - done;
    widen_fp8(static_cast<const uint8_t*>(source.values) + begin + done, count, scales[block], out + done);
    column += count;
    done += count;
  }
}

inline double sum_of_squares(const float* x, int group) {
  double sums[kSumPhases] = {};
  for (int i = 0; i < group; i += kSumPhases) {
    LOCALR1_UNROLL(4)
    for (int j = 0; j < kSumPhases; ++j) sums[j] = sums[j] + double(x[i + j]) * double(x[i + j]);
  }
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

inline void transpose_rows(const float (*rows)[kMaxWeightGroup], int group, float* lanes) {
  F block[kWidth];
  for (int first = 0; first < group; first += kWidth) {
    LOCALR1_UNROLL(16)
    for (int j = 0; j < kWidth; ++j) block[j] = Simd::load(rows[j] + first);
    Simd::transpose(block);
    LOCALR1_UNROLL(16)
    for (int j = 0; j < kWidth; ++j) Simd::store(lanes + (first + j) * kWidth, block[j]);
  }
}

// The codes of `lanes` groups, of the second assignment where its error is below `first`. Code i of a
// group begins at bit i * bits, so that one of 5 or 6 bits may lie in two words; a group ends with one.
inline void pack(const Tile& tile, const Rounding& rounding, F second, F first, int64_t lanes,
                 uint32_t* packed) {
  const int words = rounding.group * rounding.bits / 32;
  const uint32_t mask = (1u << rounding.bits) - 1;
  const F stored = Simd::set1(kMagic + float(1 << (rounding.bits - 1)));
  uint64_t bits[kWidth] = {};
  for (int i = 0, held = 0, word = 0; i < rounding.group; ++i) {
    const int at = i * kWidth;
    const F code = Simd::greater(first, second, Simd::load(tile.codes[1] + at), Simd::load(tile.codes[0] + at));
    float sums[kWidth];
    Simd::store(sums, Simd::add(code, stored));
    for (int j = 0; j < kWidth; ++j) bits[j] |= uint64_t(bits_from_float(sums[j]) & mask) << held;
    held += rounding.bits;
    if (held < 32) continue;
    for (int64_t j = 0; j < lanes; ++j) packed[j * words + word] = uint32_t(bits[j]);
    for (int j = 0; j < kWidth; ++j) bits[j] >>= 32;
    held -= 32;
    ++word;
  }
}

inline void store_scales(ScaleType type, F scale, int64_t lanes, uint16_t* out) {
  if (type == kFloat16) return Simd::store_half_n(out, scale, lanes);
  float values[kWidth];
  Simd::store(values, scale);
  for (int64_t j = 0; j < lanes; ++j) out[j] = uint16_t(bits_from_float(values[j]) >> 16);
}

template <bool kWeighted>
void quantize_groups(const WeightRows& source, const Rounding& rounding, int64_t first, int64_t count,
                     const QuantizedRows& out) {
  const int group = rounding.group;
  const int64_t groups = source.columns / group, last = (first + count) * groups;
  const Ends ends(rounding.bits);
  Tile tile;
  alignas(64) float rows[kWidth][kMaxWeightGroup];
  double energy[kWidth];
  for (int64_t row = first; row < first + count; ++row) out.error[row] = out.energy[row] = 0.0;
  for (int64_t begin = first * groups; begin < last; begin += kWidth) {
    const int64_t lanes = last - begin < kWidth ? last - begin : kWidth;
    if (lanes < kWidth) memset(rows, 0, sizeof(rows));
    for (int64_t j = 0; j < lanes; ++j) {
      widen(source, group, begin + j, rows[j]);
      energy[j] = sum_of_squares(rows[j], group);
    }
    transpose_rows(rows, group, tile.weights);
    if (kWeighted) {
      for (int64_t j = 0; j < lanes; ++j) {
        const float* importance = rounding.importance + (begin + j) % groups * group;
        memcpy(rows[j], importance, size_t(group) * sizeof(float));
      }
      transpose_rows(rows, group, tile.importance);
      for (int i = 0; i < group * kWidth; i += kWidth) {
        const F heavy = Simd::mul(Simd::load(tile.importance + i), Simd::load(tile.weights + i));
        Simd::store(tile.weighted + i, heavy);
      }
    }
    F scale = storable(rounding.scale_type, search<kWeighted>(tile, rounding, ends));
    const Assigned one = assign<kWeighted>(tile, group, scale, ends, tile.codes[0]);
    const F refit = storable(rounding.scale_type, Simd::div(one.sums.dot, one.sums.square));
    const Assigned two = assign<kWeighted>(tile, group, refit, ends, tile.codes[1]);
    const F infinity = Simd::set1(kInfinity);
    const F limit = Simd::greater(infinity, one.choice, one.choice, infinity);  // NaN is the worst
    scale = Simd::greater(limit, two.choice, refit, scale);
    pack(tile, rounding, two.choice, limit, lanes, out.packed + begin * group * rounding.bits / 32);
    store_scales(rounding.scale_type, scale, lanes, out.scale + begin);
    float errors[kWidth];
    Simd::store(errors, Simd::greater(limit, two.choice, two.error, one.error));
    for (int64_t j = 0; j < lanes; ++j) {
      const int64_t row = (begin + j) / groups;
      out.error[row] += double(errors[j]);
      out.energy[row] += energy[j];
    }
  }
}

void quantize_weights(const WeightRows& source, const Rounding& rounding, int64_t first, int64_t count,
                      const QuantizedRows& out) {
  if (rounding.importance) return quantize_groups<true>(source, rounding, first, count, out);
  quantize_groups<false>(source, rounding, first, count, out);
}

}  // namespace
