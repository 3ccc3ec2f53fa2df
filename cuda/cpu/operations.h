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

// keys, values [key/value heads, capacity, dim], float16 or float32.
struct Cache {
  void* keys;
  void* values;
  int64_t capacity;
  int half;
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

// rows [capacity, latent + rope], float16 or float32.
struct LatentRows {
  void* rows;
  int64_t capacity;
  int half;
};

// The experts of a mixture, one after another: expert i starts at i * expert_bytes(layout).
struct Experts {
  ExpertLayout layout;
  int64_t count;
  std::shared_ptr<uint8_t> data;

  uint8_t* expert(int64_t index) const { return data.get() + index * expert_bytes(layout); }
};

// Which experts each token goes to: chosen, weights [tokens, per_token], the first in column 0.
struct Choice {
  const int64_t* chosen;
  const float* weights;
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
  // Room for so many experts, to be filled with `place`.
  static Experts make_experts(const ExpertLayout& layout, int64_t count);
  // Reorders a matrix into data, which has room for matrix_bytes(layout).
  void place(const MatrixLayout& layout, const PackedSource& source, uint8_t* data);

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
  // residual [tokens, hidden] += the chosen experts of x, weighted and summed in the router's order.
  void mix_experts(const float* x, const Choice& choice, const Experts& experts, float* residual);

 private:
  const KernelTable& table_;
  Pool pool_;
  Arena arena_;
  Workspace workspace_;
  std::mutex mutex_;  // one operation at a time uses the workspace
};

}  // namespace localr1
