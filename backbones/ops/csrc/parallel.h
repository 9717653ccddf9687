// What both operators share around their kernels: threads, scratch memory, how the C interface reports.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <atomic>
#include <system_error>
#include <thread>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(_WIN32)
#define SCAN_EXPORT extern "C" __declspec(dllexport)
#else
#define SCAN_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace scan {
namespace {

enum Status : int64_t { kOk = 0, kOrderOutOfRange = 1, kNoMemory = 2 };

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline int64_t round_up(int64_t x, int64_t multiple) { return divide_up(x, multiple) * multiple; }

// States that decay towards zero reach subnormal numbers, which many CPUs handle in microcode. Restored on leaving.
struct FlushSubnormals {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved); }
#else
  FlushSubnormals() {}
#endif
};

template <class F>
void parallel(int64_t threads, int64_t tasks, const F& run) {  // run(thread, task)
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    FlushSubnormals flush;
    for (int64_t i = 0; i < tasks; i++) run(0, i);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads((int)threads)
  {
    FlushSubnormals flush;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; i++) run(omp_get_thread_num(), i);
  }
#else
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t thread) {
    FlushSubnormals flush;
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) run(thread, i);
  };
  std::vector<std::thread> pool;
  try {
    for (int64_t i = 1; i < threads; i++) pool.emplace_back(work, i);
  } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
  }
  work(0);
  for (auto& thread : pool) thread.join();
#endif
}

struct Buffer {  // uninitialised floats, aligned to a cache line
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> data;
  explicit Buffer(int64_t floats) : data((float*)::operator new(floats * sizeof(float), std::align_val_t(64))) {}
  float* get() const { return data.get(); }
};

// Into how many pieces to cut the channels of each of `tasks`: the fewest that keep threads about as busy as can be.
inline int64_t choose_pieces(int64_t tasks, int64_t units, int64_t threads) {
  auto longest = [&](int64_t pieces) { return divide_up(tasks * pieces, threads) * divide_up(units, pieces); };
  const int64_t most = std::min(units, 4 * threads);
  int64_t shortest = longest(1);
  for (int64_t pieces = 2; pieces <= most; pieces++) shortest = std::min(shortest, longest(pieces));
  int64_t pieces = 1;
  while (longest(pieces) * 16 > shortest * 17) pieces++;
  return pieces;
}

template <class F>
int64_t guarded(F run) {  // no exception may reach Python
  try {
    return run();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace
}  // namespace scan
