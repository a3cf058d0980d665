// Plays CUDA kernels on the CPU, thread by thread, so that the device code itself is tested where there is no GPU.
//
// A launch runs its blocks one after the other, in shuffled order; a block's threads are fibers that are switched at
// barriers and warp operations, also in shuffled order. Found this way: wrong results, also those that depend on the
// order of threads or blocks; accesses outside a buffer (-fsanitize=address; shared memory is a fresh, poisoned
// allocation per block); races within a block and between blocks of a launch (-fsanitize=thread: a switch of fibers
// does not synchronise, barriers, warp operations and the end of a launch do); barriers that not all threads reach.
//
// Limits: warp operations take all lanes; what atomics cost, and memory orders weaker than TSan's model, are not seen.
#pragma once
#define DISTOPT_CUDA_EMULATION 1

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

// Not part of what is tested: the race detector must not see it, inlined or not.
#define DISTOPT_UNSEEN __attribute__((no_sanitize_thread, noinline))

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };

namespace emulation {

struct Dim {
  unsigned x = 0;
};

inline constexpr int kWarpSize = 32;
inline constexpr int kMostThreads = 1024;
inline constexpr size_t kStack = 256 * 1024;

inline void race_acquire([[maybe_unused]] void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(at);
#endif
}

inline void race_release([[maybe_unused]] void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(at);
#endif
}

struct Warp {
  uint64_t values[2][kWarpSize];
  int arrived[2] = {0, 0};
  long round[2] = {0, 0};  // completed exchanges with this buffer
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;  // kept for the next launch
  unsigned thread = 0;
  bool done = false;
  long exchanges = 0;
  void* race_fiber = nullptr;
};

struct Machine {
  std::mt19937 order{12345};
  Fiber fibers[kMostThreads];
  Warp warps[kMostThreads / kWarpSize];
  Fiber* running = nullptr;
  ucontext_t scheduler;
  void* scheduler_race_fiber = nullptr;
  const std::function<void()>* body = nullptr;
  int waiting = 0;    // at the barrier
  long barriers = 0;  // completed
  bool progressed = false;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  // One for every other barrier: who is late at one must not be synchronised with who is already at the next.
  char barrier_tokens[2];
  char begin_token, end_token;  // of a launch: blocks do not synchronise with each other
  Dim thread, block, threads, blocks;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

DISTOPT_UNSEEN inline void switch_to([[maybe_unused]] void* race_fiber, ucontext_t* from, ucontext_t* to) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(race_fiber, 1);  // 1: without synchronisation
#endif
  swapcontext(from, to);
}

DISTOPT_UNSEEN inline void yield() {
  Machine& m = machine();
  switch_to(m.scheduler_race_fiber, &m.running->context, &m.scheduler);
}

DISTOPT_UNSEEN inline void start() {
  Machine& m = machine();
  race_acquire(&m.begin_token);
  (*m.body)();
  m.running->done = true;
  m.progressed = true;
  race_release(&m.end_token);
  yield();
}

DISTOPT_UNSEEN inline void barrier() {
  Machine& m = machine();
  const long mine = m.barriers;
  race_release(&m.barrier_tokens[mine & 1]);
  if (++m.waiting == static_cast<int>(m.threads.x)) {
    m.waiting = 0;
    ++m.barriers;
  }
  m.progressed = true;
  while (m.barriers == mine) yield();
  race_acquire(&m.barrier_tokens[mine & 1]);
}

// Gives all lanes what every lane of the warp put in.
DISTOPT_UNSEEN inline const uint64_t* exchange(uint64_t value) {
  Machine& m = machine();
  Fiber& f = *m.running;
  Warp& w = m.warps[f.thread / kWarpSize];
  const int buffer = f.exchanges & 1;
  const long round = f.exchanges / 2;
  ++f.exchanges;
  w.values[buffer][f.thread % kWarpSize] = value;
  race_release(&w.values[buffer]);
  if (++w.arrived[buffer] == kWarpSize) {
    w.arrived[buffer] = 0;
    ++w.round[buffer];
  }
  m.progressed = true;
  while (w.round[buffer] == round) yield();
  race_acquire(&w.values[buffer]);
  return w.values[buffer];
}

DISTOPT_UNSEEN inline void* block_memory(size_t bytes) {
  Machine& m = machine();
  if (!m.shared) {
    m.shared = new char[bytes];
    m.shared_bytes = bytes;
    memset(m.shared, 0xa5, bytes);
    race_release(&m.begin_token);
  }
  if (m.shared_bytes != bytes) {
    fprintf(stderr, "the threads of a block see different layouts of its shared memory\n");
    abort();
  }
  race_acquire(&m.begin_token);  // with whose allocation the memory came
  return m.shared;
}

// Frees the block's shared memory when the block is done, without making the scheduler, and with it the next block,
// synchronise with the block.
DISTOPT_UNSEEN inline void free_shared() {
  Machine& m = machine();
  if (!m.shared) return;
#if defined(__SANITIZE_THREAD__)
  static void* janitor = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(janitor, 1);
#endif
  race_acquire(&m.end_token);
  delete[] m.shared;
  m.shared = nullptr;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(m.scheduler_race_fiber, 1);
#endif
}

DISTOPT_UNSEEN inline void run(int64_t blocks, int threads, const std::function<void()>& body) {
  Machine& m = machine();
  if (threads != 1 && threads % kWarpSize) {
    fprintf(stderr, "%d threads are not whole warps\n", threads);
    abort();
  }
  m.body = &body;
  m.blocks.x = static_cast<unsigned>(blocks);
  m.threads.x = static_cast<unsigned>(threads);
  std::vector<unsigned> block_order(blocks), thread_order(threads);
  for (unsigned b = 0; b < blocks; ++b) block_order[b] = b;
  for (int t = 0; t < threads; ++t) thread_order[t] = static_cast<unsigned>(t);
  std::shuffle(block_order.begin(), block_order.end(), m.order);
#if defined(__SANITIZE_THREAD__)
  m.scheduler_race_fiber = __tsan_get_current_fiber();
#endif
  race_release(&m.begin_token);
  for (const unsigned b : block_order) {
    m.block.x = b;
    m.waiting = 0;
    free_shared();
    for (Warp& w : m.warps) w = Warp{};
    for (int t = 0; t < threads; ++t) {
      Fiber& f = m.fibers[t];
      f.thread = static_cast<unsigned>(t);
      f.done = false;
      f.exchanges = 0;
      if (!f.stack) f.stack = new char[kStack];
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack;
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, start, 0);
#if defined(__SANITIZE_THREAD__)
      // One for all blocks, like its stack: races between equal threads of two blocks are not seen, all others are.
      if (!f.race_fiber) f.race_fiber = __tsan_create_fiber(0);
#endif
    }
    for (int left = threads; left > 0;) {
      std::shuffle(thread_order.begin(), thread_order.end(), m.order);
      m.progressed = false;
      for (const unsigned t : thread_order) {
        Fiber& f = m.fibers[t];
        if (f.done) continue;
        m.running = &f;
        m.thread.x = t;
        switch_to(f.race_fiber, &m.scheduler, &f.context);
        left -= f.done;
      }
      if (!m.progressed) {
        fprintf(stderr, "block %u hangs: %d threads wait at a barrier, %d have ended or wait for their warp\n", b,
                m.waiting, threads - m.waiting);
        abort();
      }
    }
    if (m.waiting) {
      fprintf(stderr, "block %u ended with threads at a barrier\n", b);
      abort();
    }
  }
  free_shared();
  race_acquire(&m.end_token);
}

