// The depthwise convolution of one image and a range of channels: forward and backward. Compiled once per instruction set,
// with SCAN_ISA naming it (see setup.py).
#include "depthwise.h"
#include "math.h"

#define SCAN_JOIN_(a, b) a##b
#define SCAN_JOIN(a, b) SCAN_JOIN_(a, b)

namespace scan {
namespace {

constexpr int B = kConvBlock;
constexpr int64_t kAhead = 2 * B;          // outputs from the prefetch of a row to its use
constexpr int kSigmoids = W == 8 ? 2 : 4;  // vectors whose long dependency chains are interleaved

// Replaces a by body(a, b), a few vectors at a time.
template <class F>
SCAN_INLINE void in_pieces(Pack<B>* a, const Pack<B>* b, F body) {
  unrolled<B / kSigmoids>([&](auto piece) SCAN_FLAT {
    Pack<kSigmoids> x, y;
    for (int i = 0; i < kSigmoids; i++) x.v[i] = a->v[piece * kSigmoids + i], y.v[i] = b->v[piece * kSigmoids + i];
    x = body(x, y);
    for (int i = 0; i < kSigmoids; i++) a->v[piece * kSigmoids + i] = x.v[i];
  });
}

typedef int32_t Entries __attribute__((vector_size(4 * B)));
typedef int64_t Offsets __attribute__((vector_size(8 * B)));

// The taps that B outputs read, or B tokens are read with: which rows of channels, and where their weights are.
template <class E>
struct Taps {
  const E** rows;    // B for each tap; what is not there is a row of zeros
  int64_t* weights;  // offset of each tap's row of weights
  const E* zeros;
  int64_t count = 0;

  Taps(float* scratch, float* zeros, int64_t most)
      : rows((const E**)scratch), weights((int64_t*)(rows + most * B)), zeros((const E*)zeros) {}
  static int64_t floats(int64_t most) { return most * (B + 1) * 2; }

  // Adds entries first..first + B of each of `taps` rows of a table with `size` columns, leaving out taps without a row. Of
  // the rows from base on the last `kept`, a power of 2, are there.
  void add(const int32_t* table, int64_t taps, int64_t size, int64_t first, const E* base, int64_t stride,
           int64_t weight, int64_t cp, int64_t kept = 0) {
    const int64_t present = smaller(B, size - first), bytes = stride * (int64_t)sizeof(E);
    for (int64_t j = 0; j < taps; j++, weight += cp) {
      Entries entries = Entries{} - 1;
      if (present >= B)
        entries = read<Entries>(table + j * size + first);
      else
        for (int64_t i = 0; i < present; i++) entries[i] = table[j * size + first + i];
      if (all_negative(entries)) continue;
      const Offsets row = __builtin_convertvector(entries, Offsets);
      const Offsets address = row < 0 ? (int64_t)zeros + Offsets{} : (int64_t)base + (row & (kept - 1)) * bytes;
      memcpy(rows + count * B, &address, sizeof address);
      weights[count++] = weight;
    }
  }

