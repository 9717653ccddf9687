// Rows of channels: where a token's row lies, how results reach it, and the pieces that forward and backward share.
#pragma once

#include "math.h"

namespace scan {
namespace {

constexpr int64_t kAhead = 5;                 // steps from the prefetch of a row to its use
constexpr int64_t kTile = 64;                 // channels whose steps are worked on together, in L1

// Hands out aligned pieces of one buffer, kept apart modulo 4096 bytes, else their rows would compete for the same cache
// sets. With a null base it only counts.
struct Arena {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = base ? base + used : nullptr;
    used += round_up(floats, 16) + kSkew;
    return piece;
  }
};

// Where results go: rows of E, or of float when several visits of a bfloat16 token have to be added first.
struct Target {
  void* base;
  int64_t row;  // elements from row to row
  bool wide;    // float although E is bf16
};

template <int U, class O>
SCAN_INLINE void emit(O* p, Pack<U> x, int64_t lanes, bool first) {
  store_pack(p, first ? x : x + load_pack<U>(p, lanes), lanes);
}

template <class E, int U>
SCAN_INLINE void emit(const Target& to, int64_t row, int64_t channel, Pack<U> x, int64_t lanes, bool first) {
  if (sizeof(E) == sizeof(float) || to.wide)
    emit((float*)to.base + row * to.row + channel, x, lanes, first);
  else
    emit((E*)to.base + row * to.row + channel, x, lanes, first);
}

template <class E>
void clear_row(E* p, int64_t channels) {
  memset(p, 0, channels * sizeof(E));
}

template <class E, class F>
void clear_rows(const Target& to, int64_t l, int64_t channels, const F& chosen) {
  for (int64_t p = 0; p < l; p++)
    if (chosen(p)) {
      if (to.wide)
        clear_row((float*)to.base + p * to.row, channels);
      else
        clear_row((E*)to.base + p * to.row, channels);
    }
}

// Rows of tokens that nothing visited.
template <class E>
void clear_unseen(const Target& to, const uint8_t* seen, int64_t l, int64_t channels) {
  clear_rows<E>(to, l, channels, [&](int64_t p) { return !seen[p]; });
}

template <class E>
void narrow_rows(const float* from, E* to, int64_t rows, int64_t to_row, int64_t channels) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t ch = 0; ch < channels; ch += W) {
      int64_t lanes = channels - ch;
      store(to + r * to_row + ch, load(from + r * channels + ch, lanes), lanes);
    }
}

template <class E>
SCAN_INLINE const E* at(const void* base, const Strides& s, int64_t b, int64_t row, int64_t k) {
  return (const E*)base + b * s.b + row * s.l + k * s.k;
}

// To L2 only: the few line buffers of L1 could not cover the latency of memory.
template <int U, class E>
SCAN_INLINE void prefetch(const E* p) {
  for (int64_t i = 0; i < U * W * (int64_t)sizeof(E); i += 64) __builtin_prefetch((const char*)p + i, 0, 2);
}

// Short rows of a block of steps (B, C or delta before its projection), as contiguous floats.
template <class E>
void gather(const void* base, const Strides& s, int64_t b, int64_t k, const int32_t* tokens, int64_t steps, int64_t width,
            float* to) {
  for (int64_t i = 0; i < steps; i++) {
    const E* row = at<E>(base, s, b, tokens[i], k);
    for (int64_t j = 0; j < width; j++) to[i * width + j] = to_float(row[j]);
  }
}

template <int M, int U>
SCAN_INLINE void project_tile(const Problem& p, const float* low, const float* weight, float* to, int64_t to_row) {
  Pack<U> sum[M];
  unrolled<M>([&](auto i) SCAN_FLAT { sum[i] = Pack<U>(0.0f); });
  for (int64_t r = 0; r < p.rank; r++) {
    const Pack<U> w = load_pack<U>(weight + r * p.weight_row);
    unrolled<M>([&](auto i) SCAN_FLAT { sum[i] = sum[i] + w * low[i * p.rank + r]; });
  }
  unrolled<M>([&](auto i) SCAN_FLAT { store_pack(to + i * to_row, sum[i]); });
}

// delta of `steps` rows `low` (steps, rank) and of channels c0, c0 + 1, ... of order k. Rows of `to` have space for whole
// vectors.
__attribute__((noinline)) void project(const Problem& p, int64_t k, int64_t c0, int64_t channels, const float* low,
                                       int64_t steps, float* to, int64_t to_row) {
  constexpr int kSteps = 4;  // times 2 or 4 vectors: as many sums as hide the latency and fit into registers
  const float* weight = p.weight0 + k * p.rank * p.weight_row + c0;
  for_row<(W == 16 ? 4 : 2)>(channels, [&](int64_t v, int64_t, auto size) SCAN_FLAT {
    constexpr int U = decltype(size)::value;
    int64_t i = 0;
    for (; i + kSteps <= steps; i += kSteps)
      project_tile<kSteps, U>(p, low + i * p.rank, weight + v, to + i * to_row + v, to_row);
    for (; i < steps; i++) project_tile<1, U>(p, low + i * p.rank, weight + v, to + i * to_row + v, to_row);
  });
}

SCAN_INLINE int64_t block_steps(int64_t window, int64_t wanted) {  // a multiple of the window
  return window > 1 ? round_up(wanted, window) : wanted;
}

}  // namespace
}  // namespace scan
