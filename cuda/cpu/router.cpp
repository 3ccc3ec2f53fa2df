// Which experts each token goes to, in the reference's order of operations: every instruction set and
// any number of threads choose the same experts and return the same weights.
#include <limits>

#include "operations.h"
#include "plan.h"

namespace localr1 {

namespace {

// Tokens that meet an expert's row together: theirs stay in the first-level cache while the rows of
// all experts pass.
constexpr int64_t kTileTokens = 4;

// a goes before b, if their indices do not decide: NaN before everything, so that it is seen.
bool goes_before(float a, float b) { return a > b || (a != a && b == b); }

// The `count` best of n values that `allowed` lets pass, the lower index first where they are equal.
template <class Allowed>
void choose_best(const float* values, int64_t n, int64_t count, const Allowed& allowed, int64_t* best) {
  for (int64_t found = 0; found < count; ++found) {
    int64_t next = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (!allowed(i) || (next >= 0 && !goes_before(values[i], values[next]))) continue;
      bool taken = false;
      for (int64_t j = 0; j < found && !taken; ++j) taken = best[j] == i;
      if (!taken) next = i;
    }
    best[found] = next;
  }
}

void score(const KernelTable& table, const RouterRule& rule, const float* logits, float* scores) {
  const int64_t n = rule.experts;
  if (!rule.softmax) return table.sigmoid(logits, n, scores);
  float highest = logits[0];
  for (int64_t i = 1; i < n; ++i) {
    if (logits[i] > highest || logits[i] != logits[i]) highest = logits[i];
  }
  const float sum = table.exp_sum(logits, highest, n, scores);
  for (int64_t i = 0; i < n; ++i) scores[i] = scores[i] / sum;
}

// Marks the groups of `judged` that experts may be chosen from; group_scores [groups], temporary.
void keep_best_groups(const RouterRule& rule, const float* judged, float* group_scores,
                      int64_t* best, uint8_t* kept) {
  const int64_t size = rule.experts / rule.groups;
  const auto all = [](int64_t) { return true; };
  for (int64_t group = 0; group < rule.groups; ++group) {
    int64_t top[2];
    choose_best(judged + group * size, size, rule.group_score, all, top);
    group_scores[group] = judged[group * size + top[0]];
    if (rule.group_score == 2) group_scores[group] += judged[group * size + top[1]];
    kept[group] = 0;
  }
  choose_best(group_scores, rule.groups, rule.kept_groups, all, best);
  for (int64_t i = 0; i < rule.kept_groups; ++i) kept[best[i]] = 1;
}

}  // namespace

void Operations::route(const float* x, int64_t tokens, int64_t hidden, const RouterRule& rule,
                       int64_t* chosen, float* weights) {
  const int64_t n = rule.experts, k = rule.per_token, size = n / rule.groups;
  const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  Plan plan;
  plan.add<float>(tokens * n);
  plan.add<float>(3 * n * threads());
  plan.add<int64_t>(n * threads());
  plan.add<uint8_t>(n * threads());
  std::lock_guard<std::mutex> lock(mutex_);
  workspace_.reserve(plan.bytes());
  float* logits = workspace_.take<float>(tokens * n);
  float* thread_floats = workspace_.take<float>(3 * n * threads());
  int64_t* thread_groups = workspace_.take<int64_t>(n * threads());
  uint8_t* thread_kept = workspace_.take<uint8_t>(n * threads());
  pool_.run([&](Team& team) {
    team.for_ranges(n * tiles, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t expert = item % n, first = item / n * kTileTokens;
        const int64_t last = first + kTileTokens < tokens ? first + kTileTokens : tokens;
        for (int64_t token = first; token < last; ++token) {
          logits[token * n + expert] =
              table_.lane_dot(x + token * hidden, rule.weight + expert * hidden, hidden);
        }
      }
    });
    float* scores = thread_floats + 3 * n * team.index();
    float* judged = scores + n;
    float* group_scores = judged + n;
    int64_t* best_groups = thread_groups + n * team.index();
    uint8_t* kept = thread_kept + n * team.index();
    team.for_ranges(tokens, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        int64_t* best = chosen + token * k;
        float* weight = weights + token * k;
        score(table_, rule, logits + token * n, scores);
        for (int64_t i = 0; i < n; ++i) judged[i] = rule.bias ? scores[i] + rule.bias[i] : scores[i];
        const bool grouped = rule.kept_groups < rule.groups;
        if (grouped) keep_best_groups(rule, judged, group_scores, best_groups, kept);
        choose_best(judged, n, k, [&](int64_t i) { return !grouped || kept[i / size]; }, best);
        float sum = 0.0f;
        for (int64_t j = 0; j < k; ++j) {
          weight[j] = scores[best[j]];
          sum += weight[j];
        }
        if (rule.normalized) {
          for (int64_t j = 0; j < k; ++j) weight[j] = weight[j] / (sum + rule.epsilon);
        }
        for (int64_t j = 0; j < k; ++j) weight[j] = weight[j] * rule.scale;
      }
    });
  });
}

}  // namespace localr1
