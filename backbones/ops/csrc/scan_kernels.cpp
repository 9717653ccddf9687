// Compiled once per instruction set, with SCAN_ISA naming it: see setup.py.
#include "scan_backward.h"
#include "scan_forward.h"

#define SCAN_JOIN_(a, b) a##b
#define SCAN_JOIN(a, b) SCAN_JOIN_(a, b)

namespace scan {
namespace {

int64_t forward_scratch(const Problem& p, int64_t channels) { return ForwardScratch(p, channels, nullptr).size; }
int64_t backward_scratch(const Problem& p, int64_t channels) { return BackwardScratch(p, channels, nullptr).size; }

void forward(const Problem& p, const Task& task, float* scratch) {
  p.bf16 ? forward_task<bf16>(p, task, scratch) : forward_task<float>(p, task, scratch);
}

void backward(const Problem& p, const Task& task, float* scratch) {
  p.bf16 ? backward_task<bf16>(p, task, scratch) : backward_task<float>(p, task, scratch);
}

}  // namespace

extern const Kernels SCAN_JOIN(kernels_, SCAN_ISA) = {forward_scratch, backward_scratch, forward, backward};

}  // namespace scan
