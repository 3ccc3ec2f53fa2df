// Latent attention in absorbed form, and the block around both forms (latent.h).
#include "latent.h"

#include "plan.h"
#include "steps.h"

namespace localr1 {

namespace {

constexpr int64_t kTileRows = 32;   // rows that share one reading of the cache
constexpr int64_t kSpanChunks = 8;  // chunks of kKeyChunk positions merged by one task, in order
constexpr int64_t kSplitTiles = 16;  // at most so many tiles have their spans computed side by side
constexpr int64_t kHeadTokens = 16;  // tokens that share one reading of a head's matrix

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Whether the expanded form takes fewer multiplications, counted per head and position; mla.py has
// the same count for the matrices that no kernel knows.
bool is_expanded(const LatentBlock& b, int64_t tokens) {
  const int64_t absorbed = tokens * (2 * b.latent_size + b.rope_size);
  const int64_t expanded = tokens * (b.key_size + b.rope_size + b.value_size);
  return absorbed > expanded + b.latent_size * (b.key_size + b.value_size);
}

// Every head is one task where there are enough heads for the threads to end together; else its tokens
// are cut, in whole tiles. A token's result does not depend on it.
int64_t tokens_of_task(const LatentBlock& b, int64_t tokens, int threads) {
  const int64_t parts = blocks(2 * threads, b.heads);
  return blocks(blocks(tokens, parts), kMaxQueryRows) * kMaxQueryRows;
}

}  // namespace

LatentCall::LatentCall(const KernelTable& table, const LatentBlock& block, const Rope& rope,
                       const LatentRows& cache, int64_t tokens, int64_t start, int threads)
    : table_(table), b_(block), rope_(rope), cache_(cache), tokens_(tokens), start_(start),
      rows_(tokens * block.heads), expanded_(is_expanded(block, tokens)),
      spans_(blocks(start + tokens, kSpanChunks * kKeyChunk)),
      split_(spans_ > 1 && blocks(rows_, kTileRows) <= kSplitTiles),
      task_tokens_(tokens_of_task(block, tokens, threads)) {}

int64_t LatentCall::tile_state() const { return state_floats(kTileRows, b_.latent_size); }

int64_t LatentCall::partial_floats() const {
  return split_ && !expanded_ ? blocks(rows_, kTileRows) * spans_ * tile_state() : 0;
}

int64_t LatentCall::thread_floats() const {
  return expanded_ ? expanded_floats()
                   : attention_scratch(width(), b_.latent_size) + 3 * tile_state();
}

void LatentCall::append(Team& team, const float* down, int64_t stride, float* row) const {
  team.for_ranges(tokens_, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const float* source = down + token * stride;
      table_.rms_norm(source, b_.latent_norm, b_.latent_eps, b_.latent_size, row);
      table_.store(source + b_.latent_size, nullptr, b_.rope_size, row + b_.latent_size);
      rotate(row + b_.latent_size, token);
      const int64_t bytes = (start_ + token) * cache_row_bytes(cache_.type, width());
      table_.store_cache_row(row, width(), cache_.type, static_cast<char*>(cache_.rows) + bytes);
    }
  });
}

float* LatentCall::prepare_query(float* queries, int64_t stride, int64_t token, int64_t head) const {
  float* query = queries + token * stride + head * query_size();
  rotate(query + b_.key_size, token);
  for (int64_t i = 0; i < query_size(); ++i) query[i] = query[i] * b_.scale;
  return query;
}

void LatentCall::absorb(Team& team, float* queries, int64_t stride, float* in_latent) const {
  const int64_t tiles = blocks(tokens_, kHeadTokens);
  team.for_each(b_.heads * tiles, [&](int64_t item) {
    const int64_t head = item / tiles, first = item % tiles * kHeadTokens;
    const int64_t count = minimum(kHeadTokens, tokens_ - first);
    for (int64_t token = first; token < first + count; ++token) {
      const float* query = prepare_query(queries, stride, token, head);
      float* target = in_latent + (token * b_.heads + head) * latent_query_size();
      table_.store(query + b_.key_size, nullptr, b_.rope_size, target + b_.latent_size);
    }
    table_.multiply_stored(queries + first * stride + head * query_size(), stride, count,
                           head_matrix(b_.key_up, head, b_.key_size), b_.up_type, b_.key_size,
                           b_.latent_size, in_latent + (first * b_.heads + head) * latent_query_size(),
                           b_.heads * latent_query_size());
  });
}

void LatentCall::attend(Team& team, const float* in_latent, float* thread_memory, float* partials,
                        float* sums) const {
  float* scratch = thread_memory;
  float* states = scratch + attention_scratch(width(), b_.latent_size);
  const SoftmaxState chunk = state_at(states, kTileRows, b_.latent_size);
  const SoftmaxState span = state_at(states + tile_state(), kTileRows, b_.latent_size);
  const SoftmaxState total = state_at(states + 2 * tile_state(), kTileRows, b_.latent_size);
  const int64_t tiles = blocks(rows_, kTileRows);
  const auto partial = [&](int64_t item) {
    return state_at(partials + item * tile_state(), kTileRows, b_.latent_size);
  };
  if (split_) {
    team.for_each(tiles * spans_, [&](int64_t item) {
      attend_span(item / spans_, item % spans_, in_latent, scratch, chunk, partial(item));
    });
  }
  team.for_each(tiles, [&](int64_t item) {
    const int64_t tile = tiles - 1 - item;  // the longest first
    const int64_t count = minimum(kTileRows, rows_ - tile * kTileRows);
    clear_state(total, count, b_.latent_size);
    for (int64_t i = 0; i < spans_; ++i) {
      if (!split_) attend_span(tile, i, in_latent, scratch, chunk, span);
      table_.merge(split_ ? partial(tile * spans_ + i) : span, count, b_.latent_size, total);
    }
    for (int64_t row = 0; row < count; ++row) {
      const float* source = total.output + row * sum_size();
      float* target = sums + (tile * kTileRows + row) * sum_size();
      for (int64_t d = 0; d < b_.latent_size; ++d) target[d] = source[d] / total.sum[row];
    }
  });
}

