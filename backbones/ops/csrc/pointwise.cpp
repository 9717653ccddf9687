// The C interface of the gate and of the norms: shares rows out, adds partial sums up.
#include "pointwise.h"

#include <cstring>

#include "parallel.h"

namespace scan {
namespace {

// A piece of rows large enough to be worth a thread, and the same for any number of threads.
int64_t rows_of_a_piece(int64_t rows, int64_t c) { return std::max(divide_up(16384, c), divide_up(rows, 256)); }

template <class Call, class Kernel>  // kernel(row, end, piece)
int64_t in_pieces(const Call& call, Kernel kernel) {
  const int64_t rows = rows_of_a_piece(call.rows, call.c);
  parallel(call.threads, divide_up(call.rows, rows), [&](int64_t, int64_t i) {
    kernel(i * rows, std::min((i + 1) * rows, call.rows), i);
  });
  return kOk;
}

template <class Call>
int64_t run(const Call& call, void (*kernel)(const Call&, int64_t, int64_t)) {
  return guarded([&] { return in_pieces(call, [&](int64_t row, int64_t end, int64_t) { kernel(call, row, end); }); });
}

struct PreparedNorm {
  NormProblem p;
  std::vector<float> parameters;
};

float widened(const void* from, bool half, int64_t i) {
  if (!half) return ((const float*)from)[i];
  const uint32_t bits = (uint32_t)((const uint16_t*)from)[i] << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void prepare(const NormCall& call, PreparedNorm& s) {
  NormProblem& p = s.p;
  static_cast<NormCall&>(p) = call;
  p.cp = round_up(p.c, 64);
  s.parameters.assign(2 * p.cp, 0.0f);
  for (int64_t i = 0; i < p.c; i++) {
    s.parameters[i] = p.weight ? widened(p.weight, p.weight_bf16, i) : 1.0f;
    if (p.bias) s.parameters[p.cp + i] = widened(p.bias, p.weight_bf16, i);
  }
  p.weight0 = s.parameters.data();
  p.bias0 = p.weight0 + p.cp;
}

int64_t norm(const NormCall& call) {
  PreparedNorm s;
  prepare(call, s);
  const NormProblem& p = s.p;
  return in_pieces(p, [&](int64_t row, int64_t end, int64_t) { pointwise_kernels().norm(p, row, end); });
}

int64_t norm_backward(const NormCall& call) {
  PreparedNorm s;
  prepare(call, s);
  const NormProblem& p = s.p;
  const int64_t pieces = divide_up(p.rows, rows_of_a_piece(p.rows, p.c)), width = 2 * p.cp;
  std::vector<float> sums(pieces * width, 0.0f);
  in_pieces(p, [&](int64_t row, int64_t end, int64_t piece) {
    pointwise_kernels().norm_backward(p, row, end, sums.data() + piece * width);
  });
  for (int64_t ch = 0; ch < p.c; ch++) {
    float weight = 0, bias = 0;
    for (int64_t piece = 0; piece < pieces; piece++) {
      weight += sums[piece * width + ch];
      bias += sums[piece * width + p.cp + ch];
    }
    p.dweight[ch] = weight;
    p.dbias[ch] = bias;
  }
  return kOk;
}

}  // namespace
}  // namespace scan

SCAN_EXPORT int64_t backbones_gate_forward(const scan::GateCall* call) {
  return scan::run(*call, scan::pointwise_kernels().gate);
}

SCAN_EXPORT int64_t backbones_gate_backward(const scan::GateCall* call) {
  return scan::run(*call, scan::pointwise_kernels().gate_backward);
}

SCAN_EXPORT int64_t backbones_gate_call_size() { return sizeof(scan::GateCall); }

SCAN_EXPORT int64_t backbones_norm_forward(const scan::NormCall* call) {
  return scan::guarded([&] { return scan::norm(*call); });
}

SCAN_EXPORT int64_t backbones_norm_backward(const scan::NormCall* call) {
  return scan::guarded([&] { return scan::norm_backward(*call); });
}

SCAN_EXPORT int64_t backbones_norm_call_size() { return sizeof(scan::NormCall); }
