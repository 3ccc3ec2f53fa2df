// A persistent team of threads. One `run` is one call from outside; inside it the threads go through
// the same steps, separated by barriers. What a step computes never depends on which thread takes
// which item, so results do not depend on the number of threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace localr1 {

class Team;

class Pool {
 public:
  explicit Pool(int threads);  // threads >= 1, the caller's included
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Runs job(Team&) on every thread; returns when all have finished. Calls from several threads wait
  // for each other. The job must not throw.
  template <class Job>
  void run(const Job& job) {
    run_erased([](const void* context, Team& team) { (*static_cast<const Job*>(context))(team); },
               &job);
  }

 private:
  friend class Team;
  using Call = void (*)(const void*, Team&);
  static constexpr int kMaxSteps = 16;  // steps of one run that share out items
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };

  void run_erased(Call call, const void* context);
  void work(int index);
  void barrier(int team_size);
  void stop();
  bool forked() const;

  const int size_;
  const bool crowded_;  // more threads than processors: waiting threads must make room at once
  const long process_;
  std::mutex run_mutex_;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  Counter counters_[kMaxSteps];

  alignas(64) std::atomic<uint32_t> generation_{0};  // one more for every run
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> stopping_{false};
  struct Workers {
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> threads;
  };
  std::unique_ptr<Workers> workers_;  // on its own, to be left behind in a forked child
};

// One thread's view of a run.
class Team {
 public:
  Team(Pool& pool, int index, int size) : pool_(pool), index_(index), size_(size) {}

  int index() const { return index_; }
  int size() const { return size_; }

  // Calls body(begin, end) on ranges that cover 0..count-1: large ones first, then smaller, so that
  // all threads end together. Returns when all items are done.
  template <class Body>
  void for_ranges(int64_t count, const Body& body) {
    std::atomic<int64_t>& next = pool_.counters_[step_++].next;
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < count) {
      const int64_t share = (count - begin) / (2 * size_);
      const int64_t end = size_ == 1 ? count : begin + (share > 1 ? share : 1);
      if (next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) {
        body(begin, end);
        begin = next.load(std::memory_order_relaxed);
      }
    }
    pool_.barrier(size_);
  }

  // Calls body(item) for every item of 0..count-1. Returns when all items are done.
  template <class Body>
  void for_each(int64_t count, const Body& body) {
    std::atomic<int64_t>& next = pool_.counters_[step_++].next;
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(item);
    pool_.barrier(size_);
  }

 private:
  Pool& pool_;
  const int index_, size_;
  int step_ = 0;
};

}  // namespace localr1
