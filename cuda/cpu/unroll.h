// Loops over register arrays must be unrolled completely, or the arrays live in memory.
#pragma once

#include <type_traits>

#if defined(__GNUC__)
#define LOCALR1_PRAGMA(text) _Pragma(#text)
#define LOCALR1_UNROLL(n) LOCALR1_PRAGMA(GCC unroll n)
#else
#define LOCALR1_UNROLL(n)
#endif

// body(c) for c = 0 to 7, each a constant of its type's `value`: a shift by c then is one instruction.
template <typename Body>
inline void each_of_eight(Body body) {
  body(std::integral_constant<int, 0>());
  body(std::integral_constant<int, 1>());
  body(std::integral_constant<int, 2>());
  body(std::integral_constant<int, 3>());
  body(std::integral_constant<int, 4>());
  body(std::integral_constant<int, 5>());
  body(std::integral_constant<int, 6>());
  body(std::integral_constant<int, 7>());
}

// How far ahead of the reads of a one-token product its prefetches run.
constexpr int kPrefetchBytes = 6144;
