// The depthwise convolution of one image and a range of channels: forward and backward. Compiled once per instruction set,
// with SCAN_ISA naming it (see setup.py).
#include "depthwise.h"
#include "math.h"

#define SCAN_JOIN_(a, b) a##b
#define SCAN_JOIN(a, b) SCAN_JOIN_(a, b)

namespace scan {
namespace {

constexpr int B = kConvBlock;
constexpr int kSigmoids = W == 8 ? 2 : 4;  // vectors whose long dependency chains are interleaved

template <int U>
SCAN_INLINE Pack<U> sigmoid(Pack<U> x) {
  Pack<U> e = exp_negative(max(-88.0f, minus_abs(x)));
  return one_if_positive(x, e) * reciprocal(1.0f + e);
}

// Calls body on pieces of B vectors: a, and b where it is given.
template <class F>
SCAN_INLINE void in_pieces(Pack<B>* a, const Pack<B>* b, F body) {
  unrolled<B / kSigmoids>([&](auto piece) SCAN_FLAT {
    Pack<kSigmoids> x, y;
    for (int i = 0; i < kSigmoids; i++) x.v[i] = a->v[piece * kSigmoids + i], y.v[i] = b->v[piece * kSigmoids + i];
    x = body(x, y);
    for (int i = 0; i < kSigmoids; i++) a->v[piece * kSigmoids + i] = x.v[i];
  });
}

// For each of `rows` taps, B pointers to the rows of channels that it reads; what is not there is a row of zeros.
template <class E>
struct Rows {
  const E** at;
  const E* zeros;