void LatentCall::expand(Team& team, const float* sums, float* out) const {
  const int64_t tiles = blocks(tokens_, kHeadTokens);
  team.for_each(b_.heads * tiles, [&](int64_t item) {
    const int64_t head = item / tiles, first = item % tiles * kHeadTokens;
    const int64_t row = first * b_.heads + head;
    table_.multiply_stored(sums + row * sum_size(), b_.heads * sum_size(),
                           minimum(kHeadTokens, tokens_ - first),
                           head_matrix(b_.value_up, head, b_.value_size), b_.up_type, b_.latent_size,
                           b_.value_size, out + row * b_.value_size, b_.heads * b_.value_size);
  });
}

// The softmax of one tile over one span; spans and their chunks stand at fixed positions, so that a
// row's bits depend on nothing but the row.
void LatentCall::attend_span(int64_t tile, int64_t span, const float* in_latent, float* scratch,
                             const SoftmaxState& chunk, const SoftmaxState& state) const {
  const int64_t first = tile * kTileRows, count = minimum(kTileRows, rows_ - first);
  int64_t ends[kTileRows];
  for (int64_t row = 0; row < count; ++row) ends[row] = start_ + (first + row) / b_.heads + 1;
  const CacheRows rows{cache_.rows, cache_.rows, cache_.type, width(), b_.latent_size, width()};
  clear_state(state, count, b_.latent_size);
  for (int64_t i = span * kSpanChunks; i < (span + 1) * kSpanChunks; ++i) {
    if (i * kKeyChunk >= ends[count - 1]) break;
    table_.attend(in_latent + first * latent_query_size(), ends, count, rows, i * kKeyChunk, scratch,
                  chunk);
    table_.merge(chunk, count, b_.latent_size, state);
  }
}

void Operations::latent_block(float* x, int64_t tokens, const LatentBlock& block, const Rope& rope,
                              const LatentRows& cache, int64_t start) {
  const LatentCall call(table_, block, rope, cache, tokens, start, threads());
  const bool has_rank = block.query_down.matrix != nullptr;
  const int64_t hidden = block.kv_down.matrix->layout.columns, values = block.heads * block.value_size;
  const int64_t queries = block.heads * call.query_size();
  const int64_t rank = has_rank ? block.query_down.matrix->layout.rows : 0;
  const int64_t cached = block.latent_size + block.rope_size;
  // Beside each other: the latents' matrix and the first of the queries'.
  const int64_t stride = cached + (has_rank ? rank : queries);
  const int64_t row_floats = hidden > rank ? (hidden > cached ? hidden : cached)
                                           : (rank > cached ? rank : cached);
  Plan plan;
  plan.add_activations(tokens, hidden);
  plan.add_activations(tokens, rank);
  plan.add_activations(tokens, values);
  plan.add<float>(tokens * stride);
  plan.add<float>(has_rank ? tokens * queries : 0);
  plan.add<float>(call.in_latent_floats());
  plan.add<float>(call.sum_floats());
  plan.add<float>(tokens * values);
  plan.add<float>(row_floats * threads());
  plan.add<float>(call.thread_floats() * threads());
  plan.add<float>(call.partial_floats());
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_.reserve(plan.bytes());
  const Activations normed = take_activations(workspace_, tokens, hidden);
  const Activations ranked = take_activations(workspace_, tokens, rank);
  const Activations mixed = take_activations(workspace_, tokens, values);
  float* down = workspace_.take<float>(tokens * stride);
  float* query = workspace_.take<float>(has_rank ? tokens * queries : 0);
  float* in_latent = workspace_.take<float>(call.in_latent_floats());
  float* sums = workspace_.take<float>(call.sum_floats());
  float* attended = workspace_.take<float>(tokens * values);
  float* thread_rows = workspace_.take<float>(row_floats * threads());
  float* thread_memory = workspace_.take<float>(call.thread_floats() * threads());
  float* partials = workspace_.take<float>(call.partial_floats());
  pool_.run([&](Team& team) {
    Steps steps(table_, team);
    float* row = thread_rows + team.index() * row_floats;
    float* memory = thread_memory + team.index() * call.thread_floats();
    const Linear inputs[] = {block.kv_down, has_rank ? block.query_down : block.query};
    steps.quantize(x, block.norm, block.eps, normed, row);
    steps.products(normed, inputs, 2, down, stride, false);
    call.append(team, down, stride, row);
    if (has_rank) {
      steps.quantize(down + cached, block.query_norm, block.latent_eps, ranked, row, stride);
      steps.products(ranked, &block.query, 1, query, queries, false);
    }
    float* heads = has_rank ? query : down + cached;
    const int64_t heads_stride = has_rank ? queries : stride;
    if (call.expanded()) {
      call.attend_expanded(team, heads, heads_stride, memory, attended);
    } else {
      call.absorb(team, heads, heads_stride, in_latent);
      call.attend(team, in_latent, memory, partials, sums);
      call.expand(team, sums, attended);
    }
    steps.quantize(attended, nullptr, 0.0f, mixed, nullptr);
    steps.products(mixed, &block.output, 1, x, hidden, true);
  });
}

}  // namespace localr1
