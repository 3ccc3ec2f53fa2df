// The checked bindings: every address that comes in is accompanied by the sizes it must have, and
// sizes that do not fit are refused with both numbers. dtype and contiguity are checked in
// localr1/kernels/native.py, which knows the tensors; tensors come as addresses because two calls a
// layer cannot afford one ndarray object per argument. Every call releases the GIL. One file, though a
// long one: all calls are methods of one class and share its checks.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>

#include "checked.h"
#include "cpu/host_mixtures.h"
#include "cpu/operations.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace localr1 {

void bind_checksum(nb::module_& m);       // checksum_binding.cpp
void bind_host_mixtures(nb::module_& m);  // host_mixtures_binding.cpp
void bind_quantize(nb::module_& m);       // quantize_binding.cpp

namespace {

using MatrixHandle = std::shared_ptr<Matrix>;

void require_equal(const char* what, int64_t expected, int64_t found) {
  if (expected != found) require(false, what, expected, found);
}

struct BoundAttention {
  AttentionBlock block;
  std::vector<MatrixHandle> matrices;  // keeps them alive
};

struct BoundMlp {
  MlpBlock block;
  std::vector<MatrixHandle> matrices;
};

struct BoundLatent {
  LatentBlock block;
  std::vector<MatrixHandle> matrices;
};

class Kernels {
 public:
  Kernels(const std::string& isa, int threads) : operations_(find_table(isa), checked_threads(threads)) {}

  std::string isa() const { return table().name; }
  int threads() const { return operations_.threads(); }
  int rows_per_block() const { return table().rows_per_block; }

  MatrixHandle prepare(Address codes, Address scales, Address zeros, int64_t rows, int64_t columns,
                       int code, int group, int scale_type) {
    const MatrixLayout layout = checked_layout(rows, columns, code, group, scale_type, zeros != 0);
    nb::gil_scoped_release release;
    return std::make_shared<Matrix>(operations_.prepare(
        layout, {pointer<uint8_t>(codes), pointer<uint8_t>(scales), pointer<int8_t>(zeros)}));
  }

  std::shared_ptr<BoundAttention> bind_attention(Address norm, std::vector<MatrixHandle> matrices,
                                                 std::vector<Address> biases, Address q_norm,
                                                 Address k_norm, std::tuple<int, int, int> heads,
                                                 float eps, float scale) {
    require_equal("matrices of an attention block", 4, int64_t(matrices.size()));
    require_equal("biases of an attention block", 4, int64_t(biases.size()));
    const Heads h{std::get<0>(heads), std::get<1>(heads), std::get<2>(heads)};
    check_heads(h);
    const int64_t hidden = matrices[0]->layout.columns;
    const int64_t rows[] = {h.query * h.dim, h.key_value * h.dim, h.key_value * h.dim, hidden};
    for (int i = 0; i < 4; ++i) {
      check_matrix(*matrices[i], rows[i], i < 3 ? hidden : h.query * h.dim);
    }
    const auto part = [&](int i) { return Linear{matrices[i].get(), pointer<float>(biases[i])}; };
    const AttentionBlock block{pointer<float>(norm), part(0), part(1), part(2), part(3),
                               {pointer<float>(q_norm), pointer<float>(k_norm), eps}, h, scale};
    return std::make_shared<BoundAttention>(BoundAttention{block, std::move(matrices)});
  }

  std::shared_ptr<BoundMlp> bind_mlp(Address norm, std::vector<MatrixHandle> matrices,
                                     std::vector<Address> biases, float eps) {
    require_equal("matrices of an mlp block", 3, int64_t(matrices.size()));
    require_equal("biases of an mlp block", 3, int64_t(biases.size()));
    const int64_t hidden = matrices[0]->layout.columns, inner = matrices[0]->layout.rows;
    for (int i = 0; i < 2; ++i) check_matrix(*matrices[i], inner, hidden);
    check_matrix(*matrices[2], hidden, inner);
    const auto part = [&](int i) { return Linear{matrices[i].get(), pointer<float>(biases[i])}; };
    const MlpBlock block{pointer<float>(norm), part(0), part(1), part(2), eps};
    return std::make_shared<BoundMlp>(BoundMlp{block, std::move(matrices)});
  }

