// The operations of localr1/kernels/api.py on raw pointers: splits each over the threads of a pool and
// joins the steps of a block in one call. Sizes are checked by the caller (bindings.cpp).
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace localr1 {

struct Matrix {
  MatrixLayout layout;
  std::shared_ptr<uint8_t> data;
};

// A matrix as on disk: codes row-major, little end first, zero points or null.
struct PackedSource {
  const uint8_t* codes;  // [rows, columns * bits / 8]
  const uint8_t* scales;  // [rows, columns / group] of the layout's scale type
  const int8_t* zeros;    // [rows, columns / group]
};

struct Linear {
  const Matrix* matrix;
  const float* bias;  // [rows] or null
};

struct Rope {
  const float* cosine;  // [positions, pairs]
  const float* sine;
  int64_t pairs;
};

struct Heads {
  int64_t query, key_value, dim;
};

// keys, values [key/value heads, capacity, a row of dim values].
struct Cache {
  void* keys;
  void* values;
  int64_t capacity;
  CacheType type;
};

struct HeadNorms {
  const float* query;  // [dim] or null
  const float* key;
  float eps;
};

struct AttentionBlock {
  const float* norm;
  Linear query, key, value, output;
  HeadNorms head_norms;
  Heads heads;
  float scale;
};

struct MlpBlock {
  const float* norm;
  Linear gate, up, down;
  float eps;
};

// Latent attention: the sizes and names of kernels/api.py, LatentWeights.
struct LatentBlock {
  const float* norm;
  Linear query_down;  // its matrix may be null: then query reads the hidden state
  const float* query_norm;
  Linear query, kv_down, output;
  const float* latent_norm;
  const void* key_up;    // [heads, key, latent]
  const void* value_up;  // [heads, latent, value]
  ScaleType up_type;
  int64_t heads, key_size, rope_size, value_size, latent_size;
  float eps, latent_eps, scale;
};

// rows [capacity, a row of latent + rope values].
struct LatentRows {
  void* rows;
  int64_t capacity;
  CacheType type;
};

// The experts of a mixture, wherever they lie: data[i] is expert i, expert_bytes(layout) long, or null
// where it is not in memory.
struct Experts {
  ExpertLayout layout;
  const uint8_t* const* data;
  int64_t count;
};

// Which experts each token goes to: chosen [tokens, per_token], the first in column 0; a negative one is
// computed elsewhere.
struct Choice {
  const int64_t* chosen;
  int64_t tokens, per_token;
};

// kernels/api.py: RouterRule. weight [experts, hidden]; bias [experts] or null.
struct RouterRule {
  const float* weight;
  const float* bias;
  int64_t experts, per_token, groups, kept_groups;
  int group_score;  // judged by the best expert (1) or the sum of the best two (2)
  bool softmax, normalized;
  float epsilon, scale;
};

class Operations {
 public:
  Operations(const KernelTable& table, int threads) : table_(table), pool_(threads) {}

  const KernelTable& table() const { return table_; }
  int threads() const { return pool_.size(); }

  Matrix prepare(const MatrixLayout& layout, const PackedSource& source);
  // Reorders a matrix into data, which has room for matrix_bytes(layout), by all threads of the pool.
  void place(const MatrixLayout& layout, const PackedSource& source, uint8_t* data);
  // The row blocks first..end-1 of it, in the calling thread.
  void place_blocks(const MatrixLayout& layout, const PackedSource& source, int64_t first, int64_t end,
                    uint8_t* data) const;

  void quantize(const float* x, int64_t tokens, int64_t columns, int8_t* q, float* scale);
  void rms_norm(const float* x, const float* weight, float eps, int64_t tokens, int64_t size, float* y);
  // out [tokens, sum of rows]; norm may be null.
  void linear(const float* x, int64_t tokens, const float* norm, float eps,
              const std::vector<Linear>& parts, float* out);
  void linear_add(const float* x, int64_t tokens, const Linear& part, float* residual);
  void gate_up(const float* x, int64_t tokens, const Matrix& gate, const Matrix& up, float* out);
  void embedding(const int64_t* ids, int64_t tokens, const Matrix& matrix, float* out);
  void rope_append(const float* qkv, int64_t tokens, const Heads& heads, const HeadNorms& norms,
                   const Rope& rope, const Cache& cache, int64_t start, float* q);
  void attention(const float* q, int64_t tokens, const Heads& heads, const Cache& cache, int64_t start,
                 float scale, float* out);
  void attention_block(float* x, int64_t tokens, const AttentionBlock& block, const Rope& rope,
                       const Cache& cache, int64_t start);
  void mlp_block(float* x, int64_t tokens, const MlpBlock& block);
  void latent_block(float* x, int64_t tokens, const LatentBlock& block, const Rope& rope,
                    const LatentRows& cache, int64_t start);
  // chosen, weights [tokens, rule.per_token], written.
  void route(const float* x, int64_t tokens, int64_t hidden, const RouterRule& rule, int64_t* chosen,
             float* weights);
  // residual [tokens, hidden] += the chosen experts of x, weighted (weights [tokens, per_token]) and
  // summed in the router's order. Every chosen expert must be in memory.
  void mix_experts(const float* x, const Choice& choice, const float* weights, const Experts& experts,
                   float* residual);
  // outputs [tokens, per_token, hidden]: those of the choices that are not negative, unweighted.
  void expert_outputs(const float* x, const Choice& choice, const Experts& experts, float* outputs);
  // residual [tokens, hidden] += outputs weighted and summed: the second half of mix_experts.
  void combine_experts(const float* outputs, const float* weights, int64_t tokens, int64_t per_token,
                       int64_t hidden, float* residual);

 private:
  template <class Finish>
  void run_mixture(const float* x, const Choice& choice, const Experts& experts, const Finish& finish);

  const KernelTable& table_;
  Pool pool_;
  Arena arena_;
  Workspace workspace_;
  std::mutex mutex_;  // one operation at a time uses the workspace
};

}  // namespace localr1
