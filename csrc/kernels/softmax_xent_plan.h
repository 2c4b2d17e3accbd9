// Between softmax_xent_cpu.cc, which prepares a call and cuts it into blocks of rows, and
// softmax_xent_simd.cc, which is compiled once per CPU level and runs a block.
#ifndef FUSEDLOSS_KERNELS_SOFTMAX_XENT_PLAN_H_
#define FUSEDLOSS_KERNELS_SOFTMAX_XENT_PLAN_H_

#include <cstdint>

#include "kernels/half.h"

namespace fusedloss {

// Rows of plain cross-entropy from logits and labels are pipelined if they are this long, and short
// enough for their powers to stay in a second-level cache of 1 MiB; see softmax_xent_simd.cc.
constexpr int64_t kPipelineChunk = 512;  // classes
constexpr int64_t kMinPipelineClasses = 4 * kPipelineChunk;
constexpr int64_t kPipelineBytes = 512 << 10;

// What is the same for all rows. `A` is the type of sums.
template <typename A>
struct SoftmaxXentPlan {
  int64_t classes;  // at least 1
  bool from_logits;
  bool rich;                 // anything beyond plain cross-entropy over all classes
  bool has_subset;           // L_S is wanted, and rows outside S have none
  bool normalize_full;       // L_S is normalised over all classes
  const uint8_t* in_subset;  // bit set over the classes, 8 zero bytes behind it; null: all classes
  const A* class_weight;     // [classes], or null: all 1
  A subset_size, subset_class_weight;  // |S| and Σ_{c in S} class_weight[c]
  A full_class_weight;                 // Σ_c class_weight[c]
  A subset_weight, full_weight;
  A label_smoothing, one_minus_smoothing;
  A lowest, highest;  // of probabilities: ε and 1 − ε
  bool stream;        // the gradient is larger than the caches
};

// A block of rows, row-major. All but `predictions` may be null.
template <typename T>
struct SoftmaxXentBlock {
  using A = Accumulator<T>;
  int64_t rows;
  const T* predictions;
  const int64_t* labels;  // [rows], in [0, classes); −1: the row has loss 0 and gradient 0
  const A* targets;
  A* loss;              // out
  A* stats;             // out of the forward pass, in to the backward one
  const A* cotangents;  // [rows]
  T* gradient;          // out
  A* scratch;           // [classes + 16], aligned to 64 bytes, where rows are pipelined
};

// One version of the three passes.
template <typename T>
struct SoftmaxXentPasses {
  using Pass = void (*)(const SoftmaxXentPlan<Accumulator<T>>&, const SoftmaxXentBlock<T>&);
  Pass forward;   // predictions → loss, stats
  Pass backward;  // predictions, stats, cotangents → gradient
  Pass both;      // predictions, cotangents → loss, gradient
};

namespace baseline {
template <typename T>
SoftmaxXentPasses<T> GetSoftmaxXentPasses();
}
namespace avx2 {
template <typename T>
SoftmaxXentPasses<T> GetSoftmaxXentPasses();
}
namespace avx512 {
template <typename T>
SoftmaxXentPasses<T> GetSoftmaxXentPasses();
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_SOFTMAX_XENT_PLAN_H_
