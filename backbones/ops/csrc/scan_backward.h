// Backward: per chunk of steps, recompute the states from the saved one, then sweep back through the chunk.
// With a = exp(dt A), b = dt B u and g = dL/dy, <., .> a sum over states:
//   dh_t = g_t C_t + a_{t+1} dh_{t+1};   dC = sum_c g h;   dB = sum_c dh dt u;   du = dt <dh, B> + g D;
//   d(dt) = u <dh, B> + <A, dh a h_{t-1}>;   dA = sum_t dt dh a h_{t-1}.
// Any n works on strips of channels with groups of states in registers; scan_backward_rows.h has the form for n = 1.
#pragma once

#include "rows.h"

namespace scan {
namespace {

constexpr int kGroupBack = W == 8 ? 2 : 4;  // states in registers at a time; AVX2 has 16 registers only
constexpr int kVecs = 2;                    // vectors of channels side by side: halves the traffic of the dB, dC sums
constexpr int64_t kStrip = kVecs * W;       // channels
constexpr int64_t kRowSkew = 16;            // keeps the rows of a chunk apart modulo 4096 bytes
using Strip = Pack<kVecs>;

// Whether a gradient's visits add up in a float32 image before they are rounded to bfloat16.
bool wide_du(const Problem& p) { return p.bf16 && !(p.u_shared ? p.first_of_all : p.first_in_order); }
bool wide_ddelta(const Problem& p) { return p.bf16 && !p.rank && !p.first_in_order; }

struct BackwardScratch {
  float *wide_u, *wide_delta, *dh, *B, *C, *low, *dt, *slope, *h;
  float *dtu, *g, *dhB, *dhA, *A2, *decay, *sumB, *sumC, *local, *dF;  // strips only
  // Rows to prefetch: u, delta and grad of this chunk and of the next one to come, du and ddelta of this chunk. The passes
  // over states leave the memory idle otherwise, and those before and after them wait for it.
  const char** ahead[8];
  int64_t row, size;  // row: floats from step to step in dt and slope (and h when n = 1)
  BackwardScratch(const Problem& p, int64_t channels, float* base) {
    Arena a{base};
    const bool strips = p.n > 1 || p.window > 1;
    const int64_t steps = smaller(p.chunk, round_up(p.t, kPad)), group = strips ? kGroupBack * kStrip : 0;
    const int64_t window = p.window > 1 ? smaller(p.window, steps) * group : 0;
    row = strips ? kStrip : round_up(channels, kPad) + kRowSkew;
    wide_u = a.take(wide_du(p) ? p.l * channels : 0);
    wide_delta = a.take(wide_ddelta(p) ? p.l * channels : 0);
    dh = a.take(p.n * round_up(channels, kPad));
    B = a.take(steps * p.n);
    C = a.take(steps * p.n);
    low = a.take(steps * p.rank);
    dt = a.take(steps * row);
    slope = a.take(steps * row);
    h = a.take((steps + 1) * (strips ? group : row));
    dtu = a.take(strips ? steps * row : 0);
    g = a.take(strips ? steps * row : 0);
    dhB = a.take(strips ? steps * row : 0);
    dhA = a.take(strips ? steps * row : 0);
    A2 = a.take(group);
    decay = a.take(steps * group);
    sumB = a.take(strips ? steps * p.n * W : 0);
    sumC = a.take(strips ? steps * p.n * W : 0);
    local = a.take(window);
    dF = a.take(window);
    for (auto& rows : ahead) rows = (const char**)a.take(strips ? 2 * steps : 0);
    size = a.used;
  }
};

struct Gradients {
  Target u, delta;
  uint8_t u_bit;  // the kind of visit that stores du instead of adding to it
};

// A chunk of one order's steps, and all that its gradients need.
struct Chunk {
  const Problem& p;
  const Task& task;
  const BackwardScratch& s;
  const Gradients& out;
  int64_t k, index, s0, steps;

