// Weighted sums of two arrays in pieces that fit a cache, and the way back for their gradients.
// blend_simd.cc is compiled once per CPU level.
#ifndef FUSEDLOSS_KERNELS_BLEND_H_
#define FUSEDLOSS_KERNELS_BLEND_H_

#include <cstdint>

#include "kernels/half.h"

namespace fusedloss {

// One version of the two. Arithmetic happens in A; results are rounded to T.
template <typename T>
struct BlendPasses {
  using A = Accumulator<T>;
  // to[i] = x_weight · x[i] + y_weight · y[i]
  void (*blend)(int64_t size, const T* x, A x_weight, const T* y, A y_weight, T* to);
  // to[i] = weight · from[i], past the caches if `stream`
  void (*scale)(int64_t size, const T* from, A weight, T* to, bool stream);
};

namespace baseline {
template <typename T>
BlendPasses<T> GetBlendPasses();
}
namespace avx2 {
template <typename T>
BlendPasses<T> GetBlendPasses();
}
namespace avx512 {
template <typename T>
BlendPasses<T> GetBlendPasses();
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_BLEND_H_
