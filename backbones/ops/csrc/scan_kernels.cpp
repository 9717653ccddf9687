// One image, one or all orders, a range of channels: forward and backward. Compiled once per instruction set, with
// SCAN_ISA naming it (see setup.py).
#include "limits.h"
#include "scan_backward_rows.h"
#include "scan_forward.h"

#define SCAN_JOIN_(a, b) a##b
#define SCAN_JOIN(a, b) SCAN_JOIN_(a, b)

namespace scan {
namespace {

template <class E>
void forward_task(const Problem& p, const Task& task, float* scratch) {
  const int64_t channels = task.c1 - task.c0;
  const ForwardScratch s(p, channels, scratch);
  const bool wide = wide_y(p);
  const int64_t rows = p.out == kPerStep ? p.t : p.l, row = p.out == kSum ? p.c : p.k * p.c;
  const auto image = [&](int64_t k) { return (E*)p.y + task.b * rows * row + task.c0 + (p.out == kSum ? 0 : k * p.c); };
  const auto target = [&](int64_t k) { return wide ? Target{s.wide, channels, true} : Target{image(k), row, false}; };
  if (decay_alike<E>(p, task)) {
    const Target y = target(task.k0);
    clear_rows<E>(y, p.l, channels, [](int64_t) { return true; });
    forward_blocks<E>(p, task, task.k0, task.k1, y, s);
    if (wide) narrow_rows(s.wide, image(task.k0), p.l, row, channels);
    return;
  }
  for (int64_t k = task.k0; k < task.k1; k++) {
    const Target y = target(k);
    if (p.out == kPerOrder && !p.covers_in_order) clear_unseen<E>(y, p.seen + k * p.l, p.l, channels);
    if (p.out == kSum && !p.covers_any && k == task.k0) clear_unseen<E>(y, p.seen_any, p.l, channels);
    if (p.n > 1)
      forward_blocks<E>(p, task, k, k + 1, y, s);
    else if (p.window > 1 && wide)
      forward_windows<E, float>(p, task, k, y, s);
    else if (p.window > 1)
      forward_windows<E, E>(p, task, k, y, s);
    else if (wide)
      forward_rows<E, float>(p, task, k, y, s);
    else
      forward_rows<E, E>(p, task, k, y, s);
    if (wide && (p.out == kPerOrder || k + 1 == task.k1)) narrow_rows(s.wide, image(k), p.l, row, channels);
  }
}

// Clears what the order adds to, and the gradients of tokens that it leaves out.
template <class E>
void begin_backward(const Problem& p, const Task& task, int64_t k, const BackwardScratch& s, const Gradients& out) {
  const int64_t channels = task.c1 - task.c0, padded = round_up(channels, kLanes) * sizeof(float);
  const int64_t part = task.b * p.k + k;
  memset(s.dh, 0, p.n * round_up(channels, kPad) * sizeof(float));
  for (int64_t j = 0; j < p.n; j++) memset(p.dA_part + (part * p.n + j) * p.cp + task.c0, 0, padded);
  memset(p.dD_part + part * p.cp + task.c0, 0, padded);
  memset(p.dbias_part + part * p.cp + task.c0, 0, padded);
  if (p.u_shared ? !p.covers_any && k == task.k0 : !p.covers_in_order)
    clear_unseen<E>(out.u, p.u_shared ? p.seen_any : p.seen + k * p.l, p.l, channels);
  if (p.covers_in_order) return;
  clear_unseen<E>(out.delta, p.seen + k * p.l, p.l, channels);
  for (int64_t slice = task.c0 / p.slice; slice * p.slice < task.c1; slice++) {
    const int64_t image = ((slice * p.b + task.b) * p.l * p.k + k) * p.n;
    clear_unseen<float>({p.dB_part + image, p.k * p.n, false}, p.seen + k * p.l, p.l, p.n);
    clear_unseen<float>({p.dC_part + image, p.k * p.n, false}, p.seen + k * p.l, p.l, p.n);
  }
}

template <class E>
void backward_task(const Problem& p, const Task& task, float* scratch) {
  const int64_t channels = task.c1 - task.c0, row = p.k * p.c, u_row = p.u_shared ? p.c : row;
  const BackwardScratch s(p, channels, scratch);
  for (int64_t k = task.k0; k < task.k1; k++) {
    E* du = (E*)p.du + task.b * p.l * u_row + task.c0 + (p.u_shared ? 0 : k * p.c);
    const int64_t image = task.b * p.l * row + task.c0 + k * p.c;
    E* ddelta = (E*)p.ddelta + image;
    const Gradients out{wide_du(p) ? Target{s.wide_u, channels, true} : Target{du, u_row, false},
                        wide_ddelta(p) ? Target{s.wide_delta, channels, true}
                        : p.rank       ? Target{(float*)p.ddelta + image, row, true}
                                       : Target{ddelta, row, false},
                        p.u_shared ? kFirstOfAll : kFirstInOrder};
    begin_backward<E>(p, task, k, s, out);
    for (int64_t index = p.chunks - 1; index >= 0; index--) {
      const int64_t s0 = index * p.chunk;
      const Chunk chunk{p, task, s, out, k, index, s0, smaller(p.chunk, p.t - s0)};
      const int32_t* tokens = p.order + k * p.order_k + s0;
      gather<E>(p.B, p.sB, task.b, k, tokens, chunk.steps, p.n, s.B);
      gather<E>(p.C, p.sC, task.b, k, tokens, chunk.steps, p.n, s.C);
      if (p.rank) gather<E>(p.delta, p.sdelta, task.b, k, tokens, chunk.steps, p.rank, s.low);
      p.n > 1 || p.window > 1 ? backward_strips<E>(chunk) : backward_rows<E>(chunk);
    }
    if (wide_ddelta(p)) narrow_rows(s.wide_delta, ddelta, p.l, row, channels);
    if (wide_du(p) && (!p.u_shared || k + 1 == task.k1)) narrow_rows(s.wide_u, du, p.l, u_row, channels);
  }
}

int64_t forward_scratch(const Problem& p, int64_t channels) { return ForwardScratch(p, channels, nullptr).size; }
int64_t backward_scratch(const Problem& p, int64_t channels) { return BackwardScratch(p, channels, nullptr).size; }

void forward(const Problem& p, const Task& task, float* scratch) {
  p.bf16 ? forward_task<bf16>(p, task, scratch) : forward_task<float>(p, task, scratch);
}

void backward(const Problem& p, const Task& task, float* scratch) {
  p.bf16 ? backward_task<bf16>(p, task, scratch) : backward_task<float>(p, task, scratch);
}

}  // namespace

extern const Kernels SCAN_JOIN(kernels_, SCAN_ISA) = {forward_scratch, backward_scratch, forward,
                                                      backward,        read_all,         exp2_all};

}  // namespace scan
