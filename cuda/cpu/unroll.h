// Loops over register arrays must be unrolled completely, or the arrays live in memory.
#pragma once

#if defined(__GNUC__)
#define LOCALR1_PRAGMA(text) _Pragma(#text)
#define LOCALR1_UNROLL(n) LOCALR1_PRAGMA(GCC unroll n)
#else
#define LOCALR1_UNROLL(n)
#endif

// How far ahead of the reads of a one-token product its prefetches run.
constexpr int kPrefetchBytes = 6144;
