// The CUDA execution model on a CPU, for tests: included before a file of cuda/gpu, it lets g++ or
// clang build that very source, and runs its kernels with every thread as a fiber.
//
// A fiber runs until its thread meets another (barrier, shuffle), so threads run in an order that a seed
// chooses: 0, warps and lanes from the first on; 1, from the last; else at random, anew at every meeting.
// What depends on an order that nothing enforces so gives other results for some seed. Shared memory is
// full of NaN when a block starts. Meetings are checked: all lanes of a warp must meet at the same
// operation, and threads that wait for one that never comes are an error. Buffers stand against pages that
// nobody may touch, and their other side is watched (cuda_model.py), so that a read or write outside ends
// the launch with an error. Blocks run one after another. An asynchronous copy is done when it is awaited,
// at once, or the one or the other at random, so that what is read or overwritten too early shows.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <utility>

#define __global__
#define __device__
#define __launch_bounds__(threads, blocks)
#define __align__(bytes) __attribute__((aligned(bytes)))
// A section of its own, so that its extent is known. In a kernel itself, never in a template, whose
// statics cannot stand there; and of a fixed size.
#define __shared__ static __attribute__((section("cuda_shared")))

struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

extern "C" {
extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));
}

namespace cuda_model {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kMostCopies = 64;  // that a thread has under way
constexpr int kFragmentWords = 6;

enum State { kReady, kAtWarp, kAtBlock, kDone };

struct Copy {
  void* target;
  const void* source;
  int bytes, group;
};

struct Fiber {
  jmp_buf context;
  State state;
  dim3 index;
  bool started;
  Copy copies[kMostCopies];  // under way, the oldest first
  int num_copies, group;     // of those that are given next
};

// Where the lanes of a warp meet: the operation and lanes of the meeting under way, and the values of
// this one and of the last, which slow lanes still read.
struct Meeting {
  const char* operation;
  uint32_t lanes, arrived;
  unsigned count;
  uint64_t values[2][kWarpSize];
  uint32_t fragments[2][kWarpSize][kFragmentWords];
};

struct Machine {
  Fiber fibers[kMaxThreads];
  Meeting meetings[kMaxThreads / kWarpSize];
  uint32_t ready[kMaxThreads / kWarpSize];  // a bit for each lane that can run
  jmp_buf scheduler, launch;
  char* stacks;
  int num_threads, current, at_block;
  uint64_t random, seed;
  const char* error;
  uintptr_t fault;  // the address of a bad access
  char message[512];
  void (*call)(void*);
  void* argument;
};

// Static: each library that is built from a kernel's source has its own.
static Machine machine;
static dim3 grid, block, block_index, thread_index;

[[noreturn]] static void fail(const char* message) {
  machine.error = message;
  _longjmp(machine.launch, 1);
}

static inline uint32_t draw(uint32_t below) {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return uint32_t((machine.random >> 16) % below);
}

static inline void set_state(int thread, State state) {
  machine.fibers[thread].state = state;
  const uint32_t bit = 1u << thread % kWarpSize;
  uint32_t& ready = machine.ready[thread / kWarpSize];
  ready = state == kReady ? ready | bit : ready & ~bit;
}

// Back to the scheduler, until this fiber is chosen again.
__attribute__((noinline)) static void leave(State state) {
  set_state(machine.current, state);
  if (_setjmp(machine.fibers[machine.current].context) == 0) _longjmp(machine.scheduler, 1);
}

static inline void run_fiber() {
  for (;;) {  // one turn is one thread of a block
    machine.call(machine.argument);
    leave(kDone);
  }
}

// The lanes of `lanes` meet, each with a value; returns that of lane `source`.
__attribute__((noinline)) static uint64_t meet(const char* operation, uint32_t lanes, uint64_t value,
                                               int source) {
  const int thread = machine.current, lane = thread % kWarpSize, warp = thread / kWarpSize;
  Meeting& meeting = machine.meetings[warp];
  if (!(lanes >> lane & 1)) fail("a lane meets others without being among those it names");
  if (meeting.arrived == 0) {
    meeting.operation = operation;
    meeting.lanes = lanes;
  } else if (meeting.lanes != lanes || strcmp(meeting.operation, operation) != 0) {
    snprintf(machine.message, sizeof machine.message,
             "lanes of a warp meet at different operations: %s and %s", meeting.operation, operation);
    fail(machine.message);
  }
  const unsigned turn = meeting.count;
  meeting.values[turn & 1][lane] = value;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == meeting.lanes) {
    meeting.arrived = 0;
    ++meeting.count;
    for (int i = 0; i < kWarpSize; ++i) {
      const int other = warp * kWarpSize + i;
      if ((lanes >> i & 1) && machine.fibers[other].state == kAtWarp) set_state(other, kReady);
    }
  } else {
    while (meeting.count == turn) leave(kAtWarp);
  }
  if (source < 0) return 0;
  if (source >= kWarpSize || !(lanes >> source & 1)) fail("a shuffle reads a lane that is not among those");
  return meeting.values[turn & 1][source];
}

