// A penalty on weights: a sum over any number of variables W_k of any sizes and types.
//
//   penalty = Σ_k  l1[k]·Σ_i |W_k[i]| + l2[k]·Σ_i W_k[i]²
//   dW_k[i] = dpenalty · (l1[k]·sign W_k[i] + 2·l2[k]·W_k[i]),   sign 0 = 0
//
// Means instead of sums are coefficients divided by the sizes. NaN and Inf propagate.
#ifndef FUSEDLOSS_KERNELS_PENALTY_H_
#define FUSEDLOSS_KERNELS_PENALTY_H_

#include <cstdint>

#include "kernels/device.h"
#include "kernels/half.h"

namespace fusedloss {

enum class FloatType { kFloat, kDouble, kHalf, kBFloat16 };

// Bytes.
inline int64_t SizeOf(FloatType type) {
  switch (type) {
    case FloatType::kFloat:
      return 4;
    case FloatType::kDouble:
      return 8;
    default:
      return 2;
  }
}

struct PenaltyVariable {
  FloatType type;
  int64_t size;        // may be 0
  const void* values;  // [size]
  void* gradient;      // [size] out, or null: not wanted; wanted of all variables or of none
};

// A: of penalty and dpenalty. Sums over float64 variables are float64, over all others float32 in
// runs that are added in float64.
template <typename A>
struct PenaltyArgs {
  const PenaltyVariable* variables;  // [count], on the host even for a GPU
  int64_t count;
  const double* coefficients;  // [count, 2]: l1, l2
  const A* dpenalty;           // one number, or null: 1
  A* penalty;                  // one number out, or null: not wanted
};

// Value and gradients in one pass over all variables, whose cost depends on their total size and
// hardly on their number. Results do not depend on the number of threads.
template <typename A>
void Penalty(const Cpu& cpu, const PenaltyArgs<A>& args);
// The same on device pointers, that of the coefficients too; enqueues, never waits. The same bits
// for every run on one model.
template <typename A>
GpuError Penalty(const Gpu& gpu, const PenaltyArgs<A>& args);

// No call asks Gpu::allocate for more bytes than these, every piece rounded up to a multiple of
// 256.
inline int64_t PenaltyWorkspace(int64_t count) { return 64 * count + (65 << 10); }

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_PENALTY_H_
