// Attention of tokens over a cache of keys and values, split over the context.
//
// A span is 128 positions, at fixed places, and a block computes the softmax and the weighted sum of one
// span for up to 16 query rows that share its keys: the heads of one key/value head, or some of the heads
// of latent attention, whose key and value are one latent; of one token, or of some of a prompt. Another kernel merges a row's spans in order.
// So a row's bits depend on nothing but the row. How many spans there are is read on the card: those of a
// grid that lie behind the last position end at once.
#include "device.h"

namespace localr1 {

constexpr int kSpan = 128;  // positions
constexpr int kAttendThreads = 256;
constexpr int kKeyLanes = 8;  // threads that share a key, 8 dimensions each at a time
constexpr int kMaxHeadDim = 256;
constexpr int kMaxKeyDim = 576, kMaxValueDim = 512;
constexpr int kMergeThreads = 256;

struct Eight {
  float value[8];
};

// Eight values of a cache that stand at a multiple of eight, in one or two 16-byte loads.
template <bool kHalf>
static inline Eight load8(const void* cache, int64_t index) {
  Eight out;
  if constexpr (kHalf) {
    const uint4 bits = *(const uint4*)((const uint16_t*)cache + index);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.value[2 * i] = widen_half(uint16_t(words[i]));
      out.value[2 * i + 1] = widen_half(uint16_t(words[i] >> 16));
    }
  } else {
    const float4 first = *(const float4*)((const float*)cache + index);
    const float4 second = *(const float4*)((const float*)cache + index + 4);
    out = {{first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w}};
  }
  return out;
}

template <bool kHalf>
static inline float2 load2(const void* cache, int64_t index) {
  if constexpr (kHalf) {
    const uint32_t bits = *(const uint32_t*)((const uint16_t*)cache + index);
    return {widen_half(uint16_t(bits)), widen_half(uint16_t(bits >> 16))};
  } else {
    return *(const float2*)((const float*)cache + index);
  }
}

static inline void store_cache(void* cache, int half, int64_t index, float value) {
  if (half) {
    ((uint16_t*)cache)[index] = narrow_to_half(value);
  } else {
    ((float*)cache)[index] = value;
  }
}

// One head of one token a block of one warp, a grid of (heads + 2 * kv_heads, tokens): query and key
// heads are normed (weights or null) and rotated, keys and values written to the cache [kv_heads, capacity,
// dim] at position *start + token. qkv [tokens, all heads, dim] -> q [tokens, heads, dim].
LOCALR1_KERNEL(kWarp, 512)
rope_append(const float* qkv, int heads, int kv_heads, int dim, const float* q_norm, const float* k_norm,
            float eps, const float* cosine, const float* sine, int pairs, const int32_t* start, void* keys,
            void* values, int64_t capacity, int half, float* q) {
  __shared__ float row[kMaxHeadDim];
  const int head = blockIdx.x, lane = threadIdx.x, token = blockIdx.y;
  const int64_t position = int64_t(*start) + token;
  const float* source = qkv + (int64_t(token) * gridDim.x + head) * dim;
  const bool is_query = head < heads, is_value = head >= heads + kv_heads;
  for (int i = lane; i < dim; i += kWarp) row[i] = source[i];
  if (!is_value) {
    const float* norm = is_query ? q_norm : k_norm;
    if (norm) {
      float low = 0.0f, high = 0.0f;
      for (int i = lane; i < dim; i += kWarp) {
        float& sum = i / kWarp % 2 == 0 ? low : high;
        sum = rounded_sum(sum, rounded_product(row[i], row[i]));
      }
      const float inverse = inverse_root_mean(fold_lanes(low, high), dim, eps);
      for (int i = lane; i < dim; i += kWarp) {
        row[i] = rounded_product(rounded_product(row[i], inverse), norm[i]);
      }
    }
    __syncwarp();  // a pair's two values belong to two lanes
    for (int i = lane; i < pairs; i += kWarp) {
      const float c = cosine[position * pairs + i], s = sine[position * pairs + i];
      const float first = row[i], second = row[pairs + i];
      row[i] = rounded_difference(rounded_product(first, c), rounded_product(second, s));
      row[pairs + i] = rounded_sum(rounded_product(second, c), rounded_product(first, s));
    }
    __syncwarp();
  }
  if (is_query) {
    float* target = q + (int64_t(token) * heads + head) * dim;
    for (int i = lane; i < dim; i += kWarp) target[i] = row[i];
    return;
  }
  const int64_t index = ((head - heads) % kv_heads * capacity + position) * dim;
  for (int i = lane; i < dim; i += kWarp) store_cache(is_value ? values : keys, half, index + i, row[i]);
}

