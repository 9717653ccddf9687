// softplus, its slope and the sigmoid, on top of what the instruction set does best.
#pragma once

#include "pack.h"
#if SCAN_WIDTH == 16
#include "exp_avx512.h"
#else
#include "exp_portable.h"
#endif

namespace scan {
namespace {

SCAN_INLINE vf exp2(vf x) {
  Pack<1> p;
  p.v[0] = x;
  return exp2(p).v[0];
}

// log(1 + exp(x)). Above 20 this equals x in float32, PyTorch's threshold.
template <int U>
SCAN_INLINE Pack<U> softplus(Pack<U> x) {
  return log1p_unit(exp_negative(minus_abs(x))) + max(0.0f, x);
}

template <int U>
SCAN_INLINE Pack<U> softplus_and_slope(Pack<U> x, Pack<U>* slope) {  // slope: the sigmoid of x
  Pack<U> e = exp_negative(minus_abs(x));
  *slope = one_if_positive(x, e) * reciprocal(1.0f + e);
  return log1p_unit(e) + max(0.0f, x);
}

template <int U>
SCAN_INLINE Pack<U> sigmoid(Pack<U> x) {
  Pack<U> e = exp_negative(max(-88.0f, minus_abs(x)));
  return one_if_positive(x, e) * reciprocal(1.0f + e);
}

}  // namespace
}  // namespace scan
