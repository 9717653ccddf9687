// The gate x SiLU(z) and the norms, row by row: one pass through memory each. Compiled once per instruction set, with
// SCAN_ISA naming it (see setup.py).
#include "pointwise.h"

#include "math.h"

#define SCAN_JOIN_(a, b) a##b
#define SCAN_JOIN(a, b) SCAN_JOIN_(a, b)

namespace scan {
namespace {

template <class E>
void gate_rows(const GateCall& p, int64_t row, int64_t end) {
  const float scale = (float)p.scale;
  for (; row < end; row++) {
    const E *x = (const E*)p.x + row * p.x_row, *z = (const E*)p.z + row * p.z_row;
    E* y = (E*)p.y + row * p.c;
    for_row(p.c, [&](int64_t v, int64_t lanes, auto size) SCAN_FLAT {
      constexpr int U = decltype(size)::value;
      const Pack<U> gate = load_pack<U>(z + v, lanes);
      store_pack(y + v, load_pack<U>(x + v, lanes) * scale * gate * sigmoid(gate), lanes);
    });
  }
}

template <class E>
void gate_rows_backward(const GateCall& p, int64_t row, int64_t end) {
  const float scale = (float)p.scale;
  for (; row < end; row++) {
    const E *x = (const E*)p.x + row * p.x_row, *z = (const E*)p.z + row * p.z_row;
    const E* grad = (const E*)p.grad + row * p.grad_row;
    E *dx = (E*)p.dx + row * p.c, *dz = (E*)p.dz + row * p.c;
    for_row(p.c, [&](int64_t v, int64_t lanes, auto size) SCAN_FLAT {
      constexpr int U = decltype(size)::value;
      const Pack<U> gate = load_pack<U>(z + v, lanes), s = sigmoid(gate), g = load_pack<U>(grad + v, lanes) * scale * s;
      store_pack(dx + v, g * gate, lanes);
      store_pack(dz + v, g * load_pack<U>(x + v, lanes) * (1.0f + gate * (1.0f - s)), lanes);
    });
  }
}

SCAN_INLINE vf first_lanes(vf x, int64_t lanes) {  // the others zero
  if (__builtin_expect(lanes >= W, 1)) return x;
  vf y = {};
  for (int64_t i = 0; i < lanes; i++) y[i] = x[i];
  return y;
}

// Calls body(v, lanes) for every vector of a row.
template <class F>
SCAN_INLINE void for_vectors(int64_t c, F body) {
  int64_t v = 0;
  for (; v + W <= c; v += W) body(v, W);
  if (v < c) body(v, c - v);
}

// R rows, worked on together: the sums over a row are long chains.
template <class E, int R>
struct NormRows {
  const E* x[R];
  float mean[R], scale[R];  // 0 unless centred; one over the root of variance plus eps

