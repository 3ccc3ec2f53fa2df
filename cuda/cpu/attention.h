// Softmax attention in chunks of 64 keys, written once over the `Simd` of the including file.
//
// A chunk starts at a multiple of 64 keys, whatever the task, and a row's chunks are merged in
// order, so a row's bits do not depend on the number of threads, on the other rows of its task, nor
// on whether the token came alone or in a prompt. Sums over a head's dimensions and over a chunk's
// keys run in index order with fused multiply-adds (outside the arithmetic contract).
#pragma once

namespace {

// c [rows, kVectors vectors] = a [rows, depth] * b [depth, kVectors vectors].
template <int kTile, int kVectors>
void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                   int64_t ldc) {
  F acc[kTile][kVectors];
  LOCALR1_UNROLL(8)
  for (int i = 0; i < kTile; ++i) {
    LOCALR1_UNROLL(4)
    for (int j = 0; j < kVectors; ++j) acc[i][j] = Simd::zero();
  }
  for (int64_t d = 0; d < depth; ++d) {
    F row[kVectors];
    LOCALR1_UNROLL(4)
    for (int j = 0; j < kVectors; ++j) row[j] = Simd::load(b + d * ldb + j * kWidth);
    LOCALR1_UNROLL(8)
    for (int i = 0; i < kTile; ++i) {
      const F factor = Simd::set1(a[i * lda + d]);
      LOCALR1_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Simd::fma(factor, row[j], acc[i][j]);
    }
  }
  LOCALR1_UNROLL(8)
  for (int i = 0; i < kTile; ++i) {
    LOCALR1_UNROLL(4)
    for (int j = 0; j < kVectors; ++j) Simd::store(c + i * ldc + j * kWidth, acc[i][j]);
  }
}

template <int kVectors>
void multiply_columns(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                      float* c, int64_t ldc, int64_t rows) {
  int64_t i = 0;
  const auto steps = [&](auto kernel, int count) {
    for (; i + count <= rows; i += count) kernel(a + i * lda, lda, b, ldb, depth, c + i * ldc, ldc);
  };
  steps(multiply_tile<Simd::kTileRows, kVectors>, Simd::kTileRows);
  steps(multiply_tile<Simd::kTileRows / 2, kVectors>, Simd::kTileRows / 2);
  steps(multiply_tile<1, kVectors>, 1);
}

// c [rows, columns] = a [rows, depth] * b [depth, columns]; columns in whole vectors.
void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
              int64_t ldc, int64_t rows, int64_t columns) {
  int64_t j = 0;
  for (; j + Simd::kTileVectors * kWidth <= columns; j += Simd::kTileVectors * kWidth) {
    multiply_columns<Simd::kTileVectors>(a, lda, b + j, ldb, depth, c + j, ldc, rows);
  }
  for (; j < columns; j += kWidth) {
    multiply_columns<1>(a, lda, b + j, ldb, depth, c + j, ldc, rows);
  }
}

// Values d..d+kWidth-1 of row `row`, of which n are there; d is a multiple of kWidth, so that they
// have one scale.
inline F load_cache(const void* rows, const CacheRows& cache, int64_t row, int64_t d, int64_t n) {
  const char* begin = (const char*)rows + row * cache_row_bytes(cache.type, cache.row_values);
  switch (cache.type) {
    case kCacheFloat16:
      return Simd::load_half_n((const uint16_t*)begin + d, n);
    case kCacheInt8: {
      const uint16_t scale = cache_scale(begin, cache.row_values, d / kCacheGroup);
      return Simd::mul(Simd::load_int8_n((const int8_t*)begin + d, n),
                       Simd::set1(float_from_half(scale)));
    }
    default:
      return Simd::load_n((const float*)begin + d, n);
  }
}

// keys [key_dim, 64] = the transposed cache rows first..first+count-1; columns past count are 0.
void transpose_keys(const CacheRows& cache, int64_t first, int64_t count, float* keys) {
  const int64_t head_dim = cache.key_dim;
  for (int64_t key = 0; key < kKeyChunk; key += kWidth) {
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      F block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        block[i] = key + i < count
                       ? load_cache(cache.k, cache, first + key + i, d, head_dim - d)
                       : Simd::zero();
      }
      Simd::transpose(block);
      for (int i = 0; i < kWidth && d + i < head_dim; ++i) {
        Simd::store(keys + (d + i) * kKeyChunk + key, block[i]);
      }
    }
  }
}

void widen_cache(const CacheRows& cache, int64_t first, int64_t count, int64_t columns, float* out) {
  const int64_t padded = padded_head_dim(columns);
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t d = 0; d < padded; d += kWidth) {
      const F values = d < columns ? load_cache(cache.v, cache, first + row, d, columns - d) : Simd::zero();
      Simd::store(out + row * padded + d, values);
    }
  }
}