DISTOPT_UNSEEN inline Dim thread_index() { return machine().thread; }
DISTOPT_UNSEEN inline Dim block_index() { return machine().block; }
DISTOPT_UNSEEN inline Dim block_size() { return machine().threads; }
DISTOPT_UNSEEN inline Dim grid_size() { return machine().blocks; }

template <class T>
inline uint64_t pack(T value) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= 8);
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
inline T unpack(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline void full(unsigned mask) {
  if (mask != 0xffffffffu) {
    fprintf(stderr, "a warp operation without all lanes\n");
    abort();
  }
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp() { emulation::exchange(0); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  emulation::full(mask);
  const uint64_t* all = emulation::exchange(predicate);
  unsigned result = 0;
  for (int i = 0; i < emulation::kWarpSize; ++i) result |= static_cast<unsigned>(all[i] != 0) << i;
  return result;
}

template <class T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  emulation::full(mask);
  const uint64_t* all = emulation::exchange(emulation::pack(value));
  unsigned result = 0;
  for (int i = 0; i < emulation::kWarpSize; ++i) result |= static_cast<unsigned>(all[i] == emulation::pack(value)) << i;
  return result;
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int from) {
  emulation::full(mask);
  return emulation::unpack<T>(emulation::exchange(emulation::pack(value))[from & 31]);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  emulation::full(mask);
  const uint64_t* all = emulation::exchange(emulation::pack(value));
  const int own = static_cast<int>(threadIdx.x) % emulation::kWarpSize;
  return emulation::unpack<T>(all[own >= static_cast<int>(distance) ? own - static_cast<int>(distance) : own]);
}

template <class T>
inline T atomicAdd(T* at, std::common_type_t<T> value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

template <class T>
inline T atomicExch(T* at, std::common_type_t<T> value) {
  return __atomic_exchange_n(at, value, __ATOMIC_RELAXED);
}
