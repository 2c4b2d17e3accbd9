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
  bool focal;             // for T = A alone
  bool rich;              // anything beyond plain cross-entropy over all classes
  bool has_subset;        // L_S is wanted, and rows outside S have none
  bool normalize_full;    // L_S is normalised over all classes
  bool stream;            // the gradient is larger than the caches
  const A* class_weight;  // [classes], or null: all 1
  A full_class_weight;    // Σ_c class_weight[c]
  A subset_weight, full_weight;
  A label_smoothing, one_minus_smoothing;
  A lowest, highest;  // of probabilities: ε and 1 − ε
  A lowest_target;    // to which targets are raised: 0, or −Inf to leave them
  A inverse_temperature, z_loss, softcap, gamma;
};

// S of a row, or of all.
template <typename A>
struct SoftmaxXentSubset {
  const uint8_t* bits;   // a bit set over the classes, 8 zero bytes behind it; null: all classes
  A size, class_weight;  // |S| and Σ_{c in S} class_weight[c]
};

// A block of rows, row-major. All but `predictions` and `subsets` may be null.
template <typename T>
struct SoftmaxXentBlock {
  using A = Accumulator<T>;
  int64_t rows;
  const T* predictions;
  const int64_t* labels;  // [rows], in [0, classes); −1: the row has loss 0 and gradient 0
  const A* targets;       // [rows, classes]
  const SoftmaxXentSubset<A>* subsets;  // [rows], or one for all if subset_stride is 0, else 1
  int64_t subset_stride;
  A* loss;              // out
  A* stats;             // out of the forward pass, in to the backward one
  A* metrics;           // [rows, 3] out of the passes that make the loss
  const A* cotangents;  // [rows]
  T* gradient;          // out
  A* scratch;           // [classes + 16], aligned to 64 bytes, where rows are pipelined
};

// One version of the three passes. Only pipelined rows heed the softcap: for the others it is put
// on the predictions and taken off the gradient.
template <typename T>
struct SoftmaxXentPasses {
  using A = Accumulator<T>;
  using Pass = void (*)(const SoftmaxXentPlan<A>&, const SoftmaxXentBlock<T>&);
  Pass forward;   // predictions → loss, stats, metrics
  Pass backward;  // predictions, stats, cotangents → gradient
  Pass both;      // predictions, cotangents → loss, metrics, gradient
  // to = softcap · tanh(from / softcap), or from itself for a softcap of 0.
  void (*cap)(int64_t size, const T* from, A softcap, A* to);
  // to = gradient · ∂capped/∂from.
  void (*uncap)(int64_t size, const A* gradient, const A* capped, A softcap, T* to, bool stream);
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
