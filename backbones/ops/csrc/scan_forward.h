// Forward: softplus for a block of steps first, then the recurrence with the states in registers, then the output rows.
// A single state (n = 1) is memory-bound and goes row by row instead.
#pragma once

#include "rows.h"

namespace scan {
namespace {

constexpr int kGroup = 4;         // states in registers at a time
constexpr int64_t kBlock = 16;    // steps per block
constexpr int64_t kAhead = 4;     // tokens that the row form prefetches ahead

struct ForwardScratch {
  float *wide, *h, *B, *C, *dt, *dtu, *y, *decay, *state;
  int64_t size;
  ForwardScratch(const Problem& p, int64_t channels, float* base) {
    Arena a{base};
    int64_t steps = smaller(block_steps(p.window, kBlock), round_up(p.t, kBlock));
    const bool adds = p.out == kSum ? !p.first_of_all : p.out == kPerOrder && !p.first_in_order;
    wide = a.take(p.bf16 && adds ? p.l * channels : 0);
    h = a.take(p.n * round_up(channels, kTile));
    B = a.take(steps * p.n);
    C = a.take(steps * p.n);
    dt = a.take(steps * kTile);
    dtu = a.take(steps * kTile);
    y = a.take(steps * kTile);
    decay = a.take(p.window > 1 ? steps * kGroup * W : 0);
    state = a.take(p.window > 1 ? steps * kGroup * W : 0);
    size = a.used;
  }
};

// One block of steps for one vector of channels and G states: y += sum_g C h.
template <int G>
void advance(float* h, int64_t h_row, const float* A2, int64_t A_row, const float* B, const float* C, int64_t n, const float* dt,
             const float* dtu, float* y, int64_t steps) {
  vf hg[G], ag[G];
  for (int g = 0; g < G; g++) hg[g] = load(h + g * h_row), ag[g] = load(A2 + g * A_row);
  for (int64_t i = 0; i < steps; i++) {
    vf d = load(dt + i * kTile), x = load(dtu + i * kTile), acc = load(y + i * kTile);
    for (int g = 0; g < G; g++) {
      hg[g] = exp2(d * ag[g]) * hg[g] + x * B[i * n + g];
      acc += hg[g] * C[i * n + g];
    }
    store(y + i * kTile, acc);
  }
  for (int g = 0; g < G; g++) store(h + g * h_row, hg[g]);
}

// The same with LBMamba's local backward scan: inside each window r_t = a_t e_{t+1}, e_t = r_t + b_t from the right; y = <C, h + r>.
template <int G>
void advance_window(float* h, int64_t h_row, const float* A2, int64_t A_row, const float* B, const float* C, int64_t n, const float* dt,
                    const float* dtu, float* y, int64_t steps, int64_t window, float* decay, float* state) {
  vf hg[G], ag[G], e[G];
  for (int g = 0; g < G; g++) hg[g] = load(h + g * h_row), ag[g] = load(A2 + g * A_row);
  for (int64_t s = 0; s < steps; s += window) {
    int64_t end = smaller(s + window, steps);
    for (int64_t i = s; i < end; i++) {
      vf d = load(dt + i * kTile), x = load(dtu + i * kTile);
      for (int g = 0; g < G; g++) {
        vf a = exp2(d * ag[g]);
        hg[g] = a * hg[g] + x * B[i * n + g];
        store(decay + (i * G + g) * W, a);
        store(state + (i * G + g) * W, hg[g]);
      }
    }
    for (int g = 0; g < G; g++) e[g] = vf{};
    for (int64_t i = end - 1; i >= s; i--) {
      vf x = load(dtu + i * kTile), acc = load(y + i * kTile);
      for (int g = 0; g < G; g++) {
        vf r = load(decay + (i * G + g) * W) * e[g];
        acc += (load(state + (i * G + g) * W) + r) * C[i * n + g];
        e[g] = r + x * B[i * n + g];
      }
      store(y + i * kTile, acc);
    }
  }
  for (int g = 0; g < G; g++) store(h + g * h_row, hg[g]);
}

template <int G>
SCAN_INLINE void advance_states(const Problem& p, const ForwardScratch& s, float* h, int64_t h_row, const float* A2, int64_t j, int64_t v,
                                int64_t steps) {
  if (p.window > 1)
    advance_window<G>(h + j * h_row + v, h_row, A2 + j * p.cp + v, p.cp, s.B + j, s.C + j, p.n, s.dt + v, s.dtu + v, s.y + v, steps,
                      p.window, s.decay, s.state);
  else
    advance<G>(h + j * h_row + v, h_row, A2 + j * p.cp + v, p.cp, s.B + j, s.C + j, p.n, s.dt + v, s.dtu + v, s.y + v, steps);
}

void save_states(const Problem& p, const Task& task, int64_t k, int64_t chunk, const float* h, int64_t h_row) {
  float* to = p.states + ((task.b * p.k + k) * (p.chunks - 1) + chunk - 1) * p.n * p.c + task.c0;
  for (int64_t j = 0; j < p.n; j++) memcpy(to + j * p.c, h + j * h_row, (task.c1 - task.c0) * sizeof(float));
}

// Any n: blocks of steps, tiles of channels, groups of states.
template <class E>
void forward_order(const Problem& p, const Task& task, int64_t k, const Target& y, const ForwardScratch& s) {
  const int32_t* order = p.order + k * p.order_k;
  const uint8_t* visit = p.visit + k * p.t;
  const uint8_t first_bit = p.out == kSum ? kFirstOfAll : kFirstInOrder;
  const int64_t channels = task.c1 - task.c0, h_row = round_up(channels, kTile), block = block_steps(p.window, kBlock);
  memset(s.h, 0, p.n * h_row * sizeof(float));
  for (int64_t s0 = 0, steps; s0 < p.t; s0 += steps) {
    steps = smaller(block, smaller(p.t, (s0 / p.chunk + 1) * p.chunk) - s0);
    if (p.states && s0 && s0 % p.chunk == 0) save_states(p, task, k, s0 / p.chunk, s.h, h_row);
    gather_states<E>(p, p.B, p.sB, task.b, k, order + s0, steps, s.B);
    gather_states<E>(p, p.C, p.sC, task.b, k, order + s0, steps, s.C);
    for (int64_t tile = 0; tile < channels; tile += kTile) {
      const int64_t width = smaller(kTile, channels - tile), c0 = task.c0 + tile;
      const float *bias = p.bias0 + k * p.cp + c0, *D = p.D0 + k * p.cp + c0, *A2 = p.A2 + k * p.n * p.cp + c0;
      for (int64_t i = 0; i < steps; i++) {
        const int64_t token = order[s0 + i];
        const E *delta = at<E>(p.delta, p.sdelta, task.b, token, k) + c0, *u = at<E>(p.u, p.su, task.b, token, k) + c0;
        if (s0 + i + block < p.t) {
          const int64_t next = order[s0 + i + block];
          prefetch(at<E>(p.delta, p.sdelta, task.b, next, k) + c0, width * sizeof(E));
          prefetch(at<E>(p.u, p.su, task.b, next, k) + c0, width * sizeof(E));
        }
        for (int64_t v = 0; v < width; v += W) {
          vf x = load(u + v, width - v), d = load(delta + v, width - v) + load(bias + v);
          if (p.softplus) d = softplus(d);
          store(s.dt + i * kTile + v, d);
          store(s.dtu + i * kTile + v, d * x);
          store(s.y + i * kTile + v, load(D + v) * x);
        }
      }
      for (int64_t v = 0; v < width; v += W) {
        int64_t j = 0;
        for (; j + kGroup <= p.n; j += kGroup) advance_states<kGroup>(p, s, s.h + tile, h_row, A2, j, v, steps);
        for (; j + 2 <= p.n; j += 2) advance_states<2>(p, s, s.h + tile, h_row, A2, j, v, steps);
        for (; j < p.n; j++) advance_states<1>(p, s, s.h + tile, h_row, A2, j, v, steps);
      }
      for (int64_t i = 0; i < steps; i++) {
        const int64_t row = p.out == kPerStep ? s0 + i : order[s0 + i];
        const bool first = p.out == kPerStep || visit[s0 + i] & first_bit;
        for (int64_t v = 0; v < width; v += W) emit<E>(y, row, tile + v, load(s.y + i * kTile + v), width - v, first);
      }
    }
  }
}

template <class E, class O, bool kSoftplus>
SCAN_INLINE void row_step(const E* u, const E* delta, O* y, bool first, float B, float C, const float* A2, const float* D,
                          const float* bias, float* h, int64_t channels, const E* next_u, const E* next_delta, const O* next_y) {
  auto element = [&](int64_t v, int64_t lanes) SCAN_INLINE_LAMBDA {
    vf x = load(u + v, lanes), d = load(delta + v, lanes) + load(bias + v);
    if (kSoftplus) d = softplus(d);
    vf state = exp2(d * load(A2 + v)) * load(h + v) + d * x * B;
    store(h + v, state);
    emit(y + v, load(D + v) * x + state * C, lanes, first);
  };
  int64_t v = 0;
  for (; v + W <= channels; v += W) {
    __builtin_prefetch(next_delta + v);
    __builtin_prefetch(next_u + v);
    __builtin_prefetch(next_y + v, 1);
    element(v, W);
  }
  if (v < channels) element(v, channels - v);
}

// n = 1: whole contiguous rows, the state row stays in L1.
template <class E, class O, bool kSoftplus>
void forward_rows(const Problem& p, const Task& task, int64_t k, const Target& to, const ForwardScratch& s) {
  const int32_t* order = p.order + k * p.order_k;
  const uint8_t* visit = p.visit + k * p.t;
  const uint8_t first_bit = p.out == kSum ? kFirstOfAll : kFirstInOrder;
  const int64_t channels = task.c1 - task.c0, c0 = task.c0;
  const float *bias = p.bias0 + k * p.cp + c0, *D = p.D0 + k * p.cp + c0, *A2 = p.A2 + k * p.cp + c0;
  auto y_row = [&](int64_t step) { return (O*)to.base + (p.out == kPerStep ? step : order[step]) * to.row; };
  memset(s.h, 0, round_up(channels, kTile) * sizeof(float));
  for (int64_t step = 0; step < p.t; step++) {
    if (p.states && step && step % p.chunk == 0) save_states(p, task, k, step / p.chunk, s.h, 0);
    const int64_t token = order[step], ahead = smaller(step + kAhead, p.t - 1), next = order[ahead];
    const float B = to_float(*at<E>(p.B, p.sB, task.b, token, k)), C = to_float(*at<E>(p.C, p.sC, task.b, token, k));
    __builtin_prefetch(at<E>(p.B, p.sB, task.b, next, k));
    __builtin_prefetch(at<E>(p.C, p.sC, task.b, next, k));
    row_step<E, O, kSoftplus>(at<E>(p.u, p.su, task.b, token, k) + c0, at<E>(p.delta, p.sdelta, task.b, token, k) + c0, y_row(step),
                              p.out == kPerStep || visit[step] & first_bit, B, C, A2, D, bias, s.h, channels,
                              at<E>(p.u, p.su, task.b, next, k) + c0, at<E>(p.delta, p.sdelta, task.b, next, k) + c0, y_row(ahead));
  }
}

template <class E>
void forward_order_any(const Problem& p, const Task& task, int64_t k, const Target& y, const ForwardScratch& s) {
  if (p.n > 1 || p.window > 1) return forward_order<E>(p, task, k, y, s);
  if (y.wide) return p.softplus ? forward_rows<E, float, true>(p, task, k, y, s) : forward_rows<E, float, false>(p, task, k, y, s);
  return p.softplus ? forward_rows<E, E, true>(p, task, k, y, s) : forward_rows<E, E, false>(p, task, k, y, s);
}

template <class E>
void forward_task(const Problem& p, const Task& task, float* scratch) {
  const int64_t channels = task.c1 - task.c0;
  ForwardScratch s(p, channels, scratch);
  const int64_t rows = p.out == kPerStep ? p.t : p.l, row = p.out == kSum ? p.c : p.k * p.c;
  E* image = (E*)p.y + task.b * rows * row + task.c0;
  for (int64_t k = task.k0; k < task.k1; k++) {
    E* first = image + (p.out == kSum ? 0 : k * p.c);
    const bool wide = p.bf16 && (p.out == kSum ? !p.first_of_all : p.out == kPerOrder && !p.first_in_order);
    Target y = wide ? Target{s.wide, channels, true} : Target{first, row, false};
    if (p.out == kPerOrder && !p.covers_in_order) clear_unseen<E>(y, p.seen + k * p.l, p.l, channels);
    if (p.out == kSum && !p.covers_any && k == task.k0) clear_unseen<E>(y, p.seen_any, p.l, channels);
    forward_order_any<E>(p, task, k, y, s);
    if (wide && (p.out == kPerOrder || k + 1 == task.k1)) narrow_rows(s.wide, first, p.l, row, channels);
  }
}

}  // namespace
}  // namespace scan
