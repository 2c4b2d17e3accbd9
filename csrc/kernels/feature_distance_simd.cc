// The arithmetic of the distances of feature maps, compiled once per CPU level.
#include "kernels/feature_distance_plan.h"
#include "kernels/simd.h"

namespace fusedloss::FUSEDLOSS_CPU_LEVEL {
namespace {

// Which gradients a pass makes: that of the targets written, or added to target_sums.
enum Gradients { kNone, kOfPredictions, kOfBoth, kOfBothSummed };

// Calls run(constant) with the gradients of a strip as a compile-time constant.
template <typename T, typename Run>
FUSEDLOSS_INLINE auto WithGradients(const FeatureStrip<T>& strip, const Run& run) {
  if (strip.target_sums) return run(std::integral_constant<Gradients, kOfBothSummed>{});
  if (strip.dtargets) return run(std::integral_constant<Gradients, kOfBoth>{});
  if (strip.dpredictions) return run(std::integral_constant<Gradients, kOfPredictions>{});
  return run(std::integral_constant<Gradients, kNone>{});
}

// ---- Metrics that look at one element at a time.

template <typename A>
struct Point {
  Vec<A> distance, slope;  // f and ∂f/∂a
};

template <FeatureMetric kMetric, typename A>
FUSEDLOSS_INLINE Point<A> At(Vec<A> e, Vec<A> epsilon2) {
  if constexpr (kMetric == FeatureMetric::kSquared) {
    return {e * e, e + e};
  } else if constexpr (kMetric == FeatureMetric::kAbsolute) {
    Vec<A> sign = Select<A>(e > A(0), Set(A(1)), Select<A>(e < A(0), Set(A(-1)), e));
    return {e * sign, sign};
  } else {
    Vec<A> distance = Sqrt<A>(e * e + epsilon2);
    return {distance, Keep<A>(distance != A(0), e / distance)};
  }
}

// Rows that share a target are read side by side: one after the other, each would begin anew where
// no hardware expects it.
constexpr int64_t kSideBySide = 8;

// The same consecutive elements of one row, or of several with one target. `weights` are theirs, or
// null: then all have that one.
template <typename T>
struct Line {
  using A = Accumulator<T>;
  int64_t rows, size;
  int64_t row_stride;
  const T* predictions;
  const T* targets;
  const A* weights;
  A weight;
  const A* scales;    // [rows]
  T* dpredictions;    // out, or null
  T* dtargets;        // out, or null
  A* target_sums;     // [size] added to, or null
  double* distances;  // [rows] added to
};

template <typename T, FeatureMetric kMetric, bool kWeights, Gradients kGradients, bool kOneRow>
void RunLine(const FeaturePlan<Accumulator<T>>& plan, const Line<T>& given) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  constexpr int64_t kVector = kLanes<A>, kStep = kSlots * kVector;
  const Line<T> line = given;  // a copy: what no store can have changed
  const int64_t rows = kOneRow ? 1 : line.rows;
  const V epsilon2 = Set(plan.epsilon * plan.epsilon), one_weight = Set(line.weight);
  const bool stream = plan.stream && kGradients != kNone;

  RunningSum<A> sums[kOneRow ? 1 : kSideBySide];
  V scales[kOneRow ? 1 : kSideBySide];
  for (int64_t row = 0; row < rows; ++row) scales[row] = Set(line.scales[row]);
  auto step = [&](int64_t i, auto lanes, auto count) FUSEDLOSS_FLATTEN {
    V b[count], w[count], db[count];
    for (int k = 0; k < count; ++k) {
      const int64_t at = i + k * kVector;
      b[k] = LoadLanes(line.targets + at, lanes);
      if constexpr (kWeights)
        w[k] = line.weights ? LoadLanes(line.weights + at, lanes) : one_weight;
      if constexpr (kGradients == kOfBothSummed) db[k] = LoadLanes(line.target_sums + at, lanes);
    }
    for (int64_t row = 0; row < rows; ++row) {
      V distance{};
      for (int k = 0; k < count; ++k) {
        const int64_t at = row * line.row_stride + i + k * kVector;
        Point<A> point = At<kMetric, A>(LoadLanes(line.predictions + at, lanes) - b[k], epsilon2);
        if constexpr (kWeights) {
          point.distance *= w[k];
          point.slope *= w[k];
        }
        distance += KeepLanes<A>(lanes, point.distance);
        const V da = point.slope * scales[row];
        if constexpr (kGradients != kNone) StoreLanes(line.dpredictions + at, da, lanes, stream);
        if constexpr (kGradients == kOfBoth) StoreLanes(line.dtargets + at, -da, lanes, false);
        if constexpr (kGradients == kOfBothSummed) db[k] -= da;
      }
      sums[row] += distance;
    }
    if constexpr (kGradients == kOfBothSummed) {
      for (int k = 0; k < count; ++k) {
        StoreLanes(line.target_sums + i + k * kVector, db[k], lanes, false);
      }
    }
  };

