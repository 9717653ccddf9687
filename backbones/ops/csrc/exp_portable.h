// 2^x, e^x and log(1 + x) by one polynomial each: what every instruction set can do.
#pragma once

#include "pack.h"

namespace scan {
namespace {

// 2^n for n = x rounded to an integer: adding 1.5 2^23 rounds, and leaves the integer in the low bits. That needs strict
// IEEE semantics (no -ffast-math) and x in [-127, 128], at whose ends the result is already 0 and inf.
template <int U>
struct Power {
  Pack<U> shifted, n;
  SCAN_INLINE explicit Power(Pack<U> x) : shifted(x + 12582912.0f), n(shifted - 12582912.0f) {}
  SCAN_INLINE Pack<U> times(Pack<U> p) const { SCAN_FOR_ALL((vf)((vi)p.v[i] + ((vi)shifted.v[i] << 23))); }
};

// 2^x. The polynomial (minimax on [-1/2, 1/2], relative error 9.2e-8) is 1 at 0, else errors would pile up in long
// recurrences.
template <int U>
SCAN_INLINE Pack<U> exp2(Pack<U> x) {
  x = min(128.0f, max(-127.0f, x));
  const Power<U> power(x);
  Pack<U> r = x - power.n;
  Pack<U> p = 0x1.5bba14p-10f * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
  return power.times(p);
}

// e^x for x <= 0, accurate to the last digits however small: the rounding of x log2(e) does not enter.
template <int U>
SCAN_INLINE Pack<U> exp_negative(Pack<U> x) {
  x = max(-88.0f, x);
  const Power<U> power(x * kLog2e);
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  Pack<U> r = x - power.n * kLn2;
#else
  Pack<U> r = x - power.n * 0x1.62ep-1f - power.n * 0x1.0bfbe8p-15f;
#endif
  Pack<U> p = 0x1.0fa834p-7f * r + 0x1.573a54p-5f;
  p = p * r + 0x1.555a6ap-3f;
  p = p * r + 0x1.fffdc6p-2f;
  p = p * r + 0x1.fffff6p-1f;
  p = p * r + 1.0f;
  return power.times(p);
}

// log(1 + e) for e in [0, 1]: e times a minimax polynomial, relative error 5e-9, so tiny e keep their digits.
template <int U>
SCAN_INLINE Pack<U> log1p_unit(Pack<U> e) {
  Pack<U> p = -0x1.a93368p-9f * e + 0x1.453f0ep-6f;
  p = p * e - 0x1.d29ccap-5f;
  p = p * e + 0x1.b25360p-4f;
  p = p * e - 0x1.397562p-3f;
  p = p * e + 0x1.92f696p-3f;
  p = p * e - 0x1.ff0f88p-3f;
  p = p * e + 0x1.554c80p-2f;
  p = p * e - 0x1.ffffbep-2f;
  p = p * e + 1.0f;
  return p * e;
}

template <int U>
SCAN_INLINE Pack<U> reciprocal(Pack<U> x) { return 1.0f / x; }

}  // namespace
}  // namespace scan