// Where value d of a query lies in shared memory: the first and second halves of each 8 apart, so that the
// 8 threads of a key read 16 contiguous bytes each.
static inline int place_of_query(int d, int key_dim) {
  return d % 8 / 4 * (key_dim / 2) + d / 8 * 4 + d % 4;
}

// A key/value head's rows: position p has its key at keys + p * stride and its value at values + p *
// stride; the two may overlap.
struct CacheHead {
  const void* keys;
  const void* values;
  int64_t first;  // value of position 0
  int64_t stride;
  int key_dim, value_dim;
};

// The keys of a span that the tokens of a block see: `first` is the first token's number, which may be
// less than 0, and every token sees one more than the one before.
struct Seen {
  int first;

  inline int of(int token) const { return first + token < kSpan ? first + token : kSpan; }
};

// scores [kSpan, kRows]: the products of the block's queries [kRows, key_dim], of kHeads heads of each
// token, with the span's keys; -Inf for those that a token does not see. count: of keys for the last one.
template <int kRows, int kHeads, bool kHalf>
static inline void score_span(const CacheHead& head, const float* queries, int64_t position, int count,
                              Seen seen, float* scores) {
  const int lane = threadIdx.x % kWarp, part = lane % kKeyLanes;
  const int half_dim = head.key_dim / 2;
  for (int first = 0; first < kSpan; first += kAttendThreads / kKeyLanes) {
    const int key = first + threadIdx.x / kKeyLanes;
    float sums[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) sums[row] = 0.0f;
    if (key < count) {
      const int64_t at = head.first + (position + key) * head.stride;
      for (int eight = part; eight < head.key_dim / 8; eight += kKeyLanes) {
        const Eight k = load8<kHalf>(head.keys, at + eight * 8);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const float* query = queries + row * head.key_dim + eight * 4;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float4 a = *(const float4*)(query + half * half_dim);
            const float parts[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[row] = __fmaf_rn(parts[i], k.value[4 * half + i], sums[row]);
          }
        }
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int distance = kKeyLanes / 2; distance > 0; distance /= 2) {
        sums[row] += __shfl_xor_sync(kAllLanes, sums[row], distance);
      }
      if (part == row % kKeyLanes) {
        const bool is_seen = key < seen.of(row / kHeads);
        scores[key * kRows + row] = is_seen ? sums[row] : float_from_bits(0xff800000u);
      }
    }
  }
}

// A row's scores -> their exponentials; maximum and sum. One warp.
template <int kRows>
static inline void exponentials(float* scores, int row, int lane, int count, float* maximum, float* sum) {
  float largest = float_from_bits(0xff800000u), total = 0.0f;
#pragma unroll
  for (int key = lane; key < kSpan; key += kWarp) {
    const float score = scores[key * kRows + row];
    largest = score > largest ? score : largest;
  }
  largest = warp_max(largest);
#pragma unroll
  for (int key = lane; key < kSpan; key += kWarp) {
    const float e = key < count ? scalar_exp(scores[key * kRows + row] - largest) : 0.0f;
    scores[key * kRows + row] = e;
    total += e;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(kAllLanes, total, distance);
  }
  if (lane == 0) {
    *maximum = largest;
    *sum = total;
  }
}

// What one key gives to all rows, in wide loads where that can be.
template <int kRows>
static inline void load_key(const float* scores, float (&of_key)[kRows]) {
  if constexpr (kRows % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const float4 four = ((const float4*)scores)[i];
      of_key[4 * i] = four.x;
      of_key[4 * i + 1] = four.y;
      of_key[4 * i + 2] = four.z;
      of_key[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int row = 0; row < kRows; ++row) of_key[row] = scores[row];
  }
}

