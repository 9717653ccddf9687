// The C interface: checks orders, prepares parameters, chooses an instruction set, shares work out, adds partial sums up.
// How work is cut into partial sums depends on shapes alone, never on the number of threads, so results are bitwise
// reproducible.
#include <cstring>

#include "depthwise.h"
#include "parallel.h"
#include "pointwise.h"
#include "scan.h"

namespace scan {
namespace {

enum Selected : int64_t { kSelected = 0, kUnknownName = 1, kUnsupported = 2 };

struct Isa {
  const char* name;
  const Kernels* kernels;
  const ConvKernels* conv_kernels;
  const PointwiseKernels* pointwise_kernels;
  bool supported;
};

const std::vector<Isa>& isas() {  // the fastest first
#if defined(SCAN_X86)
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  static const std::vector<Isa> all{
      {"avx512", &kernels_avx512, &conv_kernels_avx512, &pointwise_kernels_avx512, avx512},
      {"avx2", &kernels_avx2, &conv_kernels_avx2, &pointwise_kernels_avx2, avx2},
      {"baseline", &kernels_baseline, &conv_kernels_baseline, &pointwise_kernels_baseline, true}};
#else
  static const std::vector<Isa> all{
      {"baseline", &kernels_baseline, &conv_kernels_baseline, &pointwise_kernels_baseline, true}};
#endif
  return all;
}

const Isa* best() {
  return &*std::find_if(isas().begin(), isas().end(), [](const Isa& isa) { return isa.supported; });
}

const Isa* selected = nullptr;

const Isa& current() {
  if (!selected) selected = best();
  return *selected;
}

struct Prepared {
  Problem p;
  std::vector<int32_t> identity;
  std::vector<uint8_t> visit, seen, seen_any;
  std::vector<float> parameters;
};

// Which tokens each order visits, and which visits come first (backward goes through the steps in reverse). False: a token
// is out of range.
bool prepare_orders(Prepared& s, bool backwards) {
  Problem& p = s.p;
  if (!p.orders) {
    s.identity.resize(p.t);
    for (int64_t i = 0; i < p.t; i++) s.identity[i] = (int32_t)i;
  }
  p.order = p.orders ? p.orders : s.identity.data();
  p.order_k = p.orders ? p.t : 0;
  s.visit.assign(p.k * p.t, 0);
  s.seen.assign(p.k * p.l, 0);
  s.seen_any.assign(p.l, 0);
  int64_t first = 0, first_any = 0;
  for (int64_t k = 0; k < p.k; k++)
    for (int64_t step = 0; step < p.t; step++) {
      const int64_t i = backwards ? p.t - 1 - step : step;
      const int64_t token = p.order[k * p.order_k + i];
      if (token < 0 || token >= p.l) return false;
      uint8_t &own = s.seen[k * p.l + token], &any = s.seen_any[token];
      s.visit[k * p.t + i] = (own ? 0 : kFirstInOrder) | (any ? 0 : kFirstOfAll);
      first += !own;
      first_any += !any;
      own = any = 1;
    }
  p.visit = s.visit.data();
  p.seen = s.seen.data();
  p.seen_any = s.seen_any.data();
  p.first_in_order = first == p.k * p.t;
  p.first_of_all = first_any == p.k * p.t;
  p.covers_in_order = first == p.k * p.l;
  p.covers_any = first_any == p.l;
  return true;
}

// Whether rows of `width` floats, one of each order, are all the same. Null: zeros.
bool same_rows(const Problem& p, const float* rows, int64_t width) {
  for (int64_t k = 1; rows && k < p.k; k++)
    if (std::memcmp(rows, rows + k * width, width * sizeof(float))) return false;
  return true;
}

void prepare_parameters(Prepared& s) {
  Problem& p = s.p;
  p.cp = round_up(p.c, kPad);
  p.weight_row = p.cp + 16;  // not a multiple of 4096 bytes for any c, which would slow the copy down
  s.parameters.assign(p.k * ((p.n + 2) * p.cp + p.rank * p.weight_row) + 3 * kSkew, 0.0f);
  float *A2 = s.parameters.data(), *D = A2 + p.k * p.n * p.cp + kSkew, *bias = D + p.k * p.cp + kSkew;
  float* weight = bias + p.k * p.cp + kSkew;
  for (int64_t k = 0; k < p.k; k++) {
    for (int64_t ch = 0; ch < p.c; ch++)
      for (int64_t j = 0; j < p.n; j++) A2[(k * p.n + j) * p.cp + ch] = p.A[(k * p.c + ch) * p.n + j] * kLog2e;
    if (p.D) std::memcpy(D + k * p.cp, p.D + k * p.c, p.c * sizeof(float));
    if (p.bias) std::memcpy(bias + k * p.cp, p.bias + k * p.c, p.c * sizeof(float));
    for (int64_t ch = 0; ch < p.c; ch++)
      for (int64_t r = 0; r < p.rank; r++)
        weight[(k * p.rank + r) * p.weight_row + ch] = p.dt_weight[(k * p.c + ch) * p.rank + r];
  }
  p.A2 = A2;
  p.D0 = D;
  p.bias0 = bias;
  p.weight0 = weight;
  p.one_decay = same_rows(p, p.A, p.c * p.n) && same_rows(p, p.bias, p.c) && same_rows(p, p.dt_weight, p.c * p.rank);
}

bool prepare(const Call& call, bool backwards, Prepared& s) {
  Problem& p = s.p;
  static_cast<Call&>(p) = call;
  p.window = std::min(p.window, p.t);
  // A thread is worth waking for this many updates of a state, about 5 microseconds.
  p.threads = std::min(p.threads, 1 + p.b * p.t * p.k * p.c * p.n / 32768);
  p.chunk = p.window > 1 ? round_up(kChunk, p.window) : kChunk;
  p.chunks = divide_up(p.t, p.chunk);
  if (!prepare_orders(s, backwards)) return false;
  prepare_parameters(s);
  return true;
}

// Runs `kernel` on every image, order (or all orders at once) and piece of channels, a multiple of `unit` wide.
template <class Scratch, class Kernel>
void run_tasks(const Problem& p, bool split_orders, int64_t unit, Scratch scratch_size, Kernel kernel) {
  const int64_t orders = split_orders ? p.k : 1, units = divide_up(p.c, unit);
  const int64_t wanted = choose_pieces(p.b * orders, units, p.threads);
  const int64_t width = divide_up(units, wanted) * unit, pieces = divide_up(p.c, width);
  const int64_t tasks = p.b * orders * pieces;
  const int64_t scratch = round_up(scratch_size(p, std::min(width, p.c)), 1024) + 256;
  Buffer buffer(scratch * std::min(p.threads, tasks));
  parallel(p.threads, tasks, [&](int64_t thread, int64_t i) {
    const int64_t piece = i % pieces, order = i / pieces % orders, b = i / pieces / orders;
    const Task task{b, order, split_orders ? order + 1 : p.k, piece * width, std::min((piece + 1) * width, p.c)};
    kernel(p, task, buffer.get() + thread * scratch);
  });
}

void store_as(float x, float* to) { *to = x; }
void store_as(float x, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *to = x == x ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

// Image b of (slices, b, l, k, n)
template <class E>
void add_slices(const Problem& p, int64_t b, const float* part, E* to) {
  const int64_t image = p.l * p.k * p.n;
  for (int64_t i = b * image; i < (b + 1) * image; i++) {
    float total = part[i];
    for (int64_t slice = 1; slice < p.slices; slice++) total += part[slice * p.b * image + i];
    store_as(total, to + i);
  }
}

// Order k of (b, k, n, cp), to (k, c, n)
void add_images(const Problem& p, int64_t k, int64_t n, const float* part, float* to) {
  for (int64_t ch = 0; ch < p.c; ch++)
    for (int64_t j = 0; j < n; j++) {
      float total = 0;
      for (int64_t b = 0; b < p.b; b++) total += part[((b * p.k + k) * n + j) * p.cp + ch];
      to[(k * p.c + ch) * n + j] = total;
    }
}

template <class E>
void add_partial_sums(const Problem& p) {
  parallel(p.threads, p.b + p.k, [&](int64_t, int64_t i) {
    if (i < p.b) {
      add_slices(p, i, p.dB_part, (E*)p.dB);
      add_slices(p, i, p.dC_part, (E*)p.dC);
    } else {
      add_images(p, i - p.b, p.n, p.dA_part, p.dA);
      if (p.D) add_images(p, i - p.b, 1, p.dD_part, p.dD);
      if (p.bias) add_images(p, i - p.b, 1, p.dbias_part, p.dbias);
    }
  });
}

int64_t forward(const Call& call) {
  Prepared s;
  if (!prepare(call, false, s)) return kOrderOutOfRange;
  const Kernels& kernels = *current().kernels;
  run_tasks(s.p, s.p.out != kSum, kLanes, kernels.forward_scratch, kernels.forward);
  return kOk;
}

int64_t backward(const Call& call) {
  Prepared s;
  if (!prepare(call, true, s)) return kOrderOutOfRange;
  Problem& p = s.p;
  const int64_t tasks = p.b * (p.u_shared ? 1 : p.k);
  const int64_t slices = std::max(divide_up(p.c, 128), std::min(divide_up(p.c, kLanes), divide_up(8, tasks)));
  p.slice = round_up(divide_up(p.c, slices), kLanes);
  p.slices = divide_up(p.c, p.slice);
  const int64_t states = p.b * p.l * p.k * p.n, parameters = p.b * p.k * p.cp;
  Buffer partial(2 * p.slices * states + parameters * (p.n + 2) + 4 * kSkew);
  p.dB_part = partial.get();
  p.dC_part = p.dB_part + p.slices * states + kSkew;
  p.dA_part = p.dC_part + p.slices * states + kSkew;
  p.dD_part = p.dA_part + parameters * p.n + kSkew;
  p.dbias_part = p.dD_part + parameters + kSkew;
  const Kernels& kernels = *current().kernels;
  run_tasks(p, !p.u_shared, p.slice, kernels.backward_scratch, kernels.backward);
  p.bf16 ? add_partial_sums<uint16_t>(p) : add_partial_sums<float>(p);
  return kOk;
}

}  // namespace

const ConvKernels& conv_kernels() { return *current().conv_kernels; }
const PointwiseKernels& pointwise_kernels() { return *current().pointwise_kernels; }

}  // namespace scan

SCAN_EXPORT int64_t backbones_scan_forward(const scan::Call* call) {
  return scan::guarded([&] { return scan::forward(*call); });
}

SCAN_EXPORT int64_t backbones_scan_backward(const scan::Call* call) {
  return scan::guarded([&] { return scan::backward(*call); });
}

// Two limits of this machine, for benchmarks. Every thread has its own `count` floats.
SCAN_EXPORT void backbones_scan_read(const float* from, int64_t count, int64_t threads) {
  std::vector<float> sums(threads);
  scan::parallel(threads, threads, [&](int64_t, int64_t i) {
    sums[i] = scan::current().kernels->read_all(from + i * count, count);
  });
}

SCAN_EXPORT void backbones_scan_exp2(const float* from, float* to, int64_t count, int64_t rounds, int64_t threads) {
  scan::parallel(threads, threads, [&](int64_t, int64_t i) {
    scan::current().kernels->exp2_all(from + i * count, to + i * count, count, rounds);
  });
}

SCAN_EXPORT int64_t backbones_scan_call_size() { return sizeof(scan::Call); }

// Empty: the best this CPU runs. 0 on success, 1 for an unknown name, 2 for one that this CPU lacks.
SCAN_EXPORT int64_t backbones_scan_select(const char* name) {
  if (!*name) {
    scan::selected = scan::best();
    return scan::kSelected;
  }
  for (const scan::Isa& isa : scan::isas())
    if (!std::strcmp(isa.name, name)) {
      if (!isa.supported) return scan::kUnsupported;
      scan::selected = &isa;
      return scan::kSelected;
    }
  return scan::kUnknownName;
}

SCAN_EXPORT const char* backbones_scan_isa() { return scan::current().name; }
