// The row arithmetic of softmax cross-entropy, compiled once per CPU level. A tile is what one pass
// works on: one row, with the classes in the lanes (Along), or for few classes as many rows as
// there are lanes, a row in each lane (Across). Both offer the same operations, so the formulas
// stand once.
#include "kernels/simd.h"
#include "kernels/softmax_xent_plan.h"

namespace fusedloss::FUSEDLOSS_CPU_LEVEL {
namespace {

constexpr int64_t kAcrossClasses = 32;     // up to here a tile has a row per lane
constexpr int64_t kCacheBytes = 16 << 10;  // up to here e^{z − peak} of a row is kept on the stack
constexpr int kPlainStats = 2, kRichStats = 5;

template <typename A>
FUSEDLOSS_INLINE A IsIn(const SoftmaxXentSubset<A>& subset, int64_t c) {
  return A(!subset.bits || (subset.bits[c / 8] >> (c % 8)) & 1);
}

// One row; vector number i holds the classes from i · lanes on.
template <typename T, bool kDense>
struct Along {
  using A = Accumulator<T>;
  using Sums = A;
  using V = Vec<A>;
  static constexpr int kVector = kLanes<A>;
  static constexpr bool kManyRows = false;

  const SoftmaxXentPlan<A> plan;  // by value here and below: what a store cannot have changed
  const SoftmaxXentSubset<A> subset;
  const T* predictions;
  const A* targets;
  int64_t label;
  T* gradient;
  A* cache;  // e^{z − peak} between the two sweeps, of kCacheBytes and a vector more; or null
  bool has_next;

  Along(const SoftmaxXentPlan<A>& plan, const SoftmaxXentBlock<T>& block, int64_t row, A* cache)
      : plan(plan),
        subset(block.subsets[row * block.subset_stride]),
        predictions(block.predictions + row * plan.classes),
        targets(kDense ? block.targets + row * plan.classes : nullptr),
        label(kDense ? 0 : block.labels[row]),
        gradient(block.gradient ? block.gradient + row * plan.classes : nullptr),
        cache(cache),
        has_next(row + 1 < block.rows) {}

  // Calls fn(first class, lanes, slot) for every vector, and end_run() now and then and at the end.
  template <typename Fn, typename EndRun>
  FUSEDLOSS_INLINE void Each(Fn&& fn, EndRun&& end_run) const {
    EachVectorInRuns<A>(0, plan.classes, fn, end_run);
  }
  // The same, cut so that whole vectors of the gradient are aligned.
  template <typename Fn>
  FUSEDLOSS_INLINE void EachAligned(Fn&& fn) const {
    const int64_t first = plan.stream ? UnalignedHead(gradient, plan.classes) : 0;
    if (first > 0) fn(0, First<A>(first), Slot<0>{});
    EachVector<A>(first, plan.classes, fn);
  }
  FUSEDLOSS_INLINE V Prediction(int64_t c, AllLanes) const { return Load(predictions + c); }
  FUSEDLOSS_INLINE V Prediction(int64_t c, FirstLanes<A> lanes) const {
    return LoadFirst(predictions + c, lanes.count);
  }
  FUSEDLOSS_INLINE V Target(int64_t c, AllLanes) const { return Load(targets + c); }
  FUSEDLOSS_INLINE V Target(int64_t c, FirstLanes<A> lanes) const {
    return LoadFirst(targets + c, lanes.count);
  }
  FUSEDLOSS_INLINE V ClassWeight(int64_t c, AllLanes) const {
    return plan.class_weight ? Load(plan.class_weight + c) : Set(A(1));
  }
  FUSEDLOSS_INLINE V ClassWeight(int64_t c, FirstLanes<A> lanes) const {
    return plan.class_weight ? LoadFirst(plan.class_weight + c, lanes.count)
                             : Keep<A>(lanes.mask, Set(A(1)));
  }
  template <typename Lanes>
  FUSEDLOSS_INLINE Mask<A> InSubset(int64_t c, Lanes lanes) const {
    return subset.bits ? LoadMask<A>(subset.bits, c) : MaskOf<A>(lanes);
  }
  FUSEDLOSS_INLINE V SubsetSize() const { return Set(subset.size); }
  FUSEDLOSS_INLINE V SubsetClassWeight() const { return Set(subset.class_weight); }
  FUSEDLOSS_INLINE bool MayHoldLabel(int64_t c) const {
    return static_cast<uint64_t>(label - c) < static_cast<uint64_t>(kVector);
  }
  FUSEDLOSS_INLINE Mask<A> IsLabel(int64_t c) const {
    return LaneIds<A>() == Mask<A>{} + static_cast<int>(label - c);
  }

  FUSEDLOSS_INLINE bool Caches() const { return cache != nullptr; }
  FUSEDLOSS_INLINE void Cache(int64_t c, V v) const { Store(cache + c, v); }
  FUSEDLOSS_INLINE V Cached(int64_t c) const { return Load(cache + c); }

  // The next row, into the second-level cache while this one is worked on.
  FUSEDLOSS_INLINE void Prefetch(int64_t c) const {
    if (!has_next) return;
    __builtin_prefetch(predictions + plan.classes + c, 0, 2);
    if (kDense) __builtin_prefetch(targets + plan.classes + c, 0, 2);
  }

  FUSEDLOSS_INLINE void Emit(int64_t c, AllLanes, V v) const {
    if (plan.stream) {
      Stream(gradient + c, v);
    } else {
      Store(gradient + c, v);
    }
  }
  FUSEDLOSS_INLINE void Emit(int64_t c, FirstLanes<A> lanes, V v) const {
    StoreFirst(gradient + c, v, lanes.count);
  }

  FUSEDLOSS_INLINE V SumOfRow(V v) const { return SumOfLanes<A>(v); }
  FUSEDLOSS_INLINE V MaxOfRow(V v) const { return MaxOfLanes<A>(v); }

  // A vector of fn(row of the tile, its label).
  template <typename Fn>
  FUSEDLOSS_INLINE V OfLabels(Fn&& fn) const {
    return Set(fn(0, label));
  }
  FUSEDLOSS_INLINE A PredictionAt(int, int64_t c) const { return LoadOne(predictions + c); }
  FUSEDLOSS_INLINE A IsInSubset(int, int64_t c) const { return IsIn(subset, c); }
  // The least lane, in all of them.
  FUSEDLOSS_INLINE Mask<A> FirstOfRow(Mask<A> places) const {
    auto first = places[0];
    for (int lane = 1; lane < kVector; ++lane) first = first < places[lane] ? first : places[lane];
    return Mask<A>{} + first;
  }
  FUSEDLOSS_INLINE Mask<A> Places(int64_t c) const { return LaneIds<A>() + static_cast<int>(c); }
};

// As many rows as lanes, predictions, targets and gradient transposed into [classes, lanes].
template <typename A, bool kDense>
struct Across {
  using V = Vec<A>;
  using Sums = A;
  static constexpr int kVector = kLanes<A>;
  static constexpr bool kManyRows = true;

  struct Scratch {
    alignas(64) A predictions[kAcrossClasses * kVector];
    alignas(64) A targets[kAcrossClasses * kVector];
    alignas(64) A cache[kAcrossClasses * kVector];  // e^{z − peak}, then the gradient
    alignas(64) A rows[(kAcrossClasses + 1) * kVector];
    Mask<A> in_subset[kAcrossClasses];  // where rows have an S of their own
  };

  const SoftmaxXentPlan<A> plan;
  Scratch& scratch;
  bool caches;
  const SoftmaxXentSubset<A>* subsets;  // of the rows, or one
  const bool own_subsets;
  const int rows;
  V subset_size, subset_class_weight;
  int64_t labels[kVector];
  Mask<A> active{};  // the rows that are there and not ignored
  Mask<A> label_lanes{};

  // `rows` rows of the block, from `row` on.
  template <typename T>
  Across(const SoftmaxXentPlan<A>& plan, const SoftmaxXentBlock<T>& block, int64_t row, int rows,
         Scratch& scratch, bool caches)
      : plan(plan),
        scratch(scratch),
        caches(caches),
        subsets(block.subsets + row * block.subset_stride),
        own_subsets(block.subset_stride != 0),
        rows(rows),
        subset_size(Set(subsets->size)),
        subset_class_weight(Set(subsets->class_weight)) {
    const int64_t* block_labels = kDense ? nullptr : block.labels + row;
    using Lane = std::conditional_t<std::is_same_v<A, float>, int32_t, int64_t>;
    Lane lanes[kVector];
    for (int r = 0; r < kVector; ++r) {
      lanes[r] = r >= rows ? -1 : kDense ? 0 : static_cast<Lane>(block_labels[r]);
      labels[r] = lanes[r] < 0 ? 0 : lanes[r];
    }
    __builtin_memcpy(&label_lanes, lanes, sizeof(lanes));
    active = label_lanes >= 0;
    if (!own_subsets) return;
    for (int r = 0; r < rows; ++r) {
      subset_size[r] = subsets[r].size;
      subset_class_weight[r] = subsets[r].class_weight;
    }
    for (int64_t c = 0; c < plan.classes; ++c) {
      for (int r = 0; r < kVector; ++r) {
        lanes[r] = r < rows && IsIn(subsets[r], c) != 0 ? -1 : 0;
      }
      __builtin_memcpy(&scratch.in_subset[c], lanes, sizeof(lanes));
    }
  }