// Some heads of some tokens over one span: row r of a block is head r % kHeads of token r / kHeads. start:
// position of the first token. queries [tokens, heads, key_dim]; group: query heads of a key/value head.
// partial [tokens * heads, spans, value_dim], maximum and sum [tokens * heads, spans]. A grid of (spans,
// kv_heads * ceil(group / kHeads), ceil(tokens / kTokens)). memory: kHeads * kTokens * kMaxKeyDim.
template <int kHeads, int kTokens, bool kHalf>
static inline void attend(const float* queries, int heads, int group, float scale, CacheHead head,
                          int64_t head_stride, int64_t start, int tokens, float* partial, float* maximum,
                          float* sum, float* memory, float* scores) {
  constexpr int kRows = kHeads * kTokens;
  const int thread = threadIdx.x, first_token = blockIdx.z * kTokens, spans = gridDim.x;
  const int tiles = (group + kHeads - 1) / kHeads;
  const int here = tokens - first_token < kTokens ? tokens - first_token : kTokens;
  const int64_t position = int64_t(blockIdx.x) * kSpan, keys = start + first_token + 1 - position;
  if (keys + here <= 1) return;
  const Seen seen{keys < kSpan ? int(keys) : kSpan};
  const int count = seen.of(here - 1);
  const int kv_head = blockIdx.y / tiles, first = blockIdx.y % tiles * kHeads;
  const int num_heads = group - first < kHeads ? group - first : kHeads;
  const int first_row = first_token * heads + kv_head * group + first;
  const auto is_row = [&](int row) { return row % kHeads < num_heads && row / kHeads < here; };
  const auto row_at = [&](int row) { return first_row + row / kHeads * heads + row % kHeads; };
  head.first = kv_head * head_stride;
  for (int i = thread; i < kRows * head.key_dim; i += kAttendThreads) {
    const int row = i / head.key_dim, d = i % head.key_dim;
    const int64_t source = int64_t(is_row(row) ? row_at(row) : first_row) * head.key_dim + d;
    memory[row * head.key_dim + place_of_query(d, head.key_dim)] = queries[source] * scale;
  }
  __syncthreads();
  score_span<kRows, kHeads, kHalf>(head, memory, position, count, seen, scores);
  __syncthreads();
  for (int row = thread / kWarp; row < kRows; row += kAttendThreads / kWarp) {
    const int own = seen.of(row / kHeads);
    if (!is_row(row) || own <= 0) continue;
    const int64_t state = int64_t(row_at(row)) * spans + blockIdx.x;
    exponentials<kRows>(scores, row, thread % kWarp, own, maximum + state, sum + state);
  }
  __syncthreads();
  // A thread has two dimensions of every row, over the keys of its slice.
  const int twos = head.value_dim / 2, slices = kAttendThreads / twos, slice = thread / twos;
  if (slice < slices) {
    float acc[kRows][2];
#pragma unroll
    for (int row = 0; row < kRows; ++row) acc[row][0] = acc[row][1] = 0.0f;
    const int64_t at = head.first + position * head.stride + thread % twos * 2;
    constexpr int kAhead = kTokens == 1 ? 4 : 2;  // keys whose loads are under way
#pragma unroll kAhead
    for (int key = slice; key < count; key += slices) {
      const float2 v = load2<kHalf>(head.values, at + key * head.stride);
      float of_key[kRows];
      load_key<kRows>(scores + key * kRows, of_key);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        // A value that a token does not see may be a NaN, which no factor of 0 takes away.
        if (kTokens > 1 && key >= seen.of(row / kHeads)) continue;
        acc[row][0] = __fmaf_rn(of_key[row], v.x, acc[row][0]);
        acc[row][1] = __fmaf_rn(of_key[row], v.y, acc[row][1]);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float* target = memory + (slice * kRows + row) * head.value_dim + thread % twos * 2;
      target[0] = acc[row][0];
      target[1] = acc[row][1];
    }
  }
  __syncthreads();
  for (int i = thread; i < kRows * head.value_dim; i += kAttendThreads) {
    const int row = i / head.value_dim, d = i % head.value_dim;
    if (!is_row(row) || seen.of(row / kHeads) <= 0) continue;
    float total = memory[i];
    for (int other = 1; other < slices; ++other) total += memory[other * kRows * head.value_dim + i];
    partial[(int64_t(row_at(row)) * spans + blockIdx.x) * head.value_dim + d] = total;
  }
}