// scores [64] -> their exponentials, 0 from `count` on; writes the maximum and the sum.
inline void exponentials(float* scores, int64_t count, float* maximum, float* sum) {
  F largest = Simd::set1(float_from_bits(0xff800000u));
  for (int64_t i = 0; i < count; i += kWidth) {
    const F s = Simd::load(scores + i);
    largest = Simd::max(Simd::keep_n(s, largest, count - i), largest);
  }
  const float top = Simd::reduce_max(largest);
  F total = Simd::zero();
  for (int64_t i = 0; i < kKeyChunk; i += kWidth) {
    const int64_t n = count - i;
    F e = Simd::zero();
    if (n > 0) e = Simd::keep_n(contract_exp(Simd::sub(Simd::load(scores + i), Simd::set1(top))), e, n);
    total = Simd::add(total, e);
    Simd::store(scores + i, e);
  }
  *maximum = top;
  *sum = Simd::reduce_add(total);
}

void attend_expanded(const float* queries, int64_t stride, const int64_t* ends, int64_t rows,
                     const float* keys, const float* values, int64_t key_dim, int64_t value_dim,
                     int64_t first, float* scores, const SoftmaxState& chunk) {
  const int64_t padded = padded_head_dim(value_dim);
  int64_t count = 0;  // keys of the chunk that any row sees
  for (int64_t row = 0; row < rows; ++row) count = ends[row] - first > count ? ends[row] - first : count;
  count = count < kKeyChunk ? count : kKeyChunk;
  multiply(queries, stride, keys, kKeyChunk, key_dim, scores, kKeyChunk, rows,
           (count + kWidth - 1) / kWidth * kWidth);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t seen = ends[row] - first;
    if (seen > 0) {
      exponentials(scores + row * kKeyChunk, seen < kKeyChunk ? seen : kKeyChunk,
                   chunk.maximum + row, chunk.sum + row);
    } else {
      for (int64_t i = 0; i < kKeyChunk; ++i) scores[row * kKeyChunk + i] = 0.0f;
      chunk.maximum[row] = 0.0f;
      chunk.sum[row] = 0.0f;  // empty
    }
  }
  multiply(scores, kKeyChunk, values, padded, count, chunk.output, padded, rows, padded);
}

void attend(const float* queries, const int64_t* ends, int64_t rows, const CacheRows& cache,
            int64_t first, float* scratch, const SoftmaxState& chunk) {
  const int64_t padded_key = padded_head_dim(cache.key_dim);
  const int64_t value_dim = cache.value_dim, padded = padded_head_dim(value_dim);
  float* keys = scratch;
  float* values = keys + kKeyChunk * padded_key;
  float* scores = values + kKeyChunk * padded;
  int64_t count = 0;  // keys of the chunk that any row sees
  for (int64_t row = 0; row < rows; ++row) count = ends[row] - first > count ? ends[row] - first : count;
  count = count < kKeyChunk ? count : kKeyChunk;
  transpose_keys(cache, first, count, keys);
  for (int64_t key = 0; key < count; ++key) {
    for (int64_t d = 0; d < padded; d += kWidth) {
      const F v = d < value_dim
                      ? load_cache(cache.v, cache, first + key, d, value_dim - d)
                      : Simd::zero();
      Simd::store(values + key * padded + d, v);
    }
  }
  attend_expanded(queries, padded_key, ends, rows, keys, values, cache.key_dim, value_dim, first,
                  scores, chunk);
}

void merge(const SoftmaxState& chunk, int64_t rows, int64_t value_dim, const SoftmaxState& state) {
  const int64_t padded = padded_head_dim(value_dim);
  for (int64_t row = 0; row < rows; row += kWidth) {
    const int64_t n = rows - row < kWidth ? rows - row : kWidth;
    const F before = Simd::load_n(state.maximum + row, n), now = Simd::load_n(chunk.maximum + row, n);
    const F largest = Simd::max(before, now);
    float keep[kWidth], take[kWidth], maximum[kWidth];
    Simd::store(keep, contract_exp(Simd::sub(before, largest)));
    Simd::store(take, contract_exp(Simd::sub(now, largest)));
    Simd::store(maximum, largest);
    for (int64_t i = 0; i < n; ++i) {
      const float part = chunk.sum[row + i];
      if (part == 0.0f) continue;  // the row sees no key of the chunk
      state.maximum[row + i] = maximum[i];
      state.sum[row + i] = state.sum[row + i] * keep[i] + part * take[i];
      float* output = state.output + (row + i) * padded;
      const float* added = chunk.output + (row + i) * padded;
      const F keep_factor = Simd::set1(keep[i]), take_factor = Simd::set1(take[i]);
      for (int64_t d = 0; d < padded; d += kWidth) {
        const F kept = Simd::mul(Simd::load(output + d), keep_factor);
        Simd::store(output + d, Simd::fma(Simd::load(added + d), take_factor, kept));
      }
    }
  }
}