  using One = std::integral_constant<int, 1>;
  using Several = std::integral_constant<int, kSlots>;
  int64_t i = stream ? UnalignedHead(line.dpredictions, line.size) : 0;
  if (i > 0) step(0, First<A>(i), One{});
  do {
    const int64_t end = line.size - i > kRun * kStep ? i + kRun * kStep : line.size;
    for (; i + kStep <= end; i += kStep) step(i, AllLanes{}, Several{});
    for (; i + kVector <= end; i += kVector) step(i, AllLanes{}, One{});
    if (i < end) step(i, First<A>(end - i), One{});
    i = end;
    for (int64_t row = 0; row < rows; ++row) sums[row].EndRun();
  } while (i < line.size);
  for (int64_t row = 0; row < rows; ++row) {
    line.distances[row] += SumOfLanes<A>(sums[row].total)[0];
  }
}

// `line` has all but the extent: its pointers are to the first element of the strip.
template <typename T, FeatureMetric kMetric, Gradients kGradients, bool kOneRow>
void RunLines(const FeaturePlan<Accumulator<T>>& plan, const FeatureStrip<T>& strip,
              const Line<T>& first) {
  auto at = [&](int64_t offset, int64_t sums_offset, int64_t size) {
    Line<T> line = first;
    line.size = size;
    line.predictions += offset;
    line.targets += offset;
    if (kGradients != kNone) line.dpredictions += offset;
    if (kGradients == kOfBoth) line.dtargets += offset;
    if (kGradients == kOfBothSummed) line.target_sums += sums_offset;
    return line;
  };
  const int64_t channels = strip.channels, positions = strip.positions;
  if (strip.channel_weights == nullptr) {
    RunLine<T, kMetric, false, kGradients, kOneRow>(plan, at(0, 0, positions * channels));
  } else if (plan.channels_last) {
    for (int64_t p = 0; p < positions; p += strip.repeats) {
      const int64_t count = strip.repeats < positions - p ? strip.repeats : positions - p;
      Line<T> line = at(p * channels, p * channels, count * channels);
      line.weights = strip.channel_weights;
      RunLine<T, kMetric, true, kGradients, kOneRow>(plan, line);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      Line<T> line = at(c * strip.channel_stride, c * positions, positions);
      line.weight = strip.channel_weights[c];
      RunLine<T, kMetric, true, kGradients, kOneRow>(plan, line);
    }
  }
}

template <typename T, FeatureMetric kMetric, Gradients kGradients>
void RunElementwise(const FeaturePlan<Accumulator<T>>& plan, const FeatureStrip<T>& strip) {
  using A = Accumulator<T>;
  // All rows side by side have to begin alike, or some could not be streamed.
  const bool alike = !plan.stream || strip.row_stride % kLanes<A> == 0;
  const int64_t group = strip.target_row_stride == 0 && alike ? kSideBySide : 1;
  for (int64_t row = 0; row < strip.rows; row += group) {
    A scales[kSideBySide];
    Line<T> line{};
    line.rows = strip.rows - row < group ? strip.rows - row : group;
    line.row_stride = strip.row_stride;
    line.predictions = strip.predictions + row * strip.row_stride;
    line.targets = strip.targets + row * strip.target_row_stride;
    line.scales = scales;
    if (kGradients != kNone) line.dpredictions = strip.dpredictions + row * strip.row_stride;
    if (kGradients == kOfBoth) line.dtargets = strip.dtargets + row * strip.target_row_stride;
    line.target_sums = strip.target_sums;
    line.distances = strip.distances + row;
    for (int64_t r = 0; r < line.rows; ++r) {
      scales[r] = strip.cotangents ? strip.scale * strip.cotangents[row + r] : strip.scale;
      line.distances[r] = 0;
    }
    if (line.rows == 1) {
      RunLines<T, kMetric, kGradients, true>(plan, strip, line);
    } else {
      RunLines<T, kMetric, kGradients, false>(plan, strip, line);
    }
  }
}

// ---- Metrics that compare the directions of two vectors: of a position's channels.

//   kLpips   u = i_a·a − i_b·b          distance Σ w·u²
//            d/da =  2·i_a·(w·u − r_a·i_a·(Σ w·u·a)·a),   d/db = −2·i_b·(w·u − r_b·i_b·(Σ w·u·b)·b)
//   kCosine  s = Σ w·a·b                distance 1 − i_a·i_b·s
//            d/da = i_a·i_b·w·(i_a²·s·a − b),             d/db = i_a·i_b·w·(i_b²·s·b − a)
//
// with i = 1/|x|, and r the inverse of |x| without the ε beside the root.
template <typename A>
struct Inverse {
  Vec<A> i, r;
};

// Of every lane.
template <typename A>
FUSEDLOSS_INLINE Inverse<A> InverseOfLanes(const FeaturePlan<A>& plan, Vec<A> squares) {
  const Vec<A> epsilon = Set(plan.epsilon), one = Set(A(1));
  if (plan.epsilon_in_root) {
    const Vec<A> i = one / Sqrt<A>(squares + epsilon);
    return {i, i};
  }
  const Vec<A> root = Sqrt<A>(squares);
  return {one / (root + epsilon), Keep<A>(root != A(0), one / root)};
}
// Of one number, for all lanes: dividing a vector takes several times as long.
template <typename A>
FUSEDLOSS_INLINE Inverse<A> InverseOfOne(const FeaturePlan<A>& plan, A squares) {
  if (plan.epsilon_in_root) {
    const Vec<A> i = Set(A(1) / SqrtOfOne(squares + plan.epsilon));
    return {i, i};
  }
  const A root = SqrtOfOne(squares);
  return {Set(A(1) / (root + plan.epsilon)), Set(root != A(0) ? A(1) / root : A(0))};
}

// u, which is 0 between equal features.
template <typename A>
FUSEDLOSS_INLINE Vec<A> Difference(const Inverse<A>& of_a, Vec<A> a, const Inverse<A>& of_b,
                                   Vec<A> b) {
  return Rounded<A>(of_a.i * a) - Rounded<A>(of_b.i * b);
}

// One position whose channels are neighbours: sums run over the lanes too.
template <typename A, bool kWeights>
struct AlongChannels {
  int64_t channels;
  const A* weights;

