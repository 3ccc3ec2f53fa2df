// A mixture's routed experts: the pairs (token, expert) of a call are brought into the order of their
// experts, so that an expert's weights are read once for all the tokens of a task, whatever they are.
#include <string.h>

#include <algorithm>
#include <vector>

#include "operations.h"
#include "plan.h"
#include "units.h"

namespace localr1 {

namespace {

// The tokens of one chosen expert: pairs begin..begin+count-1.
struct Group {
  int64_t expert, begin, count;
  int64_t first_task;  // of the gate and up products
};

// The pairs of a call, sorted by expert; of one expert in the order of the tokens.
struct Pairs {
  std::vector<Group> groups;   // chosen experts only
  std::vector<int64_t> token;  // [pairs]
  std::vector<int64_t> group;  // [pairs]
  std::vector<int64_t> row;    // [tokens, per_token]: where each choice stands among the pairs, or -1

  Pairs(const Choice& choice, int64_t num_experts) : row(size_t(choice.tokens * choice.per_token), -1) {
    std::vector<int64_t> next(size_t(num_experts), 0), group_of(size_t(num_experts), 0);
    for (size_t i = 0; i < row.size(); ++i) {
      if (choice.chosen[i] >= 0) ++next[size_t(choice.chosen[i])];
    }
    int64_t begin = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      const int64_t count = next[size_t(expert)];
      next[size_t(expert)] = begin;
      group_of[size_t(expert)] = int64_t(groups.size());
      if (count > 0) groups.push_back({expert, begin, count, 0});
      begin += count;
    }
    token.resize(size_t(begin));
    group.resize(size_t(begin));
    for (size_t i = 0; i < row.size(); ++i) {
      if (choice.chosen[i] < 0) continue;
      const size_t expert = size_t(choice.chosen[i]);
      const int64_t pair = next[expert]++;
      row[i] = pair;
      token[size_t(pair)] = int64_t(i) / choice.per_token;
      group[size_t(pair)] = group_of[expert];
    }
  }
};

// The activations of `count` pairs from `begin` on, which have tiles of their own.
Activations part_of(const Activations& all, int64_t begin, int64_t count) {
  const int64_t groups = begin * all.groups;
  return {all.q + groups * kGroup, all.scale + groups, all.offset + groups, count, all.groups};
}

// One call: its steps are taken by every thread of a team, as those of Steps.
class Mixture {
 public:
  Mixture(const KernelTable& table, const Experts& experts, const Choice& choice, int threads)
      : table_(table), experts_(experts), layout_(experts.layout), choice_(choice),
        pairs_(choice, experts.count), inner_units_(num_units(layout_.gate)),
        hidden_units_(num_units(layout_.down)) {
    // A single token's experts are tasks of one unit; else as many rows as stay in the cache.
    inner_step_ = alone() ? 1 : kTaskUnits;
    for (Group& group : pairs_.groups) {
      group.first_task = num_tasks_;
      const int64_t tiles = (group.count + kTokenTile - 1) / kTokenTile;
      num_tasks_ += blocks(inner_units_, inner_step_) * blocks(tiles, kTaskTiles);
    }
    // All tasks of the down product are alike: enough of them for the threads to end together.
    hidden_step_ = alone() ? 1 : kTaskUnits;
    while (hidden_step_ > 1 && blocks(hidden_units_, hidden_step_) < 4 * threads) hidden_step_ /= 2;
  }

  int64_t num_pairs() const { return int64_t(pairs_.token.size()); }
  // The tokens that are quantized: a single token once, though several experts read it.
  int64_t num_inputs() const { return alone() ? 1 : num_pairs(); }
  // Outputs of the down product that one task holds.
  int64_t task_floats() const { return hidden_step_ * num_pairs() * kUnitRows; }