// first: tokens of the step, which begins at *start, before these. keys, values: of the first key/value
// head; the next stands head_stride values behind. key_dim: a multiple of 8, at most 576; value_dim: even,
// at most 512.
#define LOCALR1_ATTEND(type, is_half, rows, at_once)                                                     \
  LOCALR1_KERNEL(kAttendThreads, 512)                                                                    \
  attend_##type##_r##rows##_t##at_once(const float* queries, int heads, int group, float scale,          \
                                       const void* keys, const void* values, int64_t head_stride,        \
                                       int64_t stride, int key_dim, int value_dim, const int32_t* start, \
                                       int first, int tokens, float* partial, float* maximum,            \
                                       float* sum) {                                                     \
    __shared__ __align__(16) float memory[rows * at_once * kMaxKeyDim];                                  \
    __shared__ __align__(16) float scores[rows * at_once * kSpan];                                       \
    const CacheHead head{keys, values, 0, stride, key_dim, value_dim};                                   \
    attend<rows, at_once, is_half>(queries, heads, group, scale, head, head_stride,                      \
                                   int64_t(*start) + first, tokens, partial, maximum, sum, memory,       \
                                   scores);                                                              \
  }

LOCALR1_ATTEND(half, true, 1, 1)
LOCALR1_ATTEND(half, true, 4, 1)
LOCALR1_ATTEND(half, true, 8, 1)
LOCALR1_ATTEND(half, true, 1, 8)
LOCALR1_ATTEND(half, true, 4, 2)
LOCALR1_ATTEND(half, true, 8, 2)
LOCALR1_ATTEND(float, false, 1, 1)
LOCALR1_ATTEND(float, false, 4, 1)
LOCALR1_ATTEND(float, false, 8, 1)
LOCALR1_ATTEND(float, false, 1, 8)
LOCALR1_ATTEND(float, false, 4, 2)
LOCALR1_ATTEND(float, false, 8, 2)

// The spans of each row, in order -> out [tokens, heads, value_dim]. A grid of (heads, tokens). start,
// first: as `attend` has them. spans: the stride of the partials, its grid.
LOCALR1_KERNEL(kMergeThreads, 1024)
merge_spans(const float* partial, const float* maximum, const float* sum, const int32_t* start,
            int first_token, int spans, int value_dim, float* out) {
  __shared__ float largest_of_warp[kMergeThreads / kWarp];
  __shared__ float factors[kMergeThreads];
  const int thread = threadIdx.x;
  const int64_t row = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const int used = int((int64_t(*start) + first_token + blockIdx.y + kSpan) / kSpan);
  float largest = float_from_bits(0xff800000u);
  for (int i = thread; i < used; i += kMergeThreads) {
    const float next = maximum[row * spans + i];
    largest = next > largest ? next : largest;
  }
  largest = warp_max(largest);
  if (thread % kWarp == 0) largest_of_warp[thread / kWarp] = largest;
  __syncthreads();
  for (int i = 0; i < kMergeThreads / kWarp; ++i) {
    largest = largest_of_warp[i] > largest ? largest_of_warp[i] : largest;
  }
  static_assert(kMaxValueDim <= 2 * kMergeThreads, "a thread has two dimensions at most");
  float total = 0.0f, acc[2] = {0.0f, 0.0f};
  for (int first = 0; first < used; first += kMergeThreads) {
    __syncthreads();
    if (first + thread < used) factors[thread] = scalar_exp(maximum[row * spans + first + thread] - largest);
    __syncthreads();
    const int count = used - first < kMergeThreads ? used - first : kMergeThreads;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const int64_t span = row * spans + first + i;
      total = __fmaf_rn(sum[span], factors[i], total);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = thread + half * kMergeThreads;
        if (d < value_dim) acc[half] = __fmaf_rn(partial[span * value_dim + d], factors[i], acc[half]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int d = thread + half * kMergeThreads;
    if (d < value_dim) out[row * value_dim + d] = rounded_quotient(acc[half], total);
  }
}

}  // namespace localr1
