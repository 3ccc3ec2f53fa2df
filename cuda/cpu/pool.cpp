#include "pool.h"

#include <chrono>

#ifdef _WIN32
#include <process.h>
#define LOCALR1_GETPID _getpid
#else
#include <unistd.h>
#define LOCALR1_GETPID getpid
#endif
#ifdef LOCALR1_X86
#include <immintrin.h>
#endif

namespace localr1 {

namespace {

// Between the calls of one decode step lie tens of microseconds; waking a thread takes about as long.
constexpr auto kSpinTime = std::chrono::microseconds(100);
constexpr int kSpins = 200;  // a few microseconds; then the thread waited for may need this processor

void pause_briefly() {
#ifdef LOCALR1_X86
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

Pool::Pool(int threads)
    : size_(threads),
      crowded_(unsigned(threads) > std::thread::hardware_concurrency()),
      process_(LOCALR1_GETPID()),
      workers_(new Workers) {
  workers_->threads.reserve(size_t(threads - 1));
  try {
    for (int index = 1; index < threads; ++index) {
      workers_->threads.emplace_back([this, index] { work(index); });
    }
  } catch (...) {  // no more threads to be had: end those that run, then report
    stop();
    throw;
  }
}

Pool::~Pool() {
  if (forked()) {
    // The threads exist only in the parent: joining them, or destroying a condition variable that
    // they seem to wait for, would never return.
    (void)workers_.release();
    return;
  }
  stop();
}

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(workers_->mutex);
    stopping_ = true;
  }
  workers_->wake.notify_all();
  for (std::thread& thread : workers_->threads) thread.join();
}

bool Pool::forked() const { return process_ != long(LOCALR1_GETPID()); }

void Pool::run_erased(Call call, const void* context) {
  std::lock_guard<std::mutex> run_lock(run_mutex_);
  for (Counter& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
  if (size_ == 1 || forked()) {
    Team alone(*this, 0, 1);
    call(context, alone);
    return;
  }
  call_ = call;
  context_ = context;
  generation_.fetch_add(1);  // sequentially consistent, as sleeping_: one of the two sees the other
  if (sleeping_.load() > 0) {
    { std::lock_guard<std::mutex> lock(workers_->mutex); }
    workers_->wake.notify_all();
  }
  Team team(*this, 0, size_);
  call(context, team);
  barrier(size_);  // after it no worker touches the context any more
}

void Pool::work(int index) {
  uint32_t seen = 0;
  for (;;) {
    const auto start = std::chrono::steady_clock::now();
    while (generation_.load(std::memory_order_acquire) == seen && !stopping_) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_relaxed) == seen; ++i) {
        pause_briefly();
      }
      if (!crowded_ && std::chrono::steady_clock::now() - start < kSpinTime) {
        if (generation_.load(std::memory_order_relaxed) == seen) std::this_thread::yield();
        continue;
      }
      std::unique_lock<std::mutex> lock(workers_->mutex);
      sleeping_.fetch_add(1);
      workers_->wake.wait(lock, [&] { return generation_.load() != seen || stopping_; });
      sleeping_.fetch_sub(1);
    }
    if (stopping_) return;
    ++seen;
    Team team(*this, index, size_);
    call_(context_, team);
    barrier(size_);
  }
}

void Pool::barrier(int team_size) {
  if (team_size == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team_size) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (!crowded_ && spins < kSpins) {
      pause_briefly();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace localr1
