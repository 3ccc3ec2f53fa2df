// The few tokens that a draw is likely to be among, where no others are wanted of the logits. A block has
// 1024 neighbouring tokens, so that the three kernels have the same grid of (ceil(vocabulary / 1024)).
#include "device.h"

namespace localr1 {

constexpr int kTokensOfThread = 4;
constexpr int kSamplingThreads = 256;
constexpr int kSamplingWarps = kSamplingThreads / kWarp;
constexpr int kTokensOfBlock = kTokensOfThread * kSamplingThreads;

// What the host asks for (localr1/candidates.py).
struct Sought {
  float depth, inverse_temperature;
};

static inline float infinity() { return float_from_bits(0x7f800000u); }

// The largest of all threads' values, for every thread. of_warps [kSamplingWarps]: shared, and of this
// call alone.
static inline float largest_of_block(float value, float* of_warps) {
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  float largest = of_warps[0];
#pragma unroll
  for (int warp = 1; warp < kSamplingWarps; ++warp) {
    largest = of_warps[warp] > largest ? of_warps[warp] : largest;
  }
  return largest;
}

// The largest of `largest` [gridDim.x], for every thread.
static inline float largest_of_all(const float* largest, float* of_warps) {
  float value = -infinity();
  for (int block = threadIdx.x; block < int(gridDim.x); block += kSamplingThreads) {
    const float other = __ldg(largest + block);
    value = other > value ? other : value;
  }
  return largest_of_block(value, of_warps);
}

// What `floor` a candidate must reach.
static inline float floor_of(float largest, const Sought* sought) {
  return rounded_difference(largest, __ldg(&sought->depth));
}

// largest [blocks]: of each block's logits; infinity where one is NaN or infinite.
LOCALR1_KERNEL(256, 1024)
largest_logits(const float* logits, int vocabulary, float* largest) {
  __shared__ float of_warps[kSamplingWarps];
  float value = -infinity();
#pragma unroll
  for (int k = 0; k < kTokensOfThread; ++k) {
    const int token = blockIdx.x * kTokensOfBlock + k * kSamplingThreads + threadIdx.x;
    if (token >= vocabulary) break;
    const float logit = __ldg(logits + token);
    const bool is_number = (bits_from_float(logit) & 0x7f800000u) != 0x7f800000u;
    const float next = is_number ? logit : infinity();
    value = next > value ? next : value;
  }
  value = largest_of_block(value, of_warps);
  if (threadIdx.x == 0) largest[blockIdx.x] = value;
}

// Of each block: counts [blocks], its candidates, and rests [blocks], the weights of its other tokens,
// exp((logit - largest) * inverse_temperature): four of a thread's, then of 32 threads by halves, then of
// the warps, one after another. largest: as `largest_logits` leaves it, without infinity.
LOCALR1_KERNEL(256, 1024)
weigh_logits(const float* logits, int vocabulary, const float* largest, const Sought* sought, int32_t* counts,
             float* rests) {
  __shared__ float of_warps[kSamplingWarps], rests_of_warps[kSamplingWarps];
  __shared__ int counts_of_warps[kSamplingWarps];
  const float top = largest_of_all(largest, of_warps);
  const float floor = floor_of(top, sought), inverse = __ldg(&sought->inverse_temperature);
  int count = 0;
  float rest = 0.0f;
#pragma unroll
  for (int k = 0; k < kTokensOfThread; ++k) {
    const int token = blockIdx.x * kTokensOfBlock + k * kSamplingThreads + threadIdx.x;
    if (token >= vocabulary) break;
    const float logit = __ldg(logits + token);
    if (logit >= floor) {
      ++count;
    } else {
      rest = rounded_sum(rest, scalar_exp(rounded_product(rounded_difference(logit, top), inverse)));
    }
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    count += __shfl_xor_sync(kAllLanes, count, distance);
    rest = rounded_sum(rest, __shfl_xor_sync(kAllLanes, rest, distance));
  }
  if (threadIdx.x % kWarp == 0) {
    counts_of_warps[threadIdx.x / kWarp] = count;
    rests_of_warps[threadIdx.x / kWarp] = rest;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kSamplingWarps; ++warp) {
    count += counts_of_warps[warp];
    rest = rounded_sum(rest, rests_of_warps[warp]);
  }
  counts[blockIdx.x] = count;
  rests[blockIdx.x] = rest;
}

// How many of the block's threads before this one `counts` counts, and of all, for every thread. of_warps
// [kSamplingWarps]: shared, and of this call alone.
static inline int before_in_block(int count, int* of_warps, int& all) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = count;  // of this lane and those before it
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_sync(kAllLanes, sum, (lane + kWarp - distance) % kWarp);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarp - 1) of_warps[warp] = sum;
  __syncthreads();
  int before = sum - count;
  all = 0;
#pragma unroll
  for (int other = 0; other < kSamplingWarps; ++other) {
    if (other < warp) before += of_warps[other];
    all += of_warps[other];
  }
  return before;
}

// ids and values [capacity]: of the candidates, in ascending order; of more than that the first. largest,
// counts: as the kernels above leave them.
LOCALR1_KERNEL(256, 1024)
gather_candidates(const float* logits, int vocabulary, const float* largest, const Sought* sought,
                  const int32_t* counts, int capacity, int32_t* ids, float* values) {
  __shared__ float of_warps[kSamplingWarps];
  __shared__ int earlier_of_warps[kSamplingWarps], counts_of_warps[kSamplingWarps];
  if (__ldg(counts + blockIdx.x) == 0) return;
  const float floor = floor_of(largest_of_all(largest, of_warps), sought);
  int earlier = 0;
  for (int block = threadIdx.x; block < int(blockIdx.x); block += kSamplingThreads) {
    earlier += __ldg(counts + block);
  }
  int place = 0;
  before_in_block(earlier, earlier_of_warps, place);
  // This thread's tokens are neighbours, so that candidates stand in the order of threads.
  const int first = blockIdx.x * kTokensOfBlock + threadIdx.x * kTokensOfThread;
  float own[kTokensOfThread];
  int count = 0;
#pragma unroll
  for (int k = 0; k < kTokensOfThread; ++k) {
    own[k] = first + k < vocabulary ? __ldg(logits + first + k) : -infinity();
    count += own[k] >= floor;
  }
  int all;
  place += before_in_block(count, counts_of_warps, all);
#pragma unroll
  for (int k = 0; k < kTokensOfThread; ++k) {
    if (!(own[k] >= floor)) continue;
    if (place < capacity) {
      ids[place] = first + k;
      values[place] = own[k];
    }
    ++place;
  }
}

}  // namespace localr1
