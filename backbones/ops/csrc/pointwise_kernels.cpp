// The gate x SiLU(z) and RMSNorm, row by row: one pass through memory each. Compiled once per instruction set, with
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

// Sum over a row of term(v, lanes), whose lanes beyond the row are zero.
template <class F>
SCAN_INLINE float row_sum(int64_t c, F term) {
  vf even = {}, odd = {};
  int64_t v = 0;
  for (; v + 2 * W <= c; v += 2 * W) even += term(v, W), odd += term(v + W, W);
  for (; v < c; v += W) even += term(v, c - v);
  return sum(even + odd);
}

float inverse_rms(const NormCall& p, const float* x) {
  const float squares = row_sum(p.c, [&](int64_t v, int64_t lanes) SCAN_FLAT {
    const vf value = load(x + v, lanes);
    return value * value;
  });
  return 1.0f / __builtin_sqrtf(squares / (float)p.c + (float)p.eps);
}

void rms_norm(const NormCall& p, int64_t row, int64_t end) {
  for (; row < end; row++) {
    const float* x = p.x + row * p.x_row;
    float* y = p.y + row * p.c;
    const float scale = inverse_rms(p, x);
    for (int64_t v = 0; v < p.c; v += W) store(y + v, load(x + v, p.c - v) * scale * load(p.weight + v, p.c - v), p.c - v);
  }
}

// With r = 1 / rms(x): dx = r (w g - x r^2 <w g, x> / c), dweight = sum over rows of g x r.
void rms_norm_backward(const NormCall& p, int64_t row, int64_t end, float* sums) {
  for (; row < end; row++) {
    const float *x = p.x + row * p.x_row, *grad = p.grad + row * p.grad_row;
    float* dx = p.dx + row * p.c;
    const float scale = inverse_rms(p, x);
    const float along = row_sum(p.c, [&](int64_t v, int64_t lanes) SCAN_FLAT {
      return load(grad + v, lanes) * load(p.weight + v, lanes) * load(x + v, lanes);
    }) * scale * scale / (float)p.c;
    for (int64_t v = 0; v < p.c; v += W) {
      const int64_t lanes = p.c - v;
      const vf value = load(x + v, lanes), g = load(grad + v, lanes);
      store(dx + v, (g * load(p.weight + v, lanes) - value * along) * scale, lanes);
      store(sums + v, load(sums + v, lanes) + g * value * scale, lanes);
    }
  }
}

void gate(const GateCall& p, int64_t row, int64_t end) {
  p.bf16 ? gate_rows<bf16>(p, row, end) : gate_rows<float>(p, row, end);
}

void gate_backward(const GateCall& p, int64_t row, int64_t end) {
  p.bf16 ? gate_rows_backward<bf16>(p, row, end) : gate_rows_backward<float>(p, row, end);
}

}  // namespace

extern const PointwiseKernels SCAN_JOIN(pointwise_kernels_, SCAN_ISA) = {gate, gate_backward, rms_norm,
                                                                         rms_norm_backward};

}  // namespace scan