  // Calls fn(offset in a map, offset in target_sums, weights, lanes, slot).
  template <typename Fn, typename EndRun>
  FUSEDLOSS_INLINE void Each(Fn&& fn, EndRun&& end_run) const {
    EachVectorInRuns<A>(
        0, channels,
        [&](int64_t c, auto lanes, auto slot) FUSEDLOSS_FLATTEN {
          fn(c, c, kWeights ? LoadLanes(weights + c, lanes) : Set(A(1)), lanes, slot);
        },
        end_run);
  }
  FUSEDLOSS_INLINE Vec<A> Total(const RunningSum<A> (&sums)[kSlots]) const {
    return SumOfLanes<A>(Sum(sums));
  }
  FUSEDLOSS_INLINE Inverse<A> InverseOf(const FeaturePlan<A>& plan, Vec<A> squares) const {
    return InverseOfOne<A>(plan, squares[0]);
  }
  FUSEDLOSS_INLINE A DistanceOf(Vec<A> distance) const { return distance[0]; }
};

// As many positions as a vector has lanes, whose channels lie apart: every lane has its own sums.
template <typename A, bool kWeights, typename Lanes>
struct AcrossChannels {
  int64_t channels;
  const A* weights;
  int64_t stride, sums_stride;
  Lanes lanes;

