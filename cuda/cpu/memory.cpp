#include "memory.h"

#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace localr1 {

namespace {
constexpr size_t kLargePage = size_t(2) << 20;
constexpr size_t kArenaChunk = size_t(32) << 20;
constexpr size_t kSlotChunk = size_t(64) << 20;
}  // namespace

std::shared_ptr<uint8_t> allocate_aligned(size_t bytes) {
  const size_t alignment = bytes >= kLargePage ? kLargePage : 64;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  auto* memory = static_cast<uint8_t*>(::operator new(rounded, std::align_val_t(alignment)));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Advice only: fewer address translations while weights stream through. May be refused.
  if (alignment == kLargePage) (void)madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return std::shared_ptr<uint8_t>(memory, [alignment](uint8_t* p) {
    ::operator delete(p, std::align_val_t(alignment));
  });
}

void Workspace::reserve(size_t bytes) {
  used_ = 0;
  if (bytes <= capacity_) return;
  memory_.reset();
  capacity_ = 0;
  memory_ = allocate_aligned(bytes);
  capacity_ = bytes;
}

std::shared_ptr<uint8_t> Arena::allocate(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (bytes > kArenaChunk / 4) return allocate_aligned(bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  if (!chunk_ || used_ + bytes > capacity_) {
    chunk_ = allocate_aligned(kArenaChunk);
    capacity_ = kArenaChunk;
    used_ = 0;
  }
  const std::shared_ptr<uint8_t> piece(chunk_, chunk_.get() + used_);
  used_ += bytes;
  return piece;
}

SlotArena::SlotArena(size_t slot_bytes)
    : slot_bytes_(slot_bytes),
      slots_per_chunk_(slot_bytes >= kSlotChunk ? 1 : int64_t(kSlotChunk / slot_bytes)) {}

int64_t SlotArena::resize(int64_t count) {
  const int64_t chunks = (count + slots_per_chunk_ - 1) / slots_per_chunk_;
  try {
    while (int64_t(chunks_.size()) < chunks) {
      chunks_.push_back(allocate_aligned(size_t(slots_per_chunk_) * slot_bytes_));
    }
  } catch (const std::bad_alloc&) {  // what there is, is used
  }
  if (int64_t(chunks_.size()) > chunks) chunks_.resize(size_t(chunks));
  const int64_t room = int64_t(chunks_.size()) * slots_per_chunk_;
  size_ = count < room ? count : room;
  return size_;
}

uint8_t* SlotArena::slot(int64_t index) const {
  const size_t offset = size_t(index % slots_per_chunk_) * slot_bytes_;
  return chunks_[size_t(index / slots_per_chunk_)].get() + offset;
}

}  // namespace localr1