  // vectors: norm, query norm (or 0), latent norm; up: (key_up, value_up, type); matrices: query,
  // kv_down, output and, where queries have a latent of their own, query_down; sizes: heads, key,
  // rope, value, latent.
  std::shared_ptr<BoundLatent> bind_latent(std::tuple<Address, Address, Address> vectors,
                                           std::tuple<Address, Address, int> up,
                                           std::vector<MatrixHandle> matrices,
                                           std::vector<Address> biases,
                                           std::tuple<int, int, int, int, int> sizes, float eps,
                                           float latent_eps, float scale) {
    require(matrices.size() == 3 || matrices.size() == 4, "matrices of latent attention", 3,
            int64_t(matrices.size()));
    require_equal("biases of latent attention", int64_t(matrices.size()), int64_t(biases.size()));
    const auto [heads, key, rope, value, latent] = sizes;
    require(heads >= 1 && key >= 1 && rope >= 2 && value >= 1 && latent >= 1, "sizes: at least", 1, 0);
    const auto [key_up, value_up, type] = up;
    require(type >= kBfloat16 && type <= kFloat32, "type of key_up", kBfloat16, type);
    const int64_t hidden = matrices[1]->layout.columns;
    const bool has_rank = matrices.size() == 4;
    if (has_rank) check_matrix(*matrices[3], matrices[3]->layout.rows, hidden);
    check_matrix(*matrices[0], int64_t(heads) * (key + rope),
                 has_rank ? matrices[3]->layout.rows : hidden);
    check_matrix(*matrices[1], int64_t(latent) + rope, hidden);
    check_matrix(*matrices[2], hidden, int64_t(heads) * value);
    const auto part = [&](size_t i) { return Linear{matrices[i].get(), pointer<float>(biases[i])}; };
    const LatentBlock block{pointer<float>(std::get<0>(vectors)),
                            has_rank ? part(3) : Linear{nullptr, nullptr},
                            pointer<float>(std::get<1>(vectors)),
                            part(0),
                            part(1),
                            part(2),
                            pointer<float>(std::get<2>(vectors)),
                            pointer<void>(key_up),
                            pointer<void>(value_up),
                            ScaleType(type),
                            heads,
                            key,
                            rope,
                            value,
                            latent,
                            eps,
                            latent_eps,
                            scale};
    return std::make_shared<BoundLatent>(BoundLatent{block, std::move(matrices)});
  }

  // (type of codes, group, scale type, zero points) of gate, up and down
  std::shared_ptr<ExpertLayout> expert_layout(
      int64_t hidden, int64_t inner, const std::vector<std::tuple<int, int, int, bool>>& schemes) const {
    require_equal("schemes of an expert", 3, int64_t(schemes.size()));
    const auto layout = [&](size_t i, int64_t rows, int64_t columns) {
      const auto [code, group, scale_type, zero] = schemes[i];
      return checked_layout(rows, columns, code, group, scale_type, zero);
    };
    // A unit of gate rows is one group of the down product's activations.
    require(inner % kUnitRows == 0, "inner size of an expert: a multiple of", kUnitRows, inner);
    return std::make_shared<ExpertLayout>(
        ExpertLayout{layout(0, inner, hidden), layout(1, inner, hidden), layout(2, hidden, inner)});
  }

  // (codes, scales, zeros) of gate, up and down, into a slot. In the calling thread, so that threads that
  // read experts do not wait for those that compute.
  void place_expert(const ExpertLayout& layout, const SlotArena& arena, int64_t slot,
                    const std::vector<std::tuple<Address, Address, Address>>& matrices) const {
    check_experts(layout);
    check_slot(layout, arena, slot);
    require_equal("matrices of an expert", 3, int64_t(matrices.size()));
    const MatrixLayout* layouts[] = {&layout.gate, &layout.up, &layout.down};
    const int64_t offsets[] = {0, up_offset(layout), down_offset(layout)};
    nb::gil_scoped_release release;
    for (size_t i = 0; i < 3; ++i) {
      const auto [codes, scales, zeros] = matrices[i];
      operations_.place_blocks(
          *layouts[i], {pointer<uint8_t>(codes), pointer<uint8_t>(scales), pointer<int8_t>(zeros)}, 0,
          num_row_blocks(*layouts[i]), arena.slot(slot) + offsets[i]);
    }
  }

  void quantize(Address x, int64_t tokens, int64_t columns, Address q, Address scale) {
    check_tokens(tokens);
    require(columns % kGroup == 0, "columns: a multiple of the group", kGroup, columns);
    nb::gil_scoped_release release;
    operations_.quantize(pointer<float>(x), tokens, columns, pointer<int8_t>(q), pointer<float>(scale));
  }