template <ScaleType kType>
inline F load_stored(const void* b, int64_t index, int64_t n) {
  if (kType == kBfloat16) return Simd::load_bfloat16_n((const uint16_t*)b + index, n);
  if (kType == kFloat16) return Simd::load_half_n((const uint16_t*)b + index, n);
  return Simd::load_n((const float*)b + index, n);
}

// kRows rows of c, kVectors vectors from column `first` on, of which the last may be cut.
template <ScaleType kType, int kTileRows, int kVectors>
void multiply_stored_tile(const float* a, int64_t lda, const void* b, int64_t depth, int64_t columns,
                          int64_t first, float* c, int64_t ldc) {
  F acc[kTileRows][kVectors];
  // A constant where it can be: a mask made anew for each vector takes longer than its product.
  const int64_t valid = kVectors > 1 ? kWidth : columns - first;
  LOCALR1_UNROLL(4)
  for (int i = 0; i < kTileRows; ++i) {
    LOCALR1_UNROLL(8)
    for (int j = 0; j < kVectors; ++j) acc[i][j] = Simd::zero();
  }
  for (int64_t d = 0; d < depth; ++d) {
    F row[kVectors];
    LOCALR1_UNROLL(8)
    for (int j = 0; j < kVectors; ++j) {
      row[j] = load_stored<kType>(b, d * columns + first + j * kWidth, valid);
    }
    LOCALR1_UNROLL(4)
    for (int i = 0; i < kTileRows; ++i) {
      const F factor = Simd::set1(a[i * lda + d]);
      LOCALR1_UNROLL(8)
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Simd::fma(factor, row[j], acc[i][j]);
    }
  }
  LOCALR1_UNROLL(4)
  for (int i = 0; i < kTileRows; ++i) {
    LOCALR1_UNROLL(8)
    for (int j = 0; j < kVectors; ++j) {
      Simd::store_n(c + i * ldc + first + j * kWidth, acc[i][j], valid);
    }
  }
}

template <ScaleType kType, int kVectors>
void multiply_stored_columns(const float* a, int64_t lda, int64_t rows, const void* b, int64_t depth,
                             int64_t columns, int64_t first, float* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2) {
    multiply_stored_tile<kType, 2, kVectors>(a + i * lda, lda, b, depth, columns, first, c + i * ldc,
                                             ldc);
  }
  if (i < rows) {
    multiply_stored_tile<kType, 1, kVectors>(a + i * lda, lda, b, depth, columns, first, c + i * ldc,
                                             ldc);
  }
}

template <ScaleType kType>
void multiply_stored_of(const float* a, int64_t lda, int64_t rows, const void* b, int64_t depth,
                        int64_t columns, float* c, int64_t ldc) {
  constexpr int kVectors = 2 * Simd::kTileVectors;
  int64_t first = 0;
  for (; first + kVectors * kWidth <= columns; first += kVectors * kWidth) {
    multiply_stored_columns<kType, kVectors>(a, lda, rows, b, depth, columns, first, c, ldc);
  }
  for (; first < columns; first += kWidth) {
    multiply_stored_columns<kType, 1>(a, lda, rows, b, depth, columns, first, c, ldc);
  }
}

void multiply_stored(const float* a, int64_t lda, int64_t rows, const void* b, ScaleType type,
                     int64_t depth, int64_t columns, float* c, int64_t ldc) {
  switch (type) {
    case kBfloat16:
      return multiply_stored_of<kBfloat16>(a, lda, rows, b, depth, columns, c, ldc);
    case kFloat16:
      return multiply_stored_of<kFloat16>(a, lda, rows, b, depth, columns, c, ldc);
    case kFloat32:
      return multiply_stored_of<kFloat32>(a, lda, rows, b, depth, columns, c, ldc);
  }
}

template <ScaleType kType>
void widen_rows_of(const void* b, int64_t rows, int64_t stride, int64_t columns, float* out) {
  const int64_t padded = padded_head_dim(columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < padded; i += kWidth) {
      const F values = i < columns ? load_stored<kType>(b, row * stride + i, columns - i) : Simd::zero();
      Simd::store(out + row * padded + i, values);
    }
  }
}

void widen_rows(const void* b, ScaleType type, int64_t rows, int64_t stride, int64_t columns,
                float* out) {
  switch (type) {
    case kBfloat16:
      return widen_rows_of<kBfloat16>(b, rows, stride, columns, out);
    case kFloat16:
      return widen_rows_of<kFloat16>(b, rows, stride, columns, out);
    case kFloat32:
      return widen_rows_of<kFloat32>(b, rows, stride, columns, out);
  }
}

}  // namespace
