// The C interface of the depthwise convolution: checks tables, prepares parameters, shares work out, adds partial sums up.
#include "depthwise.h"

#include <cstring>

#include "parallel.h"

namespace scan {
namespace {

constexpr int64_t kStrip = 512;  // most channels worked on together, so that their rows stay in L1 and L2

struct PreparedConv {
  ConvProblem p;
  std::vector<float> parameters;
  std::vector<int32_t> ready;
};

bool in_range(const int32_t* table, int64_t size, int64_t rows) {
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < size; i++) low = std::min(low, table[i]), high = std::max(high, table[i]);
  return low >= -1 && high < rows;
}

void prepare_parameters(PreparedConv& s) {
  ConvProblem& p = s.p;
  p.cp = round_up(p.c, 64);
  s.parameters.assign(p.k * (p.j + 1) * p.cp, 0.0f);
  float *weight = s.parameters.data(), *bias = weight + p.k * p.j * p.cp;
  for (int64_t k = 0; k < p.k; k++) {
    for (int64_t ch = 0; ch < p.c; ch++)
      for (int64_t j = 0; j < p.j; j++) weight[(k * p.j + j) * p.cp + ch] = p.weight[(k * p.c + ch) * p.j + j];
    if (p.bias) std::memcpy(bias + k * p.cp, p.bias + k * p.c, p.c * sizeof(float));
  }
  p.weight0 = weight;
  p.bias0 = bias;
}

// When dx of a block of tokens can be computed, and how many outputs' gradients have to be kept for that.
void prepare_lag(PreparedConv& s) {
  ConvProblem& p = s.p;
  const int64_t blocks = divide_up(p.l, kConvBlock);
  s.ready.assign(blocks, 0);
  std::vector<int32_t> oldest(blocks + 1, (int32_t)p.m);
  for (int64_t i = 0; i < p.k * p.j; i++)
    for (int64_t l = 0; l < p.l; l++) {
      const int32_t output = p.inverse[i * p.l + l];
      int32_t &last = s.ready[l / kConvBlock], &first = oldest[l / kConvBlock];
      last = std::max(last, output + 1);
      if (output >= 0) first = std::min(first, output);
    }
  for (int64_t block = 1; block < blocks; block++) s.ready[block] = std::max(s.ready[block], s.ready[block - 1]);
  int64_t most = kConvBlock;
  for (int64_t block = blocks - 1; block >= 0; block--) {
    oldest[block] = std::min(oldest[block], oldest[block + 1]);
    most = std::max(most, round_up(s.ready[block], kConvBlock) - oldest[block]);
  }
  for (p.kept = kConvBlock; p.kept < most;) p.kept *= 2;
  p.ready = s.ready.data();
}

// A thread is worth waking for this many products, about 5 microseconds.
void limit_threads(ConvProblem& p) { p.threads = std::min(p.threads, 1 + p.b * p.k * p.m * p.c * p.j / 131072); }

int64_t forward(const ConvCall& call) {
  PreparedConv s;
  ConvProblem& p = s.p;
  static_cast<ConvCall&>(p) = call;
  if (!in_range(p.taps, p.k * p.j * p.m, p.l)) return kOrderOutOfRange;
  limit_threads(p);
  prepare_parameters(s);
  const int64_t strips = divide_up(p.c, kStrip), width = round_up(divide_up(p.c, strips), 32);
  const int64_t blocks = divide_up(p.m, kConvBlock), images = p.b * p.k * divide_up(p.c, width);
  const int64_t rows = divide_up(blocks, choose_pieces(images, blocks, p.threads)) * kConvBlock;
  const int64_t pieces = divide_up(p.m, rows), wide = divide_up(p.c, width), tasks = p.b * p.k * wide * pieces;
  const ConvKernels& kernels = conv_kernels();
  const int64_t scratch = round_up(kernels.forward_scratch(p, width), 1024) + 256;
  Buffer buffer(scratch * std::min(p.threads, tasks));
  parallel(p.threads, tasks, [&](int64_t thread, int64_t i) {
    const int64_t m = i % pieces * rows, strip = i / pieces % wide * width, image = i / pieces / wide;
    const ConvTask task{image / p.k, image % p.k, m, std::min(m + rows, p.m), strip, std::min(strip + width, p.c)};
    kernels.forward(p, task, buffer.get() + thread * scratch);
  });
  return kOk;
}

// Order k of (b, k, j + 1, cp), to (k, c, j) and (k, c)
void add_images(const ConvProblem& p, int64_t k) {
  for (int64_t j = 0; j <= p.j; j++)
    for (int64_t ch = 0; ch < p.c; ch++) {
      float total = 0;
      for (int64_t b = 0; b < p.b; b++) total += p.partial[((b * p.k + k) * (p.j + 1) + j) * p.cp + ch];
      if (j < p.j)
        p.dweight[(k * p.c + ch) * p.j + j] = total;
      else if (p.dbias)
        p.dbias[k * p.c + ch] = total;
    }
}

int64_t backward(const ConvCall& call) {
  PreparedConv s;
  ConvProblem& p = s.p;
  static_cast<ConvCall&>(p) = call;
  if (!in_range(p.taps, p.k * p.j * p.m, p.l) || !in_range(p.inverse, p.k * p.j * p.l, p.m)) return kOrderOutOfRange;
  limit_threads(p);
  prepare_parameters(s);
  prepare_lag(s);
  Buffer partial(p.b * p.k * (p.j + 1) * p.cp);
  p.partial = partial.get();
  const int64_t units = divide_up(p.c, 32);
  const int64_t pieces = std::max(choose_pieces(p.b, units, p.threads), divide_up(p.c, kStrip));
  const int64_t width = divide_up(units, pieces) * 32, wide = divide_up(p.c, width), tasks = p.b * wide;
  const ConvKernels& kernels = conv_kernels();
  const int64_t scratch = round_up(kernels.backward_scratch(p, width), 1024) + 256;
  Buffer buffer(scratch * std::min(p.threads, tasks));
  parallel(p.threads, tasks, [&](int64_t thread, int64_t i) {
    const int64_t c0 = i % wide * width;
    kernels.backward(p, {i / wide, 0, 0, p.m, c0, std::min(c0 + width, p.c)}, buffer.get() + thread * scratch);
  });
  parallel(p.threads, p.k, [&](int64_t, int64_t k) { add_images(p, k); });
  return kOk;
}

}  // namespace
}  // namespace scan

SCAN_EXPORT int64_t backbones_depthwise_forward(const scan::ConvCall* call) {
  return scan::guarded([&] { return scan::forward(*call); });
}

SCAN_EXPORT int64_t backbones_depthwise_backward(const scan::ConvCall* call) {
  return scan::guarded([&] { return scan::backward(*call); });
}

SCAN_EXPORT int64_t backbones_depthwise_call_size() { return sizeof(scan::ConvCall); }