  void quantize(Team& team, const float* x, const Activations& inputs) const {
    const int64_t hidden = layout_.gate.columns;
    team.for_ranges(num_inputs(), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const Group& group = pairs_.groups[size_t(pairs_.group[size_t(pair)])];
        const int64_t token = alone() ? 0 : pairs_.token[size_t(pair)];
        const int64_t within = alone() ? 0 : pair - group.begin;
        table_.quantize(x + token * hidden, 0, inputs.groups, inputs_of(inputs, group), within);
      }
    });
  }

  void gate_up(Team& team, const Activations& inputs, const Activations& gated) const {
    const auto run = [&](int64_t task) {
      const auto after = std::upper_bound(
          pairs_.groups.begin(), pairs_.groups.end(), task,
          [](int64_t value, const Group& group) { return value < group.first_task; });
      const Group& group = *(after - 1);
      const int64_t local = task - group.first_task, columns = blocks(inner_units_, inner_step_);
      const Activations a = inputs_of(inputs, group), out = part_of(gated, group.begin, group.count);
      const int64_t unit = local % columns * inner_step_, tile = local / columns * kTaskTiles;
      const int64_t end_unit = minimum(unit + inner_step_, inner_units_);
      const int64_t end_tile = minimum(tile + kTaskTiles, num_tiles(a));
      for (int64_t u = unit; u < end_unit; ++u) {
        for (int64_t t = tile; t < end_tile; ++t) gate_up_unit(group, u, t, a, out);
      }
    };
    if (!alone()) return team.for_each(num_tasks_, run);
    team.for_ranges(num_tasks_, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) run(task);
    });
  }

  // outputs: task_floats() of this thread. Each task's are handed on as finish(unit, count, outputs).
  template <class Finish>
  void down(Team& team, const Activations& gated, float* outputs, const Finish& finish) const {
    const auto run = [&](int64_t task) {
      const int64_t first = task * hidden_step_;
      const int64_t count = minimum(hidden_step_, hidden_units_ - first);
      for (const Group& group : pairs_.groups) {
        down_units(group, first, count, part_of(gated, group.begin, group.count), outputs);
      }
      finish(first, count, outputs);
    };
    const int64_t tasks = blocks(hidden_units_, hidden_step_);
    if (!alone()) return team.for_each(tasks, run);
    team.for_ranges(tasks, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) run(task);
    });
  }

  // residual [tokens, hidden]: its columns of these units gain their weighted sums.
  void combine(int64_t first, int64_t count, const float* outputs, const float* weights,
               float* residual) const {
    const int64_t hidden = layout_.down.rows, k = choice_.per_token;
    for (int64_t unit = 0; unit < count; ++unit) {
      const float* y = outputs + unit * num_pairs() * kUnitRows;
      const int64_t row = (first + unit) * kUnitRows;
      for (int64_t token = 0; token < choice_.tokens; ++token) {
        table_.combine(y, kUnitRows, pairs_.row.data() + token * k, weights + token * k, k,
                       minimum(kUnitRows, hidden - row), residual + token * hidden + row);
      }
    }
  }

  // all [tokens, per_token, hidden]: these units' columns of the choices that were computed.
  void store(int64_t first, int64_t count, const float* outputs, float* all) const {
    const int64_t hidden = layout_.down.rows;
    for (int64_t unit = 0; unit < count; ++unit) {
      const float* y = outputs + unit * num_pairs() * kUnitRows;
      const int64_t row = (first + unit) * kUnitRows;
      for (size_t i = 0; i < pairs_.row.size(); ++i) {
        if (pairs_.row[i] < 0) continue;
        memcpy(all + int64_t(i) * hidden + row, y + pairs_.row[i] * kUnitRows,
               size_t(minimum(kUnitRows, hidden - row)) * sizeof(float));
      }
    }
  }

 private:
  static int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

  bool alone() const { return choice_.tokens == 1; }

  Activations inputs_of(const Activations& inputs, const Group& group) const {
    return alone() ? inputs : part_of(inputs, group.begin, group.count);
  }

  void gate_up_unit(const Group& group, int64_t unit, int64_t tile, const Activations& a,
                    const Activations& out) const {
    static_assert(kUnitRows == kGroup, "a unit is one group of the next product's activations");
    const uint8_t* gate = experts_.data[group.expert];
    alignas(kAlignment) float gate_y[kTokenTile * kUnitRows];
    alignas(kAlignment) float up_y[kTokenTile * kUnitRows];
    unit_product(table_, layout_.gate, gate, unit, a, tile, gate_y);
    unit_product(table_, layout_.up, gate + up_offset(layout_), unit, a, tile, up_y);
    for (int64_t t = 0; t < tile_width(a, tile); ++t) {
      float* values = gate_y + t * kUnitRows;
      table_.silu_multiply(values, nullptr, up_y + t * kUnitRows, nullptr, kUnitRows, values);
      table_.quantize(values, unit, 1, out, tile * kTokenTile + t);
    }
  }

  // outputs [count, pairs, kUnitRows]
  void down_units(const Group& group, int64_t first, int64_t count, const Activations& a,
                  float* outputs) const {
    const uint8_t* down = experts_.data[group.expert] + down_offset(layout_);
    for (int64_t tile = 0; tile < num_tiles(a); tile += kTaskTiles) {
      for (int64_t unit = 0; unit < count; ++unit) {
        for (int64_t t = tile; t < minimum(tile + kTaskTiles, num_tiles(a)); ++t) {
          float* y = outputs + (unit * num_pairs() + group.begin + t * kTokenTile) * kUnitRows;
          unit_product(table_, layout_.down, down, first + unit, a, t, y);
        }
      }
    }
  }

  const KernelTable& table_;
  const Experts& experts_;
  const ExpertLayout& layout_;
  const Choice choice_;
  Pairs pairs_;
  const int64_t inner_units_, hidden_units_;
  int64_t inner_step_, hidden_step_;  // units of a task
  int64_t num_tasks_ = 0;             // of the gate and up products
};

}  // namespace