  void rms_norm(Address x, Address weight, float eps, int64_t tokens, int64_t size, Address y) {
    check_tokens(tokens);
    require(size >= 1, "size of a norm", 1, size);
    nb::gil_scoped_release release;
    operations_.rms_norm(pointer<float>(x), pointer<float>(weight), eps, tokens, size, pointer<float>(y));
  }

  void linear(Address x, int64_t tokens, int64_t columns, Address norm, float eps,
              const std::vector<MatrixHandle>& matrices, const std::vector<Address>& biases,
              Address out) {
    check_tokens(tokens);
    require(!matrices.empty(), "matrices of a linear", 1, 0);
    require_equal("biases of a linear", int64_t(matrices.size()), int64_t(biases.size()));
    std::vector<Linear> parts;
    for (size_t i = 0; i < matrices.size(); ++i) {
      check_matrix(*matrices[i], matrices[i]->layout.rows, columns);
      parts.push_back({matrices[i].get(), pointer<float>(biases[i])});
    }
    nb::gil_scoped_release release;
    operations_.linear(pointer<float>(x), tokens, pointer<float>(norm), eps, parts, pointer<float>(out));
  }

  void linear_add(Address x, int64_t tokens, int64_t columns, const MatrixHandle& matrix, Address bias,
                  Address residual) {
    check_tokens(tokens);
    check_matrix(*matrix, matrix->layout.rows, columns);
    nb::gil_scoped_release release;
    operations_.linear_add(pointer<float>(x), tokens, {matrix.get(), pointer<float>(bias)},
                           pointer<float>(residual));
  }

  void gate_up(Address x, int64_t tokens, int64_t columns, const MatrixHandle& gate,
               const MatrixHandle& up, Address out) {
    check_tokens(tokens);
    check_matrix(*gate, gate->layout.rows, columns);
    check_matrix(*up, gate->layout.rows, columns);
    nb::gil_scoped_release release;
    operations_.gate_up(pointer<float>(x), tokens, *gate, *up, pointer<float>(out));
  }

  void embedding(Address ids, int64_t tokens, const MatrixHandle& matrix, Address out) {
    check_tokens(tokens);
    check_matrix(*matrix, matrix->layout.rows, matrix->layout.columns);
    const int64_t* values = pointer<int64_t>(ids);
    for (int64_t t = 0; t < tokens; ++t) {
      require(values[t] >= 0 && values[t] < matrix->layout.rows, "embedding: id below the rows",
              matrix->layout.rows, values[t]);
    }
    nb::gil_scoped_release release;
    operations_.embedding(values, tokens, *matrix, pointer<float>(out));
  }

  void rope_append(Address qkv, int64_t tokens, std::tuple<int, int, int> heads, Address q_norm,
                   Address k_norm, float eps, std::tuple<Address, Address, int64_t, int64_t> rope,
                   std::tuple<Address, Address, int64_t, int> cache, int64_t start, Address q) {
    check_tokens(tokens);
    const Heads h{std::get<0>(heads), std::get<1>(heads), std::get<2>(heads)};
    check_heads(h);
    const Rope r = checked_rope(rope, h.dim, start + tokens);
    const Cache c = checked_cache(cache, start, tokens);
    nb::gil_scoped_release release;
    operations_.rope_append(pointer<float>(qkv), tokens, h,
                            {pointer<float>(q_norm), pointer<float>(k_norm), eps}, r, c, start,
                            pointer<float>(q));
  }

  void attention(Address q, int64_t tokens, std::tuple<int, int, int> heads,
                 std::tuple<Address, Address, int64_t, int> cache, int64_t start, float scale,
                 Address out) {
    check_tokens(tokens);
    const Heads h{std::get<0>(heads), std::get<1>(heads), std::get<2>(heads)};
    check_heads(h);
    const Cache c = checked_cache(cache, start, tokens);
    nb::gil_scoped_release release;
    operations_.attention(pointer<float>(q), tokens, h, c, start, scale, pointer<float>(out));
  }

  void attention_block(Address x, int64_t tokens, const BoundAttention& bound,
                       std::tuple<Address, Address, int64_t, int64_t> rope,
                       std::tuple<Address, Address, int64_t, int> cache, int64_t start) {
    check_tokens(tokens);
    const Rope r = checked_rope(rope, bound.block.heads.dim, start + tokens);
    const Cache c = checked_cache(cache, start, tokens);
    nb::gil_scoped_release release;
    operations_.attention_block(pointer<float>(x), tokens, bound.block, r, c, start);
  }

