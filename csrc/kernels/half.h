// The 16-bit types as they lie in memory. Arithmetic happens in float; see simd.h for the
// conversions.
#ifndef FUSEDLOSS_KERNELS_HALF_H_
#define FUSEDLOSS_KERNELS_HALF_H_

#include <cstdint>

namespace fusedloss {

struct Half {  // IEEE 754 binary16
  uint16_t bits;
};

struct BFloat16 {  // the upper half of a float
  uint16_t bits;
};

// What sums over a T are held in: float64 for float64, float32 for all else. A struct, since
// compilers differ in how they name a function whose type holds an expression.
template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_HALF_H_
