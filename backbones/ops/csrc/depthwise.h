// What the dispatcher and the kernels of the depthwise convolution share.
#pragma once

#include <cstdint>

namespace scan {

// One record of 64-bit integers and pointers: `ConvCall` in backbones/ops/native.py has the same fields.
struct ConvCall {
  int64_t b, l, m, k, c, j;
  int64_t bf16;  // x, grad, y and dx are bfloat16 instead of float32
  int64_t silu, threads;
  const void *x, *grad;
  int64_t x_b, x_l, grad_k, grad_b, grad_m;  // strides in elements; the channel axis is contiguous
  const float *weight, *bias;                // (k, c, j), (k, c) or null
  const int32_t *taps, *inverse;             // (k, j, m), (k, j, l); -1 is none
  void *y, *dx;                              // (k, b, m, c), (b, l, c)
  float *dweight, *dbias;                    // (k, c, j), (k, c) or null
};

constexpr int64_t kConvBlock = 8;  // outputs, or tokens of dx, that are worked on together

struct ConvProblem : ConvCall {
  int64_t cp;            // c rounded up to a multiple that every vector width divides
  const float* weight0;  // (k, j, cp)
  const float* bias0;    // (k, cp), zero where the bias is null
  const int32_t* ready;  // backward: how many outputs have to be done before each block of tokens
  int64_t kept;          // backward: how many outputs' gradients are kept, a power of 2
  float* partial;        // backward: (b, k, j + 1, cp), the gradients of weight and bias from each image
};

// Forward: outputs m0..m1 of order k. Backward: all of the image. c0 is a multiple of every vector width.
struct ConvTask {
  int64_t b, k, m0, m1, c0, c1;
};

struct ConvKernels {
  int64_t (*forward_scratch)(const ConvProblem&, int64_t channels);  // floats one thread needs
  int64_t (*backward_scratch)(const ConvProblem&, int64_t channels);
  void (*forward)(const ConvProblem&, const ConvTask&, float* scratch);
  void (*backward)(const ConvProblem&, const ConvTask&, float* scratch);
};

extern const ConvKernels conv_kernels_baseline;
#if defined(SCAN_X86)
extern const ConvKernels conv_kernels_avx2;
extern const ConvKernels conv_kernels_avx512;
#endif

const ConvKernels& conv_kernels();  // of the instruction set in use

}  // namespace scan