  void mlp_block(Address x, int64_t tokens, const BoundMlp& bound) {
    check_tokens(tokens);
    nb::gil_scoped_release release;
    operations_.mlp_block(pointer<float>(x), tokens, bound.block);
  }

  // cache: (rows, capacity, type)
  void latent_block(Address x, int64_t tokens, const BoundLatent& bound,
                    std::tuple<Address, Address, int64_t, int64_t> rope,
                    std::tuple<Address, int64_t, int> cache, int64_t start) {
    check_tokens(tokens);
    require(start >= 0, "start: at least", 0, start);
    const Rope r = checked_rope(rope, bound.block.rope_size, start + tokens);
    const auto [rows, capacity, type] = cache;
    require(capacity >= start + tokens, "cache: positions", start + tokens, capacity);
    const LatentRows c{pointer<void>(rows), capacity, checked_cache_type(type)};
    nb::gil_scoped_release release;
    operations_.latent_block(pointer<float>(x), tokens, bound.block, r, c, start);
  }

  // rule: (experts, per token, groups, kept groups, group score, softmax, normalized, epsilon, scale)
  void route(Address x, int64_t tokens, int64_t hidden, Address weight, Address bias,
             std::tuple<int64_t, int64_t, int64_t, int64_t, int, bool, bool, float, float> rule,
             Address chosen, Address weights) {
    check_tokens(tokens);
    const auto [experts, per_token, groups, kept, score, softmax, normalized, epsilon, scale] = rule;
    require(groups >= 1 && experts >= groups && experts % groups == 0,
            "experts: a multiple of the groups", groups, experts);
    require(kept >= 1 && kept <= groups, "kept groups: at most", groups, kept);
    require(per_token >= 1 && per_token <= kept * (experts / groups), "experts per token: at most",
            kept * (experts / groups), per_token);
    require(score == 1 || (score == 2 && (kept == groups || experts / groups >= 2)),
            "experts that judge a group: at most", experts / groups, score);
    const RouterRule r{pointer<float>(weight), pointer<float>(bias), experts, per_token, groups, kept,
                       score, softmax, normalized, epsilon, scale};
    nb::gil_scoped_release release;
    operations_.route(pointer<float>(x), tokens, hidden, r, pointer<int64_t>(chosen),
                      pointer<float>(weights));
  }

  // table: the addresses of the layer's experts, 0 for one that is not in memory
  void mix_experts(Address x, int64_t tokens, int64_t hidden, Address chosen, Address weights,
                   int64_t per_token, const ExpertLayout& layout, Address table, int64_t count,
                   Address residual) {
    const Experts experts = checked_experts(layout, table, count, hidden);
    const Choice choice = checked_choice(chosen, tokens, per_token, experts, 0);
    nb::gil_scoped_release release;
    operations_.mix_experts(pointer<float>(x), choice, pointer<float>(weights), experts,
                            pointer<float>(residual));
  }

  // Negative choices are left out.
  void expert_outputs(Address x, int64_t tokens, int64_t hidden, Address chosen, int64_t per_token,
                      const ExpertLayout& layout, Address table, int64_t count, Address outputs) {
    const Experts experts = checked_experts(layout, table, count, hidden);
    const Choice choice = checked_choice(chosen, tokens, per_token, experts, -1);
    nb::gil_scoped_release release;
    operations_.expert_outputs(pointer<float>(x), choice, experts, pointer<float>(outputs));
  }

  void combine_experts(Address outputs, Address weights, int64_t tokens, int64_t per_token,
                       int64_t hidden, Address residual) {
    check_tokens(tokens);
    require(per_token >= 1, "experts per token: at least", 1, per_token);
    require(hidden >= 1 && hidden % kGroup == 0, "hidden size: a multiple of", kGroup, hidden);
    nb::gil_scoped_release release;
    operations_.combine_experts(pointer<float>(outputs), pointer<float>(weights), tokens, per_token,
                                hidden, pointer<float>(residual));
  }

  // elsewhere: the address of a C function of a layer's number.
  std::shared_ptr<HostMixtures> host_mixtures(Address elsewhere) {
    return std::make_shared<HostMixtures>(operations_, reinterpret_cast<HostMixtures::Elsewhere>(elsewhere));
  }

 private:
  const KernelTable& table() const { return operations_.table(); }