  int64_t channels() const { return task.c1 - task.c0; }
  int64_t token(int64_t i) const { return p.order[k * p.order_k + s0 + i]; }
  bool first(int64_t i, uint8_t bit) const { return p.visit[k * p.t + s0 + i] & bit; }
  int64_t parameters() const { return k * p.cp + task.c0; }                    // into A2 (n = 1), D0, bias0
  int64_t partial() const { return (task.b * p.k + k) * p.cp + task.c0; }      // into dD_part, dbias_part
  int64_t states() const { return k * p.n * p.cp + task.c0; }                  // into A2
  int64_t partial_states() const { return (task.b * p.k + k) * p.n * p.cp + task.c0; }  // into dA_part
  const float* saved() const {  // the state before the first step; null: zero
    return index ? p.states + ((task.b * p.k + k) * (p.chunks - 1) + index - 1) * p.n * p.c + task.c0 : nullptr;
  }
  template <class E>
  const E* u(int64_t i) const { return at<E>(p.u, p.su, task.b, token(i), k) + task.c0; }
  template <class E>
  const E* delta(int64_t i) const { return at<E>(p.delta, p.sdelta, task.b, token(i), k) + task.c0; }
  template <class E>
  const E* grad(int64_t i) const {
    return at<E>(p.grad, p.sgrad, task.b, p.out == kPerStep ? s0 + i : token(i), k) + task.c0;
  }

