#include "operations.h"

#include <string.h>

#include "../dequant.h"
#include "plan.h"
#include "steps.h"
#include "units.h"

namespace localr1 {

namespace {

// One value of `Size` bytes a group and row: from [rows, groups] to [groups, rows per block] of one row
// block. Rows past the end are zero.
template <int Size>
void place_grouped(const MatrixLayout& m, const uint8_t* values, int64_t groups, int64_t rows,
                   uint8_t* block) {
  const int64_t lanes = m.rows_per_block;
  if (rows < lanes) memset(block, 0, size_t(groups * lanes * Size));
  for (int64_t lane = 0; lane < rows; ++lane) {
    const uint8_t* source = values + lane * groups * Size;
    uint8_t* target = block + lane * Size;
    for (int64_t g = 0; g < groups; ++g) memcpy(target + g * lanes * Size, source + g * Size, Size);
  }
}

// Scales and zero points of the `rows` rows from `row` on, which are one row block.
void place_scales(const MatrixLayout& m, const PackedSource& source, int64_t row, int64_t rows,
                  uint8_t* block) {
  const int64_t groups = m.columns / m.group;
  const int size = scale_bytes(m.scale_type);
  const uint8_t* scales = source.scales + row * groups * size;
  const auto place = size == 2 ? place_grouped<2> : place_grouped<4>;
  place(m, scales, groups, rows, block + scales_offset(m));
  if (m.has_zero) {
    const auto* zeros = reinterpret_cast<const uint8_t*>(source.zeros) + row * groups;
    place_grouped<1>(m, zeros, groups, rows, block + zeros_offset(m));
  }
}

void embedding_row(const Matrix& matrix, int64_t row, float* out) {
  const MatrixLayout& m = matrix.layout;
  const uint8_t* block = matrix.data.get() + row / m.rows_per_block * row_block_bytes(m);
  const int lane = int(row % m.rows_per_block);
  for (int64_t column = 0; column < m.columns; ++column) {
    const int64_t index = column / m.group * m.rows_per_block + lane;
    const int zero = m.has_zero ? int8_t(block[zeros_offset(m) + index]) : 0;
    const float scale = load_scale(block + scales_offset(m), index, m.scale_type);
    out[column] = float(load_value(block, m, lane, column) - zero) * scale;
  }
}

}  // namespace

Matrix Operations::prepare(const MatrixLayout& layout, const PackedSource& source) {
  Matrix matrix{layout, arena_.allocate(size_t(matrix_bytes(layout)))};
  place(layout, source, matrix.data.get());
  return matrix;
}

void Operations::place_blocks(const MatrixLayout& layout, const PackedSource& source, int64_t first,
                              int64_t end, uint8_t* data) const {
  const int64_t row_bytes = layout.columns * bits_of(layout.code) / 8;
  for (int64_t block = first; block < end; ++block) {
    uint8_t* target = data + block * row_block_bytes(layout);
    const int64_t row = block * layout.rows_per_block;
    const int64_t rows = minimum(layout.rows - row, layout.rows_per_block);
    table_.place_codes(layout, source.codes + row * row_bytes, rows, target);
    place_scales(layout, source, row, rows, target);
  }
}

void Operations::place(const MatrixLayout& layout, const PackedSource& source, uint8_t* data) {
  pool_.run([&](Team& team) {
    team.for_ranges(num_row_blocks(layout), [&](int64_t begin, int64_t end) {
      place_blocks(layout, source, begin, end, data);
    });
  });
}

void Operations::quantize(const float* x, int64_t tokens, int64_t columns, int8_t* q, float* scale) {
  const int64_t groups = columns / kGroup;
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_.reserve(Workspace::size_of<int32_t>(tokens * groups));
  int32_t* offset = workspace_.take<int32_t>(tokens * groups);
  pool_.run([&](Team& team) {
    team.for_ranges(tokens, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {  // each token alone: its own tile of width 1
        const Activations one{q + t * columns, scale + t * groups, offset + t * groups, 1, groups};
        table_.quantize(x + t * columns, 0, groups, one, 0);
      }
    });
  });
}

void Operations::rms_norm(const float* x, const float* weight, float eps, int64_t tokens, int64_t size,
                          float* y) {
  pool_.run([&](Team& team) {
    team.for_ranges(tokens, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        table_.rms_norm(x + t * size, weight, eps, size, y + t * size);
      }
    });
  });
}

void Operations::linear(const float* x, int64_t tokens, const float* norm, float eps,
                        const std::vector<Linear>& parts, float* out) {
  const int64_t columns = parts[0].matrix->layout.columns;
  int64_t stride = 0;
  for (const Linear& part : parts) stride += part.matrix->layout.rows;
  Plan plan;
  plan.add_activations(tokens, columns);
  plan.add<float>(columns * threads());
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_.reserve(plan.bytes());
  const Activations a = take_activations(workspace_, tokens, columns);
  float* rows = workspace_.take<float>(columns * threads());
  pool_.run([&](Team& team) {
    Steps steps(table_, team);
    steps.quantize(x, norm, eps, a, rows + team.index() * columns);
    steps.products(a, parts.data(), int64_t(parts.size()), out, stride, false);
  });
}

