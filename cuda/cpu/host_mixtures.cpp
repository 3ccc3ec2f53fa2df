#include "host_mixtures.h"

#include <chrono>
#include <utility>

namespace localr1 {

HostLayer* HostMixtures::add(HostLayer layer) {
  layer.owner = this;
  layers_.push_back(std::make_unique<HostLayer>(layer));
  return layers_.back().get();
}

void HostMixtures::run(void* argument) {
  const HostLayer& layer = *static_cast<const HostLayer*>(argument);
  HostMixtures& self = *layer.owner;
  const Way way = self.way_;
  if (way == Way::kNothing || (way == Way::kHere && self.compute(layer))) return;
  self.elsewhere_(layer.number);
}

std::vector<HostResult> HostMixtures::take() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(results_, {});
}

double HostMixtures::seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Whether it was done. Memory that ends here is an error there, with a name.
bool HostMixtures::compute(const HostLayer& layer) noexcept {
  try {
    HostResult result{layer.number, {layer.chosen, layer.chosen + layer.per_token}, 0.0, 0.0};
    std::vector<int64_t> here = result.chosen;
    bool any = false;
    for (int64_t& expert : here) {
      if (expert < 0 || expert >= layer.experts.count) return false;
      if (layer.on_card[expert]) {
        expert = -1;
      } else if (layer.experts.data[expert] == nullptr) {
        return false;
      } else {
        any = true;
      }
    }
    if (any) {
      result.begin = seconds_now();
      operations_.expert_outputs(layer.x, {here.data(), 1, layer.per_token}, layer.experts, layer.outputs);
      result.seconds = seconds_now() - result.begin;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    results_.push_back(std::move(result));
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace localr1