  // dB and dC of one step and state, summed over a slice of channels.
  void add_partial(int64_t slice, int64_t i, int64_t j, float dB, float dC) const {
    const int64_t at = (((slice * p.b + task.b) * p.l + token(i)) * p.k + k) * p.n + j;
    const bool stores = first(i, kFirstInOrder);
    p.dB_part[at] = stores ? dB : p.dB_part[at] + dB;
    p.dC_part[at] = stores ? dC : p.dC_part[at] + dC;
  }
};

// A strip of channels and G states of it. Rows of steps have stride kStrip, n, n * W or G * kStrip.
struct Sweep {
  const float *A2, *B, *C, *dt, *dtu, *g;
  float *dh, *dA, *dhB, *dhA, *sumB, *sumC, *h, *decay, *local, *dF;
  int64_t dh_row, dA_row, n, steps, window;
  const char *const *reads, *const *writes;  // an address per step to prefetch, at these offsets
  int64_t reads_offset, writes_offset;
};

SCAN_INLINE void prefetch_strip(const char* p) {
  __builtin_prefetch(p);
  if (kStrip * sizeof(float) > 64) __builtin_prefetch(p + 64);
}

// body(g, v, offset in a row of G * kStrip) for every state and vector
template <int G, class F>
SCAN_INLINE void for_group(const F& body) {
  unrolled<G>([&](auto g) SCAN_FLAT { unrolled<kVecs>([&](auto v) SCAN_FLAT { body(g, v, g * kStrip + v * W); }); });
}

template <int G>
__attribute__((noinline)) void recompute(const Sweep& sweep) {
  const Sweep s = sweep;  // a copy that no store can alias: its fields stay in registers
  vf h[G][kVecs];
  for_group<G>([&](auto g, auto v, int64_t at) SCAN_FLAT { h[g][v] = load(s.h + at); });
  for (int64_t i = 0; i < s.steps; i++) {
    prefetch_strip(s.reads[i] + s.reads_offset);
    unrolled<kVecs>([&](auto v) SCAN_FLAT {
      const vf dt = load(s.dt + i * kStrip + v * W), dtu = load(s.dtu + i * kStrip + v * W);
      unrolled<G>([&](auto g) SCAN_FLAT {
        const vf a = exp2(dt * load(s.A2 + g * kStrip + v * W));
        h[g][v] = a * h[g][v] + dtu * s.B[i * s.n + g];
        store(s.decay + (i * G + g) * kStrip + v * W, a);
        store(s.h + ((i + 1) * G + g) * kStrip + v * W, h[g][v]);
      });
    });
  }
}

SCAN_INLINE void add_to(float* p, vf x) { store(p, load(p) + x); }

template <int G>
__attribute__((noinline)) void sweep_back(const Sweep& sweep) {
  const Sweep s = sweep;
  vf dh[G][kVecs], dA[G][kVecs];
  for_group<G>([&](auto g, auto v, int64_t) SCAN_FLAT {
    dh[g][v] = load(s.dh + g * s.dh_row + v * W);
    dA[g][v] = load(s.dA + g * s.dA_row + v * W);
  });
  for (int64_t i = s.steps - 1; i >= 0; i--) {
    const float *h = s.h + i * G * kStrip, *decay = s.decay + i * G * kStrip;
    prefetch_strip(s.writes[i] + s.writes_offset);
    vf grad[kVecs], dt[kVecs], dtu[kVecs], dhB[kVecs], dhA[kVecs];
    unrolled<kVecs>([&](auto v) SCAN_FLAT {
      grad[v] = load(s.g + i * kStrip + v * W);
      dt[v] = load(s.dt + i * kStrip + v * W);
      dtu[v] = load(s.dtu + i * kStrip + v * W);
      dhB[v] = load(s.dhB + i * kStrip + v * W);
      dhA[v] = load(s.dhA + i * kStrip + v * W);
    });
    unrolled<G>([&](auto g) SCAN_FLAT {
      const float B = s.B[i * s.n + g], C = s.C[i * s.n + g];
      vf dB = {}, dC = {};
      unrolled<kVecs>([&](auto v) SCAN_FLAT {
        const int64_t at = g * kStrip + v * W;
        const vf total = dh[g][v] + grad[v] * C;
        dC += grad[v] * load(h + G * kStrip + at);
        dB += total * dtu[v];
        dhB[v] += total * B;
        dh[g][v] = total * load(decay + at);
        const vf dhh = dh[g][v] * load(h + at);
        dhA[v] += dhh * load(s.A2 + at);
        dA[g][v] += dhh * dt[v];
      });
      add_to(s.sumB + (i * s.n + g) * W, dB);
      add_to(s.sumC + (i * s.n + g) * W, dC);
    });
    unrolled<kVecs>([&](auto v) SCAN_FLAT {
      store(s.dhB + i * kStrip + v * W, dhB[v]);
      store(s.dhA + i * kStrip + v * W, dhA[v]);
    });
  }
  for_group<G>([&](auto g, auto v, int64_t) SCAN_FLAT {
    store(s.dh + g * s.dh_row + v * W, dh[g][v]);
    store(s.dA + g * s.dA_row + v * W, dA[g][v]);
  });
}

// With LBMamba's window the state is h = hF + r, r_t = a_t hR_{t+1}. From the right: r and dF_t = g C + a_{t+1} dF_{t+1};
// then, inside each window, from the left: dR_t = g C + a_{t-1} dR_{t-1}. Gradients see dF + dR - g C in dh's place,
// and dF a hF_{t-1} + dR r in that of dh a h_{t-1}.
template <int G>
__attribute__((noinline)) void sweep_back_window(const Sweep& sweep) {
  const Sweep s = sweep;
  constexpr int64_t kRow = G * kStrip;
  for_group<G>([&](auto g, auto v, int64_t at) {
    const float *h = s.h + at, *decay = s.decay + at;
    float *local = s.local + at, *dF = s.dF + at;
    const vf A2 = load(s.A2 + at);
    vf carryF = load(s.dh + g * s.dh_row + v * W), dA = load(s.dA + g * s.dA_row + v * W);
    for (int64_t end = s.steps, begin; end > 0; end = begin) {
      begin = (end - 1) / s.window * s.window;
      vf e = {}, carryR = {};
      for (int64_t i = end - 1; i >= begin; i--) {
        const vf a = load(decay + i * kRow), r = a * e;
        const vf total = carryF + load(s.g + i * kStrip + v * W) * s.C[i * s.n + g];
        store(dF + (i - begin) * kRow, total);
        store(local + (i - begin) * kRow, r);
        e = r + load(s.dtu + i * kStrip + v * W) * s.B[i * s.n + g];
        carryF = total * a;
      }
      for (int64_t i = begin; i < end; i++) {
        const int64_t step = i * kStrip + v * W;
        const vf a = load(decay + i * kRow), r = load(local + (i - begin) * kRow), grad = load(s.g + step);
        const vf forward = load(dF + (i - begin) * kRow), total = forward + carryR;
        const vf dR = carryR + grad * s.C[i * s.n + g];
        const vf dhh = forward * a * load(h + i * kRow) + dR * r;
        add_to(s.sumC + (i * s.n + g) * W, grad * (load(h + (i + 1) * kRow) + r));
        add_to(s.sumB + (i * s.n + g) * W, total * load(s.dtu + step));
        add_to(s.dhB + step, total * s.B[i * s.n + g]);
        add_to(s.dhA + step, dhh * A2);
        dA += dhh * load(s.dt + step);
        carryR = a * dR;
      }
    }
    store(s.dh + g * s.dh_row + v * W, carryF);
    store(s.dA + g * s.dA_row + v * W, dA);
  });
}

// G states, from state j on, of the strip that starts `strip` channels into the task.
template <class E, int G>
void strip_states(const Chunk& chunk, int64_t strip, int64_t j) {
  const Problem& p = chunk.p;
  const BackwardScratch& s = chunk.s;
  const int64_t lanes = chunk.channels() - strip, dh_row = round_up(chunk.channels(), kPad), at = j * p.cp + strip;
  const float *A2 = p.A2 + chunk.states() + at, *saved = chunk.saved();
  for (int64_t g = 0; g < G; g++) {
    store_pack(s.A2 + g * kStrip, load_pack<kVecs>(A2 + g * p.cp));
    store_pack(s.h + g * kStrip, saved ? load_pack<kVecs>(saved + (j + g) * p.c + strip, lanes) : Strip(0.0f));
  }
  const int64_t group = j / kGroupBack, next = strip + kStrip;
  const Target& written = group % 2 ? chunk.out.delta : chunk.out.u;
  const bool more = next < chunk.channels();
  const Sweep sweep{s.A2, s.B + j, s.C + j, s.dt, s.dtu, s.g, s.dh + j * dh_row + strip,
                    p.dA_part + chunk.partial_states() + at, s.dhB, s.dhA, s.sumB + j * W, s.sumC + j * W, s.h, s.decay,
                    s.local, s.dF, dh_row, p.cp, p.n, chunk.steps, p.window,
                    s.ahead[group % 3 + (more ? 0 : 3)], s.ahead[6 + group % 2],
                    (more ? next : 0) * (int64_t)sizeof(E), strip * (int64_t)(written.wide ? sizeof(float) : sizeof(E))};
  recompute<G>(sweep);
  p.window > 1 ? sweep_back_window<G>(sweep) : sweep_back<G>(sweep);
}

template <class E>
void backward_strip(const Chunk& chunk, int64_t strip) {
  const Problem& p = chunk.p;
  const BackwardScratch& s = chunk.s;
  const int64_t parameters = chunk.parameters() + strip, partial = chunk.partial() + strip;
  const int64_t lanes = chunk.channels() - strip;
  const Strip bias = load_pack<kVecs>(p.bias0 + parameters), D = load_pack<kVecs>(p.D0 + parameters);
  Strip dD = load_pack<kVecs>(p.dD_part + partial), dbias = load_pack<kVecs>(p.dbias_part + partial);
  if (p.rank) project(p, chunk.k, chunk.task.c0 + strip, kStrip, s.low, chunk.steps, s.dt, kStrip);  // all lanes count
  for (int64_t i = 0; i < chunk.steps; i++) {
    const Strip u = load_pack<kVecs>(chunk.u<E>(i) + strip, lanes);
    const Strip grad = load_pack<kVecs>(chunk.grad<E>(i) + strip, lanes);
    Strip dt = p.rank ? load_pack<kVecs>(s.dt + i * kStrip) : load_pack<kVecs>(chunk.delta<E>(i) + strip, lanes);
    Strip slope(1.0f);
    dt = dt + bias;
    if (p.softplus) dt = softplus_and_slope(dt, &slope);
    dD = dD + grad * u;
    const int64_t at = i * kStrip;
    store_pack(s.dt + at, dt);
    store_pack(s.dtu + at, dt * u);
    store_pack(s.g + at, grad);
    store_pack(s.slope + at, slope);
    store_pack(s.dhB + at, Strip(0.0f));
    store_pack(s.dhA + at, Strip(0.0f));
  }
  int64_t j = 0;
  for (; j + kGroupBack <= p.n; j += kGroupBack) strip_states<E, kGroupBack>(chunk, strip, j);
  for (; j + 2 <= p.n; j += 2) strip_states<E, 2>(chunk, strip, j);
  for (; j < p.n; j++) strip_states<E, 1>(chunk, strip, j);
  for (int64_t i = chunk.steps - 1; i >= 0; i--) {  // in the order of the sweep: the last visit is met first
    const int64_t at = i * kStrip;
    const Strip u = load_pack<kVecs>(chunk.u<E>(i) + strip, lanes), dhB = load_pack<kVecs>(s.dhB + at);
    const Strip ddt = u * dhB + kLn2 * load_pack<kVecs>(s.dhA + at), ddelta = ddt * load_pack<kVecs>(s.slope + at);
    const Strip du = load_pack<kVecs>(s.dt + at) * dhB + load_pack<kVecs>(s.g + at) * D;
    dbias = dbias + ddelta;
    emit<E>(chunk.out.delta, chunk.token(i), strip, ddelta, lanes, chunk.first(i, kFirstInOrder));
    emit<E>(chunk.out.u, chunk.token(i), strip, du, lanes, chunk.first(i, chunk.out.u_bit));
  }
  store_pack(p.dD_part + partial, dD);
  store_pack(p.dbias_part + partial, dbias);
}

template <class E>
void fill_ahead(const Chunk& chunk, int64_t i, const char** const* ahead) {
  ahead[0][i] = (const char*)chunk.u<E>(i);
  ahead[1][i] = chunk.p.rank ? ahead[0][i] : (const char*)chunk.delta<E>(i);
  ahead[2][i] = (const char*)chunk.grad<E>(i);
}

template <class E>
void backward_strips(const Chunk& chunk) {
  const Problem& p = chunk.p;
  const BackwardScratch& s = chunk.s;
  const int64_t index = chunk.index ? chunk.index - 1 : 0;
  const Chunk next{p, chunk.task, s, chunk.out, chunk.k, index, index * p.chunk, p.chunk};
  for (int64_t i = 0; i < chunk.steps; i++) {
    fill_ahead<E>(chunk, i, s.ahead);
    fill_ahead<E>(next, i, s.ahead + 3);
    const auto row = [&](const Target& to) {
      return (const char*)to.base + chunk.token(i) * to.row * (int64_t)(to.wide ? sizeof(float) : sizeof(E));
    };
    s.ahead[6][i] = row(chunk.out.u);
    s.ahead[7][i] = row(chunk.out.delta);
  }
  for (int64_t c0 = 0; c0 < chunk.channels(); c0 += p.slice) {
    memset(s.sumB, 0, chunk.steps * p.n * W * sizeof(float));
    memset(s.sumC, 0, chunk.steps * p.n * W * sizeof(float));
    const int64_t c1 = smaller(c0 + p.slice, chunk.channels());
    for (int64_t strip = c0; strip < c1; strip += kStrip) backward_strip<E>(chunk, strip);
    for (int64_t i = chunk.steps - 1; i >= 0; i--)
      for (int64_t j = 0; j < p.n; j++)
        chunk.add_partial((chunk.task.c0 + c0) / p.slice, i, j, sum(load(s.sumB + (i * p.n + j) * W)),
                          sum(load(s.sumC + (i * p.n + j) * W)));
  }
}

}  // namespace
}  // namespace scan
