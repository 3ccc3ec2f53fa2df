// Aligned memory: one growing buffer for the temporaries of a call, and an arena for matrices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

namespace localr1 {

// 64-byte aligned memory, in large pages where the system gives them; throws std::bad_alloc.
std::shared_ptr<uint8_t> allocate_aligned(size_t bytes);

// Temporaries of one call. `reserve` first, then `take` pieces.
class Workspace {
 public:
  void reserve(size_t bytes);
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += size_of<T>(count);
    return piece;
  }
  template <class T>
  static size_t size_of(int64_t count) {
    return (size_t(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  std::shared_ptr<uint8_t> memory_;
  size_t capacity_ = 0, used_ = 0;
};

// Matrices side by side in large chunks; a chunk is freed with the last matrix in it.
class Arena {
 public:
  std::shared_ptr<uint8_t> allocate(size_t bytes);

 private:
  std::mutex mutex_;
  std::shared_ptr<uint8_t> chunk_;
  size_t capacity_ = 0, used_ = 0;
};

}  // namespace localr1
