// Between penalty_cpu.cc, which cuts the variables into spans, and penalty_simd.cc, which is
// compiled once per CPU level and runs one.
#ifndef FUSEDLOSS_KERNELS_PENALTY_PLAN_H_
#define FUSEDLOSS_KERNELS_PENALTY_PLAN_H_

#include <cstdint>

#include "kernels/half.h"

namespace fusedloss {

// Consecutive elements of one variable.
struct PenaltySpan {
  int64_t size;
  const void* values;  // [size]
  void* gradient;      // [size] out, or null
  double l1, l2;
  double dpenalty;
  bool stream;  // the gradients are larger than the caches
};

// One version of the pass over a span of type T. Returns l1·Σ|W| + l2·ΣW².
using PenaltyPass = double (*)(const PenaltySpan&);

namespace baseline {
template <typename T>
double RunPenalty(const PenaltySpan&);
}
namespace avx2 {
template <typename T>
double RunPenalty(const PenaltySpan&);
}
namespace avx512 {
template <typename T>
double RunPenalty(const PenaltySpan&);
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_PENALTY_PLAN_H_
