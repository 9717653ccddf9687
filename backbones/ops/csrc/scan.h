// What the dispatcher and the kernels share: the call as Python makes it, the prepared problem, the unit of parallel work.
#pragma once

#include <cstdint>

namespace scan {

enum Out : int64_t { kSum = 0, kPerOrder = 1, kPerStep = 2 };

struct Strides {  // in elements; the channel (or state) axis is contiguous
  int64_t b, l, k;
};

// One record of 64-bit integers and pointers: `ScanCall` in backbones/ops/native.py has the same fields.
struct Call {
  int64_t b, l, t, k, c, n;
  int64_t bf16;      // u, delta, B, C and y are bfloat16 instead of float32
  int64_t u_shared;  // u is (b, l, c), read by every order
  int64_t softplus, out, window, threads;
  const void *u, *delta, *B, *C, *grad;
  Strides su, sdelta, sB, sC, sgrad;
  const float *A, *D, *bias;  // (k, c, n), (k, c) or null, (k, c) or null
  const float* dt_weight;     // (k, c, rank) or null: delta is (b, l, k, rank), to be multiplied by it
  int64_t rank;               // 0 where dt_weight is null
  const int32_t* orders;      // (k, t) or null: the identity
  void* y;
  float* states;  // (b, k, chunks - 1, n, c): the state before every chunk but the first; null: not wanted
  void *du, *ddelta, *dB, *dC;  // ddelta is (b, l, k, c), and float32 where dt_weight is given
  float *dA, *dD, *dbias;
};

constexpr int64_t kChunk = 64;     // steps between two saved states
constexpr int64_t kPad = 64;       // channels of prepared parameters are padded to a multiple of this
constexpr int64_t kLanes = 32;     // tasks and slices start at multiples of this, whatever the vector width
constexpr int64_t kSkew = 5 * 16;  // floats between buffers, to keep them apart modulo 4096 bytes
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// A visit is the first of its token within its own order, or among all orders taken one after the other:
// the first one stores, the others add, so no output needs to be cleared beforehand.
enum Visit : uint8_t { kFirstInOrder = 1, kFirstOfAll = 2 };

struct Problem : Call {
  int64_t cp;              // c rounded up to kPad
  int64_t chunk, chunks;   // steps between saved states, and how many such pieces t has
  int64_t slice, slices;   // backward: channels that share one partial sum of dB and dC
  const float* A2;         // (k, n, cp): A log2(e), so that exp(dt A) is exp2(dt A2)
  const float* D0;         // (k, cp), zero where D is null
  const float* bias0;      // (k, cp), zero where the bias is null
  const float* weight0;    // (k, rank, weight_row): dt_weight, channels last
  int64_t weight_row;
  bool one_decay;          // all orders have the same A, bias and dt_weight
  const int32_t* order;    // (k, t), or one row when order_k is 0
  int64_t order_k;
  const uint8_t* visit;    // (k, t) of Visit
  const uint8_t* seen;     // (k, l): the order visits the token
  const uint8_t* seen_any; // (l): some order does
  bool first_in_order, first_of_all;   // every visit is
  bool covers_in_order, covers_any;    // no token is left out
  float *dB_part, *dC_part;            // (slices, b, l, k, n)
  float *dA_part;                      // (b, k, n, cp)
  float *dD_part, *dbias_part;         // (b, k, cp)
};

// Orders k0..k1 and channels c0..c1 of image b. c0 is a multiple of kLanes (forward) or of the slice (backward).
struct Task {
  int64_t b, k0, k1, c0, c1;
};

struct Kernels {
  int64_t (*forward_scratch)(const Problem&, int64_t channels);  // floats one thread needs
  int64_t (*backward_scratch)(const Problem&, int64_t channels);
  void (*forward)(const Problem&, const Task&, float* scratch);
  void (*backward)(const Problem&, const Task&, float* scratch);
  float (*read_all)(const float*, int64_t count);
  void (*exp2_all)(const float* from, float* to, int64_t count, int64_t rounds);
};

extern const Kernels kernels_baseline;
#if defined(SCAN_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace scan
