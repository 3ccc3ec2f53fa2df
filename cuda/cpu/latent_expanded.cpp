// Latent attention in expanded form (latent.h): a task is one head of some tokens. It computes the
// head's keys and values of a chunk of positions, which all of its queries then attend to.
#include <string.h>

#include "latent.h"

namespace localr1 {

namespace {

int64_t rounded(int64_t floats) { return padded_head_dim(floats); }

// What a task needs, one after another in a thread's memory.
struct Expanded {
  int64_t key_up, value_up;    // a head's matrices in float32: [key, latent], [latent, value]
  int64_t transposed, latent;  // of a chunk's positions: [latent + rope, 64], [64, latent]
  int64_t keys, values;        // [key + rope, 64], [64, value]
  int64_t scores, chunk;
  int64_t states;  // one of each tile of queries
  int64_t state, total;

  Expanded(const LatentBlock& b, int64_t task_tokens) {
    const int64_t value = padded_head_dim(b.value_size), wide = padded_head_dim(b.latent_size);
    int64_t next = 0;
    const auto take = [&](int64_t floats) {
      const int64_t at = next;
      next += rounded(floats);
      return at;
    };
    state = rounded(state_floats(kMaxQueryRows, b.value_size));
    key_up = take(b.key_size * wide);
    value_up = take(b.latent_size * value);
    transposed = take((b.latent_size + b.rope_size) * kKeyChunk);
    latent = take(kKeyChunk * wide);
    keys = take((b.key_size + b.rope_size) * kKeyChunk);
    values = take(kKeyChunk * value);
    scores = take(kMaxQueryRows * kKeyChunk);
    chunk = take(state);
    states = take(task_tokens / kMaxQueryRows * state);
    total = next;
  }
};

}  // namespace

int64_t LatentCall::expanded_floats() const { return Expanded(b_, task_tokens_).total; }

void LatentCall::attend_expanded(Team& team, float* queries, int64_t stride, float* thread_memory,
                                 float* out) const {
  const int64_t parts = (tokens_ + task_tokens_ - 1) / task_tokens_;
  team.for_each(parts * b_.heads, [&](int64_t item) {
    const int64_t first = (parts - 1 - item / b_.heads) * task_tokens_;  // the longest first
    attend_head(item % b_.heads, first, minimum(task_tokens_, tokens_ - first), queries, stride,
                thread_memory, out);
  });
}

void LatentCall::attend_head(int64_t head, int64_t first, int64_t count, float* queries,
                             int64_t stride, float* memory, float* out) const {
  const Expanded at(b_, task_tokens_);
  const int64_t value = padded_head_dim(b_.value_size), wide = padded_head_dim(b_.latent_size);
  float* key_up = memory + at.key_up;
  float* value_up = memory + at.value_up;
  float* keys = memory + at.keys;
  const auto state_of = [&](int64_t tile) {
    return state_at(memory + at.states + tile * at.state, kMaxQueryRows, b_.value_size);
  };
  const auto tile_rows = [&](int64_t tile) { return minimum(kMaxQueryRows, count - tile * kMaxQueryRows); };
  const int64_t tiles = (count + kMaxQueryRows - 1) / kMaxQueryRows;
  table_.widen_rows(head_matrix(b_.key_up, head, b_.key_size), b_.up_type, b_.key_size, b_.latent_size,
                    b_.latent_size, key_up);
  table_.widen_rows(head_matrix(b_.value_up, head, b_.value_size), b_.up_type, b_.latent_size,
                    b_.value_size, b_.value_size, value_up);
  for (int64_t token = first; token < first + count; ++token) prepare_query(queries, stride, token, head);
  for (int64_t tile = 0; tile < tiles; ++tile) clear_state(state_of(tile), tile_rows(tile), b_.value_size);

  const CacheRows cached{cache_.rows, cache_.rows, cache_.type, width(), b_.latent_size, width()};
  const SoftmaxState chunk = state_at(memory + at.chunk, kMaxQueryRows, b_.value_size);
  const int64_t end = start_ + first + count;
  for (int64_t position = 0; position < end; position += kKeyChunk) {
    const int64_t positions = minimum(kKeyChunk, end - position);
    float* transposed = memory + at.transposed;
    table_.transpose_keys(cached, position, positions, transposed);
    table_.multiply(key_up, wide, transposed, kKeyChunk, b_.latent_size, keys, kKeyChunk, b_.key_size,
                    kKeyChunk);
    memcpy(keys + b_.key_size * kKeyChunk, transposed + b_.latent_size * kKeyChunk,
           size_t(b_.rope_size * kKeyChunk) * sizeof(float));
    table_.widen_cache(cached, position, positions, b_.latent_size, memory + at.latent);
    table_.multiply(memory + at.latent, wide, value_up, value, b_.latent_size, memory + at.values,
                    value, positions, value);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t token = first + tile * kMaxQueryRows, rows = tile_rows(tile);
      int64_t ends[kMaxQueryRows];
      for (int64_t row = 0; row < rows; ++row) ends[row] = start_ + token + row + 1;
      if (ends[rows - 1] <= position) continue;  // All of its tokens come before these positions.
      table_.attend_expanded(queries + token * stride + head * query_size(), stride, ends, rows, keys,
                             memory + at.values, query_size(), b_.value_size, position,
                             memory + at.scores, chunk);
      table_.merge(chunk, rows, b_.value_size, state_of(tile));
    }
  }
  for (int64_t row = 0; row < count; ++row) {
    const SoftmaxState state = state_of(row / kMaxQueryRows);
    const float* source = state.output + row % kMaxQueryRows * value;
    float* target = out + ((first + row) * b_.heads + head) * b_.value_size;
    const float sum = state.sum[row % kMaxQueryRows];
    for (int64_t d = 0; d < b_.value_size; ++d) target[d] = source[d] / sum;
  }
}

}  // namespace localr1
