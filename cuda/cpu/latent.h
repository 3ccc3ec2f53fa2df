// Multi-head latent attention (localr1/layers/mla.py): the steps of one call, each taken by every
// thread of a team. Two forms of the same product over the same cache, and the cheaper one is taken:
//
// absorbed: queries are carried into the latent's space, where the cached latent is key and value of
//   all heads at once. A row is one head of one token. For few tokens.
// expanded: every head's keys and values are computed from the latents, a chunk of positions at a
//   time, for all the tokens of a task. For a prompt.
#pragma once

#include "operations.h"
#include "units.h"

namespace localr1 {

class LatentCall {
 public:
  LatentCall(const KernelTable& table, const LatentBlock& block, const Rope& rope,
             const LatentRows& cache, int64_t tokens, int64_t start, int threads);

  bool expanded() const { return expanded_; }
  int64_t query_size() const { return b_.key_size + b_.rope_size; }
  // Floats of the temporaries that all threads share, and of those of each.
  int64_t in_latent_floats() const { return expanded_ ? 0 : rows_ * latent_query_size(); }
  int64_t sum_floats() const { return expanded_ ? 0 : rows_ * sum_size(); }
  int64_t partial_floats() const;
  int64_t thread_floats() const;

  // down [tokens, stride]: the latent and the key's rotated part, before norm and rope -> the cache.
  void append(Team& team, const float* down, int64_t stride, float* row) const;

  // Absorbed. queries [tokens, stride], of which heads * (key + rope) count and are overwritten ->
  // in_latent [rows, latent_query_size()], scaled.
  void absorb(Team& team, float* queries, int64_t stride, float* in_latent) const;
  // in_latent -> sums [rows, sum_size()], the latents weighted by the softmax.
  void attend(Team& team, const float* in_latent, float* thread_memory, float* partials,
              float* sums) const;
  // sums -> out [tokens, heads, value].
  void expand(Team& team, const float* sums, float* out) const;

  // Expanded. queries as for `absorb`, overwritten too; out [tokens, heads, value].
  void attend_expanded(Team& team, float* queries, int64_t stride, float* thread_memory,
                       float* out) const;

 private:
  int64_t width() const { return b_.latent_size + b_.rope_size; }
  int64_t latent_query_size() const { return padded_head_dim(width()); }
  int64_t sum_size() const { return padded_head_dim(b_.latent_size); }
  int64_t tile_state() const;
  int64_t expanded_floats() const;

  void rotate(float* values, int64_t token) const {
    const int64_t offset = (start_ + token) * rope_.pairs;
    table_.rotate(values, rope_.cosine + offset, rope_.sine + offset, rope_.pairs);
  }
  // The query of one head of one token, rotated and scaled in place.
  float* prepare_query(float* queries, int64_t stride, int64_t token, int64_t head) const;
  // Of a head's `size` values, [latent, size] or its like.
  const void* head_matrix(const void* all, int64_t head, int64_t size) const {
    return static_cast<const char*>(all) + head * size * b_.latent_size * scale_bytes(b_.up_type);
  }
  void attend_span(int64_t tile, int64_t span, const float* in_latent, float* scratch,
                   const SoftmaxState& chunk, const SoftmaxState& state) const;
  void attend_head(int64_t head, int64_t first, int64_t count, float* queries, int64_t stride,
                   float* memory, float* out) const;

  const KernelTable& table_;
  const LatentBlock& b_;
  const Rope& rope_;
  const LatentRows& cache_;
  const int64_t tokens_, start_, rows_;
  const bool expanded_;
  // Absorbed: spans of positions; whether those of a tile are computed side by side.
  const int64_t spans_;
  const bool split_;
  // Expanded: tokens of one task of one head.
  const int64_t task_tokens_;
};

}  // namespace localr1