  template <typename Fn, typename EndRun>
  FUSEDLOSS_INLINE void Each(Fn&& fn, EndRun&& end_run) const {
    auto channel = [&](int64_t c, auto slot) FUSEDLOSS_FLATTEN {
      fn(c * stride, c * sums_stride, Set(kWeights ? weights[c] : A(1)), lanes, slot);
    };
    int64_t c = 0;
    for (; c + kSlots <= channels; c += kSlots) {
      channel(c, Slot<0>{});
      channel(c + 1, Slot<1>{});
      channel(c + 2, Slot<2>{});
      channel(c + 3, Slot<3>{});
      if (c % kRun == kRun - kSlots) end_run();
    }
    for (; c < channels; ++c) channel(c, Slot<0>{});
    end_run();
  }
  FUSEDLOSS_INLINE Vec<A> Total(const RunningSum<A> (&sums)[kSlots]) const { return Sum(sums); }
  FUSEDLOSS_INLINE Inverse<A> InverseOf(const FeaturePlan<A>& plan, Vec<A> squares) const {
    return InverseOfLanes<A>(plan, squares);
  }
  FUSEDLOSS_INLINE A DistanceOf(Vec<A> distance) const {
    return SumOfLanes<A>(KeepLanes<A>(lanes, distance))[0];
  }
};

// Features and gradients at the positions of a loop.
template <typename T>
struct Maps {
  using A = Accumulator<T>;
  const T* a;
  const T* b;
  T* da;
  T* db;      // or null
  A* db_sum;  // or null
  bool stream;
};

// The steps at the positions of a loop, each of which waits for the sums of the one before.
template <typename T, FeatureMetric kMetric, Gradients kGradients, typename Loop>
class Position {
 public:
  using A = Accumulator<T>;
  using V = Vec<A>;

  FUSEDLOSS_INLINE Position(const Loop& loop, const Maps<T>& maps) : loop_(loop), maps_(maps) {}

  FUSEDLOSS_INLINE void Measure(const FeaturePlan<A>& plan) {
    RunningSum<A> a2[kSlots], b2[kSlots], ab[kSlots];
    loop_.Each(
        [&](int64_t at, int64_t, V w, auto lanes, auto slot) FUSEDLOSS_FLATTEN {
          V a = LoadLanes(maps_.a + at, lanes), b = LoadLanes(maps_.b + at, lanes);
          if constexpr (kLpips) w = Set(A(1));
          a2[slot.value] += w * a * a;
          b2[slot.value] += w * b * b;
          if constexpr (!kLpips) ab[slot.value] += w * a * b;
        },
        [&]() FUSEDLOSS_FLATTEN {
          EndRuns(a2[0], a2[1], a2[2], a2[3]);
          EndRuns(b2[0], b2[1], b2[2], b2[3]);
          if constexpr (!kLpips) EndRuns(ab[0], ab[1], ab[2], ab[3]);
        });
    of_a_ = loop_.InverseOf(plan, loop_.Total(a2));
    of_b_ = loop_.InverseOf(plan, loop_.Total(b2));
    if constexpr (!kLpips) {
      V cosine = of_a_.i * of_b_.i * loop_.Total(ab);
      distance_ = loop_.DistanceOf(A(1) - cosine);
      from_a_ = of_a_.i * of_a_.i * cosine;
      from_b_ = of_b_.i * of_b_.i * cosine;
    }
  }

  FUSEDLOSS_INLINE void Compare() {
    if constexpr (kLpips) {
      RunningSum<A> u2[kSlots], ua[kSlots], ub[kSlots];
      loop_.Each(
          [&](int64_t at, int64_t, V w, auto lanes, auto slot) FUSEDLOSS_FLATTEN {
            V a = LoadLanes(maps_.a + at, lanes), b = LoadLanes(maps_.b + at, lanes);
            V u = Difference(of_a_, a, of_b_, b), wu = w * u;
            u2[slot.value] += wu * u;
            if constexpr (kGradients != kNone) ua[slot.value] += wu * a;
            if constexpr (kGradients >= kOfBoth) ub[slot.value] += wu * b;
          },
          [&]() FUSEDLOSS_FLATTEN {
            EndRuns(u2[0], u2[1], u2[2], u2[3]);
            if constexpr (kGradients != kNone) EndRuns(ua[0], ua[1], ua[2], ua[3]);
            if constexpr (kGradients >= kOfBoth) EndRuns(ub[0], ub[1], ub[2], ub[3]);
          });
      distance_ = loop_.DistanceOf(loop_.Total(u2));
      if constexpr (kGradients != kNone) from_a_ = of_a_.r * of_a_.i * loop_.Total(ua);
      if constexpr (kGradients >= kOfBoth) from_b_ = of_b_.r * of_b_.i * loop_.Total(ub);
    }
  }

