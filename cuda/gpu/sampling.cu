// Which token comes next, where only that is wanted of the logits.
#include "device.h"

namespace localr1 {

constexpr int kGreedyThreads = 1024;
constexpr int kGreedyWarps = kGreedyThreads / kWarp;
static_assert(kGreedyWarps == kWarp, "one warp compares what all have found");

// index: -1 for a logit that is no number, which comes before all others; its value is infinite then.
struct Token {
  float value;
  int index;
};

static inline bool comes_before(const Token& a, const Token& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// The first of all lanes' tokens, in every lane.
static inline Token first_of_warp(Token first) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Token other{__shfl_xor_sync(kAllLanes, first.value, distance),
                      __shfl_xor_sync(kAllLanes, first.index, distance)};
    if (comes_before(other, first)) first = other;
  }
  return first;
}

// token [1]: the place of the largest of logits [vocabulary], the lowest of equals, as numpy's argmax has
// it; -1 where one is NaN or infinite. One block.
LOCALR1_KERNEL(1024, 1024)
greedy(const float* logits, int vocabulary, int32_t* token) {
  __shared__ float values[kGreedyWarps];
  __shared__ int indices[kGreedyWarps];
  const float infinity = float_from_bits(0x7f800000u);
  Token first{-infinity, 0x7fffffff};
#pragma unroll 4
  for (int i = threadIdx.x; i < vocabulary; i += kGreedyThreads) {
    const float value = __ldg(logits + i);
    const bool is_number = (bits_from_float(value) & 0x7f800000u) != 0x7f800000u;
    const Token next{is_number ? value : infinity, is_number ? i : -1};
    if (comes_before(next, first)) first = next;
  }
  first = first_of_warp(first);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) {
    values[warp] = first.value;
    indices[warp] = first.index;
  }
  __syncthreads();
  if (warp > 0) return;
  first = first_of_warp(Token{values[lane], indices[lane]});
  if (lane == 0) *token = first.index;
}

}  // namespace localr1
