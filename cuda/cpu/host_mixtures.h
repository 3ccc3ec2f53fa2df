// What the host computes of a token that goes through layers on cards: in every mixture the chosen experts
// that lie in RAM and on no card. A card's stream calls `run` behind the layer's router, so that it neither
// waits for a card nor throws; what it cannot do it leaves to a function of the caller's.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "operations.h"

namespace localr1 {

class HostMixtures;

// Addresses, looked at whenever the layer is run. on_card [experts.count]: not 0 for an expert that a card
// computes. chosen [per_token] and x [hidden], normed, come from the card; outputs [per_token, hidden] is
// written where the expert is computed here.
struct HostLayer {
  HostMixtures* owner;
  int64_t number;
  Experts experts;
  const uint8_t* on_card;
  int64_t per_token;
  const int32_t* chosen;
  const float* x;
  float* outputs;
};

// chosen: all of a layer's, wherever they were computed. begin, seconds: of what was computed here, in the
// time of `seconds_now`; 0 seconds where it was nothing.
struct HostResult {
  int64_t layer;
  std::vector<int64_t> chosen;
  double begin, seconds;
};

class HostMixtures {
 public:
  // Nothing is computed; all layers are left to the other; those that have an expert in neither place.
  enum class Way : int { kNothing = 0, kElsewhere = 1, kHere = 2 };
  using Elsewhere = void (*)(int64_t layer);

  // elsewhere: called by the thread that runs the layer. It must not throw.
  HostMixtures(Operations& operations, Elsewhere elsewhere)
      : operations_(operations), elsewhere_(elsewhere) {}

  const KernelTable& table() const { return operations_.table(); }

  // Stays where it is as long as this lives. owner is set.
  HostLayer* add(HostLayer layer);
  // A C function of a HostLayer.
  static void run(void* layer);

  void go(Way way) { way_ = way; }
  // Of the layers that were computed here since the last time, in their order.
  std::vector<HostResult> take();
  static double seconds_now();

 private:
  bool compute(const HostLayer& layer) noexcept;

  Operations& operations_;
  const Elsewhere elsewhere_;
  std::atomic<Way> way_{Way::kNothing};
  std::vector<std::unique_ptr<HostLayer>> layers_;
  std::mutex mutex_;  // of results_: several cards' streams, and who takes them
  std::vector<HostResult> results_;
};

}  // namespace localr1
