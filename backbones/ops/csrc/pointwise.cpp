// The C interface of the gate and of RMSNorm: shares rows out, adds partial sums up.
#include "pointwise.h"

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

int64_t rms_norm_backward(const NormCall& call) {
  const int64_t pieces = divide_up(call.rows, rows_of_a_piece(call.rows, call.c));
  std::vector<float> sums(pieces * call.c, 0.0f);
  in_pieces(call, [&](int64_t row, int64_t end, int64_t piece) {
    pointwise_kernels().rms_norm_backward(call, row, end, sums.data() + piece * call.c);
  });
  for (int64_t ch = 0; ch < call.c; ch++) {
    float total = 0;
    for (int64_t piece = 0; piece < pieces; piece++) total += sums[piece * call.c + ch];
    call.dweight[ch] = total;
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

SCAN_EXPORT int64_t backbones_rms_norm_forward(const scan::NormCall* call) {
  return scan::run(*call, scan::pointwise_kernels().rms_norm);
}

SCAN_EXPORT int64_t backbones_rms_norm_backward(const scan::NormCall* call) {
  return scan::guarded([&] { return scan::rms_norm_backward(*call); });
}

SCAN_EXPORT int64_t backbones_rms_norm_call_size() { return sizeof(scan::NormCall); }
