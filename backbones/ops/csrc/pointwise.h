// What the dispatcher and the kernels of the gate and of the norms share.
#pragma once

#include <cstdint>

namespace scan {

// Records of 64-bit integers, pointers and a double: those of the same names in backbones/ops/native.py. x, z, grad and
// the results are (rows, c), contiguous but for what is read, which has a distance between rows, in elements.
struct GateCall {
  int64_t rows, c, threads;
  int64_t bf16;  // all are bfloat16 instead of float32
  const void *x, *z, *grad;
  int64_t x_row, z_row, grad_row;
  void *y, *dx, *dz;
  double scale;
};

// LayerNorm, or RMSNorm unless centred, of x + branch.
struct NormCall {
  int64_t rows, c, threads, centred;
  int64_t x_bf16, branch_bf16, y_bf16, weight_bf16;  // bfloat16 instead of float32; total, stream and dx are as x,
                                                     // grad is as y, dbranch as branch, bias as weight
  const void *x, *branch, *grad, *stream;            // branch, and the gradient of total, may be null
  int64_t x_row, branch_row, grad_row, stream_row;
  const void *weight, *bias;  // (c) or null
  void *total, *y, *dx, *dbranch;
  float* statistics;       // (rows, 2), from forward to backward: the mean, 0 unless centred, and the scale
  float *dweight, *dbias;  // (c)
  double eps;
};

// weight and bias, 1 and 0 where there are none, with as many zeros behind them as the widest vectors need.
struct NormProblem : NormCall {
  const float *weight0, *bias0;
  int64_t cp;  // c rounded up
};

// Rows row..end. To `sums`, 2 cp floats, the rows' share of dweight and dbias is added.
struct PointwiseKernels {
  void (*gate)(const GateCall&, int64_t row, int64_t end);
  void (*gate_backward)(const GateCall&, int64_t row, int64_t end);
  void (*norm)(const NormProblem&, int64_t row, int64_t end);
  void (*norm_backward)(const NormProblem&, int64_t row, int64_t end, float* sums);
};

extern const PointwiseKernels pointwise_kernels_baseline;
#if defined(SCAN_X86)
extern const PointwiseKernels pointwise_kernels_avx2;
extern const PointwiseKernels pointwise_kernels_avx512;
#endif

const PointwiseKernels& pointwise_kernels();  // of the instruction set in use

}  // namespace scan
