// Backward: per chunk of steps, recompute states from the saved one, then sweep back through the chunk.
// With a = exp(dt A), b = dt B u, g = dL/dy:  dh_t = g_t C_t + a_{t+1} dh_{t+1};  dC = g h;  dB = dh dt u;  du = dt <dh, B> + g D;
// d(dt) = u <dh, B> + <A, dh a h_{t-1}>;  dA = sum_t dt dh a h_{t-1}.
#pragma once

#include "rows.h"

namespace scan {
namespace {

#if SCAN_WIDTH == 8
constexpr int kGroupBack = 2;  // 16 registers
#else
constexpr int kGroupBack = 4;
#endif
constexpr int kVecs = 2;                 // vectors of channels side by side: halves the traffic of the dB and dC sums
constexpr int64_t kStrip = kVecs * W;    // channels

struct BackwardScratch {
  float *wide_u, *wide_delta, *dh, *B, *C, *sumB, *sumC, *dt, *dtu, *g, *slope, *dhB, *dhA, *h, *decay, *local, *dF;
  int64_t size;
  BackwardScratch(const Problem& p, int64_t channels, float* base) {
    Arena a{base};
    const bool rows = p.n == 1 && p.window <= 1;
    const int64_t steps = smaller(p.chunk, round_up(p.t, kPad)), width = rows ? round_up(channels, kPad) : kStrip;
    const int64_t states = rows ? width : kGroupBack * kStrip, window = p.window > 1 ? smaller(p.window, steps) * kGroupBack * kStrip : 0;
    wide_u = a.take(p.bf16 && !(p.u_shared ? p.first_of_all : p.first_in_order) ? p.l * channels : 0);
    wide_delta = a.take(p.bf16 && !p.first_in_order ? p.l * channels : 0);
    dh = a.take(p.n * round_up(channels, kPad));
    B = a.take(steps * p.n);
    C = a.take(steps * p.n);
    sumB = a.take(steps * p.n * W);
    sumC = a.take(steps * p.n * W);
    dt = a.take(steps * width);
    dtu = a.take(rows ? 0 : steps * width);
    g = a.take(rows ? 0 : steps * width);
    slope = a.take(steps * width);
    dhB = a.take(rows ? 0 : steps * width);
    dhA = a.take(rows ? 0 : steps * width);
    h = a.take((steps + 1) * states);
    decay = a.take(rows ? 0 : steps * states);
    local = a.take(window);
    dF = a.take(window);
    size = a.used;
  }
};

// Where a chunk of one order starts and what belongs to it.
struct Chunk {
  int64_t k, index, s0, steps;
  const int32_t* tokens;
  const uint8_t* visit;
};

// A strip of channels and G states of it, as the sweeps see them. Rows of steps have stride kStrip, n or G * kStrip.
struct Sweep {
  const float *A2, *B, *C, *dt, *dtu, *g;
  float *dh, *dA, *dhB, *dhA, *sumB, *sumC, *h, *decay, *local, *dF;
  int64_t dh_row, cp, n, steps, window;
};

template <int G>
void recompute(const Sweep& s) {
  vf h[G][kVecs];
  for (int g = 0; g < G; g++)
    for (int v = 0; v < kVecs; v++) h[g][v] = load(s.h + g * kStrip + v * W);
  for (int64_t i = 0; i < s.steps; i++)
    for (int v = 0; v < kVecs; v++) {
      vf d = load(s.dt + i * kStrip + v * W), x = load(s.dtu + i * kStrip + v * W);
      for (int g = 0; g < G; g++) {
        vf a = exp2(d * load(s.A2 + g * s.cp + v * W));
        h[g][v] = a * h[g][v] + x * s.B[i * s.n + g];
        store(s.decay + (i * G + g) * kStrip + v * W, a);
        store(s.h + ((i + 1) * G + g) * kStrip + v * W, h[g][v]);
      }
    }
}

SCAN_INLINE void add_to(float* p, vf x) { store(p, load(p) + x); }

template <int G>
void sweep_back(const Sweep& s) {
  vf dh[G][kVecs], dA[G][kVecs];
  for (int g = 0; g < G; g++)
    for (int v = 0; v < kVecs; v++) dh[g][v] = load(s.dh + g * s.dh_row + v * W), dA[g][v] = load(s.dA + g * s.cp + v * W);
  for (int64_t i = s.steps - 1; i >= 0; i--) {
    vf dhB[kVecs], dhA[kVecs];
    for (int v = 0; v < kVecs; v++) dhB[v] = load(s.dhB + i * kStrip + v * W), dhA[v] = load(s.dhA + i * kStrip + v * W);
    for (int g = 0; g < G; g++) {
      vf dB = {}, dC = {};
      const float B = s.B[i * s.n + g], C = s.C[i * s.n + g];
      for (int v = 0; v < kVecs; v++) {
        vf grad = load(s.g + i * kStrip + v * W);
        vf total = dh[g][v] + grad * C;
        dC += grad * load(s.h + ((i + 1) * G + g) * kStrip + v * W);
        dB += total * load(s.dtu + i * kStrip + v * W);
        dhB[v] += total * B;
        dh[g][v] = total * load(s.decay + (i * G + g) * kStrip + v * W);
        vf q = dh[g][v] * load(s.h + (i * G + g) * kStrip + v * W);
        dhA[v] += q * load(s.A2 + g * s.cp + v * W);
        dA[g][v] += q * load(s.dt + i * kStrip + v * W);
      }
      add_to(s.sumB + (i * s.n + g) * W, dB);
      add_to(s.sumC + (i * s.n + g) * W, dC);
    }
    for (int v = 0; v < kVecs; v++) store(s.dhB + i * kStrip + v * W, dhB[v]), store(s.dhA + i * kStrip + v * W, dhA[v]);
  }
  for (int g = 0; g < G; g++)
    for (int v = 0; v < kVecs; v++) store(s.dh + g * s.dh_row + v * W, dh[g][v]), store(s.dA + g * s.cp + v * W, dA[g][v]);
}

// With LBMamba's window: h = hF + r, r_t = a_t hR_{t+1}. Right to left r and dF, then left to right dR_t = g C + a_{t-1} dR_{t-1};
// every gradient sees dF + dR - g C, and the decay's sees dF a hF_{t-1} + dR r.
template <int G>
void sweep_back_window(const Sweep& s) {
  for (int g = 0; g < G; g++)
    for (int v = 0; v < kVecs; v++) {
      float *h = s.h + g * kStrip + v * W, *decay = s.decay + g * kStrip + v * W;
      float *local = s.local + g * kStrip + v * W, *dF = s.dF + g * kStrip + v * W;
      vf A2 = load(s.A2 + g * s.cp + v * W), carry = load(s.dh + g * s.dh_row + v * W), dA = load(s.dA + g * s.cp + v * W);
      for (int64_t begin = (s.steps - 1) / s.window * s.window, end = s.steps; begin >= 0; end = begin, begin -= s.window) {
        vf e = {};
        for (int64_t i = end - 1; i >= begin; i--) {
          vf a = load(decay + i * G * kStrip), total = carry + load(s.g + i * kStrip + v * W) * s.C[i * s.n + g], r = a * e;
          store(dF + (i - begin) * G * kStrip, total);
          store(local + (i - begin) * G * kStrip, r);
          e = r + load(s.dtu + i * kStrip + v * W) * s.B[i * s.n + g];
          carry = total * a;
        }
        vf carryR = {};
        for (int64_t i = begin; i < end; i++) {
          const int64_t at = i * kStrip + v * W;
          vf grad = load(s.g + at), r = load(local + (i - begin) * G * kStrip), forward = load(dF + (i - begin) * G * kStrip);
          vf a = load(decay + i * G * kStrip), dR = carryR + grad * s.C[i * s.n + g], total = forward + carryR;
          vf q = forward * a * load(h + i * G * kStrip) + dR * r;
          add_to(s.sumC + (i * s.n + g) * W, grad * (load(h + (i + 1) * G * kStrip) + r));
          add_to(s.sumB + (i * s.n + g) * W, total * load(s.dtu + at));
          add_to(s.dhB + at, total * s.B[i * s.n + g]);
          add_to(s.dhA + at, q * A2);
          dA += q * load(s.dt + at);
          carryR = a * dR;
        }
      }
      store(s.dh + g * s.dh_row + v * W, carry);
      store(s.dA + g * s.cp + v * W, dA);
    }
}

const float* saved_state(const Problem& p, const Task& task, const Chunk& chunk) {
  return chunk.index ? p.states + ((task.b * p.k + chunk.k) * (p.chunks - 1) + chunk.index - 1) * p.n * p.c + task.c0 : nullptr;
}

// G states of a strip that starts at channel `strip` of the task.
template <int G>
void strip_states(const Problem& p, const Task& task, const Chunk& chunk, const BackwardScratch& s, int64_t strip, int64_t j) {
  const int64_t channels = task.c1 - task.c0, dh_row = round_up(channels, kPad);
  const float* saved = saved_state(p, task, chunk);
  for (int g = 0; g < G; g++)
    for (int64_t v = 0; v < kStrip; v += W)
      store(s.h + g * kStrip + v, saved ? load(saved + (j + g) * p.c + strip + v, channels - strip - v) : vf{});
  const int64_t parameters = (j * p.cp) + task.c0 + strip;
  Sweep sweep{p.A2 + chunk.k * p.n * p.cp + parameters, s.B + j, s.C + j, s.dt, s.dtu, s.g, s.dh + j * dh_row + strip,
              p.dA_part + (task.b * p.k + chunk.k) * p.n * p.cp + parameters, s.dhB, s.dhA, s.sumB + j * W, s.sumC + j * W, s.h,
              s.decay, s.local, s.dF, dh_row, p.cp, p.n, chunk.steps, p.window};
  recompute<G>(sweep);
  if (p.window > 1)
    sweep_back_window<G>(sweep);
  else
    sweep_back<G>(sweep);
}

struct Gradients {
  Target u, delta;
  uint8_t u_bit;
};

template <class E>
struct Inputs {  // rows of one step, at the task's first channel
  const E *u, *delta, *grad;
  Inputs(const Problem& p, const Task& task, const Chunk& chunk, int64_t i)
      : u(at<E>(p.u, p.su, task.b, chunk.tokens[i], chunk.k) + task.c0),
        delta(at<E>(p.delta, p.sdelta, task.b, chunk.tokens[i], chunk.k) + task.c0),
        grad(at<E>(p.grad, p.sgrad, task.b, p.out == kPerStep ? chunk.s0 + i : chunk.tokens[i], chunk.k) + task.c0) {}
};

template <class E>
void backward_strip(const Problem& p, const Task& task, const Chunk& chunk, const BackwardScratch& s, const Gradients& out, int64_t strip) {
  const int64_t channels = task.c1 - task.c0, parameters = chunk.k * p.cp + task.c0 + strip;
  const int64_t part = (task.b * p.k + chunk.k) * p.cp + task.c0 + strip;
  for (int64_t v = 0; v < kStrip; v += W) {
    const int64_t lanes = channels - strip - v;
    vf bias = load(p.bias0 + parameters + v), dD = load(p.dD_part + part + v);
    for (int64_t i = 0; i < chunk.steps; i++) {
      const Inputs<E> in(p, task, chunk, i);
      vf x = {}, d = bias, grad = {}, slope = splat(1.0f);
      if (lanes > 0) x = load(in.u + strip + v, lanes), d += load(in.delta + strip + v, lanes), grad = load(in.grad + strip + v, lanes);
      if (p.softplus) d = softplus_and_slope(d, &slope);
      dD += grad * x;
      const int64_t at = i * kStrip + v;
      store(s.dt + at, d);
      store(s.dtu + at, d * x);
      store(s.g + at, grad);
      store(s.slope + at, slope);
      store(s.dhB + at, vf{});
      store(s.dhA + at, vf{});
    }
    store(p.dD_part + part + v, dD);
  }
  int64_t j = 0;
  for (; j + kGroupBack <= p.n; j += kGroupBack) strip_states<kGroupBack>(p, task, chunk, s, strip, j);
  for (; j + 2 <= p.n; j += 2) strip_states<2>(p, task, chunk, s, strip, j);
  for (; j < p.n; j++) strip_states<1>(p, task, chunk, s, strip, j);
  for (int64_t v = 0; v < kStrip && v < channels - strip; v += W) {
    const int64_t lanes = channels - strip - v;
    vf D = load(p.D0 + parameters + v), dbias = load(p.dbias_part + part + v);
    for (int64_t i = chunk.steps - 1; i >= 0; i--) {
      const int64_t at = i * kStrip + v;
      vf x = load(Inputs<E>(p, task, chunk, i).u + strip + v, lanes), dhB = load(s.dhB + at);
      vf ddelta = (x * dhB + kLn2 * load(s.dhA + at)) * load(s.slope + at);
      dbias += ddelta;
      emit<E>(out.delta, chunk.tokens[i], strip + v, ddelta, lanes, chunk.visit[i] & kFirstInOrder);
      emit<E>(out.u, chunk.tokens[i], strip + v, load(s.dt + at) * dhB + load(s.g + at) * D, lanes, chunk.visit[i] & out.u_bit);
    }
    store(p.dbias_part + part + v, dbias);
  }
}

// The lane sums of a slice of channels, per step and state, into that slice's partial dB and dC.
void reduce_slice(const Problem& p, const Task& task, const Chunk& chunk, const BackwardScratch& s, int64_t slice) {
  for (int64_t i = chunk.steps - 1; i >= 0; i--) {
    const int64_t row = (((slice * p.b + task.b) * p.l + chunk.tokens[i]) * p.k + chunk.k) * p.n;
    const bool first = chunk.visit[i] & kFirstInOrder;
    for (int64_t j = 0; j < p.n; j++) {
      float dB = sum(load(s.sumB + (i * p.n + j) * W)), dC = sum(load(s.sumC + (i * p.n + j) * W));
      p.dB_part[row + j] = first ? dB : p.dB_part[row + j] + dB;
      p.dC_part[row + j] = first ? dC : p.dC_part[row + j] + dC;
    }
  }
}

template <class E>
void backward_chunk(const Problem& p, const Task& task, const Chunk& chunk, const BackwardScratch& s, const Gradients& out) {
  for (int64_t c0 = task.c0; c0 < task.c1; c0 += p.slice) {
    memset(s.sumB, 0, chunk.steps * p.n * W * sizeof(float));
    memset(s.sumC, 0, chunk.steps * p.n * W * sizeof(float));
    for (int64_t ch = c0; ch < smaller(c0 + p.slice, task.c1); ch += kStrip) backward_strip<E>(p, task, chunk, s, out, ch - task.c0);
    reduce_slice(p, task, chunk, s, c0 / p.slice);
  }
}

// n = 1, whole rows: states, steps and slopes of the chunk in L2, everything else streams.
template <class E, bool kSoftplus>
void backward_chunk_rows(const Problem& p, const Task& task, const Chunk& chunk, const BackwardScratch& s, const Gradients& out) {
  const int64_t channels = task.c1 - task.c0, row = round_up(channels, kPad);
  const int64_t parameters = chunk.k * p.cp + task.c0, part = (task.b * p.k + chunk.k) * p.cp + task.c0;
  const float *A2 = p.A2 + parameters, *D = p.D0 + parameters, *bias = p.bias0 + parameters;
  float *dA = p.dA_part + part, *dD = p.dD_part + part, *dbias = p.dbias_part + part;
  const float* saved = saved_state(p, task, chunk);
  for (int64_t v = 0; v < channels; v += W) store(s.h + v, saved ? load(saved + v, channels - v) : vf{});
  for (int64_t i = 0; i < chunk.steps; i++) {
    const Inputs<E> in(p, task, chunk, i);
    const float B = s.B[i];
    float *h = s.h + i * row, *dt = s.dt + i * row, *slopes = s.slope + i * row;
    for (int64_t v = 0; v < channels; v += W) {
      vf x = load(in.u + v, channels - v), d = load(in.delta + v, channels - v) + load(bias + v), slope = splat(1.0f);
      if (kSoftplus) d = softplus_and_slope(d, &slope);
      store(dt + v, d);
      store(slopes + v, slope);
      store(h + row + v, exp2(d * load(A2 + v)) * load(h + v) + d * x * B);
    }
  }
  for (int64_t i = chunk.steps - 1; i >= 0; i--) {
    const Inputs<E> in(p, task, chunk, i);
    const float B = s.B[i], C = s.C[i];
    const float *h = s.h + i * row, *dt = s.dt + i * row, *slopes = s.slope + i * row;
    const bool first = chunk.visit[i] & kFirstInOrder, first_u = chunk.visit[i] & out.u_bit;
    const int64_t token = chunk.tokens[i];
    for (int64_t c0 = 0; c0 < channels; c0 += p.slice) {
      vf dB = {}, dC = {};
      for (int64_t v = c0; v < smaller(c0 + p.slice, channels); v += W) {
        const int64_t lanes = channels - v;
        vf x = load(in.u + v, lanes), grad = load(in.grad + v, lanes), d = load(dt + v), a2 = load(A2 + v);
        vf total = load(s.dh + v) + grad * C, carry = total * exp2(d * a2), q = carry * load(h + v), dhB = total * B;
        vf ddelta = (x * dhB + kLn2 * a2 * q) * load(slopes + v);
        store(s.dh + v, carry);
        dC += grad * load(h + row + v);
        dB += total * (d * x);
        add_to(dA + v, q * d);
        add_to(dD + v, grad * x);
        add_to(dbias + v, ddelta);
        emit<E>(out.delta, token, v, ddelta, lanes, first);
        emit<E>(out.u, token, v, d * dhB + grad * load(D + v), lanes, first_u);
      }
      const int64_t at = (((task.c0 + c0) / p.slice * p.b + task.b) * p.l + token) * p.k + chunk.k;
      p.dB_part[at] = first ? sum(dB) : p.dB_part[at] + sum(dB);
      p.dC_part[at] = first ? sum(dC) : p.dC_part[at] + sum(dC);
    }
  }
}

template <class E>
void backward_order(const Problem& p, const Task& task, int64_t k, const BackwardScratch& s, const Gradients& out) {
  const int64_t channels = task.c1 - task.c0, part = (task.b * p.k + k) * p.cp + task.c0;
  const int64_t padded = round_up(channels, kLanes);
  memset(s.dh, 0, p.n * round_up(channels, kPad) * sizeof(float));
  for (int64_t j = 0; j < p.n; j++) memset(p.dA_part + (part - task.c0) * p.n + j * p.cp + task.c0, 0, padded * sizeof(float));
  memset(p.dD_part + part, 0, padded * sizeof(float));
  memset(p.dbias_part + part, 0, padded * sizeof(float));
  for (int64_t index = p.chunks - 1; index >= 0; index--) {
    const int64_t s0 = index * p.chunk;
    const Chunk chunk{k, index, s0, smaller(p.chunk, p.t - s0), p.order + k * p.order_k + s0, p.visit + k * p.t + s0};
    gather_states<E>(p, p.B, p.sB, task.b, k, chunk.tokens, chunk.steps, s.B);
    gather_states<E>(p, p.C, p.sC, task.b, k, chunk.tokens, chunk.steps, s.C);
    if (p.n > 1 || p.window > 1)
      backward_chunk<E>(p, task, chunk, s, out);
    else if (p.softplus)
      backward_chunk_rows<E, true>(p, task, chunk, s, out);
    else
      backward_chunk_rows<E, false>(p, task, chunk, s, out);
  }
}

template <class E>
void backward_task(const Problem& p, const Task& task, float* scratch) {
  const int64_t channels = task.c1 - task.c0, row = p.k * p.c, u_row = p.u_shared ? p.c : row;
  BackwardScratch s(p, channels, scratch);
  for (int64_t k = task.k0; k < task.k1; k++) {
    E* du = (E*)p.du + task.b * p.l * u_row + task.c0 + (p.u_shared ? 0 : k * p.c);
    E* ddelta = (E*)p.ddelta + task.b * p.l * row + task.c0 + k * p.c;
    const bool wide_u = p.bf16 && !(p.u_shared ? p.first_of_all : p.first_in_order), wide_delta = p.bf16 && !p.first_in_order;
    Gradients out{wide_u ? Target{s.wide_u, channels, true} : Target{du, u_row, false},
                  wide_delta ? Target{s.wide_delta, channels, true} : Target{ddelta, row, false},
                  p.u_shared ? kFirstOfAll : kFirstInOrder};
    if (!p.covers_in_order) {
      clear_unseen<E>(out.delta, p.seen + k * p.l, p.l, channels);
      for (int64_t slice = task.c0 / p.slice; slice * p.slice < task.c1; slice++) {
        const int64_t image = ((slice * p.b + task.b) * p.l * p.k + k) * p.n;
        clear_unseen<float>({p.dB_part + image, p.k * p.n, false}, p.seen + k * p.l, p.l, p.n);
        clear_unseen<float>({p.dC_part + image, p.k * p.n, false}, p.seen + k * p.l, p.l, p.n);
      }
    }
    if (p.u_shared ? !p.covers_any && k == task.k0 : !p.covers_in_order)
      clear_unseen<E>(out.u, p.u_shared ? p.seen_any : p.seen + k * p.l, p.l, channels);
    backward_order<E>(p, task, k, s, out);
    if (wide_delta) narrow_rows(s.wide_delta, ddelta, p.l, row, channels);
    if (wide_u && (!p.u_shared || k + 1 == task.k1)) narrow_rows(s.wide_u, du, p.l, u_row, channels);
  }
}

}  // namespace
}  // namespace scan
