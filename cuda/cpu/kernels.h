// The raw kernels of one instruction set, as a table of functions. Raw: no checks, no allocation, no
// exceptions, single-threaded; `operations.cpp` splits the work and checked arguments come from
// `bindings.cpp`.
#pragma once

#include <math.h>
#include <string.h>

#include "../blocks.h"

namespace localr1 {

// How a row of n values stands in a cache: as float32, as float16, or in 8 bits (kernels/cache_rows.py):
// n codes, then a float16 scale for each kCacheGroup of them.
enum CacheType { kCacheFloat32 = 0, kCacheFloat16 = 1, kCacheInt8 = 2 };
constexpr int kCacheGroup = 32;

static inline int64_t cache_row_bytes(CacheType type, int64_t values) {
  if (type == kCacheInt8) return values + 2 * ((values + kCacheGroup - 1) / kCacheGroup);
  return values * (type == kCacheFloat16 ? 2 : 4);
}

// The scale of group `group` of a row of n values in 8 bits; a row may begin at any byte.
static inline uint16_t cache_scale(const void* row, int64_t values, int64_t group) {
  uint16_t scale;
  memcpy(&scale, static_cast<const char*>(row) + values + 2 * group, 2);
  return scale;
}

// The cache rows of one key/value head, each of row_values values: position p has its key in row p of
// k and its value in row p of v, from the row's beginning; the two may be the same.
struct CacheRows {
  const void* k;
  const void* v;
  CacheType type;
  int64_t key_dim, value_dim, row_values;
};

constexpr int kKeyChunk = 64;      // keys of one step of attention; chunks start at multiples of it
constexpr int kMaxHeadDim = 256;
constexpr int kMaxQueryRows = 96;  // query rows (heads * tokens) of one attention task

// One task of a many-token product: the activations of 64 tokens and the weights of 128 rows both
// stay in the second-level cache (rows * 4096 columns: 256 KiB each).
constexpr int64_t kTaskTiles = 4;
constexpr int64_t kTaskUnits = 4;

// The running softmax of `rows` query rows: maximum and sum [rows], output [rows, padded value dim].
struct SoftmaxState {
  float* maximum;
  float* sum;
  float* output;
};

struct KernelTable {
  const char* name;
  int rows_per_block;

  // Codes of one row block, its `rows` real rows from `codes` on, as on disk.
  void (*place_codes)(const MatrixLayout& layout, const uint8_t* codes, int64_t rows, uint8_t* block);
  // The contract's sums of `blocks` row blocks (at most kUnitRows rows) and one token tile:
  // y [tokens of the tile, kUnitRows].
  void (*product)(const MatrixLayout& layout, const uint8_t* row_block, int64_t blocks,
                  const Activations& a, int64_t tile, float* y);
  // Quantizes x [count * 32] as the groups first..first+count-1 of token `token` of a.
  void (*quantize)(const float* x, int64_t first, int64_t count, const Activations& a, int64_t token);
  // y = x * (1 / sqrt(mean(x^2) + eps)) * weight, in the reference's order; y may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  // out = y + bias; bias may be null.
  void (*store)(const float* y, const float* bias, int64_t n, float* out);
  // out = out + (y + bias).
  void (*accumulate)(const float* y, const float* bias, int64_t n, float* out);
  // out = silu(gate + gate_bias) * (up + up_bias).
  void (*silu_multiply)(const float* gate, const float* gate_bias, const float* up,
                        const float* up_bias, int64_t n, float* out);
  // out = out + (weights[0] * y_0 + weights[1] * y_1 + ...), added from the first on, where y_i is row
  // rows[i] of y [.., stride]; n is a multiple of 16, or the stride leaves whole vectors to read.
  void (*combine)(const float* y, int64_t stride, const int64_t* rows, const float* weights,
                  int64_t count, int64_t n, float* out);
  // The sum of x[i] * weight[i], products added in 64 lanes as the squares of a norm are.
  float (*lane_dot)(const float* x, const float* weight, int64_t n);
  // out = exp(x - highest); returns the sum of all, added in 64 lanes.
  float (*exp_sum)(const float* x, float highest, int64_t n, float* out);
  // out = 1 / (1 + exp(-x)).
  void (*sigmoid)(const float* x, int64_t n, float* out);
  // Rotates the pairs (i, i + pairs) of x in place.
  void (*rotate)(float* x, const float* cosine, const float* sine, int64_t pairs);
  // x [n] -> a row of a cache.
  void (*store_cache_row)(const float* x, int64_t n, CacheType type, void* row);