  void look_up(const int32_t* table, int64_t taps, int64_t size, int64_t first, const E* base, int64_t stride) const {
    const int64_t count = smaller(B, size - first);
    for (int64_t j = 0; j < taps; j++)
      for (int64_t i = 0; i < B; i++) {
        const int64_t row = i < count ? table[j * size + first + i] : -1;
        at[j * B + i] = row < 0 ? zeros : base + row * stride;
      }
  }
};

// B outputs in registers: every weight is loaded once for all of them.
template <class E>
SCAN_INLINE Pack<B> convolve(const E* const* rows, int64_t taps, const float* weight, int64_t cp, vf start, int64_t v,
                             int64_t lanes) {
  Pack<B> y;
  for (int i = 0; i < B; i++) y.v[i] = start;
  for (int64_t j = 0; j < taps; j++) {
    const vf w = load(weight + j * cp + v);
    for (int i = 0; i < B; i++) y.v[i] += w * load(rows[j * B + i] + v, lanes);
  }
  return y;
}

// Calls body(v, lanes) for every vector of a row; full ones have a constant number of lanes.
template <class F>
SCAN_INLINE void for_vectors(int64_t channels, F body) {
  int64_t v = 0;
  for (; v + W <= channels; v += W) body(v, W);
  if (v < channels) body(v, channels - v);
}

template <class E>
struct ForwardRows : Rows<E> {
  int64_t size;  // floats
  ForwardRows(const ConvProblem& p, int64_t channels, float* scratch) {
    const int64_t pointers = p.j * B * sizeof(E*) / sizeof(float), row = round_up(channels, 64);
    this->at = (const E**)scratch;
    this->zeros = (const E*)(scratch + pointers);
    size = pointers + row;
    if (scratch) memset(scratch + pointers, 0, row * sizeof(float));
  }
};

template <class E>
void forward_task(const ConvProblem& p, const ConvTask& t, float* scratch) {
  const int64_t channels = t.c1 - t.c0;
  const ForwardRows<E> rows(p, channels, scratch);
  const E* x = (const E*)p.x + t.b * p.x_b + t.c0;
  E* y = (E*)p.y + (t.k * p.b + t.b) * p.m * p.c + t.c0;
  const float *weight = p.weight0 + t.k * p.j * p.cp + t.c0, *bias = p.bias0 + t.k * p.cp + t.c0;
  for (int64_t m = t.m0; m < t.m1; m += B) {
    rows.look_up(p.taps + t.k * p.j * p.m, p.j, p.m, m, x, p.x_l);
    const int64_t count = smaller(B, t.m1 - m);
    for_vectors(channels, [&](int64_t v, int64_t lanes) SCAN_FLAT {
      Pack<B> sums = convolve(rows.at, p.j, weight, p.cp, load(bias + v), v, lanes);
      if (p.silu) in_pieces(&sums, &sums, [](auto s, auto) SCAN_FLAT { return s * sigmoid(s); });
      unrolled<B>([&](auto i) SCAN_FLAT {
        if (i < count) store(y + (m + i) * p.c + v, sums.v[i], lanes);
      });
    });
  }
}

struct BackwardScratch {
  float *g, *zeros, *pointers;
  int64_t width, size;
  BackwardScratch(const ConvProblem& p, int64_t channels, float* scratch) {
    width = round_up(channels, 16);
    const int64_t outputs = p.silu ? p.k * p.m * width : 0;
    g = scratch;
    zeros = g + outputs;
    pointers = zeros + round_up(channels, 64);
    size = outputs + round_up(channels, 64) + (p.k * p.j + 1) * B * sizeof(void*) / sizeof(float);
    if (scratch) memset(zeros, 0, round_up(channels, 64) * sizeof(float));
  }
};

// Gradients of weight and bias from B outputs; with SiLU, also those of the convolution's result, into s.g.
template <class E>
void backward_outputs(const ConvProblem& p, const ConvTask& t, const BackwardScratch& s, int64_t k, int64_t m) {
  const Rows<E> rows{(const E**)s.pointers, (const E*)s.zeros};
  const E** grad = rows.at + p.j * B;
  const E* image = (const E*)p.grad + k * p.grad_k + t.b * p.grad_b + t.c0;
  const int64_t count = smaller(B, p.m - m);
  for (int64_t i = 0; i < B; i++) grad[i] = i < count ? image + (m + i) * p.grad_m : rows.zeros;
  rows.look_up(p.taps + k * p.j * p.m, p.j, p.m, m, (const E*)p.x + t.b * p.x_b + t.c0, p.x_l);
  const float *weight = p.weight0 + k * p.j * p.cp + t.c0, *bias = p.bias0 + k * p.cp + t.c0;
  float* dweight = p.partial + (t.b * p.k + k) * (p.j + 1) * p.cp + t.c0;
  float* g_rows = s.g + (k * p.m + m) * s.width;
  for_vectors(t.c1 - t.c0, [&](int64_t v, int64_t lanes) SCAN_FLAT {
    Pack<B> g;
    for (int i = 0; i < B; i++) g.v[i] = load(grad[i] + v, lanes);
    if (p.silu) {
      Pack<B> sums = convolve(rows.at, p.j, weight, p.cp, load(bias + v), v, lanes);
      in_pieces(&g, &sums, [](auto y, auto x) SCAN_FLAT {
        const auto s = sigmoid(x);
        return y * s * (1.0f + x * (1.0f - s));
      });
      unrolled<B>([&](auto i) SCAN_FLAT {
        if (i < count) store(g_rows + i * s.width + v, g.v[i]);
      });
    }
    vf even = g.v[0], odd = g.v[1];
    for (int i = 2; i < B; i += 2) even += g.v[i], odd += g.v[i + 1];
    store(dweight + p.j * p.cp + v, load(dweight + p.j * p.cp + v) + (even + odd));
    for (int64_t j = 0; j < p.j; j++) {
      const E* const* row = rows.at + j * B;
      even = g.v[0] * load(row[0] + v, lanes), odd = g.v[1] * load(row[1] + v, lanes);
      for (int i = 2; i < B; i += 2) {
        even += g.v[i] * load(row[i] + v, lanes);
        odd += g.v[i + 1] * load(row[i + 1] + v, lanes);
      }
      store(dweight + j * p.cp + v, load(dweight + j * p.cp + v) + (even + odd));
    }
  });
}

// dx of B tokens, from rows of G: SiLU's scratch or the given gradient.
template <class E, class G>
void backward_tokens(const ConvProblem& p, const ConvTask& t, const BackwardScratch& s, int64_t l, const G* g,
                     int64_t g_k, int64_t g_m) {
  for (int64_t k = 0; k < p.k; k++) {
    const Rows<G> rows{(const G**)s.pointers + k * p.j * B, (const G*)s.zeros};
    rows.look_up(p.inverse + k * p.j * p.l, p.j, p.l, l, g + k * g_k, g_m);
  }
  const int64_t count = smaller(B, p.l - l);
  E* dx = (E*)p.dx + (t.b * p.l + l) * p.c + t.c0;
  for_vectors(t.c1 - t.c0, [&](int64_t v, int64_t lanes) SCAN_FLAT {
    const Pack<B> sums = convolve((const G* const*)s.pointers, p.k * p.j, p.weight0 + t.c0, p.cp, vf{}, v, lanes);
    unrolled<B>([&](auto i) SCAN_FLAT {
      if (i < count) store(dx + i * p.c + v, sums.v[i], lanes);
    });
  });
}

template <class E>
void backward_task(const ConvProblem& p, const ConvTask& t, float* scratch) {
  const int64_t channels = t.c1 - t.c0, parts = p.k * (p.j + 1);
  const BackwardScratch s(p, channels, scratch);
  for (int64_t i = 0; i < parts; i++)
    memset(p.partial + (t.b * parts + i) * p.cp + t.c0, 0, round_up(channels, 16) * sizeof(float));
  // dx follows as soon as it can: what it reads is still in a cache.
  int64_t m = 0;
  for (int64_t l = 0; l < p.l; l += B) {
    for (; m < p.ready[l / B]; m += B)
      for (int64_t k = 0; k < p.k; k++) backward_outputs<E>(p, t, s, k, m);
    if (p.silu)
      backward_tokens<E>(p, t, s, l, s.g, p.m * s.width, s.width);
    else
      backward_tokens<E>(p, t, s, l, (const E*)p.grad + t.b * p.grad_b + t.c0, p.grad_k, p.grad_m);
  }
  for (; m < p.m; m += B)  // outputs that read no token but zeros
    for (int64_t k = 0; k < p.k; k++) backward_outputs<E>(p, t, s, k, m);
}

int64_t forward_scratch(const ConvProblem& p, int64_t channels) { return ForwardRows<float>(p, channels, nullptr).size; }
int64_t backward_scratch(const ConvProblem& p, int64_t channels) { return BackwardScratch(p, channels, nullptr).size; }

void forward(const ConvProblem& p, const ConvTask& task, float* scratch) {
  p.bf16 ? forward_task<bf16>(p, task, scratch) : forward_task<float>(p, task, scratch);
}

void backward(const ConvProblem& p, const ConvTask& task, float* scratch) {
  p.bf16 ? backward_task<bf16>(p, task, scratch) : backward_task<float>(p, task, scratch);
}

}  // namespace

extern const ConvKernels SCAN_JOIN(conv_kernels_, SCAN_ISA) = {forward_scratch, backward_scratch, forward, backward};

}  // namespace scan
