// The arithmetic of the pointwise losses, compiled once per CPU level: a functor for each kind, and
// one loop for all.
#include "kernels/pointwise_plan.h"
#include "kernels/simd.h"

namespace fusedloss::FUSEDLOSS_CPU_LEVEL {
namespace {

template <typename A>
struct Point {
  Vec<A> loss, slope;  // f and ∂f/∂p
};

template <typename A>
FUSEDLOSS_INLINE Vec<A> Abs(Vec<A> x) {
  return BitCast<Vec<A>>(BitCast<Mask<A>>(x) & ~BitCast<Mask<A>>(Set(A(-0.0))));
}
// `size`, not negative, with the sign of x.
template <typename A>
FUSEDLOSS_INLINE Vec<A> WithSign(Vec<A> size, Vec<A> x) {
  Mask<A> sign = BitCast<Mask<A>>(x) & BitCast<Mask<A>>(Set(A(-0.0)));
  return BitCast<Vec<A>>(BitCast<Mask<A>>(size) | sign);
}
// x where it is 0 or NaN, else one of the others.
template <typename A>
FUSEDLOSS_INLINE Vec<A> BySign(Vec<A> x, Vec<A> if_positive, Vec<A> if_negative) {
  return Select<A>(x > A(0), if_positive, Select<A>(x < A(0), if_negative, x));
}

// log((1 + x) / (1 − x)) = 2·atanh x for |x| < 0.1717, where the polynomial holds.
template <typename A>
FUSEDLOSS_INLINE Vec<A> TwiceAtanh(Vec<A> x) {
  Vec<A> x2 = x * x;
  return x * (Polynomial<A>(Float<A>::kLog, x2) * x2 + A(2));
}

// log(1 + t) for t in [0, 1], relative to itself as accurate as log.
template <typename A>
FUSEDLOSS_INLINE Vec<A> Log1p(Vec<A> t) {
  Mask<A> half = t > A(0.41421356237309504880);  // then by way of log((1 + t)/2)
  Vec<A> x = Divide<A>(Select<A>(half, t - A(1), t), Select<A>(half, t + A(3), t + A(2)));
  return TwiceAtanh<A>(x) + Keep<A>(half, Set(A(0.69314718055994530942)));
}

template <Pointwise kKind, typename A>
struct Formula;

template <typename A>
struct Formula<Pointwise::kHuber, A> {
  const Vec<A> delta;
  FUSEDLOSS_INLINE explicit Formula(const PointwisePlan<A>& plan) : delta(Set(plan.parameter)) {}
  FUSEDLOSS_INLINE Point<A> operator()(Vec<A> p, Vec<A> y, Vec<A>) const {
    Vec<A> e = p - y;
    Vec<A> slope = Min<A>(delta, Max<A>(-delta, e));  // in this order: of NaN, NaN
    return {slope * (e - A(0.5) * slope), slope};
  }
};

template <typename A>
struct Formula<Pointwise::kSquared, A> {
  FUSEDLOSS_INLINE explicit Formula(const PointwisePlan<A>&) {}
  FUSEDLOSS_INLINE Point<A> operator()(Vec<A> p, Vec<A> y, Vec<A>) const {
    Vec<A> e = p - y;
    return {e * e, e + e};
  }
};

template <typename A>
struct Formula<Pointwise::kAbsolute, A> {
  FUSEDLOSS_INLINE explicit Formula(const PointwisePlan<A>&) {}
  FUSEDLOSS_INLINE Point<A> operator()(Vec<A> p, Vec<A> y, Vec<A>) const {
    Vec<A> e = p - y;
    return {Abs<A>(e), BySign<A>(e, Set(A(1)), Set(A(-1)))};
  }
};

// With t = e^(−2|e|): tanh |e| = (1 − t)/(1 + t), and log cosh e = |e| + log(1 + t) − log 2, or
// where that would cancel −log(1 − tanh² e)/2.
template <typename A>
struct Formula<Pointwise::kLogCosh, A> {
  FUSEDLOSS_INLINE explicit Formula(const PointwisePlan<A>&) {}
  FUSEDLOSS_INLINE Point<A> operator()(Vec<A> p, Vec<A> y, Vec<A>) const {
    Vec<A> e = p - y;
    Vec<A> size = Abs<A>(e);
    Vec<A> t_minus_1 = ExpMinus1<A>(size * A(-2));
    Vec<A> t = t_minus_1 + A(1);
    Vec<A> slope = Divide<A>(-t_minus_1, t + A(1));
    Vec<A> slope2 = slope * slope;
    Mask<A> small = size < A(0.6);
    Vec<A> x = Divide<A>(Select<A>(small, slope2, t), A(2) + Select<A>(small, -slope2, t));
    Vec<A> log = TwiceAtanh<A>(x);
    Vec<A> large = size + (log - A(0.69314718055994530942));
    return {Select<A>(small, log * A(0.5), large), WithSign<A>(slope, e)};
  }
};

template <typename A>
struct Formula<Pointwise::kQuantile, A> {
  FUSEDLOSS_INLINE explicit Formula(const PointwisePlan<A>&) {}
  FUSEDLOSS_INLINE Point<A> operator()(Vec<A> p, Vec<A> y, Vec<A> quantile) const {
    Vec<A> e = p - y;
    Mask<A> is_low = quantile > A(0);
    Vec<A> one = Set(A(1));
    Vec<A> slope = BySign<A>(e, Keep<A>(is_low, one) - quantile, -Keep<A>(~is_low, one) - quantile);
    return {e * slope, slope};
  }
};

template <typename A>
struct Formula<Pointwise::kBinaryLogits, A> {
  const Vec<A> smoothing;
  FUSEDLOSS_INLINE explicit Formula(const PointwisePlan<A>& plan)
      : smoothing(Set(plan.parameter)) {}
  FUSEDLOSS_INLINE Point<A> operator()(Vec<A> p, Vec<A> y, Vec<A>) const {
    Vec<A> share = Smoothed(y);
    Vec<A> t = Exp<A>(-Abs<A>(p));
    Vec<A> positive = Max<A>(Set(A(0)), p);
    Vec<A> sigmoid = Divide<A>(Select<A>(p < A(0), t, Set(A(1))), t + A(1));
    return {positive - p * share + Log1p<A>(t), sigmoid - share};
  }
  FUSEDLOSS_INLINE Vec<A> Smoothed(Vec<A> y) const {
    return y * (A(1) - smoothing) + smoothing * A(0.5);
  }
};

template <typename A>
struct Formula<Pointwise::kBinaryProbabilities, A> {
  const Vec<A> lowest, highest;
  const Formula<Pointwise::kBinaryLogits, A> logits;
  FUSEDLOSS_INLINE explicit Formula(const PointwisePlan<A>& plan)
      : lowest(Set(plan.lowest)), highest(Set(plan.highest)), logits(plan) {}
  FUSEDLOSS_INLINE Point<A> operator()(Vec<A> p, Vec<A> y, Vec<A>) const {
    Vec<A> share = logits.Smoothed(y);
    Vec<A> c = Min<A>(highest, Max<A>(lowest, p));
    Vec<A> rest = A(1) - c;
    Vec<A> loss = -(share * Log<A>(c) + (A(1) - share) * Log<A>(rest));
    Vec<A> slope = Divide<A>(c - share, c * rest);
    return {loss, Select<A>(c == p, slope, Keep<A>(p != p, p))};
  }
};

// kPlain: a gradient of predictions and targets, and no other array.
template <typename T, typename Y, Pointwise kKind, bool kPlain>
Accumulator<T> Run(const PointwisePlan<Accumulator<T>>& plan, const PointwiseSpan<T, Y>& given) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const PointwiseSpan<T, Y> span = given;  // a copy: what no store can have changed
  const Formula<kKind, A> formula(plan);
  const V quantile = Set(plan.parameter), scale = Set(span.scale);
  const V one_target = span.one_target ? Set(LoadOne(span.targets)) : V{};
  const bool stream = plan.stream && span.gradient;