  // Attention of `rows` scaled queries [rows, padded key dim] over the keys first..first+63, of
  // which row i sees those before ends[i]. scratch: attention_scratch floats.
  void (*attend)(const float* queries, const int64_t* ends, int64_t rows, const CacheRows& cache,
                 int64_t first, float* scratch, const SoftmaxState& chunk);
  // The same over keys and values that stand in memory as attention wants them: keys [key_dim, 64],
  // values [64, padded value dim]. stride: from query to query. scores: rows * 64 floats.
  void (*attend_expanded)(const float* queries, int64_t stride, const int64_t* ends, int64_t rows,
                          const float* keys, const float* values, int64_t key_dim,
                          int64_t value_dim, int64_t first, float* scores,
                          const SoftmaxState& chunk);
  // keys [key_dim, 64] = the transposed keys of positions first..first+count-1, 0 behind them.
  void (*transpose_keys)(const CacheRows& cache, int64_t first, int64_t count, float* keys);
  // out [count, padded columns] = the first `columns` values of the rows first..first+count-1, 0 behind.
  void (*widen_cache)(const CacheRows& cache, int64_t first, int64_t count, int64_t columns,
                      float* out);
  // state = state combined with chunk, in that order; rows whose chunk is empty keep their state.
  void (*merge)(const SoftmaxState& chunk, int64_t rows, int64_t value_dim, const SoftmaxState& state);
  // c [rows, columns] = a [rows, depth] * b [depth, columns] in float32; columns in whole vectors.
  void (*multiply)(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                   int64_t ldc, int64_t rows, int64_t columns);
  // out [rows, padded columns] = b [rows, columns] of type `type`, 0 behind; stride: of b, in values.
  void (*widen_rows)(const void* b, ScaleType type, int64_t rows, int64_t stride, int64_t columns,
                     float* out);
  // c [rows, columns] = a [rows, depth] * b [depth, columns], b contiguous and of type `type`; sums
  // run in index order with fused multiply-adds. lda, ldc: strides of a and c.
  void (*multiply_stored)(const float* a, int64_t lda, int64_t rows, const void* b, ScaleType type,
                          int64_t depth, int64_t columns, float* c, int64_t ldc);
};

// Row stride of queries and outputs: whole vectors of any instruction set.
static inline int64_t padded_head_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

static inline int64_t attention_scratch(int64_t key_dim, int64_t value_dim) {
  return kKeyChunk * (padded_head_dim(key_dim) + padded_head_dim(value_dim)) +
         kMaxQueryRows * kKeyChunk;
}

// Floats of a SoftmaxState of `rows` rows, and one in such memory.
static inline int64_t state_floats(int64_t rows, int64_t value_dim) {
  return rows * (padded_head_dim(value_dim) + 2);
}

static inline SoftmaxState state_at(float* memory, int64_t rows, int64_t value_dim) {
  return {memory + rows * padded_head_dim(value_dim),
          memory + rows * (padded_head_dim(value_dim) + 1), memory};
}

// The state of rows that have seen nothing.
void clear_state(const SoftmaxState& state, int64_t rows, int64_t value_dim);

const KernelTable* kernels_generic();
#ifdef LOCALR1_X86
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512vnni();
#endif

}  // namespace localr1
