// Between feature_distance_cpu.cc, which cuts the feature maps into strips, and
// feature_distance_simd.cc, which is compiled once per CPU level and runs one.
#ifndef FUSEDLOSS_KERNELS_FEATURE_DISTANCE_PLAN_H_
#define FUSEDLOSS_KERNELS_FEATURE_DISTANCE_PLAN_H_

#include <cstdint>

#include "kernels/feature_distance.h"
#include "kernels/half.h"

namespace fusedloss {

// What is the same for all strips. `A` is the type of sums.
template <typename A>
struct FeaturePlan {
  FeatureMetric metric;
  bool channels_last;
  bool epsilon_in_root;
  A epsilon;
  bool stream;  // the gradients are larger than the caches
};

// The same positions of the maps of some examples. All pointers are to the first of these.
template <typename T>
struct FeatureStrip {
  using A = Accumulator<T>;
  int64_t rows, positions, channels;
  int64_t row_stride;         // elements between predictions of two rows
  int64_t target_row_stride;  // 0: one target for all rows
  int64_t channel_stride;     // elements between two channels, unless channels_last
  const T* predictions;
  const T* targets;
  const A* channel_weights;  // [channels], or null
  int64_t repeats;           // how often an elementwise metric finds them one after the other
  A scale;                   // of the gradients
  const A* cotangents;       // [rows], or null: all 1
  T* dpredictions;           // out, laid out as predictions; or null
  T* dtargets;               // out, laid out as targets, where each row has its own; or null
  A* target_sums;     // out, where the rows have one: [positions, channels] as they are laid out,
                      // the sum of what would be dtargets; or null
  double* distances;  // [rows] out: sums over the strip, before any divisor
};

// The end of the gradient of one target: dtargets = Σ_range sums[range].
template <typename T>
struct FeatureSums {
  int64_t positions, channels;
  int64_t channel_stride;  // of dtargets, unless channels_last
  int64_t ranges, range_stride;
  const Accumulator<T>* sums;
  T* dtargets;
};

#define FUSEDLOSS_FEATURE_PASSES(level)                                             \
  namespace level {                                                                 \
  template <typename T>                                                             \
  void RunFeatureStrip(const FeaturePlan<Accumulator<T>>&, const FeatureStrip<T>&); \
  template <typename T>                                                             \
  void RunFeatureSums(const FeaturePlan<Accumulator<T>>&, const FeatureSums<T>&);   \
  }
FUSEDLOSS_FEATURE_PASSES(baseline)
FUSEDLOSS_FEATURE_PASSES(avx2)
FUSEDLOSS_FEATURE_PASSES(avx512)
#undef FUSEDLOSS_FEATURE_PASSES

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_FEATURE_DISTANCE_PLAN_H_