template <class T>
static inline T shuffle(const char* operation, uint32_t lanes, T value, int source) {
  static_assert(sizeof(T) <= 8, "a value of a shuffle");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = meet(operation, lanes, bits, source);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// One word of a fragment: 4 int8 values.
static inline int product_of_words(uint32_t a, uint32_t b) {
  int sum = 0;
  for (int i = 0; i < 4; ++i) sum += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
  return sum;
}

// mma.sync.m16n8k32 of int8: a and b are put together out of the words of all lanes, as the PTX ISA has
// them.
static inline void multiply_16x8x32(const uint32_t (&a)[4], uint2 b, int (&sums)[4]) {
  const int thread = machine.current, lane = thread % kWarpSize;
  Meeting& meeting = machine.meetings[thread / kWarpSize];
  uint32_t(&words)[kWarpSize][kFragmentWords] = meeting.fragments[meeting.count & 1];
  memcpy(words[lane], a, sizeof a);
  memcpy(words[lane] + 4, &b, sizeof b);
  meet("mma", 0xffffffffu, 0, -1);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int quad = 0; quad < 8; ++quad) {  // of the 32 columns of a
      const uint32_t of_a = words[row % 8 * 4 + quad % 4][row / 8 + quad / 4 * 2];
      sums[i] += product_of_words(of_a, words[column * 4 + quad % 4][4 + quad / 4]);
    }
  }
}

template <int kBytes>
static inline void copy_async(void* target, const void* source) {
  Fiber& fiber = machine.fibers[machine.current];
  if ((uintptr_t(target) | uintptr_t(source)) % kBytes) fail("an asynchronous copy that is not aligned");
  if (machine.seed == 1 || (machine.seed >= 2 && draw(2))) {
    memcpy(target, source, kBytes);
    return;
  }
  if (fiber.num_copies == kMostCopies) fail("more asynchronous copies than the model holds");
  fiber.copies[fiber.num_copies++] = {target, source, kBytes, fiber.group};
}
static inline void end_group() { ++machine.fibers[machine.current].group; }
template <int kMost>
static inline void await_groups() {
  Fiber& fiber = machine.fibers[machine.current];
  int done = 0;
  while (done < fiber.num_copies && fiber.copies[done].group < fiber.group - kMost) {
    memcpy(fiber.copies[done].target, fiber.copies[done].source, size_t(fiber.copies[done].bytes));
    ++done;
  }
  fiber.num_copies -= done;
  memmove(fiber.copies, fiber.copies + done, size_t(fiber.num_copies) * sizeof(Copy));
}

static inline void open_barrier() {
  for (int i = 0; i < machine.num_threads; ++i) {
    if (machine.fibers[i].state == kAtBlock) set_state(i, kReady);
  }
  machine.at_block = 0;
}

// The lane to run of those that can: the first, the last, or the next from a random one on.
static inline int lane_of(uint32_t ready, uint64_t seed) {
  if (seed == 0) return __builtin_ctz(ready);
  if (seed == 1) return 31 - __builtin_clz(ready);
  const uint32_t start = draw(kWarpSize);
  const uint32_t turned = start ? ready >> start | ready << (kWarpSize - start) : ready;
  return int((__builtin_ctz(turned) + start) % kWarpSize);
}

// The next fiber to run, or -1 where none can.
static inline int choose(uint64_t seed) {
  const int warps = (machine.num_threads + kWarpSize - 1) / kWarpSize;
  static int last;  // stay in a warp for a while, so that warps get ahead of each other
  if (seed >= 2 && last < warps && machine.ready[last] && draw(8)) {
    return last * kWarpSize + lane_of(machine.ready[last], seed);
  }
  const int first = seed >= 2 ? int(draw(uint32_t(warps))) : 0;
  for (int i = 0; i < warps; ++i) {
    const int warp = seed == 1 ? warps - 1 - i : (first + i) % warps;
    if (!machine.ready[warp]) continue;
    last = warp;
    return warp * kWarpSize + lane_of(machine.ready[warp], seed);
  }
  return -1;
}

static inline void run_block(uint64_t seed) {
  const size_t shared = size_t(__stop_cuda_shared - __start_cuda_shared);
  if (shared) memset(__start_cuda_shared, 0xff, shared);  // NaN
  memset(machine.meetings, 0, sizeof machine.meetings);
  machine.at_block = 0;
  memset(machine.ready, 0, sizeof machine.ready);
  for (int i = 0; i < kMaxThreads; ++i) {
    set_state(i, i < machine.num_threads ? kReady : kDone);
    machine.fibers[i].num_copies = machine.fibers[i].group = 0;
  }
  for (int alive = machine.num_threads; alive > 0;) {
    const int next = choose(seed);
    if (next < 0) {
      snprintf(machine.message, sizeof machine.message,
               "block (%u, %u): %d threads wait for others that never come, %d of them at __syncthreads",
               block_index.x, block_index.y, alive, machine.at_block);
      fail(machine.message);
    }
    machine.current = next;
    Fiber& fiber = machine.fibers[next];
    thread_index = fiber.index;
    if (_setjmp(machine.scheduler) == 0) {
      if (fiber.started) _longjmp(fiber.context, 1);
      fiber.started = true;
      ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = machine.stacks + size_t(next) * kStackBytes;
      context.uc_stack.ss_size = kStackBytes;
      context.uc_link = nullptr;
      makecontext(&context, run_fiber, 0);
      setcontext(&context);
    }
    if (machine.fibers[machine.current].state == kDone) --alive;
    // A thread that has ended is not waited for.
    if (machine.at_block > 0 && machine.at_block == alive) open_barrier();
  }
}

