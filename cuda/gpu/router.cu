// Which experts each token goes to, in the reference's order of operations.
#include "device.h"

namespace localr1 {

constexpr int kExpertsOfBlock = 8;  // a warp each
constexpr int kMaxExperts = 1024;

// NaN before everything, so that it is seen.
static inline bool goes_before(float a, float b) { return a > b || (a != a && b == b); }

struct Candidate {
  float value;
  int index;  // negative: none
};

static inline bool is_better(const Candidate& a, const Candidate& b) {
  if (a.index < 0 || b.index < 0) return b.index < 0 && a.index >= 0;
  if (goes_before(a.value, b.value)) return true;
  return !goes_before(b.value, a.value) && a.index < b.index;
}

// The best of all lanes' candidates, the lower index of equals, in every lane.
static inline Candidate best_of_warp(Candidate best) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Candidate other{__shfl_xor_sync(kAllLanes, best.value, distance),
                          __shfl_xor_sync(kAllLanes, best.index, distance)};
    if (is_better(other, best)) best = other;
  }
  return best;
}

template <ScaleType kType>
static inline float lane_dot(const float* x, const void* weight, int64_t first, int n, int lane) {
  float low = 0.0f, high = 0.0f;
#pragma unroll 4
  for (int i = lane; i < n; i += kLanes) {
    low = rounded_sum(low, rounded_product(__ldg(x + i), load_scale(weight, first + i, kType)));
    if (i + kWarp < n) {
      const float other = load_scale(weight, first + i + kWarp, kType);
      high = rounded_sum(high, rounded_product(__ldg(x + i + kWarp), other));
    }
  }
  return fold_lanes(low, high);
}

// logits [tokens, experts] of x [tokens, hidden] and weight [experts, hidden], which is widened exactly. A
// grid of (ceil(experts / 8), tokens).
LOCALR1_KERNEL(256, 1024)
route_logits(const float* x, const void* weight, int weight_type, int hidden, int experts, float* logits) {
  const int lane = threadIdx.x % kWarp;
  const int expert = blockIdx.x * kExpertsOfBlock + threadIdx.x / kWarp;
  if (expert >= experts) return;
  const float* row = x + int64_t(blockIdx.y) * hidden;
  const int64_t first = int64_t(expert) * hidden;
  float logit;
  if (weight_type == kFloat32) {
    logit = lane_dot<kFloat32>(row, weight, first, hidden, lane);
  } else if (weight_type == kBfloat16) {
    logit = lane_dot<kBfloat16>(row, weight, first, hidden, lane);
  } else {
    logit = lane_dot<kFloat16>(row, weight, first, hidden, lane);
  }
  if (lane == 0) logits[int64_t(blockIdx.y) * experts + expert] = logit;
}

// kernels/api.py: RouterRule. groups, kept and per_token: at most 32.
struct RouterRule {
  int experts, per_token, groups, kept_groups;
  int group_score;  // judged by the best expert (1) or the sum of the best two (2)
  int softmax, normalized;
  float epsilon, scale;
};
static_assert(sizeof(RouterRule) == 36, "as localr1/kernels/gpu_layout.py passes it");

// logits -> scores [experts], each lane those of its experts.
static inline void score(const RouterRule& rule, const float* logits, int lane, float* scores) {
  if (!rule.softmax) {
    for (int i = lane; i < rule.experts; i += kWarp) scores[i] = sigmoid_of(logits[i]);
    return;
  }
  Candidate highest{0.0f, -1};
  for (int i = lane; i < rule.experts; i += kWarp) {
    const Candidate next{logits[i], i};
    if (is_better(next, highest)) highest = next;
  }
  const float top = best_of_warp(highest).value;  // NaN, if there is one
  float low = 0.0f, high = 0.0f;
  for (int i = lane; i < rule.experts; i += kWarp) {
    const float e = scalar_exp(rounded_difference(logits[i], top));
    scores[i] = e;
    if (i / kWarp % 2 == 0) {
      low = rounded_sum(low, e);
    } else {
      high = rounded_sum(high, e);
    }
  }
  const float sum = fold_lanes(low, high);
  for (int i = lane; i < rule.experts; i += kWarp) scores[i] = rounded_quotient(scores[i], sum);
}

// A bit for each group that experts may be chosen from. A lane judges one group.
static inline uint32_t best_groups(const RouterRule& rule, const float* judged, int lane) {
  if (rule.kept_groups >= rule.groups) return kAllLanes;
  const int size = rule.experts / rule.groups;
  Candidate mine{0.0f, -1};
  if (lane < rule.groups) {
    Candidate best{0.0f, -1}, second{0.0f, -1};
    for (int i = 0; i < size; ++i) {
      const int within = (i + lane) % size;  // lanes so meet in no bank, whatever the size
      const Candidate next{judged[lane * size + within], within};
      if (is_better(next, best)) {
        second = best;
        best = next;
      } else if (is_better(next, second)) {
        second = next;
      }
    }
    const float both = rule.group_score == 2 ? rounded_sum(best.value, second.value) : best.value;
    mine = {both, lane};
  }
  uint32_t kept = 0u;
  for (int i = 0; i < rule.kept_groups; ++i) {
    const Candidate best = best_of_warp(mine);
    kept |= 1u << best.index;
    if (best.index == lane) mine.index = -1;
  }
  return kept;
}

// chosen, weights [tokens, per_token], the expert chosen first in column 0. One warp a token: a grid of
// (tokens).
LOCALR1_KERNEL(kWarp, 512)
route_choose(const float* logits, const float* bias, RouterRule rule, int32_t* chosen, float* weights) {
  __shared__ float scores[kMaxExperts];
  __shared__ float judged[kMaxExperts];
  const int lane = threadIdx.x, size = rule.experts / rule.groups;
  score(rule, logits + int64_t(blockIdx.x) * rule.experts, lane, scores);
  for (int i = lane; i < rule.experts; i += kWarp) {
    judged[i] = bias ? rounded_sum(scores[i], bias[i]) : scores[i];
  }
  __syncwarp();
  const uint32_t kept = best_groups(rule, judged, lane);
  uint32_t taken = 0u;  // a bit for each of this lane's experts
  int expert = -1;      // of the choice whose number this lane has
  float total = 0.0f, weight = 0.0f;
  for (int choice = 0; choice < rule.per_token; ++choice) {
    Candidate mine{0.0f, -1};
    for (int i = lane, bit = 0; i < rule.experts; i += kWarp, ++bit) {
      const Candidate next{judged[i], i};
      if ((kept >> i / size & 1u) && !(taken >> bit & 1u) && is_better(next, mine)) mine = next;
    }
    const int best = best_of_warp(mine).index;
    if (best % kWarp == lane) taken |= 1u << best / kWarp;
    const float score = scores[best];
    total = rounded_sum(total, score);
    if (choice == lane) {
      expert = best;
      weight = score;
    }
  }
  if (lane >= rule.per_token) return;
  if (rule.normalized) weight = rounded_quotient(weight, rounded_sum(total, rule.epsilon));
  chosen[blockIdx.x * rule.per_token + lane] = expert;
  weights[blockIdx.x * rule.per_token + lane] = rounded_product(weight, rule.scale);
}

}  // namespace localr1