  static void check_tokens(int64_t tokens) { require(tokens >= 1, "tokens: at least", 1, tokens); }

  MatrixLayout checked_layout(int64_t rows, int64_t columns, int code, int group, int scale_type,
                              bool has_zero) const {
    if (code != kInt4 && code != kInt5 && code != kInt6 && code != kInt8 && code != kNf4) {
      throw RefusedError("codes: expected 4, 5, 6, 8 bits or NF4's 20, found " + std::to_string(code));
    }
    require(code != kNf4 || !has_zero, "zero points of NF4", 0, has_zero);
    if (group != 32 && group != 64 && group != 128) {
      throw RefusedError("group: expected 32, 64 or 128, found " + std::to_string(group));
    }
    require(rows >= 1, "rows", 1, rows);
    require(columns >= group && columns % group == 0, "columns: a multiple of the group", group, columns);
    require(scale_type >= kBfloat16 && scale_type <= kFloat32, "scale type", kBfloat16, scale_type);
    return {rows, columns, rows_per_block(), CodeType(code), group, ScaleType(scale_type), has_zero};
  }

  void check_experts(const ExpertLayout& layout) const {
    require_equal("rows per block of the experts", rows_per_block(), layout.gate.rows_per_block);
  }

  static void check_slot(const ExpertLayout& layout, const SlotArena& arena, int64_t slot) {
    require(slot >= 0 && slot < arena.size(), "slot: below", arena.size(), slot);
    require(expert_bytes(layout) <= int64_t(arena.slot_bytes()), "bytes of an expert: at most",
            int64_t(arena.slot_bytes()), expert_bytes(layout));
  }

  Experts checked_experts(const ExpertLayout& layout, Address table, int64_t count,
                          int64_t hidden) const {
    check_experts(layout);
    require_equal("hidden size of the experts", hidden, layout.gate.columns);
    require(count >= 1, "experts: at least", 1, count);
    return {layout, pointer<const uint8_t*>(table), count};
  }

  static Choice checked_choice(Address chosen, int64_t tokens, int64_t per_token, const Experts& experts,
                               int64_t lowest) {
    check_tokens(tokens);
    require(per_token >= 1, "experts per token: at least", 1, per_token);
    const Choice choice{pointer<int64_t>(chosen), tokens, per_token};
    for (int64_t i = 0; i < tokens * per_token; ++i) {
      const int64_t expert = choice.chosen[i];
      require(expert >= lowest && expert < experts.count, "expert: below", experts.count, expert);
      require(expert < 0 || experts.data[expert] != nullptr, "experts in memory: also number", expert,
              expert);
    }
    return choice;
  }

  // Rows, columns and the layout this instruction set reads.
  void check_matrix(const Matrix& matrix, int64_t rows, int64_t columns) const {
    require_equal("rows of a matrix", rows, matrix.layout.rows);
    require_equal("columns of a matrix", columns, matrix.layout.columns);
    require_equal("rows per block of a matrix", rows_per_block(), matrix.layout.rows_per_block);
  }

  static void check_heads(const Heads& h) {
    require(h.query >= 1 && h.key_value >= 1 && h.query % h.key_value == 0,
            "query heads: a multiple of the key/value heads", h.key_value, h.query);
    require(h.dim >= 8 && h.dim % 8 == 0, "head dim: a multiple of", 8, h.dim);
    require(h.dim <= kMaxHeadDim, "head dim: at most", kMaxHeadDim, h.dim);
  }

  // (cos, sin, positions, pairs)
  static Rope checked_rope(const std::tuple<Address, Address, int64_t, int64_t>& rope, int64_t dim,
                           int64_t end) {
    const auto [cosine, sine, positions, pairs] = rope;
    require(positions >= end, "rope table: positions", end, positions);
    require(pairs >= 0 && 2 * pairs <= dim, "rope table: pairs at most", dim / 2, pairs);
    return {pointer<float>(cosine), pointer<float>(sine), pairs};
  }

  static CacheType checked_cache_type(int type) {
    require(type >= kCacheFloat32 && type <= kCacheInt8, "cache type: at most", kCacheInt8, type);
    return static_cast<CacheType>(type);
  }

  // (keys, values, capacity, type)
  static Cache checked_cache(const std::tuple<Address, Address, int64_t, int>& cache, int64_t start,
                             int64_t tokens) {
    const auto [keys, values, capacity, type] = cache;
    require(start >= 0, "start: at least", 0, start);
    require(capacity >= start + tokens, "cache: positions", start + tokens, capacity);
    return {pointer<void>(keys), pointer<void>(values), capacity, checked_cache_type(type)};
  }