  template <typename Fn, typename EndRun>
  FUSEDLOSS_INLINE void Each(Fn&& fn, EndRun&& end_run) const {
    EachAligned(fn);
    end_run();
  }
  template <typename Fn>
  FUSEDLOSS_INLINE void EachAligned(Fn&& fn) const {
    for (int64_t c = 0; c < plan.classes; ++c) fn(c, AllLanes{}, Slot<0>{});
  }
  FUSEDLOSS_INLINE V Prediction(int64_t c, AllLanes) const {
    return Load(scratch.predictions + c * kVector);
  }
  FUSEDLOSS_INLINE V Target(int64_t c, AllLanes) const {
    return Load(scratch.targets + c * kVector);
  }
  FUSEDLOSS_INLINE V ClassWeight(int64_t c, AllLanes) const {
    return Set(plan.class_weight ? plan.class_weight[c] : A(1));
  }
  FUSEDLOSS_INLINE Mask<A> InSubset(int64_t c, AllLanes) const {
    if (own_subsets) return scratch.in_subset[c];
    return Mask<A>{} - static_cast<int>(IsIn(*subsets, c));
  }
  FUSEDLOSS_INLINE V SubsetSize() const { return subset_size; }
  FUSEDLOSS_INLINE V SubsetClassWeight() const { return subset_class_weight; }
  FUSEDLOSS_INLINE bool MayHoldLabel(int64_t) const { return true; }
  FUSEDLOSS_INLINE Mask<A> IsLabel(int64_t c) const {
    return label_lanes == Mask<A>{} + static_cast<int>(c);
  }
  FUSEDLOSS_INLINE bool Caches() const { return caches; }
  FUSEDLOSS_INLINE void Cache(int64_t c, V v) const { Store(scratch.cache + c * kVector, v); }
  FUSEDLOSS_INLINE V Cached(int64_t c) const { return Load(scratch.cache + c * kVector); }
  FUSEDLOSS_INLINE void Prefetch(int64_t) const {}
  FUSEDLOSS_INLINE void Emit(int64_t c, AllLanes, V v) const {
    Store(scratch.cache + c * kVector, Keep<A>(active, v));
  }
  FUSEDLOSS_INLINE V SumOfRow(V v) const { return v; }
  FUSEDLOSS_INLINE V MaxOfRow(V v) const { return v; }
  template <typename Fn>
  FUSEDLOSS_INLINE V OfLabels(Fn&& fn) const {
    A values[kVector];  // a vector's elements one by one would each wait for the last
    for (int r = 0; r < kVector; ++r) values[r] = fn(r, labels[r]);
    return Load(values);
  }
  FUSEDLOSS_INLINE A PredictionAt(int r, int64_t c) const {
    return scratch.predictions[c * kVector + r];
  }
  FUSEDLOSS_INLINE A IsInSubset(int r, int64_t c) const {
    return IsIn(subsets[own_subsets && r < rows ? r : 0], c);
  }
  FUSEDLOSS_INLINE Mask<A> FirstOfRow(Mask<A> places) const { return places; }
  FUSEDLOSS_INLINE Mask<A> Places(int64_t c) const { return Mask<A>{} + static_cast<int>(c); }
};

// to[c, r] = from[r, c] for [rows, columns], of row lengths that may be larger.
template <typename A>
FUSEDLOSS_INLINE void Transpose(const A* from, int64_t rows, int64_t columns, int64_t from_length,
                                A* to, int64_t to_length) {
  int64_t whole_rows = 0, whole_columns = 0;
  if constexpr (std::is_same_v<A, float>) {  // in blocks of 4 by 4
    whole_rows = rows - rows % 4;
    whole_columns = columns - columns % 4;
    for (int64_t r = 0; r < whole_rows; r += 4) {
      for (int64_t c = 0; c < whole_columns; c += 4) {
        const float* block = from + r * from_length + c;
        __m128 x0 = _mm_loadu_ps(block), x1 = _mm_loadu_ps(block + from_length);
        __m128 x2 = _mm_loadu_ps(block + 2 * from_length);
        __m128 x3 = _mm_loadu_ps(block + 3 * from_length);
        _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
        float* place = to + c * to_length + r;
        _mm_storeu_ps(place, x0);
        _mm_storeu_ps(place + to_length, x1);
        _mm_storeu_ps(place + 2 * to_length, x2);
        _mm_storeu_ps(place + 3 * to_length, x3);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
      to[c * to_length + r] = from[r * from_length + c];
    }
  }
}

// [rows, classes] into [classes, lanes].
template <typename T, typename Scratch, typename A = Accumulator<T>>
FUSEDLOSS_INLINE void IntoLanes(const T* from, int rows, int64_t classes, Scratch& scratch, A* to) {
  constexpr int kVector = kLanes<A>;
  const A* numbers = scratch.rows;
  if constexpr (std::is_same_v<T, A>) {
    numbers = from;
  } else {
    int64_t count = rows * classes, i = 0;
    for (; i + kVector <= count; i += kVector) Store(scratch.rows + i, Load(from + i));
    if (i < count) Store(scratch.rows + i, LoadFirst(from + i, static_cast<int>(count - i)));
  }
  Transpose(numbers, rows, classes, classes, to, kVector);
  // Lanes without a row repeat the first one: no NaN is made up, and nothing of them is kept.
  for (int r = rows; r < kVector; ++r) {
    for (int64_t c = 0; c < classes; ++c) to[c * kVector + r] = to[c * kVector];
  }
}

// The gradient in the scratch's cache, back into [rows, classes].
template <typename T, typename Scratch, typename A = Accumulator<T>>
FUSEDLOSS_INLINE void IntoRows(Scratch& scratch, int rows, int64_t classes, T* to) {
  constexpr int kVector = kLanes<A>;
  A* numbers = scratch.rows;
  if constexpr (std::is_same_v<T, A>) numbers = to;
  Transpose(scratch.cache, classes, rows, kVector, numbers, classes);
  if constexpr (!std::is_same_v<T, A>) {
    int64_t count = rows * classes, i = 0;
    for (; i + kVector <= count; i += kVector) Store(to + i, Load(numbers + i));
    if (i < count) StoreFirst(to + i, Load(numbers + i), static_cast<int>(count - i));
  }
}

// What the backward pass needs of a row: for each family its peak (from probabilities: its sum) and
// its weight times Σ y^F over its sum; and the weight of L_S, 0 in a row that is outside S.
template <typename A>
struct RowStats {
  // Left as they are where they are made: zeroing them takes as long as a short row.
  Vec<A> subset_peak, subset_scale, full_peak, full_scale, subset_weight;
  // Not kept from the forward pass: the sums, and which rows are not outside S.
  Vec<A> subset_sum, full_sum;
  Mask<A> inside;
  bool clips = true;  // false: from dense probabilities, known not to reach their bounds
};

// (tanh(x) / x − 1) / x² in x² on [0, 0.625²], a minimax fit in 40 digits; 4.4e-9 of tanh.
constexpr float kTanh[] = {-5.7049869628206996e-3f, 2.0639087183001448e-2f, -5.3739715052263289e-2f,
                           1.3331442197517888e-1f, -3.3333281941972616e-1f};
constexpr float kMaxTanhSquare = 0.625f * 0.625f;

// tanh x, relative to itself within a few ulp; equal for equal x, whatever is beside it.
template <typename A>
FUSEDLOSS_INLINE Vec<A> Tanh(Vec<A> x) {
  Vec<A> small{};
  Mask<A> is_small{};
  if constexpr (std::is_same_v<A, float>) {
    Vec<A> square = x * x;
    small = x + x * square * Polynomial<A>(kTanh, square);
    is_small = square <= kMaxTanhSquare;
    if (!Any<A>(~is_small)) return small;  // logits are rarely near their cap
  }
  Mask<A> sign = BitCast<Mask<A>>(x) & BitCast<Mask<A>>(Set(A(-0.0)));
  Vec<A> magnitude = BitCast<Vec<A>>(BitCast<Mask<A>>(x) ^ sign);
  Vec<A> rest = ExpMinus1<A>(A(-2) * magnitude);
  Vec<A> tanh = BitCast<Vec<A>>(BitCast<Mask<A>>(Divide<A>(-rest, rest + A(2))) | sign);
  return Select<A>(is_small, small, tanh);
}

// ---- From logits, and from probabilities with labels, whose logits are log(clip(p)).
template <bool kLogits, bool kRich, bool kDense, typename Tile>
struct Softmax {
  using A = typename Tile::Sums;
  using V = Vec<A>;
  const Tile tile;
  const SoftmaxXentPlan<A>& plan = tile.plan;
  // Which normalisers are needed: over all classes, over S alone.
  const bool full = !kRich || !plan.has_subset || plan.normalize_full || plan.full_weight != 0;
  const bool subset = kRich && plan.has_subset && !plan.normalize_full;

  FUSEDLOSS_INLINE V Clip(V p) const {
    p = p < plan.lowest ? Set(plan.lowest) : p;
    return p > plan.highest ? Set(plan.highest) : p;
  }
  template <typename Lanes>
  FUSEDLOSS_INLINE V Target(int64_t c, Lanes lanes) const {
    V target = tile.Target(c, lanes);
    return kRich ? Max<A>(Set(plan.lowest_target), target) : target;
  }
  FUSEDLOSS_INLINE V Power(V x, V peak) const {
    if constexpr (kLogits) {
      return Exp<A>(x * plan.inverse_temperature - peak);
    } else {
      return Clip(x);
    }
  }
  FUSEDLOSS_INLINE V Logit(V x) const {
    if constexpr (kLogits) {
      return x * plan.inverse_temperature;
    } else {
      return Log<A>(Clip(x));
    }
  }

  // Σ y^F·x from Σ w·y·x and Σ w·x.
  FUSEDLOSS_INLINE V Smoothed(V of_targets, V of_classes, V size) const {
    if (plan.label_smoothing == A(0)) return of_targets;
    return of_targets * plan.one_minus_smoothing + of_classes * (plan.label_smoothing / size);
  }

  // z_loss · lse², and how much its derivative adds to that of lse.
  FUSEDLOSS_INLINE V LogSumLoss(V log_sum) const {
    return plan.z_loss == A(0) ? V{} : plan.z_loss * log_sum * log_sum;
  }
  FUSEDLOSS_INLINE V LogSumPull(V log_sum) const {
    return plan.z_loss == A(0) ? V{} : A(2) * plan.z_loss * log_sum;
  }

  // Whether one exp serves both families: so when their peaks coincide.
  FUSEDLOSS_INLINE bool SamePeak(const RowStats<A>& stats) const {
    return full && (!kLogits || !Any<A>(stats.subset_peak != stats.full_peak));
  }

  FUSEDLOSS_INLINE void FindPeaks(RowStats<A>& stats) const {
    stats.full_peak = stats.subset_peak = V{};
    if constexpr (!kLogits) return;
    V lowest = Set(A(-__builtin_inf()));
    V all[kSlots] = {lowest, lowest, lowest, lowest}, in = lowest;
    tile.Each(
        [&](int64_t c, auto lanes, auto slot) FUSEDLOSS_FLATTEN {
          V z = tile.Prediction(c, lanes);
          z = Select<A>(MaskOf<A>(lanes), z, lowest);
          all[slot.value] = Max<A>(z, all[slot.value]);
          if (kRich && subset) in = Max<A>(Select<A>(tile.InSubset(c, lanes), z, lowest), in);
        },
        [] {});
    all[0] = Max<A>(Max<A>(all[0], all[1]), Max<A>(all[2], all[3]));
    stats.full_peak = tile.MaxOfRow(all[0]) * plan.inverse_temperature;
    if (kRich && subset) {
      stats.subset_peak = tile.MaxOfRow(in) * plan.inverse_temperature;
      // Where the peaks are close, e^{z − peak} of all classes is exact enough for S as well.
      if (full && !Any<A>(!(stats.full_peak - stats.subset_peak <= A(8)))) {
        stats.subset_peak = stats.full_peak;
      }
    }
  }

  FUSEDLOSS_INLINE V Forward(RowStats<A>& stats) const {
    FindPeaks(stats);
    const V subset_reference = subset ? stats.subset_peak : stats.full_peak;
    const bool same = SamePeak(stats);
    const bool smoothing = kRich && plan.label_smoothing != 0;
    RunningSum<A> full_sum[kSlots], subset_sum;
    // Per family: Σ y, Σ w·y, Σ w·y·(z − reference), Σ w·(z − reference), w the class weights.
    RunningSum<A> in_targets, in_weighted, in_dot, in_logits;
    RunningSum<A> all_weighted, all_dot, all_logits;
    tile.Each(
        [&](int64_t c, auto lanes, auto slot) FUSEDLOSS_FLATTEN {
          V x = tile.Prediction(c, lanes);
          V power{};
          if (full) {
            power = KeepLanes<A>(lanes, Power(x, stats.full_peak));
            full_sum[slot.value] += power;
            if (tile.Caches()) tile.Cache(c, power);
          }
          if constexpr (!Tile::kManyRows) tile.Prefetch(c);
          if constexpr (kRich) {
            Mask<A> in = tile.InSubset(c, lanes);
            if (subset) {
              if (!same) power = Power(x, stats.subset_peak);
              subset_sum += Keep<A>(in, power);
            }
            if (kDense || smoothing) {
              V z = Logit(x);
              V below_full = z - stats.full_peak, below_subset = z - subset_reference;
              V weight = tile.ClassWeight(c, lanes);
              if constexpr (kDense) {
                V target = Target(c, lanes);
                V weighted = weight * target;
                Mask<A> counts = weighted != A(0);
                in_targets += Keep<A>(in, target);
                in_weighted += Keep<A>(in, weighted);
                in_dot += Keep<A>(in & counts, weighted * below_subset);
                all_weighted += weighted;
                all_dot += Keep<A>(counts, weighted * below_full);
              }
              if (smoothing) {
                Mask<A> counts = weight != A(0);
                in_logits += Keep<A>(in & counts, weight * below_subset);
                all_logits += Keep<A>(counts, weight * below_full);
              }
            }
          } else if constexpr (kDense) {
            V target = tile.Target(c, lanes);
            all_weighted += target;
            all_dot += Keep<A>(target != A(0), target * (Logit(x) - stats.full_peak));
          }
        },
        [&] {
          EndRuns(full_sum[0], full_sum[1], full_sum[2], full_sum[3]);
          if constexpr (kRich)
            EndRuns(subset_sum, in_targets, in_weighted, in_dot, in_logits, all_logits);
          if constexpr (kDense) EndRuns(all_weighted, all_dot);
        });
    V sum = tile.SumOfRow(Sum(full_sum));
    V log_sum = Log<A>(sum);
    stats.full_sum = stats.subset_sum = sum;
    // Per family: Σ w·y, and Σ w·y·(lse − z) before smoothing.
    V all_weight{}, all_nats{}, in_target{}, in_weight{}, in_nats{};
    V subset_log_sum = log_sum, in_sum = sum;
    if (kRich && subset) {
      in_sum = tile.SumOfRow(subset_sum.total);
      subset_log_sum = Log<A>(in_sum);
      stats.subset_sum = in_sum;
    }
    if constexpr (kDense) {
      all_weight = tile.SumOfRow(all_weighted.total);
      all_nats = all_weight * log_sum - tile.SumOfRow(all_dot.total);
      in_target = tile.SumOfRow(in_targets.total);
      in_weight = tile.SumOfRow(in_weighted.total);
      in_nats = in_weight * subset_log_sum - tile.SumOfRow(in_dot.total);
    } else {
      V z = Logit(tile.OfLabels([&](int r, int64_t c) { return tile.PredictionAt(r, c); }));
      all_weight = tile.OfLabels(
          [&](int, int64_t c) { return kRich && plan.class_weight ? plan.class_weight[c] : A(1); });
      all_nats = all_weight * (log_sum - (z - stats.full_peak));
      if constexpr (kRich) {
        in_target = tile.OfLabels([&](int r, int64_t c) { return tile.IsInSubset(r, c); });
        in_weight = all_weight * in_target;
        in_nats = all_weight * (subset_log_sum - (z - subset_reference));
      }
    }
    const V lse = log_sum + stats.full_peak;
    if constexpr (!kRich) {
      stats.full_scale = (all_weight + LogSumPull(lse)) / sum;
      return all_nats + LogSumLoss(lse);
    }
    V loss{};
    if (plan.full_weight != 0) {
      const V size = Set(A(plan.classes)), weights = Set(plan.full_class_weight);
      V of_classes = weights * log_sum - tile.SumOfRow(all_logits.total);
      loss = plan.full_weight * (Smoothed(all_nats, of_classes, size) + LogSumLoss(lse));
      V pull = Smoothed(all_weight, weights, size) + LogSumPull(lse);
      stats.full_scale = plan.full_weight * pull / sum;
    }
    if (plan.has_subset) {
      const V size = tile.SubsetSize(), weights = tile.SubsetClassWeight();
      const V in_lse = subset_log_sum + subset_reference;
      stats.inside = in_target != A(0);
      V of_classes = weights * subset_log_sum - tile.SumOfRow(in_logits.total);
      V in_loss = Smoothed(in_nats, of_classes, size) + LogSumLoss(in_lse);
      loss += Keep<A>(stats.inside, plan.subset_weight * in_loss);
      V pull = Smoothed(in_weight, weights, size) + LogSumPull(in_lse);
      V scale = plan.subset_weight * pull / in_sum;
      (subset ? stats.subset_scale : stats.full_scale) += Keep<A>(stats.inside, scale);
      stats.subset_weight = Keep<A>(stats.inside, Set(plan.subset_weight));
    }
    return loss;
  }

  // A tile with a cache has e^{z − peak} of all classes in it from the forward pass.
  FUSEDLOSS_INLINE void Backward(const RowStats<A>& stats, V cotangent) const {
    if (plan.classes == 1 &&
        plan.z_loss == A(0)) {  // constant: exactly 0, where the difference of terms is an ulp
      tile.EachAligned([&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
        V z = Logit(tile.Prediction(c, lanes));
        tile.Emit(c, lanes, (z - z) * cotangent);
      });
      return;
    }
    const bool same = SamePeak(stats);
    const V full_scale = stats.full_scale * cotangent;
    const V subset_scale = stats.subset_scale * cotangent;
    const Mask<A> inside = stats.subset_weight != A(0);
    const Mask<A> pulled = stats.full_scale != A(0);  // not so: 0 even where the power is NaN
    const V smooth_in = stats.subset_weight * (plan.label_smoothing / tile.SubsetSize());
    const A smooth_all = plan.full_weight * (plan.label_smoothing / A(plan.classes));
    tile.EachAligned([&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
      V power{}, pull{};
      V x = tile.Prediction(c, lanes);
      if (full) {
        power = tile.Caches() ? tile.Cached(c) : Power(x, stats.full_peak);
        pull = full_scale * power;
        if constexpr (kRich) pull = Keep<A>(pulled, pull);
      }
      if constexpr (kRich) {
        Mask<A> in = tile.InSubset(c, lanes) & inside;
        if (subset) {
          if (!same) power = Power(x, stats.subset_peak);
          pull += Keep<A>(in, subset_scale * power);
        }
        V of_target = Keep<A>(in, stats.subset_weight) + plan.full_weight;
        if constexpr (kDense) {
          V target = of_target * plan.one_minus_smoothing * Target(c, lanes);
          target += Keep<A>(in, smooth_in) + smooth_all;
          pull -= cotangent * tile.ClassWeight(c, lanes) * target;
        } else {
          if (plan.label_smoothing != 0) {
            pull -= cotangent * tile.ClassWeight(c, lanes) * (Keep<A>(in, smooth_in) + smooth_all);
          }
          if (tile.MayHoldLabel(c)) {
            V target = of_target * plan.one_minus_smoothing * tile.ClassWeight(c, lanes);
            pull -= Keep<A>(tile.IsLabel(c), cotangent * target);
          }
        }
      } else if constexpr (kDense) {
        pull -= cotangent * tile.Target(c, lanes);
      } else if (tile.MayHoldLabel(c)) {
        pull -= Keep<A>(tile.IsLabel(c), cotangent);
      }
      if constexpr (!kLogits) {
        // d log(clip(p)) / dp is 1/p between the bounds, else 0.
        Mask<A> clipped = (x < plan.lowest) | (x > plan.highest);
        pull = Keep<A>(~clipped & (pull != A(0)), pull / x);
      }
      tile.Emit(c, lanes, pull);
    });
  }
};

// ---- From probabilities with dense targets.
template <bool kRich, typename Tile>
struct Divided {
  using A = typename Tile::Sums;
  using V = Vec<A>;
  const Tile tile;
  const SoftmaxXentPlan<A>& plan = tile.plan;

  template <typename Lanes>
  FUSEDLOSS_INLINE V Target(int64_t c, Lanes lanes) const {
    V target = tile.Target(c, lanes);
    return kRich ? Max<A>(Set(plan.lowest_target), target) : target;
  }

  // Of shares p / sum: those that clipping leaves alone, and log(clip(share)).
  FUSEDLOSS_INLINE Mask<A> Between(V share) const {
    return ~((share < plan.lowest) | (share > plan.highest));
  }
  FUSEDLOSS_INLINE V LogOfClipped(V share) const {
    share = share < plan.lowest ? Set(plan.lowest) : share;
    return Log<A>(share > plan.highest ? Set(plan.highest) : share);
  }

  // What a row is reduced to. Per family: the sum that p is divided by, Σ y^F·log(share), and Σ y^F
  // of the shares between the bounds; and Σ y over S.
  struct Totals {
    V full_sum, subset_sum, all_dot, all_between, in_dot, in_between, in_targets;
  };

  // In general: shares may be clipped, and NaN and Inf must stay in their family.
  __attribute__((noinline)) Totals TakeCare() const {
    const bool smoothing = kRich && plan.label_smoothing != 0;
    const A smooth_all = plan.label_smoothing / A(plan.classes);
    const V smooth_in = plan.label_smoothing / tile.SubsetSize();
    RunningSum<A> full_sum, subset_sum, in_targets;
    tile.Each(
        [&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
          V p = tile.Prediction(c, lanes);
          full_sum += p;
          if constexpr (kRich) {
            Mask<A> in = tile.InSubset(c, lanes);
            subset_sum += Keep<A>(in, p);
            in_targets += Keep<A>(in, Target(c, lanes));
          }
        },
        [&] { EndRuns(full_sum, subset_sum, in_targets); });
    Totals totals{};
    totals.full_sum = totals.subset_sum = tile.SumOfRow(full_sum.total);
    if (NormalizesSubset()) totals.subset_sum = tile.SumOfRow(subset_sum.total);
    totals.in_targets = tile.SumOfRow(in_targets.total);

    RunningSum<A> all_dots, all_betweens, in_dots, in_betweens;
    tile.Each(
        [&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
          V target = Target(c, lanes);
          if (!smoothing && !Any<A>(target != A(0))) return;
          V p = tile.Prediction(c, lanes);
          V weight = Set(A(1));
          if constexpr (kRich) {
            weight = tile.ClassWeight(c, lanes);
            target *= plan.one_minus_smoothing;
          }
          V all_target = weight * (target + (smoothing ? smooth_all : A(0)));
          V share = p / totals.full_sum;
          all_dots += Keep<A>(all_target != A(0), all_target * LogOfClipped(share));
          all_betweens += Keep<A>(Between(share), all_target);
          if constexpr (kRich) {
            Mask<A> in = tile.InSubset(c, lanes);
            V in_target = Keep<A>(in, weight * (target + (smoothing ? smooth_in : V{})));
            share = p / totals.subset_sum;
            in_dots += Keep<A>(in_target != A(0), in_target * LogOfClipped(share));
            in_betweens += Keep<A>(Between(share), in_target);
          }
        },
        [&] { EndRuns(all_dots, all_betweens, in_dots, in_betweens); });
    totals.all_dot = tile.SumOfRow(all_dots.total);
    totals.all_between = tile.SumOfRow(all_betweens.total);
    totals.in_dot = tile.SumOfRow(in_dots.total);
    totals.in_between = tile.SumOfRow(in_betweens.total);
    return totals;
  }

  FUSEDLOSS_INLINE bool NormalizesSubset() const {
    return kRich && plan.has_subset && !plan.normalize_full;
  }

  // The same in one sweep without smoothing, supposing that all is finite and that no share with a
  // target is clipped: then log(share) = log(p) − log(sum), and a mask may be a factor of 0 or 1.
  // Whether that held is seen from the sums, and from the range of the p that have a target.
  FUSEDLOSS_INLINE bool Suppose(Totals& totals) const {
    const V infinity = Set(A(__builtin_inf()));
    RunningSum<A> all[kSlots], in_sum, in_targets;
    RunningSum<A> all_weighted, all_logs, in_weighted, in_logs;
    V lowest = infinity, highest{};
    tile.Each(
        [&](int64_t c, auto lanes, auto slot) FUSEDLOSS_FLATTEN {
          if constexpr (!Tile::kManyRows) tile.Prefetch(c);
          V p = tile.Prediction(c, lanes);
          V target = Target(c, lanes);
          V in{};
          all[slot.value] += p;
          if constexpr (kRich) {
            in = Keep<A>(tile.InSubset(c, lanes), Set(A(1)));
            in_sum += in * p;
          }
          if (!Any<A>(target != A(0))) return;  // one-hot rows are nearly all zeros
          WidenRange(target, p, lowest, highest);
          V log = LogOfNormal<A>(p);  // finite whatever p is
          if constexpr (kRich) {
            in_targets += in * target;
            if (plan.class_weight) {
              target *= tile.ClassWeight(c, lanes);
              in_weighted += in * target;
            }
            in_logs += in * (target * log);
          }
          all_weighted += target;
          all_logs += target * log;
        },
        [&] {
          EndRuns(all[0], all[1], all[2], all[3], all_weighted, all_logs);
          if constexpr (kRich) EndRuns(in_sum, in_targets, in_weighted, in_logs);
        });
    totals.full_sum = totals.subset_sum = tile.SumOfRow(Sum(all));
    if (NormalizesSubset()) totals.subset_sum = tile.SumOfRow(in_sum.total);
    const A unsmoothed = kRich ? plan.one_minus_smoothing : A(1);
    totals.all_between = unsmoothed * tile.SumOfRow(all_weighted.total);
    totals.all_dot = unsmoothed * tile.SumOfRow(all_logs.total);
    totals.all_dot -= totals.all_between * Log<A>(totals.full_sum);
    if constexpr (kRich) {
      totals.in_targets = tile.SumOfRow(in_targets.total);
      totals.in_between = totals.in_targets;
      if (plan.class_weight) totals.in_between = tile.SumOfRow(in_weighted.total);
      totals.in_between *= unsmoothed;
      totals.in_dot = unsmoothed * tile.SumOfRow(in_logs.total);
      totals.in_dot -= totals.in_between * Log<A>(totals.subset_sum);
    }
    const V least = Max<A>(totals.full_sum, totals.subset_sum);
    const V most = Min<A>(totals.full_sum, totals.subset_sum);
    const V dots = (totals.all_dot + totals.in_dot) * A(0);
    const A normal = std::is_same_v<A, float> ? A(0x1p-126) : A(0x1p-1022);
    return !Any<A>(~((lowest >= normal) & (lowest >= plan.lowest * least) &
                     (highest <= plan.highest * most) & (most >= A(0x1p-99)) &
                     (least <= A(0x1p99)) & (dots == A(0))));
  }

  FUSEDLOSS_INLINE V Forward(RowStats<A>& stats) const {
    Totals totals{};
    stats.clips = (kRich && plan.label_smoothing != 0) || !Suppose(totals);
    if (stats.clips) totals = TakeCare();
    const V full_sum = totals.full_sum, subset_sum = totals.subset_sum;
    // NaN and Inf among the predictions reach loss and gradient through their sum, 0 through 0/0.
    const V full_poison = (full_sum + A(1) / full_sum) * A(0);
    V loss{};
    stats.full_peak = stats.full_sum = full_sum;
    stats.full_scale = stats.subset_scale = V{};
    if (!kRich || plan.full_weight != 0) {
      const A weight = kRich ? plan.full_weight : A(1);
      loss = weight * (full_poison - totals.all_dot);
      stats.full_scale = weight * (totals.all_between / full_sum + full_poison);
    }
    if constexpr (kRich) {
      V poison = totals.in_dot * A(0);
      Mask<A> inside{};
      if (plan.has_subset) inside = totals.in_targets != A(0);
      stats.inside = inside;
      if (!plan.normalize_full) poison += (subset_sum + A(1) / subset_sum) * A(0);
      stats.subset_peak = stats.subset_sum = subset_sum;
      stats.subset_weight = Keep<A>(inside, Set(plan.subset_weight));
      loss += Keep<A>(inside, plan.subset_weight * (poison - totals.in_dot));
      V scale = Keep<A>(inside, plan.subset_weight * (totals.in_between / subset_sum + poison));
      (plan.normalize_full ? stats.full_scale : stats.subset_scale) += scale;
    }
    return loss;
  }

  FUSEDLOSS_INLINE void Backward(const RowStats<A>& stats, V cotangent) const {
    const V full_scale = stats.full_scale * cotangent;
    const V subset_scale = stats.subset_scale * cotangent;
    const bool smoothing = kRich && plan.label_smoothing != 0;
    const A smooth_all = plan.label_smoothing / A(plan.classes);
    const V smooth_in = plan.label_smoothing / tile.SubsetSize();
    const V subset_weight = stats.subset_weight * cotangent * plan.one_minus_smoothing;
    const V full_weight = (kRich ? plan.full_weight * plan.one_minus_smoothing : A(1)) * cotangent;
    if (!stats.clips) {
      tile.EachAligned([&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
        V target = Target(c, lanes);
        V pull = full_scale, weight = full_weight;
        if constexpr (kRich) {
          Mask<A> in = tile.InSubset(c, lanes);
          pull += Keep<A>(in, subset_scale);
          weight += Keep<A>(in, subset_weight);
          if (plan.class_weight) weight *= tile.ClassWeight(c, lanes);
        }
        Mask<A> counts = target != A(0);
        if (Any<A>(counts)) {
          pull -= Keep<A>(counts, Divide<A>(weight * target, tile.Prediction(c, lanes)));
        }
        tile.Emit(c, lanes, pull);
      });
      return;
    }
    tile.EachAligned([&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
      V target = Target(c, lanes);
      V pull = full_scale;
      Mask<A> in{};
      if constexpr (kRich) {
        in = tile.InSubset(c, lanes);
        pull += Keep<A>(in, subset_scale);
      }
      if (smoothing || Any<A>(target != A(0))) {
        V p = tile.Prediction(c, lanes);
        V all_target = target, in_target{};
        if constexpr (kRich) {
          target *= plan.one_minus_smoothing;
          all_target = plan.full_weight * (target + (smoothing ? smooth_all : A(0)));
          in_target = stats.subset_weight * (target + (smoothing ? smooth_in : V{}));
          in_target = Keep<A>(in, in_target);
        }
        all_target = Keep<A>(Between(p / stats.full_peak), all_target);
        if constexpr (kRich) in_target = Keep<A>(Between(p / stats.subset_peak), in_target);
        if constexpr (kRich) all_target = tile.ClassWeight(c, lanes) * (all_target + in_target);
        pull -= Keep<A>(all_target != A(0), cotangent * all_target / p);
      }
      tile.Emit(c, lanes, pull);
    });
  }
};

// ---- The focal form. Labels are one-hot targets here.
template <bool kLogits, bool kDense, typename Tile>
struct Focal {
  using A = typename Tile::Sums;
  using V = Vec<A>;
  static constexpr bool kDivides = !kLogits && kDense;  // p itself, not a softmax of its logarithm
  const Tile tile;
  const SoftmaxXentPlan<A>& plan = tile.plan;
  const Softmax<kLogits, true, kDense, Tile> softmax{tile};
  const bool full = softmax.full, subset = softmax.subset;
  const bool smoothing = plan.label_smoothing != 0;
  const A smooth_all = plan.label_smoothing / A(plan.classes);
  const V smooth_in = plan.label_smoothing / tile.SubsetSize();
  // The cache holds y^F · slope if there is one family: logarithms are taken once.
  const bool caches = tile.Caches() && plan.has_subset == (plan.full_weight == 0);

  template <typename Lanes>
  FUSEDLOSS_INLINE V Target(int64_t c, Lanes lanes) const {
    if constexpr (kDense) return softmax.Target(c, lanes);
    return Keep<A>(tile.IsLabel(c), Set(A(1)));
  }
  FUSEDLOSS_INLINE V Power(V x, V peak) const { return kDivides ? x : softmax.Power(x, peak); }
  // x^gamma / x
  FUSEDLOSS_INLINE V PowerBelowGamma(V x) const {
    if (plan.gamma == A(1)) return Set(A(1));
    return plan.gamma == A(2) ? x : Exp<A>(plan.gamma * LogOfNormal<A>(x)) / x;
  }

  // −(1 − q)^gamma · log q of q = clip(share), and its derivative in the share.
  struct Term {
    V nats, slope;
  };
  FUSEDLOSS_INLINE Term TermOf(V share) const {
    V q = softmax.Clip(share), rest = A(1) - q;
    V log = Log<A>(q), below = PowerBelowGamma(rest), power = below * rest;
    Mask<A> between = ~((share < plan.lowest) | (share > plan.highest));
    return {-power * log, Keep<A>(between, plan.gamma * below * log - power / q)};
  }

  // What both families have at a vector of classes.
  struct Classes {
    V full_share, subset_share;    // in N
    V full_target, subset_target;  // y^F
    Term full_term, subset_term;   // where a target is not 0
  };
  template <typename Lanes>
  FUSEDLOSS_INLINE Classes At(int64_t c, Lanes lanes, const RowStats<A>& stats) const {
    Classes at{};
    V target = Target(c, lanes);
    const bool counts = smoothing || Any<A>(target != A(0));
    if (kDivides && !counts) return at;  // one-hot rows are nearly all zeros
    V x = tile.Prediction(c, lanes);
    Mask<A> in = tile.InSubset(c, lanes);
    if (full) at.full_share = Power(x, stats.full_peak) * (A(1) / stats.full_sum);
    at.subset_share = at.full_share;
    if (subset) {
      at.subset_share = Keep<A>(in, Power(x, stats.subset_peak) * (A(1) / stats.subset_sum));
    }
    if (!counts) return at;
    const V weight = tile.ClassWeight(c, lanes);
    target *= plan.one_minus_smoothing;
    at.full_target = weight * (target + (smoothing ? smooth_all : A(0)));
    at.subset_target = Keep<A>(in, weight * (target + (smoothing ? smooth_in : V{})));
    if (plan.full_weight != 0) at.full_term = TermOf(at.full_share);
    if (plan.has_subset) at.subset_term = TermOf(at.subset_share);
    return at;
  }
  // y^F · x, 0 where y^F is.
  static FUSEDLOSS_INLINE V Times(V target, V x) { return Keep<A>(target != A(0), target * x); }
  // NaN and Inf among probabilities reach loss and gradient through their sum.
  static FUSEDLOSS_INLINE V Poison(V sum) { return kLogits ? V{} : (sum + A(1) / sum) * A(0); }

  FUSEDLOSS_INLINE V Forward(RowStats<A>& stats) const {
    softmax.FindPeaks(stats);
    RunningSum<A> full_sum, subset_sum, in_targets;
    tile.Each(
        [&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
          V x = tile.Prediction(c, lanes);
          Mask<A> in = tile.InSubset(c, lanes) & MaskOf<A>(lanes);
          if (full) full_sum += KeepLanes<A>(lanes, Power(x, stats.full_peak));
          if (subset) subset_sum += Keep<A>(in, Power(x, stats.subset_peak));
          in_targets += Keep<A>(in, Target(c, lanes));
        },
        [&] { EndRuns(full_sum, subset_sum, in_targets); });
    stats.full_sum = stats.subset_sum = tile.SumOfRow(full_sum.total);
    if (subset) stats.subset_sum = tile.SumOfRow(subset_sum.total);
    if (plan.has_subset) stats.inside = tile.SumOfRow(in_targets.total) != A(0);
    stats.subset_weight = Keep<A>(stats.inside, Set(plan.subset_weight));

    // Per family: Σ y^F · nats, and Σ y^F · slope · share.
    RunningSum<A> full_nats, full_dot, subset_nats, subset_dot;
    tile.Each(
        [&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
          const Classes at = At(c, lanes, stats);
          V full_slope = Times(at.full_target, at.full_term.slope);
          V subset_slope = Times(at.subset_target, at.subset_term.slope);
          if (caches) tile.Cache(c, plan.has_subset ? subset_slope : full_slope);
          full_nats += KeepLanes<A>(lanes, Times(at.full_target, at.full_term.nats));
          full_dot += KeepLanes<A>(lanes, Times(full_slope, at.full_share));
          subset_nats += KeepLanes<A>(lanes, Times(at.subset_target, at.subset_term.nats));
          subset_dot += KeepLanes<A>(lanes, Times(subset_slope, at.subset_share));
        },
        [&] { EndRuns(full_nats, full_dot, subset_nats, subset_dot); });
    V loss{};
    if (plan.full_weight != 0) {
      const V lse = Log<A>(stats.full_sum) + stats.full_peak, poison = Poison(stats.full_sum);
      V nats = tile.SumOfRow(full_nats.total) + softmax.LogSumLoss(lse) + poison;
      loss = plan.full_weight * nats;
      stats.full_scale = softmax.LogSumPull(lse) - tile.SumOfRow(full_dot.total) + poison;
    }
    if (plan.has_subset) {
      const V peak = subset ? stats.subset_peak : stats.full_peak;
      const V lse = Log<A>(stats.subset_sum) + peak, poison = Poison(stats.subset_sum);
      V nats = tile.SumOfRow(subset_nats.total) + softmax.LogSumLoss(lse) + poison;
      loss += Keep<A>(stats.inside, plan.subset_weight * nats);
      stats.subset_scale = softmax.LogSumPull(lse) - tile.SumOfRow(subset_dot.total) + poison;
    }
    return loss;
  }

  FUSEDLOSS_INLINE void Backward(const RowStats<A>& stats, V cotangent) const {
    const V full_weight = plan.full_weight * cotangent;
    const V subset_weight = stats.subset_weight * cotangent;
    const V full_divisor = A(1) / stats.full_sum, subset_divisor = A(1) / stats.subset_sum;
    tile.EachAligned([&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
      V full_slope, full_share, subset_slope, subset_share;
      if (caches) {
        full_slope = subset_slope = tile.Cached(c);
        V x = kDivides ? V{} : tile.Prediction(c, lanes);
        if (full) full_share = Power(x, stats.full_peak) * full_divisor;
        subset_share = subset ? Power(x, stats.subset_peak) * subset_divisor : full_share;
      } else {
        const Classes at = At(c, lanes, stats);
        full_slope = Times(at.full_target, at.full_term.slope);
        subset_slope = Times(at.subset_target, at.subset_term.slope);
        full_share = at.full_share;
        subset_share = at.subset_share;
      }
      V pull{};
      if (plan.full_weight != 0) {
        pull = full_weight * (full_slope + stats.full_scale);
        pull *= kDivides ? full_divisor : full_share;
      }
      if (plan.has_subset) {
        V slope = subset_weight * (subset_slope + stats.subset_scale);
        slope *= kDivides ? subset_divisor : subset_share;
        Mask<A> in = subset ? tile.InSubset(c, lanes) & stats.inside : stats.inside;
        pull += Keep<A>(in, slope);
      }
      if constexpr (!kLogits && !kDense) {  // d log(clip(p)) / dp
        V p = tile.Prediction(c, lanes);
        Mask<A> clipped = (p < plan.lowest) | (p > plan.highest);
        pull = Keep<A>(~clipped & (pull != A(0)), pull / p);
      }
      tile.Emit(c, lanes, pull);
    });
  }
};

enum class Form { kPlain, kRich, kFocal };

template <bool kLogits, Form kForm, bool kDense, typename Tile>
struct FormulaOf {
  using Type = Softmax<kLogits, kForm == Form::kRich, kDense, Tile>;
};
template <Form kForm, typename Tile>
struct FormulaOf<false, kForm, true, Tile> {
  using Type = Divided<kForm == Form::kRich, Tile>;
};
template <bool kLogits, bool kDense, typename Tile>
struct FormulaOf<kLogits, Form::kFocal, kDense, Tile> {
  using Type = Focal<kLogits, kDense, Tile>;
};
template <typename Tile>
struct FormulaOf<false, Form::kFocal, true, Tile> {
  using Type = Focal<false, true, Tile>;
};

// Rank, entropy and log-sum-exp of a row whose forward pass has left its sums.
template <bool kLogits, bool kDense, typename Tile>
struct Metrics {
  using A = typename Tile::Sums;
  using V = Vec<A>;
  static constexpr bool kDivides = !kLogits && kDense;
  V rank, entropy, log_sum_exp;

  __attribute__((noinline)) Metrics(const Tile& tile, const RowStats<A>& stats) {
    const SoftmaxXentPlan<A>& plan = tile.plan;
    const Softmax<kLogits, true, kDense, Tile> softmax{tile};
    const V peak = kDivides ? V{} : softmax.subset ? stats.subset_peak : stats.full_peak;
    const V sum = plan.has_subset ? stats.subset_sum : stats.full_sum;
    Mask<A> own;  // the place of the row's class
    V score;
    if constexpr (kDense) {
      own = FirstOfGreatestTargets(tile, softmax);
      for (int r = 0; r < Tile::kVector; ++r) {
        score[r] = tile.PredictionAt(r, own[r] < plan.classes ? own[r] : 0);
      }
    } else {
      score = tile.OfLabels([&](int r, int64_t c) { return tile.PredictionAt(r, c); });
      const V labels = tile.OfLabels([](int, int64_t c) {
        return BitCast<A>(static_cast<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>(c));
      });
      own = BitCast<Mask<A>>(labels);
    }
    RunningSum<A> higher, dot;
    tile.Each(
        [&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
          V x = tile.Prediction(c, lanes);
          Mask<A> in = tile.InSubset(c, lanes) & MaskOf<A>(lanes);
          Mask<A> before = ~(x <= score) | ((x == score) & (tile.Places(c) < own));
          higher += Keep<A>(in & before, Set(A(1)));
          V power = kDivides ? x : softmax.Power(x, peak);
          V below = kLogits ? softmax.Logit(x) - peak : Log<A>(power);
          Mask<A> counts = power != A(0);
          counts &= softmax.subset ? in : MaskOf<A>(lanes);
          dot += Keep<A>(counts, power * below);
        },
        [&] { EndRuns(higher, dot); });
    const V log_sum = Log<A>(sum);
    rank = tile.SumOfRow(higher.total);
    entropy = log_sum - tile.SumOfRow(dot.total) / sum;
    log_sum_exp = log_sum + peak;
    if (!plan.has_subset) return;
    rank = Select<A>(stats.inside, rank, Set(A(-1)));
    entropy = Keep<A>(stats.inside, entropy);
    log_sum_exp = Keep<A>(stats.inside, log_sum_exp);
  }

  template <typename Formula>
  static FUSEDLOSS_INLINE Mask<A> FirstOfGreatestTargets(const Tile& tile, const Formula& softmax) {
    const V lowest = Set(A(-__builtin_inf()));
    V greatest = lowest;
    tile.Each(
        [&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
          Mask<A> in = tile.InSubset(c, lanes) & MaskOf<A>(lanes);
          greatest = Max<A>(Select<A>(in, softmax.Target(c, lanes), lowest), greatest);
        },
        [] {});
    greatest = tile.MaxOfRow(greatest);
    const Mask<A> nowhere = Mask<A>{} + static_cast<int>(tile.plan.classes);
    Mask<A> first = nowhere;
    tile.Each(
        [&](int64_t c, auto lanes, auto) FUSEDLOSS_FLATTEN {
          Mask<A> in = tile.InSubset(c, lanes) & MaskOf<A>(lanes);
          Mask<A> earlier = in & (softmax.Target(c, lanes) == greatest) & (tile.Places(c) < first);
          first = (tile.Places(c) & earlier) | (first & ~earlier);
        },
        [] {});
    return tile.FirstOfRow(first);
  }

  FUSEDLOSS_INLINE void Save(int lane, bool counts, A* to) const {
    if (!counts) return SaveNone(to);
    to[0] = rank[lane];
    to[1] = entropy[lane];
    to[2] = log_sum_exp[lane];
  }
  static FUSEDLOSS_INLINE void SaveNone(A* to) {
    to[0] = -1;
    to[1] = to[2] = 0;
  }
};

// Out of line: each of these is large, and stands once for all passes.
template <typename Formula, typename Tile, typename A = typename Tile::Sums>
__attribute__((noinline)) Vec<A> Forward(const Tile& tile, RowStats<A>& stats) {
  RowStats<A> local{};
  Vec<A> loss = Formula{tile}.Forward(local);
  stats = local;
  return loss;
}
template <typename Formula, typename Tile, typename A = typename Tile::Sums>
__attribute__((noinline)) void Backward(const Tile& tile, const RowStats<A>& stats,
                                        Vec<A> cotangent) {
  RowStats<A> local = stats;
  Formula{tile}.Backward(local, cotangent);
}

template <typename A>
FUSEDLOSS_INLINE void SaveStats(const RowStats<A>& stats, bool rich, int lane, A* to) {
  if (rich) {
    to[0] = stats.subset_peak[lane];
    to[1] = stats.subset_scale[lane];
    to[2] = stats.full_peak[lane];
    to[3] = stats.full_scale[lane];
    to[4] = stats.subset_weight[lane];
  } else {
    to[0] = stats.full_peak[lane];
    to[1] = stats.full_scale[lane];
  }
}

template <typename A>
FUSEDLOSS_INLINE void LoadStats(const A* from, bool rich, int lane, RowStats<A>& stats) {
  if (rich) {
    stats.subset_peak[lane] = from[0];
    stats.subset_scale[lane] = from[1];
    stats.full_peak[lane] = from[2];
    stats.full_scale[lane] = from[3];
    stats.subset_weight[lane] = from[4];
  } else {
    stats.full_peak[lane] = from[0];
    stats.full_scale[lane] = from[1];
  }
}

enum class Pass { kForward, kBackward, kBoth };

template <typename T, bool kLogits, Form kForm, bool kDense>
void RunAlong(Pass pass, const SoftmaxXentPlan<Accumulator<T>>& plan,
              const SoftmaxXentBlock<T>& block) {
  using A = Accumulator<T>;
  using Tile = Along<T, kDense>;
  using Formula = typename FormulaOf<kLogits, kForm, kDense, Tile>::Type;
  constexpr bool kRich = kForm != Form::kPlain;
  constexpr int kStats = kRich ? kRichStats : kPlainStats;
  constexpr int64_t kCachedClasses = kCacheBytes / sizeof(A);
  alignas(64) A memory[kCachedClasses + kLanes<A>];
  A* cache = pass == Pass::kBoth && plan.classes <= kCachedClasses ? memory : nullptr;
  for (int64_t row = 0; row < block.rows; ++row) {
    Tile tile(plan, block, row, cache);
    RowStats<A> stats;
    A* saved = block.stats ? block.stats + row * kStats : nullptr;
    if (!kDense && tile.label < 0) {
      if (block.loss) block.loss[row] = 0;
      if (saved && pass == Pass::kForward) __builtin_memset(saved, 0, kStats * sizeof(A));
      if (block.metrics) Metrics<kLogits, kDense, Tile>::SaveNone(block.metrics + 3 * row);
      if (block.gradient) __builtin_memset(tile.gradient, 0, plan.classes * sizeof(T));
      continue;
    }
    if (pass == Pass::kBackward) {
      for (int lane = 0; lane < kLanes<A>; ++lane) LoadStats<A>(saved, kRich, lane, stats);
    } else {
      block.loss[row] = Forward<Formula>(tile, stats)[0];
      if (block.metrics) {
        Metrics<kLogits, kDense, Tile>(tile, stats).Save(0, true, block.metrics + 3 * row);
      }
    }
    if (pass == Pass::kForward) {
      if (saved) SaveStats<A>(stats, kRich, 0, saved);
    } else {
      Backward<Formula>(tile, stats, Set(block.cotangents[row] * plan.inverse_temperature));
    }
  }
  if (plan.stream) _mm_sfence();
}

// Plain cross-entropy of long rows from logits and labels, both passes: where the time goes. The
// gradient of a row is written while the next row is read, vector by vector, so that memory sees
// reads and writes all the time and exp is computed in their shadow. That takes one read of a row:
// exp is taken relative to the greatest logit before the chunk, kept in block.scratch, and scaled
// to the peak of the row when it is written. A chunk that rises far above that is done again.
template <typename T, bool kCap>
class Pipeline {
 public:
  Pipeline(const SoftmaxXentPlan<Accumulator<T>>& plan, const SoftmaxXentBlock<T>& block)
      : classes_(plan.classes),
        stream_(plan.stream),
        z_loss_(plan.z_loss),
        inverse_temperature_(plan.inverse_temperature),
        highest_(plan.softcap * plan.inverse_temperature),
        inverse_cap_(A(1) / plan.softcap),
        powers_(block.scratch),
        chunks_((classes_ - kVector) / kChunk) {}

  void Run(const SoftmaxXentBlock<T>& block) {
    int64_t previous = -1;
    for (int64_t row = 0; row < block.rows; ++row) {
      if (block.labels[row] < 0) {
        block.loss[row] = 0;
        __builtin_memset(block.gradient + row * classes_, 0, classes_ * sizeof(T));
        continue;
      }
      Read(block, row);
      if (previous < 0) {
        Sweep<true, false>();
      } else {
        Sweep<true, true>();
      }
      block.loss[row] = EndRow(block.cotangents[row]);
      Write(block, row);
      previous = row;
    }
    if (previous >= 0) Sweep<false, true>();
    if (stream_) _mm_sfence();
  }

 private:
  using A = Accumulator<T>;
  using V = Vec<A>;
  static constexpr int kVector = kLanes<A>;
  static constexpr int64_t kChunk = kPipelineChunk;
  static constexpr int64_t kMaxChunks = kPipelineBytes / sizeof(A) / kChunk + 1;
  static constexpr int64_t kAhead = 4096 / sizeof(T);  // classes from a load to the prefetch
  static constexpr int kMaxRise = 40;                  // nats: e^40 summed over any row is finite

  void Read(const SoftmaxXentBlock<T>& block, int64_t row) {
    logits_ = block.predictions + row * classes_;
    const Scaled label = Scale(Set(LoadOne(logits_ + block.labels[row])));
    logit_ = label.logit[0];
    slope_ = label.slope[0];
  }

  // A logit as the softmax takes it, and its derivative but for the temperature.
  struct Scaled {
    V logit, slope;
  };
  FUSEDLOSS_INLINE Scaled Scale(V z) const {
    if constexpr (kCap) {
      V tanh = Tanh<A>(z * inverse_cap_);
      return {tanh * highest_, A(1) - tanh * tanh};
    } else {
      return {z * inverse_temperature_, Set(A(1))};
    }
  }
  // e^{scaled − peak}, and what the gradient is made of: this times the derivative.
  struct Powered {
    V power, kept;
  };
  FUSEDLOSS_INLINE Powered Power(V z, V peak) const {
    const Scaled scaled = Scale(z);
    V power = Exp<A>(scaled.logit - peak);
    return {power, kCap ? power * scaled.slope : power};
  }

  // The gradient of one row; copied to where it is used, so that no store can change it.
  struct Writer {
    T* gradient = nullptr;
    int64_t label = 0;
    int64_t head = 0;  // classes before the first vector that is aligned
    V cotangent{};
    bool stream = false;

    FUSEDLOSS_INLINE V Gradient(int64_t c, V power, V factor) const {
      V pull = power * factor;
      if (static_cast<uint64_t>(label - c) < static_cast<uint64_t>(kVector)) {
        Mask<A> is_label = LaneIds<A>() == Mask<A>{} + static_cast<int>(label - c);
        pull -= Keep<A>(is_label, cotangent);
      }
      return pull;
    }
    FUSEDLOSS_INLINE void Emit(int64_t c, V power, V factor) const {
      V pull = Gradient(c, power, factor);
      if (stream) {
        Stream(gradient + c, pull);
      } else {
        Store(gradient + c, pull);
      }
    }
    FUSEDLOSS_INLINE void EmitFirst(int64_t c, V power, V factor, int64_t count) const {
      StoreFirst(gradient + c, Gradient(c, power, factor), static_cast<int>(count));
    }
  };

  // The row just read is the one to write from here on.
  void Write(const SoftmaxXentBlock<T>& block, int64_t row) {
    const V cotangent = Set(block.cotangents[row] * inverse_temperature_ * slope_);
    writer_ = {block.gradient + row * classes_, block.labels[row], 0, cotangent, stream_};
    if (stream_) writer_.head = UnalignedHead(writer_.gradient, classes_);
  }

  // A scaled peak. A chunk without a finite logit must not make exp(−Inf + Inf).
  FUSEDLOSS_INLINE V Finite(V peak) const {
    return Max<A>(Scale(peak).logit,
                  Set(std::is_same_v<A, float> ? A(-0x1.fffffep127) : A(-0x1.fffffffffffffp1023)));
  }

  // Powers of the row that is read replace those of the row that is written.
  template <bool kReads, bool kWrites>
  __attribute__((noinline)) void Sweep() {
    V reference = kReads ? Peak(0, kChunk) : V{};  // before it is scaled
    if constexpr (kWrites) {
      // Up to the first aligned vector; chunks are written from here on, each `head` late.
      writer_.EmitFirst(0, Load(powers_), Set(factors_[0]), writer_.head);
    }
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) Chunk<kReads, kWrites>(chunk, reference);
    Rest<kReads, kWrites>(reference);
  }

  // The peak of whole vectors, in all lanes, before it is scaled.
  FUSEDLOSS_INLINE V Peak(int64_t begin, int64_t end) const {
    V peak = Set(A(-__builtin_inf()));
    for (int64_t c = begin; c + kVector <= end; c += kVector) {
      peak = Max<A>(Load(logits_ + c), peak);
    }
    return MaxOfLanes<A>(peak);
  }

  template <bool kReads, bool kWrites>
  FUSEDLOSS_INLINE void Chunk(int64_t chunk, V& reference) {
    const int64_t begin = chunk * kChunk;
    V sum[2] = {}, peak[2] = {reference, reference};
    V factor{}, last_factor{};
    const Writer writer = writer_;
    const V before = Finite(reference);
    if constexpr (kWrites) {
      factor = Set(factors_[chunk]);
      Mask<A> inside = LaneIds<A>() < Mask<A>{} + static_cast<int>(kVector - writer.head);
      last_factor = Select<A>(inside, factor, Set(factors_[chunk + 1]));
    }
    const T* logits = logits_ + begin;
    A* powers = powers_ + begin;
    auto vector = [&](int64_t c, int slot, V factor) FUSEDLOSS_FLATTEN {
      V old{};
      if constexpr (kWrites) old = Load(powers + c + writer.head);
      if constexpr (kReads) {
        V z = Load(logits + c);
        peak[slot] = Max<A>(z, peak[slot]);
        const Powered powered = Power(z, before);
        sum[slot] += powered.power;
        Store(powers + c, powered.kept);
        __builtin_prefetch(logits + c + kAhead, 0, 3);
      }
      if constexpr (kWrites) writer.Emit(begin + c + writer.head, old, factor);
    };
    int64_t c = 0;
    for (; c < kChunk - 2 * kVector; c += 2 * kVector) {
      vector(c, 0, factor);
      vector(c + kVector, 1, factor);
    }
    vector(c, 0, factor);
    vector(c + kVector, 1, last_factor);
    if constexpr (kReads) {
      reference = MaxOfLanes<A>(Max<A>(peak[0], peak[1]));
      V chunk_peak = before;
      const V highest = Finite(reference);
      if (Any<A>(highest - before > A(kMaxRise))) {
        sum[0] = sum[1] = V{};
        chunk_peak = highest;
        for (int64_t c = 0; c < kChunk; c += kVector) {
          const Powered powered = Power(Load(logits + c), highest);
          sum[0] += powered.power;
          Store(powers + c, powered.kept);
        }
      }
      peaks_[chunk] = chunk_peak[0];
      sums_[chunk] = SumOfLanes<A>(sum[0] + sum[1])[0];
    }
  }

  // What the chunks leave over: more than a vector, so that none reaches past the end.
  template <bool kReads, bool kWrites>
  FUSEDLOSS_INLINE void Rest(V reference) {
    const int64_t begin = chunks_ * kChunk;
    if constexpr (kWrites) {
      const V factor = Set(factors_[chunks_]);
      int64_t c = begin + writer_.head;
      for (; c + kVector <= classes_; c += kVector) writer_.Emit(c, Load(powers_ + c), factor);
      if (c < classes_) {
        V powers = LoadFirst(powers_ + c, static_cast<int>(classes_ - c));
        writer_.EmitFirst(c, powers, factor, classes_ - c);
      }
    }
    if constexpr (kReads) {
      // The vector at the end may overlap the one before it: harmless for a peak.
      V peak = Max<A>(Peak(begin, classes_), Peak(classes_ - kVector, classes_));
      peak = Finite(Max<A>(peak, reference));  // of the whole row: the loss is exact relative to it
      V sum{};
      int64_t c = begin;
      for (; c + kVector <= classes_; c += kVector) {
        const Powered powered = Power(Load(logits_ + c), peak);
        sum += powered.power;
        Store(powers_ + c, powered.kept);
      }
      if (c < classes_) {
        FirstLanes<A> lanes = First<A>(classes_ - c);
        const Powered powered = Power(LoadFirst(logits_ + c, lanes.count), peak);
        sum += Keep<A>(lanes.mask, powered.power);
        StoreFirst(powers_ + c, powered.kept, lanes.count);
      }
      peaks_[chunks_] = peak[0];
      sums_[chunks_] = SumOfLanes<A>(sum)[0];
    }
  }

  // The loss of the row that was read; factors_ becomes what its powers are to be multiplied by.
  A EndRow(A cotangent) {
    A peak = peaks_[0], sum = 0;
    for (int64_t k = 1; k <= chunks_; ++k) peak = peaks_[k] > peak ? peaks_[k] : peak;
    for (int64_t k = chunks_ + 1; k % kVector != 0; ++k) peaks_[k] = peak;
    for (int64_t k = 0; k <= chunks_; k += kVector) {
      Store(factors_ + k, Exp<A>(Load(peaks_ + k) - peak));
    }
    for (int64_t k = 0; k <= chunks_; ++k) sum += sums_[k] * factors_[k];
    const A log_sum = Log<A>(Set(sum))[0];
    A loss = log_sum - (logit_ - peak), pull = inverse_temperature_;
    if (z_loss_ != 0) {
      const A lse = log_sum + peak;
      loss += z_loss_ * lse * lse;
      pull += inverse_temperature_ * 2 * z_loss_ * lse;
    }
    for (int64_t k = 0; k <= chunks_; ++k) factors_[k] *= cotangent * pull / sum;
    return loss;
  }

  const int64_t classes_;
  const bool stream_;
  const A z_loss_, inverse_temperature_, highest_, inverse_cap_;  // highest_: of the scaled logits
  A* const powers_;                                               // [classes + a vector]
  const int64_t chunks_;                                          // full ones
  const T* logits_ = nullptr;
  A logit_ = 0, slope_ = 1;  // of the label of the row that is read
  Writer writer_;
  alignas(64) A peaks_[kMaxChunks + kVector], sums_[kMaxChunks + kVector];
  alignas(64) A factors_[kMaxChunks + kVector];
};

template <typename T, bool kLogits, Form kForm, bool kDense>
void RunAcross(Pass pass, const SoftmaxXentPlan<Accumulator<T>>& plan,
               const SoftmaxXentBlock<T>& block) {
  using A = Accumulator<T>;
  using Tile = Across<A, kDense>;
  using Formula = typename FormulaOf<kLogits, kForm, kDense, Tile>::Type;
  constexpr bool kRich = kForm != Form::kPlain;
  constexpr int kStats = kRich ? kRichStats : kPlainStats;
  typename Tile::Scratch scratch;
  for (int64_t row = 0; row < block.rows; row += kLanes<A>) {
    const int rows = static_cast<int>(block.rows - row < kLanes<A> ? block.rows - row : kLanes<A>);
    const int64_t first = row * plan.classes;
    IntoLanes(block.predictions + first, rows, plan.classes, scratch, scratch.predictions);
    if (kDense) IntoLanes(block.targets + first, rows, plan.classes, scratch, scratch.targets);
    Tile tile(plan, block, row, rows, scratch, pass == Pass::kBoth);
    RowStats<A> stats;
    if (pass == Pass::kBackward) {
      for (int r = 0; r < kLanes<A>; ++r) {  // lanes without a row repeat the last one
        const int64_t of_row = row + (r < rows ? r : rows - 1);
        LoadStats<A>(block.stats + of_row * kStats, kRich, r, stats);
      }
    } else {
      Vec<A> loss = Keep<A>(tile.active, Forward<Formula>(tile, stats));
      rows == kLanes<A> ? Store(block.loss + row, loss) : StoreFirst(block.loss + row, loss, rows);
      if (block.metrics) {
        const Metrics<kLogits, kDense, Tile> metrics(tile, stats);
        for (int r = 0; r < rows; ++r) {
          metrics.Save(r, tile.active[r] != 0, block.metrics + 3 * (row + r));
        }
      }
    }
    if (pass == Pass::kForward) {
      if (block.stats == nullptr) continue;
      for (int r = 0; r < rows; ++r)
        SaveStats<A>(stats, kRich, r, block.stats + (row + r) * kStats);
    } else {
      Vec<A> cotangents = rows == kLanes<A> ? Load(block.cotangents + row)
                                            : LoadFirst(block.cotangents + row, rows);
      Backward<Formula>(tile, stats, cotangents * plan.inverse_temperature);
      IntoRows(scratch, rows, plan.classes, block.gradient + first);
    }
  }
}

template <typename T, bool kLogits, Form kForm, bool kDense>
void RunTiles(Pass pass, const SoftmaxXentPlan<Accumulator<T>>& plan,
              const SoftmaxXentBlock<T>& block) {
  if constexpr (kLogits && kForm == Form::kPlain && !kDense) {
    if (block.scratch) {
      if (plan.softcap != 0) return Pipeline<T, true>(plan, block).Run(block);
      return Pipeline<T, false>(plan, block).Run(block);
    }
  }
  if (plan.classes <= kAcrossClasses && block.rows > 1) {
    RunAcross<T, kLogits, kForm, kDense>(pass, plan, block);
  } else {
    RunAlong<T, kLogits, kForm, kDense>(pass, plan, block);
  }
}

template <typename T, Form kForm>
void RunForm(Pass pass, const SoftmaxXentPlan<Accumulator<T>>& plan,
             const SoftmaxXentBlock<T>& block) {
  using Tiles = void (*)(Pass, const SoftmaxXentPlan<Accumulator<T>>&, const SoftmaxXentBlock<T>&);
  static constexpr Tiles kTiles[2][2] = {
      {RunTiles<T, false, kForm, false>, RunTiles<T, false, kForm, true>},
      {RunTiles<T, true, kForm, false>, RunTiles<T, true, kForm, true>}};
  kTiles[plan.from_logits][block.targets != nullptr](pass, plan, block);
}

template <typename T, Pass kPass>
void Run(const SoftmaxXentPlan<Accumulator<T>>& plan, const SoftmaxXentBlock<T>& block) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    if (plan.focal) return RunForm<T, Form::kFocal>(kPass, plan, block);
  }
  if (plan.rich) {
    RunForm<T, Form::kRich>(kPass, plan, block);
  } else {
    RunForm<T, Form::kPlain>(kPass, plan, block);
  }
}