  RunningSum<A> sums[kSlots];
  auto vector = [&](int64_t i, auto lanes, auto slot) FUSEDLOSS_FLATTEN {
    V p = LoadLanes(span.predictions + i, lanes);
    V y, q = quantile, factor = scale;
    if constexpr (kPlain) {
      y = LoadLanes(span.targets + i, lanes);
    } else {
      y = span.one_target ? one_target : LoadLanes(span.targets + i, lanes);
      if (span.quantiles) q = LoadLanes(span.quantiles + i, lanes);
    }
    Point<A> point = formula(p, y, q);
    if constexpr (!kPlain) {
      if (span.output_weights) {
        V w = LoadLanes(span.output_weights + i, lanes);
        point.loss = Keep<A>(w != A(0), point.loss * w);
        point.slope = Keep<A>(w != A(0), point.slope * w);
      }
      if (span.losses) StoreLanes(span.losses + i, point.loss, lanes, false);
      if (span.cotangents) {
        V cotangent = LoadLanes(span.cotangents + i, lanes);
        point.loss *= cotangent;
        factor *= cotangent;
      }
    }
    sums[slot.value] += KeepLanes<A>(lanes, point.loss);
    if (kPlain || span.gradient) {
      StoreLanes(span.gradient + i, point.slope * factor, lanes, stream);
    }
  };
  auto end_run = [&]() FUSEDLOSS_FLATTEN { EndRuns(sums[0], sums[1], sums[2], sums[3]); };