  Operations operations_;
};

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels of localr1; localr1/kernels/native.py is their documented face.";
  nb::set_leak_warnings(false);  // objects may live until the interpreter ends
  nb::exception<RefusedError>(m, "RefusedError", PyExc_ValueError);

  bind_checksum(m);
  bind_host_mixtures(m);
  bind_quantize(m);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const KernelTable* table : available_tables()) names.emplace_back(table->name);
    return names;
  });
  m.def(
      "matrix_bytes",
      [](int64_t rows, int64_t columns, int rows_per_block, int code, int group, int scale_type,
         bool zero) {
        return matrix_bytes(
            {rows, columns, rows_per_block, CodeType(code), group, ScaleType(scale_type), zero});
      },
      "rows"_a, "columns"_a, "rows_per_block"_a, "code"_a, "group"_a, "scale_type"_a, "zero"_a);

  nb::class_<Matrix>(m, "Matrix")
      .def_prop_ro("nbytes", [](const Matrix& matrix) { return matrix_bytes(matrix.layout); })
      .def_prop_ro("address", [](const Matrix& matrix) { return Address(matrix.data.get()); })
      .def_prop_ro("layout", [](const Matrix& matrix) {
        const MatrixLayout& layout = matrix.layout;
        return std::make_tuple(layout.rows, layout.columns, layout.rows_per_block, int(layout.code),
                               layout.group, int(layout.scale_type), layout.has_zero);
      });
  nb::class_<ExpertLayout>(m, "ExpertLayout").def_prop_ro("nbytes", [](const ExpertLayout& layout) {
    return expert_bytes(layout);
  });
  nb::class_<SlotArena>(m, "SlotArena")
      .def("__init__",
           [](SlotArena* arena, int64_t slot_bytes) {
             require(slot_bytes >= 1 && slot_bytes % kAlignment == 0, "bytes of a slot: a multiple of",
                     kAlignment, slot_bytes);
             new (arena) SlotArena(size_t(slot_bytes));
           })
      .def(
          "resize",
          [](SlotArena& arena, int64_t count) {
            require(count >= 0, "slots: at least", 0, count);
            return arena.resize(count);
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("size", &SlotArena::size)
      .def_prop_ro("slot_bytes", [](const SlotArena& arena) { return int64_t(arena.slot_bytes()); })
      .def("address", [](const SlotArena& arena, int64_t slot) {
        require(slot >= 0 && slot < arena.size(), "slot: below", arena.size(), slot);
        return Address(arena.slot(slot));
      });
  nb::class_<BoundAttention>(m, "BoundAttention");
  nb::class_<BoundMlp>(m, "BoundMlp");
  nb::class_<BoundLatent>(m, "BoundLatent");

  nb::class_<Kernels>(m, "Kernels")
      .def(nb::init<const std::string&, int>(), "isa"_a, "threads"_a)
      .def_prop_ro("isa", &Kernels::isa)
      .def_prop_ro("threads", &Kernels::threads)
      .def_prop_ro("rows_per_block", &Kernels::rows_per_block)
      .def("prepare", &Kernels::prepare)
      .def("expert_layout", &Kernels::expert_layout)
      .def("place_expert", &Kernels::place_expert)
      .def("bind_attention", &Kernels::bind_attention)
      .def("bind_mlp", &Kernels::bind_mlp)
      .def("bind_latent", &Kernels::bind_latent)
      .def("quantize", &Kernels::quantize)
      .def("rms_norm", &Kernels::rms_norm)
      .def("linear", &Kernels::linear)
      .def("linear_add", &Kernels::linear_add)
      .def("gate_up", &Kernels::gate_up)
      .def("embedding", &Kernels::embedding)
      .def("rope_append", &Kernels::rope_append)
      .def("attention", &Kernels::attention)
      .def("attention_block", &Kernels::attention_block)
      .def("mlp_block", &Kernels::mlp_block)
      .def("latent_block", &Kernels::latent_block)
      .def("route", &Kernels::route)
      .def("mix_experts", &Kernels::mix_experts)
      .def("expert_outputs", &Kernels::expert_outputs)
      .def("combine_experts", &Kernels::combine_experts)
      .def("host_mixtures", &Kernels::host_mixtures, nb::keep_alive<0, 1>());
}

}  // namespace
}  // namespace localr1