  SCAN_INLINE void find_statistics(const NormProblem& p, int64_t row) {
    vf sums[R];
    unrolled<R>([&](auto r) SCAN_FLAT { mean[r] = 0, sums[r] = vf{}; });
    if (p.centred) {
      for_vectors(p.c, [&](int64_t v, int64_t lanes) SCAN_FLAT {
        unrolled<R>([&](auto r) SCAN_FLAT { sums[r] += load(x[r] + v, lanes); });
      });
      unrolled<R>([&](auto r) SCAN_FLAT { mean[r] = sum(sums[r]) / (float)p.c, sums[r] = vf{}; });
    }
    for_vectors(p.c, [&](int64_t v, int64_t lanes) SCAN_FLAT {
      unrolled<R>([&](auto r) SCAN_FLAT {
        const vf value = first_lanes(load(x[r] + v, lanes) - mean[r], lanes);
        sums[r] += value * value;
      });
    });
    unrolled<R>([&](auto r) SCAN_FLAT {
      scale[r] = 1.0f / __builtin_sqrtf(sum(sums[r]) / (float)p.c + (float)p.eps);
      p.statistics[2 * (row + r)] = mean[r], p.statistics[2 * (row + r) + 1] = scale[r];
    });
  }
  SCAN_INLINE vf normalised(int r, int64_t v, int64_t lanes) const {
    return (load(x[r] + v, lanes) - mean[r]) * scale[r];
  }
};

// x + branch, to total.
template <class E, class F>
SCAN_INLINE void add_branch(const NormProblem& p, int64_t row, int64_t end) {
  for (; row < end; row++) {
    const E* x = (const E*)p.x + row * p.x_row;
    const F* branch = (const F*)p.branch + row * p.branch_row;
    E* total = (E*)p.total + row * p.c;
    for_vectors(p.c, [&](int64_t v, int64_t lanes) SCAN_FLAT {
      store(total + v, load(x + v, lanes) + load(branch + v, lanes), lanes);
    });
  }
}

template <class E, class G, int R>
SCAN_INLINE void norm_rows(const NormProblem& p, int64_t row) {
  NormRows<E, R> rows;
  G* y[R];
  if (p.branch) p.branch_bf16 ? add_branch<E, bf16>(p, row, row + R) : add_branch<E, float>(p, row, row + R);
  for (int r = 0; r < R; r++) {
    rows.x[r] = p.branch ? (const E*)p.total + (row + r) * p.c : (const E*)p.x + (row + r) * p.x_row;
    y[r] = (G*)p.y + (row + r) * p.c;
  }
  rows.find_statistics(p, row);
  const int64_t next = R * p.x_row;
  for_vectors(p.c, [&](int64_t v, int64_t lanes) SCAN_FLAT {
    const vf weight = load(p.weight0 + v), bias = load(p.bias0 + v);
    unrolled<R>([&](auto r) SCAN_FLAT {
      __builtin_prefetch(rows.x[r] + next + v);
      store(y[r] + v, rows.normalised(r, v, lanes) * weight + bias, lanes);
    });
  });
}

// With n = (x - mean) scale and h = weight grad: dx = scale (h - <h> - n <h n>), where <.> is the mean over the row and
// RMSNorm has no <h>; dweight = sum over rows of grad n, dbias of grad. What reaches x + branch by other ways is added.
template <class E, class G, int R>
SCAN_INLINE void norm_rows_backward(const NormProblem& p, int64_t row, float* sums) {
  NormRows<E, R> rows;
  const G* grad[R];
  for (int r = 0; r < R; r++) {
    rows.x[r] = (const E*)p.x + (row + r) * p.x_row;
    grad[r] = (const G*)p.grad + (row + r) * p.grad_row;
    rows.mean[r] = p.statistics[2 * (row + r)], rows.scale[r] = p.statistics[2 * (row + r) + 1];
  }
  vf h[R], hn[R];
  unrolled<R>([&](auto r) SCAN_FLAT { h[r] = vf{}, hn[r] = vf{}; });
  for_vectors(p.c, [&](int64_t v, int64_t lanes) SCAN_FLAT {  // behind a row, grad is zero
    const vf weight = load(p.weight0 + v);
    vf dweight = load(sums + v), dbias = load(sums + p.cp + v);
    unrolled<R>([&](auto r) SCAN_FLAT {
      const vf g = load(grad[r] + v, lanes), gn = g * rows.normalised(r, v, lanes);
      dweight += gn, dbias += g;
      h[r] += g * weight, hn[r] += gn * weight;
    });
    store(sums + v, dweight);
    store(sums + p.cp + v, dbias);
  });
  float h_mean[R], hn_mean[R];
  unrolled<R>([&](auto r) SCAN_FLAT {
    h_mean[r] = p.centred ? sum(h[r]) / (float)p.c : 0.0f;
    hn_mean[r] = sum(hn[r]) / (float)p.c;
  });
  const int64_t next = R * p.x_row, next_grad = R * p.grad_row;
  for_vectors(p.c, [&](int64_t v, int64_t lanes) SCAN_FLAT {
    const vf weight = load(p.weight0 + v);
    unrolled<R>([&](auto r) SCAN_FLAT {
      const int64_t at = (row + r) * p.c + v;
      __builtin_prefetch(rows.x[r] + next + v);
      __builtin_prefetch(grad[r] + next_grad + v);
      vf dx = load(grad[r] + v, lanes) * weight - h_mean[r] - rows.normalised(r, v, lanes) * hn_mean[r];
      dx *= rows.scale[r];
      if (p.stream) dx += load((const E*)p.stream + (row + r) * p.stream_row + v, lanes);
      store((E*)p.dx + at, dx, lanes);
      if (p.dbranch) p.branch_bf16 ? store((bf16*)p.dbranch + at, dx, lanes) : store((float*)p.dbranch + at, dx, lanes);
    });
  });
}

constexpr int kNormRows = 4;

template <class E, class G>
void norm_of(const NormProblem& problem, int64_t row, int64_t end) {
  const NormProblem p = problem;  // a copy that no store can alias: its fields stay in registers
  for (; row + kNormRows <= end; row += kNormRows) norm_rows<E, G, kNormRows>(p, row);
  for (; row < end; row++) norm_rows<E, G, 1>(p, row);
}

template <class E, class G>
void norm_backward_of(const NormProblem& problem, int64_t row, int64_t end, float* sums) {
  const NormProblem p = problem;
  for (; row + kNormRows <= end; row += kNormRows) norm_rows_backward<E, G, kNormRows>(p, row, sums);
  for (; row < end; row++) norm_rows_backward<E, G, 1>(p, row, sums);
}

void norm(const NormProblem& p, int64_t row, int64_t end) {
  if (p.x_bf16)
    p.y_bf16 ? norm_of<bf16, bf16>(p, row, end) : norm_of<bf16, float>(p, row, end);
  else
    p.y_bf16 ? norm_of<float, bf16>(p, row, end) : norm_of<float, float>(p, row, end);
}

void norm_backward(const NormProblem& p, int64_t row, int64_t end, float* sums) {
  if (p.x_bf16)
    p.y_bf16 ? norm_backward_of<bf16, bf16>(p, row, end, sums) : norm_backward_of<bf16, float>(p, row, end, sums);
  else
    p.y_bf16 ? norm_backward_of<float, bf16>(p, row, end, sums) : norm_backward_of<float, float>(p, row, end, sums);
}

void gate(const GateCall& p, int64_t row, int64_t end) {
  p.bf16 ? gate_rows<bf16>(p, row, end) : gate_rows<float>(p, row, end);
}

void gate_backward(const GateCall& p, int64_t row, int64_t end) {
  p.bf16 ? gate_rows_backward<bf16>(p, row, end) : gate_rows_backward<float>(p, row, end);
}

}  // namespace

extern const PointwiseKernels SCAN_JOIN(pointwise_kernels_, SCAN_ISA) = {gate, gate_backward, norm, norm_backward};

}  // namespace scan
