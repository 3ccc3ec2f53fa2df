#include "steps.h"

#include <limits>

#include "units.h"

namespace localr1 {

namespace {

int64_t num_units(const Matrix& matrix) { return num_units(matrix.layout); }

int64_t unit_product(const KernelTable& table, const Matrix& matrix, int64_t unit, const Activations& a,
                     int64_t tile, float* y) {
  return unit_product(table, matrix.layout, matrix.data.get(), unit, a, tile, y);
}

}  // namespace

template <class Body>
void Steps::share_rows(int64_t units, int64_t tiles, const Body& body) {
  if (tiles == 1) {
    team_.for_ranges(units, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) body(unit, 0);
    });
    return;
  }
  const int64_t unit_tasks = (units + kTaskUnits - 1) / kTaskUnits;
  const int64_t tile_tasks = (tiles + kTaskTiles - 1) / kTaskTiles;
  team_.for_each(unit_tasks * tile_tasks, [&](int64_t task) {
    const int64_t first_unit = task % unit_tasks * kTaskUnits;
    const int64_t first_tile = task / unit_tasks * kTaskTiles;
    const int64_t end_unit = minimum(first_unit + kTaskUnits, units);
    const int64_t end_tile = minimum(first_tile + kTaskTiles, tiles);
    for (int64_t unit = first_unit; unit < end_unit; ++unit) {
      for (int64_t tile = first_tile; tile < end_tile; ++tile) body(unit, tile);
    }
  });
}

void Steps::quantize(const float* x, const float* norm, float eps, const Activations& a, float* row,
                     int64_t stride) {
  const int64_t columns = a.groups * kGroup;
  team_.for_ranges(a.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const float* source = x + token * (stride ? stride : columns);
      if (norm) {
        table_.rms_norm(source, norm, eps, columns, row);
        source = row;
      }
      table_.quantize(source, 0, a.groups, a, token);
    }
  });
}

void Steps::products(const Activations& a, const Linear* parts, int64_t num_parts, float* out,
                     int64_t stride, bool add) {
  int64_t units = 0;
  for (int64_t i = 0; i < num_parts; ++i) units += num_units(*parts[i].matrix);
  share_rows(units, num_tiles(a), [&](int64_t unit, int64_t tile) {
    const Linear* part = parts;
    int64_t column = 0;
    while (unit >= num_units(*part->matrix)) {
      unit -= num_units(*part->matrix);
      column += part->matrix->layout.rows;
      ++part;
    }
    alignas(kAlignment) float y[kTokenTile * kUnitRows];
    const int64_t rows = unit_product(table_, *part->matrix, unit, a, tile, y);
    const int64_t row = unit * kUnitRows;
    const float* bias = part->bias ? part->bias + row : nullptr;
    float* target = out + tile * kTokenTile * stride + column + row;
    const auto finish = add ? table_.accumulate : table_.store;
    for (int64_t t = 0; t < tile_width(a, tile); ++t) {
      finish(y + t * kUnitRows, bias, rows, target + t * stride);
    }
  });
}

void Steps::gate_up(const Activations& a, const Linear& gate, const Linear& up, float* out,
                    const Activations& quantized) {
  static_assert(kUnitRows == kGroup, "a unit is one group of the next product's activations");
  const int64_t stride = gate.matrix->layout.rows;
  share_rows(num_units(*gate.matrix), num_tiles(a), [&](int64_t unit, int64_t tile) {
    alignas(kAlignment) float gate_y[kTokenTile * kUnitRows];
    alignas(kAlignment) float up_y[kTokenTile * kUnitRows];
    const int64_t rows = unit_product(table_, *gate.matrix, unit, a, tile, gate_y);
    unit_product(table_, *up.matrix, unit, a, tile, up_y);
    const int64_t row = unit * kUnitRows;
    const float* gate_bias = gate.bias ? gate.bias + row : nullptr;
    const float* up_bias = up.bias ? up.bias + row : nullptr;
    for (int64_t t = 0; t < tile_width(a, tile); ++t) {
      const int64_t token = tile * kTokenTile + t;
      float* values = gate_y + t * kUnitRows;
      float* target = out ? out + token * stride + row : values;
      table_.silu_multiply(values, gate_bias, up_y + t * kUnitRows, up_bias, rows, target);
      if (!out) table_.quantize(values, unit, 1, quantized, token);
    }
  });
}

void Steps::rope_append(const float* qkv, int64_t tokens, const Heads& heads, const HeadNorms& norms,
                        const Rope& rope, const Cache& cache, int64_t start, float* q) {
  const int64_t dim = heads.dim, all = heads.query + 2 * heads.key_value;
  team_.for_ranges(tokens * all, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t token = item / all, head = item % all, position = start + token;
      const float* source = qkv + item * dim;
      const bool is_query = head < heads.query, is_value = head >= heads.query + heads.key_value;
      float rotated[kMaxHeadDim];
      if (!is_value) {
        const float* norm = is_query ? norms.query : norms.key;
        if (norm) {
          table_.rms_norm(source, norm, norms.eps, dim, rotated);
        } else {
          table_.store(source, nullptr, dim, rotated);
        }
        table_.rotate(rotated, rope.cosine + position * rope.pairs, rope.sine + position * rope.pairs,
                      rope.pairs);
        source = rotated;
      }
      if (is_query) {
        table_.store(source, nullptr, dim, q + (token * heads.query + head) * dim);
        continue;
      }
      const int64_t cache_head = (head - heads.query) % heads.key_value;
      const int64_t row = cache_head * cache.capacity + position;
      void* target = is_value ? cache.values : cache.keys;
      table_.store_cache_row(source, dim, cache.type,
                             static_cast<char*>(target) + row * cache_row_bytes(cache.type, dim));
    }
  });
}

