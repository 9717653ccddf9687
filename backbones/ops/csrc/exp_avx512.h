// 2^x, e^x and log(1 + x) for AVX-512, whose permutations look values up in tables: shorter polynomials take work off
// the multipliers, of which the scan is short. All intrinsics are in their maskz forms: the plain ones draw false warnings
// from GCC 12.
#pragma once

#include "pack.h"

namespace scan {
namespace {

alignas(64) const float kPowers[16] = {  // 2^(j/16)
    0x1p0f, 0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fep0f, 0x1.3dea64p0f, 0x1.4bfdaep0f, 0x1.5ab07ep0f,
    0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f, 0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f};
alignas(64) const float kInverse[16] = {  // 1 / (1 + j/15)
    0x1p0f, 0x1.ep-1f, 0x1.c3c3c4p-1f, 0x1.aaaaaap-1f, 0x1.9435e6p-1f, 0x1.8p-1f, 0x1.6db6dcp-1f, 0x1.5d1746p-1f,
    0x1.4de9bep-1f, 0x1.4p-1f, 0x1.333334p-1f, 0x1.276276p-1f, 0x1.1c71c8p-1f, 0x1.124924p-1f, 0x1.08d3dcp-1f, 0x1p-1f};
alignas(64) const float kLog[16] = {  // minus the logarithms of these
    0.0f, 0x1.08598cp-4f, 0x1.005588p-3f, 0x1.756504p-3f, 0x1.e41fc8p-3f, 0x1.269622p-2f, 0x1.588c2cp-2f, 0x1.882f1ep-2f,
    0x1.b5b3ep-2f, 0x1.e148a2p-2f, 0x1.058aeep-1f, 0x1.199facp-1f, 0x1.2cf25ep-1f, 0x1.3f9128p-1f, 0x1.5188a6p-1f, 0x1.62e43p-1f};

SCAN_INLINE vf look_up(const float* table, vf index) {  // by the low 4 bits
  return (vf)_mm512_maskz_permutexvar_ps(-1, (__m512i)index, _mm512_load_ps(table));
}
template <int U>
SCAN_INLINE Pack<U> scale(Pack<U> x, Pack<U> n) {  // x 2^floor(n)
  SCAN_FOR_ALL((vf)_mm512_maskz_scalef_ps(-1, (__m512)x.v[i], (__m512)n.v[i]));
}

// 2^x = 2^n 2^(j/16) 2^r, |r| <= 1/32. Adding 1.5 2^19 leaves 16 n + j in the low bits; one instruction gives r, and the
// last one takes n = floor(x - r) by itself, 0 and inf included. Near x = 0 the table holds an exact 1, and the polynomial
// (relative error 2e-9) is a degree longer than float32 asks for: a bias of part of an ulp piles up in long recurrences.
// A permutation of one register runs beside the multipliers on Zen 4, one of two registers (32 entries) takes their place.
template <int U>
SCAN_INLINE Pack<U> exp2(Pack<U> x) {
  Pack<U> shifted = x + 786432.0f, r, s;
  for (int i = 0; i < U; i++) r.v[i] = (vf)_mm512_maskz_reduce_ps(-1, (__m512)x.v[i], 4 << 4);  // 4 bits, to nearest
  for (int i = 0; i < U; i++) s.v[i] = look_up(kPowers, shifted.v[i]);
  return scale(s * r * ((0x1.c6b08ep-5f * r + 0x1.ebfff4p-3f) * r + 0x1.62e43p-1f) + s, x - r);
}

// e^x for x <= 0 with r = x - n log(2), |r| <= log(2)/32, accurate however small: the rounding of x log2(e) does not
// enter.
template <int U>
SCAN_INLINE Pack<U> exp_negative(Pack<U> x) {
  Pack<U> shifted = x * kLog2e + 786432.0f, n = shifted - 786432.0f, r = x - n * kLn2, s;
  for (int i = 0; i < U; i++) s.v[i] = look_up(kPowers, shifted.v[i]);
  return scale(s * r * ((0x1.555556p-3f * r + 0x1.00021ep-1f) * r + 1.0f) + s, n);
}

// log(1 + e) for e in [0, 1] = log(1 + r) - log(c) with c = 1 / (1 + j/15), r = c (1 + e) - 1. In the first of the 16
// pieces r is e itself, so tiny e keep their digits. Relative error of the polynomial 4.3e-8.
template <int U>
SCAN_INLINE Pack<U> log1p_unit(Pack<U> e) {
  Pack<U> index = e * 15.0f + 12582912.0f, c, log_c;
  for (int i = 0; i < U; i++) c.v[i] = look_up(kInverse, index.v[i]);
  for (int i = 0; i < U; i++) log_c.v[i] = look_up(kLog, index.v[i]);
  Pack<U> r = e * c + (c - 1.0f);
  return r * r * ((-0x1.0033a2p-2f * r + 0x1.5585a0p-2f) * r - 0x1.fffffep-2f) + (r + log_c);
}

template <int U>
SCAN_INLINE Pack<U> reciprocal(Pack<U> x) {  // one Newton step from 14 bits
  Pack<U> y;
  for (int i = 0; i < U; i++) y.v[i] = (vf)_mm512_maskz_rcp14_ps(-1, (__m512)x.v[i]);
  return y + y * (1.0f - x * y);
}

}  // namespace
}  // namespace scan