template <typename T, typename A = Accumulator<T>>
void CapLogits(int64_t size, const T* from, A softcap, A* to) {
  EachVector<A>(0, size, [&](int64_t i, auto lanes, auto) FUSEDLOSS_FLATTEN {
    Vec<A> x = LoadLanes(from + i, lanes);
    if (softcap != 0) x = softcap * Tanh<A>(x * (A(1) / softcap));
    StoreLanes(to + i, x, lanes, /*stream=*/false);
  });
}

template <typename T, typename A = Accumulator<T>>
void UncapGradient(int64_t size, const A* gradient, const A* capped, A softcap, T* to,
                   bool stream) {
  const int64_t first = stream ? UnalignedHead(to, size) : 0;
  auto vector = [&](int64_t i, auto lanes, auto) FUSEDLOSS_FLATTEN {
    Vec<A> pull = LoadLanes(gradient + i, lanes);
    if (softcap != 0) {
      Vec<A> tanh = LoadLanes(capped + i, lanes) * (A(1) / softcap);
      pull = Keep<A>(pull != A(0), pull * (A(1) - tanh * tanh));  // 0 even where tanh is NaN
    }
    StoreLanes(to + i, pull, lanes, stream);
  };
  if (first > 0) vector(0, First<A>(first), Slot<0>{});
  EachVector<A>(first, size, vector);
  if (stream) _mm_sfence();
}

}  // namespace

template <typename T>
SoftmaxXentPasses<T> GetSoftmaxXentPasses() {
  return {Run<T, Pass::kForward>, Run<T, Pass::kBackward>, Run<T, Pass::kBoth>, CapLogits<T>,
          UncapGradient<T>};
}

template SoftmaxXentPasses<float> GetSoftmaxXentPasses();
template SoftmaxXentPasses<double> GetSoftmaxXentPasses();
template SoftmaxXentPasses<Half> GetSoftmaxXentPasses();
template SoftmaxXentPasses<BFloat16> GetSoftmaxXentPasses();

}  // namespace fusedloss::FUSEDLOSS_CPU_LEVEL