void Operations::linear_add(const float* x, int64_t tokens, const Linear& part, float* residual) {
  const int64_t columns = part.matrix->layout.columns;
  Plan plan;
  plan.add_activations(tokens, columns);
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_.reserve(plan.bytes());
  const Activations a = take_activations(workspace_, tokens, columns);
  pool_.run([&](Team& team) {
    Steps steps(table_, team);
    steps.quantize(x, nullptr, 0.0f, a, nullptr);
    steps.products(a, &part, 1, residual, part.matrix->layout.rows, true);
  });
}

void Operations::gate_up(const float* x, int64_t tokens, const Matrix& gate, const Matrix& up,
                         float* out) {
  const int64_t columns = gate.layout.columns;
  Plan plan;
  plan.add_activations(tokens, columns);
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_.reserve(plan.bytes());
  const Activations a = take_activations(workspace_, tokens, columns);
  pool_.run([&](Team& team) {
    Steps steps(table_, team);
    steps.quantize(x, nullptr, 0.0f, a, nullptr);
    steps.gate_up(a, {&gate, nullptr}, {&up, nullptr}, out, Activations{});
  });
}

void Operations::embedding(const int64_t* ids, int64_t tokens, const Matrix& matrix, float* out) {
  pool_.run([&](Team& team) {
    team.for_ranges(tokens, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        embedding_row(matrix, ids[t], out + t * matrix.layout.columns);
      }
    });
  });
}

void Operations::rope_append(const float* qkv, int64_t tokens, const Heads& heads,
                             const HeadNorms& norms, const Rope& rope, const Cache& cache,
                             int64_t start, float* q) {
  pool_.run([&](Team& team) {
    Steps(table_, team).rope_append(qkv, tokens, heads, norms, rope, cache, start, q);
  });
}

void Operations::attention(const float* q, int64_t tokens, const Heads& heads, const Cache& cache,
                           int64_t start, float scale, float* out) {
  const AttentionPlan attention(tokens, start, heads);
  const int64_t thread_floats = int64_t(AttentionPlan::thread_floats(heads.dim));
  const int64_t partial_floats = int64_t(attention.partial_floats(heads));
  Plan plan;
  plan.add<float>(thread_floats * threads());
  plan.add<float>(partial_floats);
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_.reserve(plan.bytes());
  float* thread_memory = workspace_.take<float>(thread_floats * threads());
  float* partials = workspace_.take<float>(partial_floats);
  pool_.run([&](Team& team) {
    Steps(table_, team).attention(q, heads, cache, start, scale, attention,
                                  thread_memory + team.index() * thread_floats, partials, out);
  });
}

void Operations::attention_block(float* x, int64_t tokens, const AttentionBlock& block,
                                 const Rope& rope, const Cache& cache, int64_t start) {
  const Heads& heads = block.heads;
  const int64_t hidden = block.query.matrix->layout.columns, width = heads.query * heads.dim;
  const int64_t qkv_width = width + 2 * heads.key_value * heads.dim;
  const AttentionPlan attention(tokens, start, heads);
  const int64_t thread_floats = hidden + int64_t(AttentionPlan::thread_floats(heads.dim));
  const int64_t partial_floats = int64_t(attention.partial_floats(heads));
  Plan plan;
  plan.add_activations(tokens, hidden);
  plan.add_activations(tokens, width);
  plan.add<float>(tokens * qkv_width);
  plan.add<float>(tokens * width);
  plan.add<float>(tokens * width);
  plan.add<float>(thread_floats * threads());
  plan.add<float>(partial_floats);
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_.reserve(plan.bytes());
  const Activations normed = take_activations(workspace_, tokens, hidden);
  const Activations mixed = take_activations(workspace_, tokens, width);
  float* qkv = workspace_.take<float>(tokens * qkv_width);
  float* q = workspace_.take<float>(tokens * width);
  float* attended = workspace_.take<float>(tokens * width);
  float* thread_memory = workspace_.take<float>(thread_floats * threads());
  float* partials = workspace_.take<float>(partial_floats);
  const Linear inputs[] = {block.query, block.key, block.value};
  pool_.run([&](Team& team) {
    Steps steps(table_, team);
    float* row = thread_memory + team.index() * thread_floats;
    steps.quantize(x, block.norm, block.head_norms.eps, normed, row);
    steps.products(normed, inputs, 3, qkv, qkv_width, false);
    steps.rope_append(qkv, tokens, heads, block.head_norms, rope, cache, start, q);
    steps.attention(q, heads, cache, start, block.scale, attention, row + hidden, partials, attended);
    steps.quantize(attended, nullptr, 0.0f, mixed, nullptr);
    steps.products(mixed, &block.output, 1, x, hidden, true);
  });
}

void Operations::mlp_block(float* x, int64_t tokens, const MlpBlock& block) {
  const int64_t hidden = block.gate.matrix->layout.columns;
  const int64_t inner = block.gate.matrix->layout.rows;
  Plan plan;
  plan.add_activations(tokens, hidden);
  plan.add_activations(tokens, inner);
  plan.add<float>(hidden * threads());
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_.reserve(plan.bytes());
  const Activations normed = take_activations(workspace_, tokens, hidden);
  const Activations gated = take_activations(workspace_, tokens, inner);
  float* rows = workspace_.take<float>(hidden * threads());
  pool_.run([&](Team& team) {
    Steps steps(table_, team);
    steps.quantize(x, block.norm, block.eps, normed, rows + team.index() * hidden);
    steps.gate_up(normed, block.gate, block.up, nullptr, gated);
    steps.products(gated, &block.down, 1, x, hidden, true);
  });
}

}  // namespace localr1