template <class Finish>
void Operations::run_mixture(const float* x, const Choice& choice, const Experts& experts,
                             const Finish& finish) {
  const int64_t hidden = experts.layout.gate.columns, inner = experts.layout.gate.rows;
  const Mixture mixture(table_, experts, choice, threads());
  if (mixture.num_pairs() == 0) return;
  Plan plan;
  plan.add_activations(mixture.num_inputs(), hidden);
  plan.add_activations(mixture.num_pairs(), inner);
  plan.add<float>(mixture.task_floats() * threads());
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_.reserve(plan.bytes());
  const Activations inputs = take_activations(workspace_, mixture.num_inputs(), hidden);
  const Activations gated = take_activations(workspace_, mixture.num_pairs(), inner);
  float* outputs = workspace_.take<float>(mixture.task_floats() * threads());
  pool_.run([&](Team& team) {
    mixture.quantize(team, x, inputs);
    mixture.gate_up(team, inputs, gated);
    mixture.down(team, gated, outputs + team.index() * mixture.task_floats(),
                 [&](int64_t first, int64_t count, const float* y) { finish(mixture, first, count, y); });
  });
}

void Operations::mix_experts(const float* x, const Choice& choice, const float* weights,
                             const Experts& experts, float* residual) {
  run_mixture(x, choice, experts,
              [&](const Mixture& mixture, int64_t first, int64_t count, const float* y) {
                mixture.combine(first, count, y, weights, residual);
              });
}

void Operations::expert_outputs(const float* x, const Choice& choice, const Experts& experts,
                                float* outputs) {
  run_mixture(x, choice, experts,
              [&](const Mixture& mixture, int64_t first, int64_t count, const float* y) {
                mixture.store(first, count, y, outputs);
              });
}

void Operations::combine_experts(const float* outputs, const float* weights, int64_t tokens,
                                 int64_t per_token, int64_t hidden, float* residual) {
  std::vector<int64_t> rows(static_cast<size_t>(per_token));
  for (int64_t i = 0; i < per_token; ++i) rows[size_t(i)] = i;
  pool_.run([&](Team& team) {
    team.for_ranges(tokens, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        table_.combine(outputs + token * per_token * hidden, hidden, rows.data(),
                       weights + token * per_token, per_token, hidden, residual + token * hidden);
      }
    });
  });
}

}  // namespace localr1
