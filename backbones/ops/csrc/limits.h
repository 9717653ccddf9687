// What the scan is measured against: how fast this machine reads memory, and computes the kernel's own 2^x.
#pragma once

#include "rows.h"

namespace scan {
namespace {

float read_all(const float* p, int64_t count) {  // their sum, so that no read can be left out
  constexpr int64_t kStep = 8 * W;
  Pack<8> total(0.0f);
  for (int64_t i = 0; i + kStep <= count; i += kStep) {
    __builtin_prefetch(p + i + 64 * kStep / 8);
    total = total + load_pack<8>(p + i);
  }
  float sum_of_all = 0;
  for (const vf& x : total.v) sum_of_all += sum(x);
  return sum_of_all;
}

void exp2_all(const float* from, float* to, int64_t count, int64_t rounds) {
  for (int64_t round = 0; round < rounds; round++) {
    asm volatile("" ::: "memory");  // every round computes again
    for_row(count, [&](int64_t v, int64_t lanes, auto size) SCAN_FLAT {
      constexpr int U = decltype(size)::value;
      store_pack(to + v, exp2(load_pack<U>(from + v, lanes)), lanes);
    });
  }
}

}  // namespace
}  // namespace scan
