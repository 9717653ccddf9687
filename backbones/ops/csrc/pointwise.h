// What the dispatcher and the kernels of the gate and of RMSNorm share.
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

struct NormCall {
  int64_t rows, c, threads;
  const float *x, *grad;
  int64_t x_row, grad_row;
  const float* weight;  // (c)
  float *y, *dx;
  float* dweight;  // (c)
  double eps;
};

// Rows row..end. `sums` has c floats, to which the rows' share of dweight is added.
struct PointwiseKernels {
  void (*gate)(const GateCall&, int64_t row, int64_t end);
  void (*gate_backward)(const GateCall&, int64_t row, int64_t end);
  void (*rms_norm)(const NormCall&, int64_t row, int64_t end);
  void (*rms_norm_backward)(const NormCall&, int64_t row, int64_t end, float* sums);
};

extern const PointwiseKernels pointwise_kernels_baseline;
#if defined(SCAN_X86)
extern const PointwiseKernels pointwise_kernels_avx2;
extern const PointwiseKernels pointwise_kernels_avx512;
#endif

const PointwiseKernels& pointwise_kernels();  // of the instruction set in use

}  // namespace scan
