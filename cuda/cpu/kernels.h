// The raw kernels of one instruction set, as a table of functions. Raw: no checks, no allocation, no
// exceptions, single-threaded; `operations.cpp` splits the work and checked arguments come from
// `bindings.cpp`.
#pragma once

#include "../blocks.h"

namespace localr1 {

// One key/value head's cache rows: [positions, head_dim] contiguous, float16 or float32.
struct CacheRows {
  const void* k;
  const void* v;
  int half;  // 1: float16
};

constexpr int kKeyChunk = 64;      // keys of one step of attention; chunks start at multiples of it
constexpr int kMaxHeadDim = 256;
constexpr int kMaxQueryRows = 96;  // query rows (heads * tokens) of one attention task

// The running softmax of `rows` query rows: maximum and sum [rows], output [rows, padded head dim].
struct SoftmaxState {
  float* maximum;
  float* sum;
  float* output;
};

struct KernelTable {
  const char* name;
  int rows_per_block;

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
  // rows[i] of y [.., kUnitRows].
  void (*combine)(const float* y, const int64_t* rows, const float* weights, int64_t count, int64_t n,
                  float* out);
  // The sum of x[i] * weight[i], products added in 64 lanes as the squares of a norm are.
  float (*lane_dot)(const float* x, const float* weight, int64_t n);
  // out = exp(x - highest); returns the sum of all, added in 64 lanes.
  float (*exp_sum)(const float* x, float highest, int64_t n, float* out);
  // out = 1 / (1 + exp(-x)).
  void (*sigmoid)(const float* x, int64_t n, float* out);
  // Rotates the pairs (i, i + pairs) of x in place.
  void (*rotate)(float* x, const float* cosine, const float* sine, int64_t pairs);
  void (*convert_to_half)(const float* x, int64_t n, uint16_t* out);

  // Attention of `rows` scaled queries [rows, padded head dim] over the keys first..first+63, of
  // which row i sees those before ends[i]; merged into `state`. scratch: attention_scratch floats.
  void (*attend)(const float* queries, const int64_t* ends, int64_t rows, const CacheRows& cache,
                 int64_t head_dim, int64_t first, float* scratch, const SoftmaxState& chunk);
  // state = state combined with chunk, in that order; rows whose chunk is empty keep their state.
  void (*merge)(const SoftmaxState& chunk, int64_t rows, int64_t head_dim, const SoftmaxState& state);
};

// Row stride of queries and outputs: whole vectors of any instruction set.
static inline int64_t padded_head_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

static inline int64_t attention_scratch(int64_t head_dim) {
  return 2 * kKeyChunk * padded_head_dim(head_dim) + kMaxQueryRows * kKeyChunk;
}

const KernelTable* kernels_generic();
#ifdef LOCALR1_X86
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512vnni();
#endif

}  // namespace localr1