static inline void on_signal(int signal_number, siginfo_t* information, void*) {
  machine.fault = uintptr_t(information->si_addr);
  machine.error = signal_number == SIGILL || signal_number == SIGTRAP
                      ? "an address that its type does not align with, or an index outside an array"
                      : "a read or write outside every buffer";
  _longjmp(machine.launch, 1);
}

// Takes the signals of a bad access while it lives.
class Signals {
 public:
  Signals() {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~Signals() {
    for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kCount = 4;
  static constexpr int kSignals[kCount] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction before_[kCount];
};

// Runs all blocks of a grid; false with machine.error where something was found.
static inline bool run_grid(dim3 grid_size, dim3 block_size, uint64_t seed, void (*call)(void*), void* argument) {
  machine.num_threads = int(block_size.x * block_size.y * block_size.z);
  machine.error = nullptr;
  machine.fault = 0;
  if (machine.num_threads < 1 || machine.num_threads > kMaxThreads) {
    machine.error = "a block has 1 to 1024 threads";
    return false;
  }
  if (!machine.stacks) {
    machine.stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  machine.seed = seed;
  machine.random = seed * 0x9e3779b97f4a7c15ull + 1;
  machine.call = call;
  machine.argument = argument;
  grid = grid_size;
  block = block_size;
  for (int i = 0; i < machine.num_threads; ++i) {
    const unsigned thread = unsigned(i);
    machine.fibers[i].index = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
  }
  const Signals signals;
  if (_setjmp(machine.launch) != 0) {  // fibers stand in the middle of a kernel: begin them anew
    for (Fiber& fiber : machine.fibers) fiber.started = false;
    return false;
  }
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t first = seed >= 2 && blocks ? draw(uint32_t(blocks)) : 0;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = seed == 1 ? blocks - 1 - i : (first + i) % blocks;
    block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block(seed);
  }
  return true;
}

// Calls a kernel with the arguments of a launch, given as the driver takes them: the address of each.
template <auto kernel>
struct Caller;

template <class... T, void (*kernel)(T...)>
struct Caller<kernel> {
  static constexpr size_t kCount = sizeof...(T);
  static constexpr size_t kSizes[kCount] = {sizeof(T)...};

  template <size_t... I>
  static void apply(void** values, std::index_sequence<I...>) {
    kernel(*static_cast<T*>(values[I])...);
  }
  static void call(void* values) {
    apply(static_cast<void**>(values), std::index_sequence_for<T...>());
  }
};

struct Entry {
  const char* name;
  void (*call)(void*);
  size_t num_arguments;
  const size_t* sizes;
};

template <auto kernel>
constexpr Entry entry(const char* name) {
  return {name, Caller<kernel>::call, Caller<kernel>::kCount, Caller<kernel>::kSizes};
}

}  // namespace cuda_model

// What kernels use of CUDA.
#define threadIdx (cuda_model::thread_index)
#define blockIdx (cuda_model::block_index)
#define blockDim (cuda_model::block)
#define gridDim (cuda_model::grid)

static inline void __syncthreads() {
  ++cuda_model::machine.at_block;
  cuda_model::leave(cuda_model::kAtBlock);
}
static inline void __syncwarp(unsigned lanes = 0xffffffffu) {
  cuda_model::meet("__syncwarp", lanes, 0, -1);
}
template <class T>
static inline T __shfl_sync(unsigned lanes, T value, int source) {
  return cuda_model::shuffle("__shfl_sync", lanes, value, source % cuda_model::kWarpSize);
}
template <class T>
static inline T __shfl_xor_sync(unsigned lanes, T value, int distance) {
  const int lane = cuda_model::machine.current % cuda_model::kWarpSize;
  return cuda_model::shuffle("__shfl_xor_sync", lanes, value, lane ^ distance);
}
template <class T>
static inline T __ldg(const T* address) {
  return *address;
}
template <class T>
static inline T __ldcs(const T* address) {
  return *address;
}
static inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += int(int8_t(unsigned(a) >> 8 * i)) * int(int8_t(unsigned(b) >> 8 * i));
  return sum;
}
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// Four of the 8 bytes of y and x, lowest first, each by the lower three bits of a nibble of `selector`.
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return chosen;
}

static inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
