// Aligned memory: one growing buffer for the temporaries of a call, an arena for matrices, and slots for
// experts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

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

// Slots of one size, in chunks that come and go one by one, the last ones first: a tier of experts that
// takes what memory there is and gives it back. A slot stays where it is as long as it exists.
class SlotArena {
 public:
  explicit SlotArena(size_t slot_bytes);

  // Grows or shrinks to `count` slots, or to as many as there is memory for; returns how many there are.
  // Whole chunks are kept, so memory may hold a few slots more.
  int64_t resize(int64_t count);
  int64_t size() const { return size_; }
  size_t slot_bytes() const { return slot_bytes_; }
  uint8_t* slot(int64_t index) const;

 private:
  const size_t slot_bytes_;
  const int64_t slots_per_chunk_;
  int64_t size_ = 0;
  std::vector<std::shared_ptr<uint8_t>> chunks_;
};

}  // namespace localr1