AttentionPlan::AttentionPlan(int64_t tokens, int64_t start, const Heads& heads)
    : rows(tokens * (heads.query / heads.key_value)),
      tiles((rows + kMaxQueryRows - 1) / kMaxQueryRows),
      chunks((start + tokens + kKeyChunk - 1) / kKeyChunk),
      split(rows <= kMaxQueryRows / 4 && chunks > 1) {}

void clear_state(const SoftmaxState& state, int64_t rows, int64_t value_dim) {
  for (int64_t row = 0; row < rows; ++row) {
    state.maximum[row] = -std::numeric_limits<float>::infinity();
    state.sum[row] = 0.0f;
  }
  for (int64_t i = 0; i < rows * padded_head_dim(value_dim); ++i) state.output[i] = 0.0f;
}

namespace {

// Rows first..first+count-1 of one key/value head, with the state they are computed in.
struct AttentionTask {
  const KernelTable& table;
  const Heads& heads;
  int64_t key_value_head, first, count;
  int64_t dim, padded, group;

  AttentionTask(const KernelTable& table, const Heads& heads, int64_t head, int64_t first, int64_t rows)
      : table(table), heads(heads), key_value_head(head), first(first),
        count(minimum(rows - first, kMaxQueryRows)), dim(heads.dim), padded(padded_head_dim(heads.dim)),
        group(heads.query / heads.key_value) {}

  int64_t token(int64_t row) const { return (first + row) / group; }
  // Offset of a row in [tokens, heads, dim].
  int64_t offset(int64_t row) const {
    return (token(row) * heads.query + key_value_head * group + (first + row) % group) * dim;
  }

  void load_queries(const float* q, float scale, float* queries) const {
    for (int64_t row = 0; row < count; ++row) {
      const float* source = q + offset(row);
      for (int64_t d = 0; d < dim; ++d) queries[row * padded + d] = source[d] * scale;
    }
  }

  void attend(const float* queries, const Cache& cache, int64_t start, int64_t chunk, float* scratch,
              const SoftmaxState& result) const {
    int64_t ends[kMaxQueryRows];
    for (int64_t row = 0; row < count; ++row) ends[row] = start + token(row) + 1;
    const int64_t bytes = key_value_head * cache.capacity * cache_row_bytes(cache.type, dim);
    const CacheRows head{static_cast<const char*>(cache.keys) + bytes,
                         static_cast<const char*>(cache.values) + bytes, cache.type, dim, dim, dim};
    table.attend(queries, ends, count, head, chunk * kKeyChunk, scratch, result);
  }

  void finish(const SoftmaxState& state, float* out) const {
    for (int64_t row = 0; row < count; ++row) {
      const float* source = state.output + row * padded;
      float* target = out + offset(row);
      for (int64_t d = 0; d < dim; ++d) target[d] = source[d] / state.sum[row];
    }
  }
};

}  // namespace

size_t AttentionPlan::thread_floats(int64_t head_dim) {
  return size_t(attention_scratch(head_dim, head_dim) + kMaxQueryRows * padded_head_dim(head_dim) +
                2 * state_floats(kMaxQueryRows, head_dim));
}

size_t AttentionPlan::partial_floats(const Heads& heads) const {
  return split ? size_t(heads.key_value * chunks * state_floats(rows, heads.dim)) : 0;
}

void Steps::attention(const float* q, const Heads& heads, const Cache& cache,
                      int64_t start, float scale, const AttentionPlan& plan, float* thread_memory,
                      float* partials, float* out) {
  const int64_t dim = heads.dim;
  float* scratch = thread_memory;
  float* queries = scratch + attention_scratch(dim, dim);
  float* states = queries + kMaxQueryRows * padded_head_dim(dim);
  const SoftmaxState chunk_state = state_at(states, kMaxQueryRows, dim);
  const SoftmaxState state =
      state_at(states + state_floats(kMaxQueryRows, dim), kMaxQueryRows, dim);
  if (plan.split) {
    const auto partial = [&](int64_t item) {
      return state_at(partials + item * state_floats(plan.rows, dim), plan.rows, dim);
    };
    team_.for_each(heads.key_value * plan.chunks, [&](int64_t item) {
      const AttentionTask task(table_, heads, item / plan.chunks, 0, plan.rows);
      task.load_queries(q, scale, queries);
      task.attend(queries, cache, start, item % plan.chunks, scratch, partial(item));
    });
    team_.for_each(heads.key_value, [&](int64_t head) {
      const AttentionTask task(table_, heads, head, 0, plan.rows);
      clear_state(state, task.count, dim);
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        table_.merge(partial(head * plan.chunks + chunk), plan.rows, dim, state);
      }
      task.finish(state, out);
    });
    return;
  }
  team_.for_each(plan.tiles * heads.key_value, [&](int64_t item) {
    const int64_t tile = plan.tiles - 1 - item / heads.key_value;  // the longest first
    const AttentionTask task(table_, heads, item % heads.key_value, tile * kMaxQueryRows, plan.rows);
    task.load_queries(q, scale, queries);
    clear_state(state, task.count, dim);
    const int64_t end = start + task.token(task.count - 1) + 1;
    for (int64_t chunk = 0; chunk * kKeyChunk < end; ++chunk) {
      task.attend(queries, cache, start, chunk, scratch, chunk_state);
      table_.merge(chunk_state, task.count, dim, state);
    }
    task.finish(state, out);
  });
}

}  // namespace localr1
