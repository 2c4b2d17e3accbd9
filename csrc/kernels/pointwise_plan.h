// Between pointwise_cpu.cc, which cuts a call into spans, and pointwise_simd.cc, which is compiled
// once per CPU level and runs one.
#ifndef FUSEDLOSS_KERNELS_POINTWISE_PLAN_H_
#define FUSEDLOSS_KERNELS_POINTWISE_PLAN_H_

#include <cstdint>

#include "kernels/half.h"
#include "kernels/pointwise.h"

namespace fusedloss {

// What is the same for all elements. `A` is the type of sums.
template <typename A>
struct PointwisePlan {
  Pointwise kind;
  A parameter;
  A lowest, highest;  // of probabilities: ε and 1 − ε
  bool stream;        // the gradient is larger than the caches
};

// Consecutive elements.
template <typename T, typename Y>
struct PointwiseSpan {
  using A = Accumulator<T>;
  int64_t size;
  const T* predictions;
  const Y* targets;  // [size], or one for all
  // Each [size], or null.
  const A* output_weights;  // w
  const A* quantiles;
  const A* cotangents;
  bool one_target;
  A scale;
  T* gradient;  // [size] out, or null: scale · cotangents · w · ∂f/∂p
  A* losses;    // [size] out, or null: w · f
};

// One version of the pass over a span. Returns Σ cotangents · w · f.
template <typename T, typename Y>
using PointwisePass = Accumulator<T> (*)(const PointwisePlan<Accumulator<T>>&,
                                         const PointwiseSpan<T, Y>&);

namespace baseline {
template <typename T, typename Y>
Accumulator<T> RunPointwise(const PointwisePlan<Accumulator<T>>&, const PointwiseSpan<T, Y>&);
}
namespace avx2 {
template <typename T, typename Y>
Accumulator<T> RunPointwise(const PointwisePlan<Accumulator<T>>&, const PointwiseSpan<T, Y>&);
}
namespace avx512 {
template <typename T, typename Y>
Accumulator<T> RunPointwise(const PointwisePlan<Accumulator<T>>&, const PointwiseSpan<T, Y>&);
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_POINTWISE_PLAN_H_