  FUSEDLOSS_INLINE void Differentiate(V scale) const {
    if constexpr (kGradients == kNone) return;
    const Inverse<A> of_a = of_a_, of_b = of_b_;  // copies: what no store can have changed
    const V from_a = from_a_, from_b = from_b_, both = scale * of_a.i * of_b.i;
    const V factor_a = A(2) * scale * of_a.i, factor_b = A(2) * scale * of_b.i;
    const Maps<T> maps = maps_;
    loop_.Each(
        [&](int64_t at, int64_t sum_at, V w, auto lanes, auto) FUSEDLOSS_FLATTEN {
          V a = LoadLanes(maps.a + at, lanes), b = LoadLanes(maps.b + at, lanes), da, db;
          if constexpr (kLpips) {
            V wu = w * Difference(of_a, a, of_b, b);
            da = factor_a * (wu - from_a * a);
            db = factor_b * (from_b * b - wu);
          } else {
            da = w * (scale * from_a * a - both * b);
            db = w * (scale * from_b * b - both * a);
          }
          StoreLanes(maps.da + at, da, lanes, maps.stream);
          if constexpr (kGradients == kOfBoth) StoreLanes(maps.db + at, db, lanes, false);
          if constexpr (kGradients == kOfBothSummed) {
            V sum = LoadLanes(maps.db_sum + sum_at, lanes);
            StoreLanes(maps.db_sum + sum_at, sum + db, lanes, false);
          }
        },
        [] {});
  }

  FUSEDLOSS_INLINE A distance() const { return distance_; }

 private:
  static constexpr bool kLpips = kMetric == FeatureMetric::kLpips;

  Loop loop_;
  Maps<T> maps_;
  Inverse<A> of_a_, of_b_;
  V from_a_, from_b_;
  A distance_;
};

// The cosine's from_a is i_a²·i_a·i_b·s, the other's r_a·i_a·(Σ w·u·a): what a is taken from b, or
// from w·u, for.
// The positions of one row. Returns the sum of their distances.
template <typename T, FeatureMetric kMetric, bool kWeights, Gradients kGradients>
double RunPositions(const FeaturePlan<Accumulator<T>>& plan, const FeatureStrip<T>& strip,
                    const Maps<T>& row, Accumulator<T> row_scale) {
  using A = Accumulator<T>;
  const Vec<A> scale = Set(row_scale);
  auto at = [&](int64_t offset, int64_t sum_offset) {
    return Maps<T>{row.a + offset,
                   row.b + offset,
                   row.da ? row.da + offset : nullptr,
                   row.db ? row.db + offset : nullptr,
                   row.db_sum ? row.db_sum + sum_offset : nullptr,
                   row.stream};
  };
  double sums[2] = {};  // of a run of positions, and of those before
  int64_t done = 0;
  auto run = [&](const auto& loop, const Maps<T>& maps) FUSEDLOSS_FLATTEN {
    Position<T, kMetric, kGradients, std::decay_t<decltype(loop)>> position(loop, maps);
    position.Measure(plan);
    position.Compare();
    position.Differentiate(scale);
    sums[0] += position.distance();
    if (++done % kRun == 0) {
      sums[1] += sums[0];
      sums[0] = 0;
    }
  };
  if (plan.channels_last) {
    const AlongChannels<A, kWeights> loop{strip.channels, strip.channel_weights};
    for (int64_t p = 0; p < strip.positions; ++p) {
      const int64_t offset = p * strip.channels;
      run(loop, at(offset, offset));
    }
  } else {
    auto vector = [&](int64_t p, auto lanes) {
      const AcrossChannels<A, kWeights, decltype(lanes)> loop{
          strip.channels, strip.channel_weights, strip.channel_stride, strip.positions, lanes};
      run(loop, at(p, p));
    };
    int64_t p = 0;
    for (; p + kLanes<A> <= strip.positions; p += kLanes<A>) vector(p, AllLanes{});
    if (p < strip.positions) vector(p, First<A>(strip.positions - p));
  }
  return sums[0] + sums[1];
}

// Whether every vector of every position is to be streamed, and can be.
template <typename T>
bool IsAligned(const FeaturePlan<Accumulator<T>>& plan, const FeatureStrip<T>& strip,
               const T* row) {
  constexpr int64_t kVector = kLanes<Accumulator<T>>;
  return plan.stream && reinterpret_cast<uintptr_t>(row) % (kVector * sizeof(T)) == 0 &&
         (plan.channels_last ? strip.channels : strip.channel_stride) % kVector == 0;
}

// Has the next row's part of a strip on its way, which begins where no hardware expects it.
template <typename T>
void Prefetch(const FeaturePlan<Accumulator<T>>& plan, const FeatureStrip<T>& strip, const T* row) {
  if (!plan.channels_last) return;
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t size = strip.positions * strip.channels;
  for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(row + i, /*rw=*/0, /*locality=*/2);
}

template <typename T, FeatureMetric kMetric, Gradients kGradients>
void RunDirections(const FeaturePlan<Accumulator<T>>& plan, const FeatureStrip<T>& strip) {
  using A = Accumulator<T>;
  for (int64_t row = 0; row < strip.rows; ++row) {
    const T* a = strip.predictions + row * strip.row_stride;
    const T* b = strip.targets + row * strip.target_row_stride;
    T* da = strip.dpredictions ? strip.dpredictions + row * strip.row_stride : nullptr;
    T* db = strip.dtargets ? strip.dtargets + row * strip.target_row_stride : nullptr;
    const A scale = strip.cotangents ? strip.scale * strip.cotangents[row] : strip.scale;
    const bool one_target = strip.target_row_stride == 0;  // Then a row's part is short.
    if (one_target && row + 1 < strip.rows) Prefetch(plan, strip, a + strip.row_stride);
    const Maps<T> maps{a, b, da, db, strip.target_sums, IsAligned(plan, strip, da)};
    strip.distances[row] =
        strip.channel_weights
            ? RunPositions<T, kMetric, true, kGradients>(plan, strip, maps, scale)
            : RunPositions<T, kMetric, false, kGradients>(plan, strip, maps, scale);
  }
}

template <typename T, FeatureMetric kMetric>
void RunMetric(const FeaturePlan<Accumulator<T>>& plan, const FeatureStrip<T>& strip) {
  WithGradients(strip, [&](auto gradients) {
    if constexpr (kMetric == FeatureMetric::kCosine || kMetric == FeatureMetric::kLpips) {
      RunDirections<T, kMetric, gradients>(plan, strip);
    } else {
      RunElementwise<T, kMetric, gradients>(plan, strip);
    }
  });
  if (plan.stream) _mm_sfence();
}

}  // namespace

