// Backward for n = 1, in whole rows: the states, steps and slopes of a chunk stay in L2, everything else streams.
#pragma once

#include "scan_backward.h"

namespace scan {
namespace {

constexpr int64_t kRows = 4;  // most rows that the sweep works on together

template <class E>
void recompute_rows(const Chunk& chunk) {
  const Problem& p = chunk.p;
  const BackwardScratch& s = chunk.s;
  const float *A2 = p.A2 + chunk.parameters(), *bias = p.bias0 + chunk.parameters(), *saved = chunk.saved();
  for (int64_t v = 0; v < chunk.channels(); v += W)
    store(s.h + v, saved ? load(saved + v, chunk.channels() - v) : vf{});
  if (p.rank) project(p, chunk.k, chunk.task.c0, chunk.channels(), s.low, chunk.steps, s.dt, s.row);
  for (int64_t i = 0; i < chunk.steps; i++) {
    const int64_t ahead = smaller(i + kAhead, chunk.steps - 1);
    const E *u = chunk.u<E>(i), *delta = chunk.delta<E>(i);
    const E *next_u = chunk.u<E>(ahead), *next_delta = chunk.delta<E>(ahead);
    const float B = s.B[i];
    float *h = s.h + i * s.row, *dt = s.dt + i * s.row, *slopes = s.slope + i * s.row;
    const int64_t row = s.row;
    for_row(chunk.channels(), [&](int64_t v, int64_t lanes, auto size) SCAN_FLAT {
      constexpr int U = decltype(size)::value;
      prefetch<U>(next_u + v);
      if (!p.rank) prefetch<U>(next_delta + v);
      const Pack<U> x = load_pack<U>(u + v, lanes);
      Pack<U> d = p.rank ? load_pack<U>(dt + v) : load_pack<U>(delta + v, lanes), slope(1.0f);
      d = d + load_pack<U>(bias + v);
      if (p.softplus) d = softplus_and_slope(d, &slope);
      store_pack(dt + v, d);
      store_pack(slopes + v, slope);
      store_pack(h + row + v, exp2(d * load_pack<U>(A2 + v)) * load_pack<U>(h + v) + d * x * B);
    });
  }
}

// The sweep over `steps` rows from step i0 on: what belongs to channels stays in registers meanwhile.
template <class E>
void sweep_rows(const Chunk& chunk, int64_t i0, int64_t steps) {
  const Problem& p = chunk.p;
  const BackwardScratch& s = chunk.s;
  const Target du = chunk.out.u, ddelta = chunk.out.delta;
  const int64_t parameters = chunk.parameters(), partial = chunk.partial(), row = s.row;
  const E *u[kRows], *grad[kRows], *next_grad[kRows], *next_ddelta[kRows], *next_du[kRows];
  int64_t token[kRows];
  bool first[kRows], first_u[kRows];
  for (int64_t i = 0; i < steps; i++) {
    const int64_t next = i0 >= kRows ? i0 - kRows + i : 0;
    u[i] = chunk.u<E>(i0 + i), grad[i] = chunk.grad<E>(i0 + i), next_grad[i] = chunk.grad<E>(next);
    next_ddelta[i] = (const E*)ddelta.base + chunk.token(next) * ddelta.row;
    next_du[i] = (const E*)du.base + chunk.token(next) * du.row;
    token[i] = chunk.token(i0 + i);
    first[i] = chunk.first(i0 + i, kFirstInOrder), first_u[i] = chunk.first(i0 + i, chunk.out.u_bit);
  }
  for (int64_t c0 = 0; c0 < chunk.channels(); c0 += p.slice) {
    vf dB[kRows] = {}, dC[kRows] = {};
    for_row<2>(smaller(p.slice, chunk.channels() - c0), [&](int64_t v, int64_t lanes, auto size) SCAN_FLAT {
      constexpr int U = decltype(size)::value;
      const int64_t ch = c0 + v;
      const Pack<U> A2 = load_pack<U>(p.A2 + parameters + ch), D = load_pack<U>(p.D0 + parameters + ch);
      Pack<U> dh = load_pack<U>(s.dh + ch), dA = load_pack<U>(p.dA_part + partial + ch);
      Pack<U> dD = load_pack<U>(p.dD_part + partial + ch), dbias = load_pack<U>(p.dbias_part + partial + ch);
      for (int64_t i = steps - 1; i >= 0; i--) {
        const int64_t at = (i0 + i) * row + ch;
        prefetch<U>(next_grad[i] + ch);
        prefetch<U>(next_ddelta[i] + ch);
        prefetch<U>(next_du[i] + ch);
        const Pack<U> x = load_pack<U>(u[i] + ch, lanes), gy = load_pack<U>(grad[i] + ch, lanes);
        const Pack<U> dt = load_pack<U>(s.dt + at), total = dh + gy * s.C[i0 + i], dhB = total * s.B[i0 + i];
        const Pack<U> to_dB = total * (dt * x), to_dC = gy * load_pack<U>(s.h + row + at);
        dh = total * exp2(dt * A2);
        const Pack<U> dhh = dh * load_pack<U>(s.h + at);
        const Pack<U> to_delta = (x * dhB + kLn2 * A2 * dhh) * load_pack<U>(s.slope + at);
        dA = dA + dhh * dt;
        dD = dD + gy * x;
        dbias = dbias + to_delta;
        for (int w = 0; w < U; w++) dB[i] += to_dB.v[w], dC[i] += to_dC.v[w];
        emit<E>(ddelta, token[i], ch, to_delta, lanes, first[i]);
        emit<E>(du, token[i], ch, dt * dhB + gy * D, lanes, first_u[i]);
      }
      store_pack(s.dh + ch, dh);
      store_pack(p.dA_part + partial + ch, dA);
      store_pack(p.dD_part + partial + ch, dD);
      store_pack(p.dbias_part + partial + ch, dbias);
    });
    for (int64_t i = steps - 1; i >= 0; i--)
      chunk.add_partial((chunk.task.c0 + c0) / p.slice, i0 + i, 0, sum(dB[i]), sum(dC[i]));
  }
}

template <class E>
void backward_rows(const Chunk& chunk) {
  recompute_rows<E>(chunk);
  const int64_t rows = chunk.channels() > 512 ? 2 : kRows;  // wide rows fall out of L1
  for (int64_t i0 = (chunk.steps - 1) / rows * rows; i0 >= 0; i0 -= rows)
    sweep_rows<E>(chunk, i0, smaller(rows, chunk.steps - i0));
}

}  // namespace
}  // namespace scan
