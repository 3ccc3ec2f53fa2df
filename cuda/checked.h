// What the bindings share: how sizes that do not fit are refused, and how a table of kernels is found.
#pragma once

#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace localr1 {

using Address = uintptr_t;
constexpr int kMaxThreads = 1024;

struct RefusedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool holds, const std::string& what, int64_t expected, int64_t found) {
  if (!holds) {
    throw RefusedError(what + ": expected " + std::to_string(expected) + ", found " + std::to_string(found));
  }
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The best one for an empty name.
inline const KernelTable& find_table(const std::string& isa) {
  std::string names;
  for (const KernelTable* table : available_tables()) {
    if (isa.empty() || isa == table->name) return *table;
    names += std::string(names.empty() ? "" : ", ") + table->name;
  }
  throw RefusedError("instruction set: expected one of " + names + ", found " + isa);
}

inline int checked_threads(int threads) {
  require(threads >= 1, "threads: at least", 1, threads);
  require(threads <= kMaxThreads, "threads: at most", kMaxThreads, threads);
  return threads;
}

}  // namespace localr1