template <typename T>
void RunFeatureStrip(const FeaturePlan<Accumulator<T>>& plan, const FeatureStrip<T>& strip) {
  if (strip.target_sums) {
    __builtin_memset(strip.target_sums, 0,
                     strip.positions * strip.channels * sizeof(*strip.target_sums));
  }
  switch (plan.metric) {
    case FeatureMetric::kSquared:
      return RunMetric<T, FeatureMetric::kSquared>(plan, strip);
    case FeatureMetric::kAbsolute:
      return RunMetric<T, FeatureMetric::kAbsolute>(plan, strip);
    case FeatureMetric::kCharbonnier:
      return RunMetric<T, FeatureMetric::kCharbonnier>(plan, strip);
    case FeatureMetric::kCosine:
      return RunMetric<T, FeatureMetric::kCosine>(plan, strip);
    default:
      return RunMetric<T, FeatureMetric::kLpips>(plan, strip);
  }
}

template <typename T>
void RunFeatureSums(const FeaturePlan<Accumulator<T>>& plan, const FeatureSums<T>& all) {
  using A = Accumulator<T>;
  const int64_t lines = plan.channels_last ? 1 : all.channels;
  const int64_t size = plan.channels_last ? all.positions * all.channels : all.positions;
  for (int64_t line = 0; line < lines; ++line) {
    const A* sums = all.sums + line * size;
    T* dtargets = all.dtargets + line * all.channel_stride;
    EachVector<A>(0, size, [&](int64_t i, auto lanes, auto) FUSEDLOSS_FLATTEN {
      Vec<A> total{};
      for (int64_t range = 0; range < all.ranges; ++range) {
        total += LoadLanes(sums + range * all.range_stride + i, lanes);
      }
      StoreLanes(dtargets + i, total, lanes, false);
    });
  }
}

#define FUSEDLOSS_INSTANTIATE(T)                                                             \
  template void RunFeatureStrip(const FeaturePlan<Accumulator<T>>&, const FeatureStrip<T>&); \
  template void RunFeatureSums(const FeaturePlan<Accumulator<T>>&, const FeatureSums<T>&);
FUSEDLOSS_INSTANTIATE(float)
FUSEDLOSS_INSTANTIATE(double)
FUSEDLOSS_INSTANTIATE(Half)
FUSEDLOSS_INSTANTIATE(BFloat16)
#undef FUSEDLOSS_INSTANTIATE

}  // namespace fusedloss::FUSEDLOSS_CPU_LEVEL
