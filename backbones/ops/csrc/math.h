// Vectors of floats, loads and stores of float32 and bfloat16, exp2, softplus. GCC/Clang vector extensions; the width follows the
// compiler's target flags. Everything is in an unnamed namespace and nothing comes from std::, because this header is compiled once per
// instruction set: a shared weak symbol could otherwise be linked in from the widest one and crash the others.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "scan.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define SCAN_WIDTH 16
#elif defined(__AVX2__)
#define SCAN_WIDTH 8
#else
#define SCAN_WIDTH 4
#endif

#define SCAN_INLINE inline __attribute__((always_inline))
#define SCAN_INLINE_LAMBDA __attribute__((always_inline))

namespace scan {
namespace {

constexpr int64_t W = SCAN_WIDTH;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

SCAN_INLINE vf splat(float x) { return x - vf{}; }
SCAN_INLINE vf max(vf a, vf b) { return a > b ? a : b; }  // a NaN in b comes through
SCAN_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
SCAN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SCAN_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class V, class P>
SCAN_INLINE V read(const P* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

SCAN_INLINE vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

SCAN_INLINE vh narrow(vf x) {  // to nearest, ties to even; a NaN stays one
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : vu{} + 0x7fc0, vh);
}

SCAN_INLINE vf load(const float* p) { return read<vf>(p); }
SCAN_INLINE vf load(const bf16* p) { return widen(read<vh>(p)); }
SCAN_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
SCAN_INLINE void store(bf16* p, vf x) {
  vh h = narrow(x);
  memcpy(p, &h, sizeof h);
}

// The first `lanes` of W elements; the others are zero, or left alone.
template <class E>
SCAN_INLINE vf load(const E* p, int64_t lanes) {
  if (__builtin_expect(lanes >= W, 1)) return load(p);
  E part[W] = {};
  for (int64_t i = 0; i < lanes; i++) part[i] = p[i];
  return load(part);
}
template <class E>
SCAN_INLINE void store(E* p, vf x, int64_t lanes) {
  if (__builtin_expect(lanes >= W, 1)) return store(p, x);
  E part[W];
  store(part, x);
  for (int64_t i = 0; i < lanes; i++) p[i] = part[i];
}

SCAN_INLINE float to_float(float x) { return x; }
SCAN_INLINE float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

SCAN_INLINE float sum(vf x) {  // a tree, the same one for a given width
  float part[W];
  memcpy(part, &x, sizeof x);
  for (int64_t half = W / 2; half; half /= 2)
    for (int64_t i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

// 2^n for an integer n, as each instruction set likes it best. Without AVX-512, adding 1.5 2^23 rounds to an integer and leaves that
// integer in the low bits (which needs strict IEEE semantics: no -ffast-math), and x is first kept within [-127, 128], where the
// result is already 0 or inf. The plain forms of the intrinsics, without maskz, draw false warnings from GCC 12.
struct Power {
#if SCAN_WIDTH == 16
  vf n;
  SCAN_INLINE explicit Power(vf x) : n((vf)_mm512_maskz_roundscale_ps(-1, (__m512)x, 0)) {}
  SCAN_INLINE vf times(vf p) const { return (vf)_mm512_maskz_scalef_ps(-1, (__m512)p, (__m512)n); }
#else
  vf shifted, n;
  SCAN_INLINE explicit Power(vf x) : shifted(x + splat(12582912.0f)), n(shifted - splat(12582912.0f)) {}
  SCAN_INLINE vf times(vf p) const { return (vf)((vi)p + ((vi)shifted << 23)); }
#endif
};

// 2^x. The polynomial (minimax on [-1/2, 1/2], relative error 9.2e-8) is 1 at 0, else errors would pile up in long recurrences.
// 0 below 2^-127, inf from 2^128, NaN for NaN.
SCAN_INLINE vf exp2(vf x) {
#if SCAN_WIDTH < 16
  x = min(splat(128.0f), max(splat(-127.0f), x));
#endif
  const Power power(x);
  vf r = x - power.n;
  vf p = 0x1.5bba14p-10f * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
  return power.times(p);
}

// e^x for x <= 0, accurate to the last digits however small: the rounding of x log2(e) does not enter.
SCAN_INLINE vf exp_negative(vf x) {
#if SCAN_WIDTH < 16
  x = max(splat(-88.0f), x);
#endif
  const Power power(x * kLog2e);
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  vf r = x - power.n * kLn2;
#else
  vf r = x - power.n * 0x1.62ep-1f - power.n * 0x1.0bfbe8p-15f;
#endif
  vf p = 0x1.0fa834p-7f * r + 0x1.573a54p-5f;
  p = p * r + 0x1.555a6ap-3f;
  p = p * r + 0x1.fffdc6p-2f;
  p = p * r + 0x1.fffff6p-1f;
  p = p * r + 1.0f;
  return power.times(p);
}

// log(1 + e) for e in [0, 1]: e times a minimax polynomial of degree 9, relative error 5e-9, so tiny e keep their digits.
SCAN_INLINE vf log1p_unit(vf e) {
  vf p = -0x1.a93368p-9f * e + 0x1.453f0ep-6f;
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

// log(1 + exp(x)). Above 20 this equals x in float32, PyTorch's threshold.
SCAN_INLINE vf softplus(vf x) {
  vf e = exp_negative(x > 0 ? -x : x);
  return max(vf{}, x) + log1p_unit(e);
}

SCAN_INLINE vf softplus_and_slope(vf x, vf* slope) {  // slope: the sigmoid of x
  vf e = exp_negative(x > 0 ? -x : x);
  *slope = (x > 0 ? splat(1.0f) : e) / (1.0f + e);
  return max(vf{}, x) + log1p_unit(e);
}

}  // namespace
}  // namespace scan