  static bool all_negative(Entries entries) {
    uint64_t pairs[B / 2];
    memcpy(pairs, &entries, sizeof pairs);
    uint64_t signs = 0x8000000080000000u;
    for (uint64_t pair : pairs) signs &= pair;
    return signs == 0x8000000080000000u;
  }
};

// B results in registers: every weight is loaded once for all of them.
template <class E>
SCAN_INLINE Pack<B> convolve(const Taps<E>& taps, const float* weight, vf start, int64_t v, int64_t lanes) {
  Pack<B> y;
  for (int i = 0; i < B; i++) y.v[i] = start;
  for (int64_t j = 0; j < taps.count; j++) {
    const vf w = load(weight + taps.weights[j] + v);
    for (int i = 0; i < B; i++) y.v[i] += w * load(taps.rows[j * B + i] + v, lanes);
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

// Rows that are needed soon: those that the last tap reads, which for windows and causal taps no output has read before.
template <class E>
struct Ahead {
  const E* rows[B] = {};
  Ahead(const int32_t* last_tap, int64_t size, int64_t first, const E* base, int64_t stride) {
    for (int64_t i = 0; i < smaller(B, size - first); i++)
      if (last_tap[first + i] >= 0) rows[i] = base + last_tap[first + i] * stride;
  }
  SCAN_INLINE void prefetch(int64_t v) const {
    for (int i = 0; i < B; i++) __builtin_prefetch(rows[i] + v);
  }
};

int64_t forward_scratch(const ConvProblem& p, int64_t channels) {
  return Taps<float>::floats(p.j) + round_up(channels, 64);
}

// Adds B terms, a chain for every second one.
template <class F>
SCAN_INLINE void add_to(float* sum, F term) {
  vf even = term(0), odd = term(1);
  for (int i = 2; i < B; i += 2) even += term(i), odd += term(i + 1);
  store(sum, load(sum) + (even + odd));
}

template <class E>
void forward_task(const ConvProblem& p, const ConvTask& t, float* scratch) {
  const int64_t channels = t.c1 - t.c0;
  float* zeros = scratch + Taps<E>::floats(p.j);
  memset(zeros, 0, round_up(channels, 64) * sizeof(float));
  const E* x = (const E*)p.x + t.b * p.x_b + t.c0;
  E* y = (E*)p.y + (t.k * p.b + t.b) * p.m * p.c + t.c0;
  const int32_t* table = p.taps + t.k * p.j * p.m;
  const float *weight = p.weight0 + t.k * p.j * p.cp + t.c0, *bias = p.bias0 + t.k * p.cp + t.c0;
  for (int64_t m = t.m0; m < t.m1; m += B) {
    const int64_t count = smaller(B, t.m1 - m);
    const Ahead<E> ahead(table + (p.j - 1) * p.m, p.m, m + kAhead, x, p.x_l);
    Taps<E> taps(scratch, zeros, p.j);
    taps.add(table, p.j, p.m, m, x, p.x_l, 0, p.cp);
    for_vectors(channels, [&](int64_t v, int64_t lanes) SCAN_FLAT {
      ahead.prefetch(v);
      Pack<B> sums = convolve(taps, weight, load(bias + v), v, lanes);
      if (p.silu) in_pieces(&sums, &sums, [](auto s, auto) SCAN_FLAT { return s * sigmoid(s); });
      unrolled<B>([&](auto i) SCAN_FLAT {
        if (i < count) store(y + (m + i) * p.c + v, sums.v[i], lanes);
      });
    });
  }
}

struct BackwardScratch {
  float *g, *zeros, *taps;  // (k, p.kept, width): the gradients of SiLU's argument
  int64_t width, size;
  BackwardScratch(const ConvProblem& p, int64_t channels, float* scratch) : width(round_up(channels, 16)) {
    const int64_t outputs = p.silu ? p.k * p.kept * width : 0, padded = round_up(channels, 64);
    g = scratch;
    zeros = g + outputs;
    taps = zeros + padded;
    size = outputs + padded + Taps<float>::floats(p.k * p.j);
    if (scratch) memset(zeros, 0, padded * sizeof(float));
  }
};

// Gradients of weight and bias from B outputs; with SiLU, also those of its argument, into s.g.
template <class E>
void backward_outputs(const ConvProblem& p, const ConvTask& t, const BackwardScratch& s, int64_t k, int64_t m) {
  const E* x = (const E*)p.x + t.b * p.x_b + t.c0;
  const E* image = (const E*)p.grad + k * p.grad_k + t.b * p.grad_b + t.c0;
  const int32_t* table = p.taps + k * p.j * p.m;
  const int64_t count = smaller(B, p.m - m);
  const Ahead<E> ahead(table + (p.j - 1) * p.m, p.m, m + kAhead, x, p.x_l);
  const E *grad[B], *next_grad[B];
  for (int64_t i = 0; i < B; i++) {
    grad[i] = i < count ? image + (m + i) * p.grad_m : (const E*)s.zeros;
    next_grad[i] = image + smaller(m + kAhead + i, p.m - 1) * p.grad_m;
  }
  Taps<E> taps(s.taps, s.zeros, p.j);
  taps.add(table, p.j, p.m, m, x, p.x_l, 0, p.cp);
  const float *weight = p.weight0 + k * p.j * p.cp + t.c0, *bias = p.bias0 + k * p.cp + t.c0;
  float* dweight = p.partial + (t.b * p.k + k) * (p.j + 1) * p.cp + t.c0;
  float* dbias = dweight + p.j * p.cp;
  float* g_rows = s.g + (k * p.kept + (m & (p.kept - 1))) * s.width;
  for_vectors(t.c1 - t.c0, [&](int64_t v, int64_t lanes) SCAN_FLAT {
    ahead.prefetch(v);
    for (int i = 0; i < B; i++) __builtin_prefetch(next_grad[i] + v);
    Pack<B> g;
    for (int i = 0; i < B; i++) g.v[i] = load(grad[i] + v, lanes);
    if (p.silu) {
      const Pack<B> sums = convolve(taps, weight, load(bias + v), v, lanes);
      in_pieces(&g, &sums, [](auto y, auto x) SCAN_FLAT {
        const auto s = sigmoid(x);
        return y * s * (1.0f + x * (1.0f - s));
      });
      unrolled<B>([&](auto i) SCAN_FLAT {
        if (i < count) store(g_rows + i * s.width + v, g.v[i]);
      });
    }
    add_to(dbias + v, [&](int i) SCAN_FLAT { return g.v[i]; });
    for (int64_t j = 0; j < taps.count; j++)
      add_to(dweight + taps.weights[j] + v, [&](int i) SCAN_FLAT { return g.v[i] * load(taps.rows[j * B + i] + v, lanes); });
  });
}

// dx of B tokens, from rows of G: SiLU's scratch or the given gradient.
template <class E, class G>
void backward_tokens(const ConvProblem& p, const ConvTask& t, const BackwardScratch& s, int64_t l, const G* g,
                     int64_t g_k, int64_t g_m, int64_t kept) {
  Taps<G> taps(s.taps, s.zeros, p.k * p.j);
  for (int64_t k = 0; k < p.k; k++)
    taps.add(p.inverse + k * p.j * p.l, p.j, p.l, l, g + k * g_k, g_m, k * p.j * p.cp, p.cp, kept);
  const int64_t count = smaller(B, p.l - l);
  E* dx = (E*)p.dx + (t.b * p.l + l) * p.c + t.c0;
  for_vectors(t.c1 - t.c0, [&](int64_t v, int64_t lanes) SCAN_FLAT {
    const Pack<B> sums = convolve(taps, p.weight0 + t.c0, vf{}, v, lanes);
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
      backward_tokens<E>(p, t, s, l, s.g, p.kept * s.width, s.width, p.kept);
    else
      backward_tokens<E>(p, t, s, l, (const E*)p.grad + t.b * p.grad_b + t.c0, p.grad_k, p.grad_m, 0);
  }
  for (; m < p.m; m += B)  // outputs that read nothing but zeros
    for (int64_t k = 0; k < p.k; k++) backward_outputs<E>(p, t, s, k, m);
}

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
