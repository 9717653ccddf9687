// Forward: softplus for a block of steps first, then the recurrence with the states in registers, then the output
// rows. A single state (n = 1) leaves too little to compute for that, and goes row by row instead.
#pragma once

#include "rows.h"

namespace scan {
namespace {

constexpr int kGroup = 4;       // states in registers at a time
constexpr int kGroupWindow = W == 16 ? 8 : 4;
constexpr int64_t kBlock = 16;  // steps per block

// Whether visits add up in a float32 image before they are rounded to bfloat16.
bool wide_y(const Problem& p) {
  return p.bf16 && (p.out == kSum ? !p.first_of_all : p.out == kPerOrder && !p.first_in_order);
}

// Orders that a task may take side by side; all others go one after the other.
int64_t side_by_side(const Problem& p) {
  return p.out == kSum && p.n > 1 && p.window <= 1 && p.rank && p.one_decay ? p.k : 1;
}

struct ForwardScratch {
  float *wide, *h, *B, *C, *low, *dt, *dtu, *y, *local;
  // Rows to prefetch while the first groups of states advance: delta and u of the next block, y of this one. Spread
  // over the arithmetic like this they cost nothing; in the memory-bound phases before and after they did.
  const char** ahead[4];
  int64_t steps, size;  // steps: of a block
  ForwardScratch(const Problem& p, int64_t channels, float* base) {
    Arena a{base};
    const int64_t orders = side_by_side(p);
    steps = smaller(block_steps(p.window, kBlock), round_up(p.t, kBlock));
    wide = a.take(wide_y(p) ? p.l * channels : 0);
    h = a.take(orders * p.n * round_up(channels, kTile));
    B = a.take(orders * steps * p.n);
    C = a.take(orders * steps * p.n);
    low = a.take(steps * p.rank);
    dt = a.take(steps * (p.n > 1 ? kTile : round_up(channels, kTile)));
    dtu = a.take(orders * steps * kTile);
    y = a.take(orders * steps * kTile);
    local = a.take(p.window > 1 ? p.window * (p.n > 1 ? kGroupWindow * W : 3 * kTile)
                   : orders > 1 ? steps * kGroup * W
                                : 0);
    for (auto& rows : ahead) rows = (const char**)a.take(2 * (orders * steps + p.window));
    size = a.used;
  }
};

// One vector of channels and G of its states over a block of steps. Rows of steps have stride kTile or n.
struct Group {
  const float *A2, *B, *C, *dt, *dtu;
  float *h, *y, *local;
  const char* const* ahead;  // an address per step to prefetch, at this offset
  int64_t ahead_offset, h_row, A2_row, n, steps, window;
};

// exp(dt A) of a block of steps: computed, computed and kept for the orders that share it, or what was kept.
enum Decay { kComputed, kKept, kShared };

// y += sum_g C h.
template <int G, Decay kDecay>
void advance(const Group& group) {
  const Group s = group;  // a copy that no store can alias: its fields stay in registers
  vf h[G], A2[G];
  unrolled<G>([&](auto g) SCAN_FLAT { h[g] = load(s.h + g * s.h_row), A2[g] = load(s.A2 + g * s.A2_row); });
  for (int64_t i = 0; i < s.steps; i++) {
    __builtin_prefetch(s.ahead[i] + s.ahead_offset);
    const vf dt = load(s.dt + i * kTile), dtu = load(s.dtu + i * kTile);
    vf y = load(s.y + i * kTile);
    unrolled<G>([&](auto g) SCAN_FLAT {
      float* kept = s.local + (i * G + g) * W;
      const vf a = kDecay == kShared ? load(kept) : exp2(dt * A2[g]);
      if (kDecay == kKept) store(kept, a);
      h[g] = a * h[g] + dtu * s.B[i * s.n + g];
      y += h[g] * s.C[i * s.n + g];
    });
    store(s.y + i * kTile, y);
  }
  unrolled<G>([&](auto g) SCAN_FLAT { store(s.h + g * s.h_row, h[g]); });
}

// The same with LBMamba's local backward scan: in each window, from the right, r_t = a_t e_{t+1} and e_t = r_t + b_t;
// y += <C, h + r>.
template <int G>
void advance_window(const Group& group) {
  const Group s = group;
  vf h[G], A2[G], e[G];
  unrolled<G>([&](auto g) SCAN_FLAT { h[g] = load(s.h + g * s.h_row), A2[g] = load(s.A2 + g * s.A2_row); });
  for (int64_t begin = 0; begin < s.steps; begin += s.window) {
    const int64_t end = smaller(begin + s.window, s.steps);
    float* local = s.local;
    for (int64_t i = begin; i < end; i++, local += G * W) {
      __builtin_prefetch(s.ahead[i] + s.ahead_offset);
      const vf dt = load(s.dt + i * kTile), dtu = load(s.dtu + i * kTile);
      vf y = load(s.y + i * kTile);
      unrolled<G>([&](auto g) SCAN_FLAT {
        const vf a = exp2(dt * A2[g]);
        h[g] = a * h[g] + dtu * s.B[i * s.n + g];
        y += h[g] * s.C[i * s.n + g];
        store(local + g * W, a);
      });
      store(s.y + i * kTile, y);
    }
    unrolled<G>([&](auto g) SCAN_FLAT { e[g] = vf{}; });
    for (int64_t i = end - 1; i >= begin; i--) {
      local -= G * W;
      const vf dtu = load(s.dtu + i * kTile);
      vf y = load(s.y + i * kTile);
      unrolled<G>([&](auto g) SCAN_FLAT {
        const vf r = load(local + g * W) * e[g];
        y += r * s.C[i * s.n + g];
        e[g] = r + dtu * s.B[i * s.n + g];
      });
      store(s.y + i * kTile, y);
    }
  }
  unrolled<G>([&](auto g) SCAN_FLAT { store(s.h + g * s.h_row, h[g]); });
}

void save_states(const Problem& p, const Task& task, int64_t k, int64_t chunk, const float* h, int64_t h_row) {
  float* to = p.states + ((task.b * p.k + k) * (p.chunks - 1) + chunk - 1) * p.n * p.c + task.c0;
  for (int64_t j = 0; j < p.n; j++) memcpy(to + j * p.c, h + j * h_row, (task.c1 - task.c0) * sizeof(float));
}

// Whether all orders of the task decay alike: they have the same parameters and, whatever token they visit at a step,
// read the same row of delta there (PlainMamba).
template <class E>
bool decay_alike(const Problem& p, const Task& task) {
  if (side_by_side(p) == 1 || task.k1 - task.k0 == 1) return false;
  for (int64_t k = task.k0 + 1; k < task.k1; k++)
    for (int64_t i = 0; i < p.t; i++) {
      const E* row = at<E>(p.delta, p.sdelta, task.b, p.order[k * p.order_k + i], k);
      const E* first = at<E>(p.delta, p.sdelta, task.b, p.order[task.k0 * p.order_k + i], task.k0);
      if (memcmp(row, first, p.rank * sizeof(E))) return false;
    }
  return true;
}

// Any n: blocks of steps, tiles of channels, groups of states. Orders k0..k1 go side by side and share what the first of
// them computes of dt; where they are several, their outputs are added to y.
template <class E>
void forward_blocks(const Problem& p, const Task& task, int64_t k0, int64_t k1, const Target& y, const ForwardScratch& s) {
  const uint8_t first_bit = p.out == kSum ? kFirstOfAll : kFirstInOrder;
  const int64_t channels = task.c1 - task.c0, h_row = round_up(channels, kTile);
  const int64_t h_order = p.n * h_row, row_order = s.steps * p.n, tile_order = s.steps * kTile;
  const bool alone = k1 - k0 == 1;
  memset(s.h, 0, (k1 - k0) * h_order * sizeof(float));
  for (int64_t s0 = 0, steps; s0 < p.t; s0 += steps) {
    steps = smaller(s.steps, smaller(p.t, (s0 / p.chunk + 1) * p.chunk) - s0);
    if (p.rank) gather<E>(p.delta, p.sdelta, task.b, k0, p.order + k0 * p.order_k + s0, steps, p.rank, s.low);
    for (int64_t o = 0, k = k0; k < k1; o++, k++) {
      const int32_t* order = p.order + k * p.order_k;
      if (p.states && s0 && s0 % p.chunk == 0) save_states(p, task, k, s0 / p.chunk, s.h + o * h_order, h_row);
      gather<E>(p.B, p.sB, task.b, k, order + s0, steps, p.n, s.B + o * row_order);
      gather<E>(p.C, p.sC, task.b, k, order + s0, steps, p.n, s.C + o * row_order);
      for (int64_t i = 0; i < steps; i++) {
        const int64_t next = order[smaller(s0 + i + steps, p.t - 1)], at_i = o * s.steps + i;
        s.ahead[1][at_i] = (const char*)at<E>(p.u, p.su, task.b, next, k);
        s.ahead[0][at_i] = p.rank ? s.ahead[1][at_i] : (const char*)at<E>(p.delta, p.sdelta, task.b, next, k);
        const int64_t y_row = (p.out == kPerStep ? s0 + i : order[s0 + i]) * y.row - task.c0;
        s.ahead[2][at_i] = s.ahead[3][at_i] =
            (const char*)y.base + y_row * (int64_t)(y.wide ? sizeof(float) : sizeof(E));
      }
    }
    for (int64_t tile = 0; tile < channels; tile += kTile) {
      const int64_t width = smaller(kTile, channels - tile), c0 = task.c0 + tile;
      const float* bias = p.bias0 + k0 * p.cp + c0;
      const float* A2 = p.A2 + k0 * p.n * p.cp + c0;
      if (p.rank) project(p, k0, c0, width, s.low, steps, s.dt, kTile);
      for (int64_t o = 0, k = k0; k < k1; o++, k++) {
        const int32_t* order = p.order + k * p.order_k;
        const float* D = p.D0 + k * p.cp + c0;
        for (int64_t i = 0; i < steps; i++) {
          const E* delta = at<E>(p.delta, p.sdelta, task.b, order[s0 + i], k) + c0;
          const E* u = at<E>(p.u, p.su, task.b, order[s0 + i], k) + c0;
          float *dtu = s.dtu + o * tile_order + i * kTile, *to = s.y + o * tile_order + i * kTile;
          for_row(width, [&](int64_t v, int64_t lanes, auto size) SCAN_FLAT {
            constexpr int U = decltype(size)::value;
            const Pack<U> x = load_pack<U>(u + v, lanes);
            Pack<U> dt = p.rank ? load_pack<U>(s.dt + i * kTile + v) : load_pack<U>(delta + v, lanes);
            if (o == 0) {
              dt = dt + load_pack<U>(bias + v);
              if (p.softplus) dt = softplus(dt);
              store_pack(s.dt + i * kTile + v, dt);
            }
            store_pack(dtu + v, dt * x);
            store_pack(to + v, load_pack<U>(D + v) * x);
          });
        }
      }
      for (int64_t v = 0; v < width; v += W) {
        auto states_from = [&](int64_t j, auto size) SCAN_FLAT {
          constexpr int G = decltype(size)::value;
          for (int64_t o = 0; o < k1 - k0; o++) {
            const Group group{A2 + j * p.cp + v, s.B + o * row_order + j, s.C + o * row_order + j,
                              s.dt + v, s.dtu + o * tile_order + v,
                              s.h + o * h_order + j * h_row + tile + v, s.y + o * tile_order + v, s.local,
                              s.ahead[j / kGroup % 4] + o * s.steps, (c0 + v) * (int64_t)sizeof(E), h_row, p.cp, p.n,
                              steps, p.window};
            if (G > kGroup || p.window > 1)
              advance_window<G>(group);
            else if (alone)
              advance<G, kComputed>(group);
            else if (o == 0)
              advance<G, kKept>(group);
            else
              advance<G, kShared>(group);
          }
        };
        int64_t j = 0;
        if (p.window > 1 && kGroupWindow > kGroup)
          for (; j + kGroupWindow <= p.n; j += kGroupWindow) states_from(j, Size<kGroupWindow>());
        for (; j + kGroup <= p.n; j += kGroup) states_from(j, Size<kGroup>());
        for (; j + 2 <= p.n; j += 2) states_from(j, Size<2>());
        for (; j < p.n; j++) states_from(j, Size<1>());
      }
      for (int64_t o = 0, k = k0; k < k1; o++, k++) {
        const int32_t* order = p.order + k * p.order_k;
        const uint8_t* visit = p.visit + k * p.t;
        for (int64_t i = 0; i < steps; i++) {
          const int64_t row = p.out == kPerStep ? s0 + i : order[s0 + i];
          const bool first = alone && (p.out == kPerStep || visit[s0 + i] & first_bit);
          const float* from = s.y + o * tile_order + i * kTile;
          for_row(width, [&](int64_t v, int64_t lanes, auto size) SCAN_FLAT {
            emit<E>(y, row, tile + v, load_pack<decltype(size)::value>(from + v), lanes, first);
          });
        }
      }
    }
  }
}

// n = 1: whole contiguous rows, the state row stays in L1.
template <class E, class O>
void forward_rows(const Problem& p, const Task& task, int64_t k, const Target& to, const ForwardScratch& s) {
  const int32_t* order = p.order + k * p.order_k;
  const uint8_t* visit = p.visit + k * p.t;
  const uint8_t first_bit = p.out == kSum ? kFirstOfAll : kFirstInOrder;
  const int64_t channels = task.c1 - task.c0, c0 = task.c0;
  const float *bias = p.bias0 + k * p.cp + c0, *D = p.D0 + k * p.cp + c0, *A2 = p.A2 + k * p.cp + c0;
  float* h = s.h;
  const int64_t dt_row = round_up(channels, kTile);
  memset(h, 0, round_up(channels, kTile) * sizeof(float));
  auto u_row = [&](int64_t step) { return at<E>(p.u, p.su, task.b, order[step], k) + c0; };
  auto delta_row = [&](int64_t step) { return at<E>(p.delta, p.sdelta, task.b, order[step], k) + c0; };
  auto y_row = [&](int64_t step) { return (O*)to.base + (p.out == kPerStep ? step : order[step]) * to.row; };
  auto B_of = [&](int64_t step) { return at<E>(p.B, p.sB, task.b, order[step], k); };
  auto C_of = [&](int64_t step) { return at<E>(p.C, p.sC, task.b, order[step], k); };
  for (int64_t step = 0; step < p.t; step++) {
    if (p.states && step && step % p.chunk == 0) save_states(p, task, k, step / p.chunk, h, 0);
    const int64_t ahead = smaller(step + kAhead, p.t - 1);
    __builtin_prefetch(B_of(ahead));
    __builtin_prefetch(C_of(ahead));
    if (p.rank) __builtin_prefetch(at<E>(p.delta, p.sdelta, task.b, order[smaller(step + kBlock, p.t - 1)], k));
    if (p.rank && step % kBlock == 0) {
      const int64_t steps = smaller(kBlock, p.t - step);
      gather<E>(p.delta, p.sdelta, task.b, k, order + step, steps, p.rank, s.low);
      project(p, k, c0, channels, s.low, steps, s.dt, dt_row);
    }
    const float* projected = s.dt + step % kBlock * dt_row;
    const E *u = u_row(step), *delta = delta_row(step), *next_u = u_row(ahead), *next_delta = delta_row(ahead);
    O *y = y_row(step), *next_y = y_row(ahead);
    const float B = to_float(*B_of(step)), C = to_float(*C_of(step));
    const bool first = p.out == kPerStep || visit[step] & first_bit;
    for_row(channels, [&](int64_t v, int64_t lanes, auto size) SCAN_FLAT {
      constexpr int U = decltype(size)::value;
      if (!p.rank) prefetch<U>(next_delta + v);
      prefetch<U>(next_u + v);
      prefetch<U>(next_y + v);
      const Pack<U> x = load_pack<U>(u + v, lanes);
      Pack<U> dt = p.rank ? load_pack<U>(projected + v) : load_pack<U>(delta + v, lanes);
      dt = dt + load_pack<U>(bias + v);
      if (p.softplus) dt = softplus(dt);
      const Pack<U> state = exp2(dt * load_pack<U>(A2 + v)) * load_pack<U>(h + v) + dt * x * B;
      store_pack(h + v, state);
      emit(y + v, load_pack<U>(D + v) * x + state * C, lanes, first);
    });
  }
}

// n = 1 with LBMamba's window: the windows of a few vectors of channels at a time go forth and back in L1.
template <class E, class O>
void forward_windows(const Problem& p, const Task& task, int64_t k, const Target& to, const ForwardScratch& s) {
  const int32_t* order = p.order + k * p.order_k;
  const uint8_t* visit = p.visit + k * p.t;
  const uint8_t first_bit = p.out == kSum ? kFirstOfAll : kFirstInOrder;
  const int64_t channels = task.c1 - task.c0, c0 = task.c0, dt_row = round_up(channels, kTile);
  const float *bias = p.bias0 + k * p.cp + c0, *D = p.D0 + k * p.cp + c0, *A2 = p.A2 + k * p.cp + c0;
  const int64_t block = block_steps(p.window, kBlock);
  const E **u = (const E**)s.ahead[0], **delta = (const E**)s.ahead[1];
  O** y = (O**)s.ahead[2];
  memset(s.h, 0, dt_row * sizeof(float));
  for (int64_t s0 = 0, steps; s0 < p.t; s0 += steps) {
    steps = smaller(block, smaller(p.t, (s0 / p.chunk + 1) * p.chunk) - s0);
    if (p.states && s0 && s0 % p.chunk == 0) save_states(p, task, k, s0 / p.chunk, s.h, 0);
    gather<E>(p.B, p.sB, task.b, k, order + s0, steps, 1, s.B);
    gather<E>(p.C, p.sC, task.b, k, order + s0, steps, 1, s.C);
    if (p.rank) {
      gather<E>(p.delta, p.sdelta, task.b, k, order + s0, steps, p.rank, s.low);
      project(p, k, c0, channels, s.low, steps, s.dt, dt_row);
    }
    for (int64_t i = 0; i < steps + p.window; i++) {  // and of the window after this block, to prefetch
      const int64_t step = smaller(s0 + i, p.t - 1), token = order[step];
      u[i] = at<E>(p.u, p.su, task.b, token, k) + c0;
      delta[i] = p.rank ? u[i] : at<E>(p.delta, p.sdelta, task.b, token, k) + c0;
      y[i] = (O*)to.base + (p.out == kPerStep ? step : token) * to.row;
    }
    for (int64_t begin = 0, end; begin < steps; begin = end) {
      end = smaller(begin + p.window, steps);
      for_row(channels, [&](int64_t v, int64_t lanes, auto size) SCAN_FLAT {
        constexpr int U = decltype(size)::value;
        constexpr int64_t kPart = U * W;
        // The next channels of this window are prefetched, after the last ones the first ones of the next window.
        const bool last = v + kPart >= channels;
        const int64_t ahead = last ? p.window : 0, next = last ? 0 : v + kPart;
        Pack<U> e(0.0f);
        float* local = s.local;
        for (int64_t i = begin; i < end; i++, local += 3 * kPart) {
          prefetch<U>(delta[i + ahead] + next);
          prefetch<U>(u[i + ahead] + next);
          prefetch<U>(y[i + ahead] + next);
          const Pack<U> x = load_pack<U>(u[i] + v, lanes);
          Pack<U> dt = p.rank ? load_pack<U>(s.dt + i * dt_row + v) : load_pack<U>(delta[i] + v, lanes);
          dt = dt + load_pack<U>(bias + v);
          if (p.softplus) dt = softplus(dt);
          const Pack<U> a = exp2(dt * load_pack<U>(A2 + v)), b = dt * x * s.B[i];
          const Pack<U> h = a * load_pack<U>(s.h + v) + b;
          store_pack(s.h + v, h);
          store_pack(local, a);
          store_pack(local + kPart, b);
          store_pack(local + 2 * kPart, load_pack<U>(D + v) * x + h * s.C[i]);
        }
        for (int64_t i = end - 1; i >= begin; i--) {
          local -= 3 * kPart;
          const Pack<U> r = load_pack<U>(local) * e, out = load_pack<U>(local + 2 * kPart) + r * s.C[i];
          e = r + load_pack<U>(local + kPart);
          emit(y[i] + v, out, lanes, p.out == kPerStep || visit[s0 + i] & first_bit);
        }
      });
    }
  }
}

}  // namespace
}  // namespace scan
