// Blending two arrays, compiled once per CPU level.
#include "kernels/blend.h"
#include "kernels/simd.h"

namespace fusedloss::FUSEDLOSS_CPU_LEVEL {
namespace {

template <typename T, typename A = Accumulator<T>>
void Blend(int64_t size, const T* x, A x_weight, const T* y, A y_weight, T* to) {
  const Vec<A> x_weights = Set(x_weight), y_weights = Set(y_weight);
  EachVector<A>(0, size, [&](int64_t i, auto lanes, auto) FUSEDLOSS_FLATTEN {
    const Vec<A> sum = x_weights * LoadLanes(x + i, lanes) + y_weights * LoadLanes(y + i, lanes);
    StoreLanes(to + i, sum, lanes, /*stream=*/false);
  });
}

template <typename T, typename A = Accumulator<T>>
void Scale(int64_t size, const T* from, A weight, T* to, bool stream) {
  const Vec<A> weights = Set(weight);
  auto vector = [&](int64_t i, auto lanes, auto) FUSEDLOSS_FLATTEN {
    StoreLanes(to + i, weights * LoadLanes(from + i, lanes), lanes, stream);
  };
  const int64_t head = stream ? UnalignedHead(to, size) : 0;
  if (head > 0) vector(0, First<A>(head), Slot<0>{});
  EachVector<A>(head, size, vector);
  if (stream) _mm_sfence();
}

}  // namespace

template <typename T>
BlendPasses<T> GetBlendPasses() {
  return {Blend<T>, Scale<T>};
}

template BlendPasses<float> GetBlendPasses<float>();
template BlendPasses<double> GetBlendPasses<double>();
template BlendPasses<Half> GetBlendPasses<Half>();
template BlendPasses<BFloat16> GetBlendPasses<BFloat16>();

}  // namespace fusedloss::FUSEDLOSS_CPU_LEVEL
