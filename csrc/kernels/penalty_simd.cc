// The arithmetic of the penalty on weights, compiled once per CPU level.
#include "kernels/penalty_plan.h"
#include "kernels/simd.h"

namespace fusedloss::FUSEDLOSS_CPU_LEVEL {
namespace {

// kL1, kL2: which terms there are. One with coefficient 0 is not: it makes no NaN of an Inf.
template <typename T, bool kGradient, bool kL1, bool kL2>
double Run(const PenaltySpan& span) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const T* values = static_cast<const T*>(span.values);
  T* gradient = static_cast<T*>(span.gradient);
  const bool stream = span.stream;
  const V l1 = Set(static_cast<A>(span.dpenalty * span.l1));
  const V twice_l2 = Set(static_cast<A>(2 * span.dpenalty * span.l2));

  RunningSum<A> magnitudes[kSlots], squares[kSlots];
  auto vector = [&](int64_t i, auto lanes, auto slot) FUSEDLOSS_FLATTEN {
    V w = LoadLanes(values + i, lanes), dw{};
    if constexpr (kL1) {
      V sign = Select<A>(w > A(0), Set(A(1)), Select<A>(w < A(0), Set(A(-1)), w));
      magnitudes[slot.value] += w * sign;
      dw = l1 * sign;
    }
    if constexpr (kL2) {
      squares[slot.value] += w * w;
      dw += twice_l2 * w;
    }
    if constexpr (kGradient) StoreLanes(gradient + i, dw, lanes, stream);
  };
  auto end_run = [&]() FUSEDLOSS_FLATTEN {
    EndRuns(magnitudes[0], magnitudes[1], magnitudes[2], magnitudes[3]);
    EndRuns(squares[0], squares[1], squares[2], squares[3]);
  };

  const int64_t head = kGradient && stream ? UnalignedHead(gradient, span.size) : 0;
  if (head > 0) vector(0, First<A>(head), Slot<0>{});
  EachVectorInRuns<A>(head, span.size, vector, end_run);
  if (kGradient && stream) _mm_sfence();

  return span.l1 * SumOfLanes<A>(Sum(magnitudes))[0] + span.l2 * SumOfLanes<A>(Sum(squares))[0];
}

template <typename T, bool kGradient>
double RunTerms(const PenaltySpan& span) {
  if (span.l1 == 0) {
    return span.l2 == 0 ? Run<T, kGradient, false, false>(span)
                        : Run<T, kGradient, false, true>(span);
  }
  return span.l2 == 0 ? Run<T, kGradient, true, false>(span) : Run<T, kGradient, true, true>(span);
}

}  // namespace

template <typename T>
double RunPenalty(const PenaltySpan& span) {
  return span.gradient ? RunTerms<T, true>(span) : RunTerms<T, false>(span);
}

template double RunPenalty<float>(const PenaltySpan&);
template double RunPenalty<double>(const PenaltySpan&);
template double RunPenalty<Half>(const PenaltySpan&);
template double RunPenalty<BFloat16>(const PenaltySpan&);

}  // namespace fusedloss::FUSEDLOSS_CPU_LEVEL