  const int64_t head = stream ? UnalignedHead(span.gradient, span.size) : 0;
  if (head > 0) vector(0, First<A>(head), Slot<0>{});
  EachVectorInRuns<A>(head, span.size, vector, end_run);
  if (stream) _mm_sfence();
  return SumOfLanes<A>(Sum(sums))[0];
}

template <typename T, typename Y, Pointwise kKind>
Accumulator<T> RunKind(const PointwisePlan<Accumulator<T>>& plan, const PointwiseSpan<T, Y>& span) {
  const bool plain = span.gradient && !span.losses && !span.output_weights && !span.quantiles &&
                     !span.cotangents && !span.one_target;
  return plain ? Run<T, Y, kKind, true>(plan, span) : Run<T, Y, kKind, false>(plan, span);
}

}  // namespace

template <typename T, typename Y>
Accumulator<T> RunPointwise(const PointwisePlan<Accumulator<T>>& plan,
                            const PointwiseSpan<T, Y>& span) {
  switch (plan.kind) {
    case Pointwise::kHuber:
      return RunKind<T, Y, Pointwise::kHuber>(plan, span);
    case Pointwise::kSquared:
      return RunKind<T, Y, Pointwise::kSquared>(plan, span);
    case Pointwise::kAbsolute:
      return RunKind<T, Y, Pointwise::kAbsolute>(plan, span);
    case Pointwise::kLogCosh:
      return RunKind<T, Y, Pointwise::kLogCosh>(plan, span);
    case Pointwise::kQuantile:
      return RunKind<T, Y, Pointwise::kQuantile>(plan, span);
    case Pointwise::kBinaryLogits:
      return RunKind<T, Y, Pointwise::kBinaryLogits>(plan, span);
    default:
      return RunKind<T, Y, Pointwise::kBinaryProbabilities>(plan, span);
  }
}

#define FUSEDLOSS_INSTANTIATE(T, Y)                                                \
  template Accumulator<T> RunPointwise<T, Y>(const PointwisePlan<Accumulator<T>>&, \
                                             const PointwiseSpan<T, Y>&);
FUSEDLOSS_POINTWISE_TYPES(FUSEDLOSS_INSTANTIATE)
#undef FUSEDLOSS_INSTANTIATE

}  // namespace fusedloss::FUSEDLOSS_CPU_LEVEL
