// Vectors of floats, loads and stores of float32 and bfloat16, in GCC's and Clang's vector extensions; the width follows
// the compiler's target flags. Everything is in an unnamed namespace and nothing comes from std::, because this header is
// compiled once per instruction set: a weak symbol could else be linked in from the widest one and crash the others.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE__)
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

#define SCAN_FLAT __attribute__((always_inline))  // for lambdas
#define SCAN_INLINE inline __attribute__((always_inline))

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
// Both let a NaN in b through.
#if SCAN_WIDTH == 16
SCAN_INLINE vf max(vf a, vf b) { return (vf)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b); }
SCAN_INLINE vf min(vf a, vf b) { return (vf)_mm512_maskz_min_ps(-1, (__m512)a, (__m512)b); }
#elif SCAN_WIDTH == 8
SCAN_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
SCAN_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE__)
SCAN_INLINE vf max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
SCAN_INLINE vf min(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
#else
SCAN_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
SCAN_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
#endif
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

template <int N>
struct Floats {
  typedef float type __attribute__((vector_size(4 * N)));
};
template <int N>
SCAN_INLINE float sum_of(typename Floats<N>::type x) {  // halves first: a tree, the same one for a given width
  if constexpr (N == 1) {
    return x[0];
  } else {
    typename Floats<N / 2>::type low, high;
    memcpy(&low, &x, sizeof low);
    memcpy(&high, (const char*)&x + sizeof low, sizeof high);
    return sum_of<N / 2>(low + high);
  }
}
SCAN_INLINE float sum(vf x) { return sum_of<W>(x); }

// body(0), ..., body(N - 1) written out, so that arrays indexed with them live in registers.
template <int I>
struct Index {
  SCAN_INLINE constexpr operator int() const { return I; }
};
template <int N, int I = 0, class F>
SCAN_INLINE void unrolled(const F& body) {
  if constexpr (I < N) {
    body(Index<I>());
    unrolled<N, I + 1>(body);
  }
}

// U independent vectors, every operation applied to all of them in turn: the long chains of exp2 and softplus then overlap,
// which out-of-order execution alone does not achieve in long loop bodies.
template <int U>
struct Pack {
  vf v[U];
  SCAN_INLINE Pack() {}
  SCAN_INLINE Pack(float x) {
    for (int i = 0; i < U; i++) v[i] = splat(x);
  }
};

#define SCAN_FOR_ALL(expression)                   \
  Pack<U> y;                                       \
  for (int i = 0; i < U; i++) y.v[i] = expression; \
  return y
#define SCAN_OPERATOR(op)                                                                   \
  template <int U>                                                                          \
  SCAN_INLINE Pack<U> operator op(Pack<U> a, Pack<U> b) { SCAN_FOR_ALL(a.v[i] op b.v[i]); } \
  template <int U>                                                                          \
  SCAN_INLINE Pack<U> operator op(Pack<U> a, float b) { SCAN_FOR_ALL(a.v[i] op b); }        \
  template <int U>                                                                          \
  SCAN_INLINE Pack<U> operator op(float a, Pack<U> b) { SCAN_FOR_ALL(a op b.v[i]); }
SCAN_OPERATOR(+)
SCAN_OPERATOR(-)
SCAN_OPERATOR(*)
SCAN_OPERATOR(/)

template <int U>
SCAN_INLINE Pack<U> max(float a, Pack<U> b) { SCAN_FOR_ALL(max(splat(a), b.v[i])); }
template <int U>
SCAN_INLINE Pack<U> min(float a, Pack<U> b) { SCAN_FOR_ALL(min(splat(a), b.v[i])); }
template <int U>
SCAN_INLINE Pack<U> minus_abs(Pack<U> a) { SCAN_FOR_ALL((vf)((vu)a.v[i] | 0x80000000u)); }
template <int U>
SCAN_INLINE Pack<U> one_if_positive(Pack<U> a, Pack<U> otherwise) {
  SCAN_FOR_ALL(a.v[i] > 0 ? splat(1.0f) : otherwise.v[i]);
}

// U vectors of W elements, of which `lanes` exist.
template <int U, class E>
SCAN_INLINE Pack<U> load_pack(const E* p, int64_t lanes = U * W) {
  SCAN_FOR_ALL(load(p + i * W, lanes - i * W));
}
template <int U, class E>
SCAN_INLINE void store_pack(E* p, Pack<U> x, int64_t lanes = U * W) {
  for (int i = 0; i < U; i++) store(p + i * W, x.v[i], lanes - i * W);
}

constexpr int kInterleaved = W == 8 ? 2 : 4;  // vectors whose long dependency chains are interleaved

// Calls body(v, lanes, Size<U>) over a row of channels: several vectors at a time, then fewer, the last one with fewer
// lanes.
template <int U>
struct Size {
  static constexpr int value = U;
};
template <int kUnroll = kInterleaved, class F>
SCAN_INLINE void for_row(int64_t channels, F body) {
  int64_t v = 0;
  for (; v + kUnroll * W <= channels; v += kUnroll * W) body(v, kUnroll * W, Size<kUnroll>());
  for (; v + 2 * W <= channels; v += 2 * W) body(v, 2 * W, Size<2>());
  for (; v + W <= channels; v += W) body(v, W, Size<1>());
  if (v < channels) body(v, channels - v, Size<1>());
}

}  // namespace
}  // namespace scan
