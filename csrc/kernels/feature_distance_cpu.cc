// What is the same on every CPU: cutting the feature maps into strips, and adding up.
#include <algorithm>
#include <vector>

#include "kernels/feature_distance.h"
#include "kernels/feature_distance_plan.h"

namespace fusedloss {
namespace {

// Elements of a block: enough to amortise claiming it, few enough to balance the threads, and by
// the shapes alone, so that results are the same for any number of threads.
constexpr int64_t kBlockElements = 64 << 10;
// Where the rows have one target, what a strip keeps of it, and the sums of its gradient, stay in
// the first-level cache, or, where all rows take each from there once, in the second-level cache.
constexpr int64_t kTargetElements = 2 << 10, kElementwiseTargetElements = 8 << 10;
// Of channels that lie apart, a strip's maps stay in the second-level cache, and a piece of a
// channel is a few cache lines at least.
constexpr int64_t kApartElements = 32 << 10, kApartPositions = 64;
// Fewer strips than these of rows with one target are cut by rows as well.
constexpr int64_t kStrips = 16;
// From here on the gradients leave the caches before anybody reads them.
constexpr int64_t kStreamBytes = 8 << 20;
constexpr int64_t kAlignment = 32;  // elements: a cache line of the narrowest type
// Weights of the channels are written out for so many elements: of an elementwise metric, a few
// channels would fill no vector.
constexpr int64_t kExpanded = 1024;

template <typename T>
struct Passes {
  using Plan = FeaturePlan<Accumulator<T>>;
  void (*strip)(const Plan&, const FeatureStrip<T>&);
  void (*sums)(const Plan&, const FeatureSums<T>&);
};

template <typename T>
Passes<T> PassesOf() {
  switch (ChosenCpuLevel()) {
    case CpuLevel::kAvx512:
      return {avx512::RunFeatureStrip<T>, avx512::RunFeatureSums<T>};
    case CpuLevel::kAvx2:
      return {avx2::RunFeatureStrip<T>, avx2::RunFeatureSums<T>};
    default:
      return {baseline::RunFeatureStrip<T>, baseline::RunFeatureSums<T>};
  }
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool IsElementwise(FeatureMetric metric) {
  return metric != FeatureMetric::kCosine && metric != FeatureMetric::kLpips;
}

// One layer of one call: its strips, by positions and rows.
template <typename T>
class Layer {
 public:
  using A = Accumulator<T>;

  // `cotangents` of the rows (null: 1), times `scale`, go into the gradients, if they are wanted.
  Layer(const FeatureDistanceArgs<T>& args, const FeaturePlan<A>& plan, const FeatureLayer<T>& from,
        double layer_weight, const A* cotangents, double scale, bool gradients)
      : plan_(plan),
        passes_(PassesOf<T>()),
        map_(from.positions * from.channels),
        positions_(from.positions),
        channels_(from.channels),
        rows_(args.rows),
        one_target_(from.reference != FeatureReference::kTarget),
        predictions_(from.predictions),
        targets_(from.targets),
        channel_weights_(from.channel_weights),
        cotangents_(cotangents),
        dpredictions_(gradients ? from.dpredictions : nullptr),
        dtargets_(gradients ? from.dtargets : nullptr) {
    if (map_ == 0) return;
    const bool elementwise = IsElementwise(args.metric);
    factor_ = layer_weight / (elementwise ? map_ : positions_);
    scale_ = static_cast<A>(scale * factor_);
    if (from.reference == FeatureReference::kFirst) {
      first_row_ = std::min<int64_t>(1, rows_);
      rows_ -= first_row_;
      targets_ = predictions_;
      dtargets_ = rows_ + first_row_ > 0 ? dpredictions_ : nullptr;
      predictions_ += map_;
      if (dpredictions_) dpredictions_ += map_;
      if (cotangents_) ++cotangents_;
    }
    if (elementwise && channel_weights_ == nullptr) {
      positions_ = map_;  // All elements are alike.
      channels_ = 1;
    }
    apart_ = !plan.channels_last && channels_ > 1;
    if (elementwise && channel_weights_ && !apart_) Expand();
    Cut(elementwise);
  }

  int64_t blocks() const { return map_ == 0 ? 0 : strips_ * ranges_; }

  void RunBlock(int64_t block) {
    const int64_t position = block / ranges_ * strip_positions_;
    const int64_t range = block % ranges_, row = range * range_rows_;
    FeatureStrip<T> strip{};
    strip.rows = std::min(range_rows_, rows_ - row);
    strip.positions = std::min(strip_positions_, positions_ - position);
    strip.channels = channels_;
    strip.row_stride = map_;
    strip.target_row_stride = one_target_ ? 0 : map_;
    strip.channel_stride = positions_;
    const int64_t offset = apart_ ? position : position * channels_;
    strip.predictions = predictions_ + row * map_ + offset;
    strip.targets = targets_ + row * strip.target_row_stride + offset;
    strip.channel_weights = expanded_.empty() ? channel_weights_ : expanded_.data();
    strip.repeats = repeats_;
    strip.scale = scale_;
    strip.cotangents = cotangents_ ? cotangents_ + row : nullptr;
    if (dpredictions_) strip.dpredictions = dpredictions_ + row * map_ + offset;
    std::vector<A> sums;
    if (dtargets_ && !one_target_) {
      strip.dtargets = dtargets_ + row * map_ + offset;
    } else if (dtargets_ && ranges_ == 1) {
      sums.resize(strip.positions * channels_);
      strip.target_sums = sums.data();
    } else if (dtargets_) {
      strip.target_sums = partial_sums_.data() + range * map_ + position * channels_;
    }
    strip.distances = distances_.data() + block / ranges_ * rows_ + row;
    passes_.strip(plan_, strip);
    if (!sums.empty()) AddUp(position, sums.data());
  }

  // The end of what several ranges of rows have summed.
  int64_t summed_blocks() const { return partial_sums_.empty() ? 0 : strips_; }
  void RunSummedBlock(int64_t strip) {
    const int64_t position = strip * strip_positions_;
    AddUp(position, partial_sums_.data() + position * channels_);
  }

  // Adds this layer's share to the loss of every row.
  void AddTo(double* loss) const {
    if (map_ == 0) return;
    for (int64_t row = 0; row < rows_; ++row) {
      double sum = 0;
      for (int64_t strip = 0; strip < strips_; ++strip) sum += distances_[strip * rows_ + row];
      loss[first_row_ + row] += factor_ * sum;
    }
  }

 private:
  void Expand() {
    repeats_ = std::clamp<int64_t>(kExpanded / channels_, 1, positions_);
    for (int64_t i = 0; i < repeats_; ++i) {
      expanded_.insert(expanded_.end(), channel_weights_, channel_weights_ + channels_);
    }
  }

  void Cut(bool elementwise) {
    int64_t elements = !one_target_  ? kBlockElements
                       : elementwise ? kElementwiseTargetElements
                                     : kTargetElements;
    if (apart_) elements = std::min(elements, kApartElements);
    strip_positions_ = std::max<int64_t>(elements / channels_, apart_ ? kApartPositions : 1);
    if (apart_ || channels_ == 1) {
      strip_positions_ = CeilDiv(strip_positions_, kAlignment) * kAlignment;
    } else {
      strip_positions_ = CeilDiv(strip_positions_, repeats_) * repeats_;
    }
    strip_positions_ = std::min(strip_positions_, positions_);
    strips_ = CeilDiv(positions_, strip_positions_);

    const int64_t blocks = CeilDiv(rows_ * map_, kBlockElements);
    range_rows_ = std::max<int64_t>(rows_, 1);
    if (!one_target_) {
      range_rows_ = std::max<int64_t>(1, kBlockElements / (strip_positions_ * channels_));
    } else if (strips_ < kStrips && blocks > strips_) {
      range_rows_ = CeilDiv(range_rows_, std::min(kStrips, blocks) / strips_ + 1);
    }
    ranges_ = std::max<int64_t>(1, CeilDiv(rows_, range_rows_));
    distances_.resize(strips_ * rows_);
    if (ranges_ > 1 && one_target_ && dtargets_) partial_sums_.resize(ranges_ * map_);
  }

  void AddUp(int64_t position, const A* sums) const {
    FeatureSums<T> all{};
    all.positions = std::min(strip_positions_, positions_ - position);
    all.channels = channels_;
    all.channel_stride = positions_;
    all.ranges = ranges_;
    all.range_stride = map_;
    all.sums = sums;
    all.dtargets = dtargets_ + (apart_ ? position : position * channels_);
    passes_.sums(plan_, all);
  }

  const FeaturePlan<A>& plan_;
  const Passes<T> passes_;
  const int64_t map_;  // elements of a feature map
  int64_t positions_, channels_;
  int64_t rows_, first_row_ = 0;
  const bool one_target_;
  const T* predictions_;
  const T* targets_;
  const A* const channel_weights_;
  const A* cotangents_;
  T* dpredictions_;
  T* dtargets_;
  double factor_ = 0;
  A scale_ = 0;
  bool apart_ = false;  // the channels of a position are not neighbours
  int64_t repeats_ = 1;
  std::vector<A> expanded_;
  int64_t strip_positions_ = 0, strips_ = 0, range_rows_ = 0, ranges_ = 0;
  std::vector<double> distances_;  // [strips, rows]
  std::vector<A> partial_sums_;    // [ranges, map], where the gradient of one target needs them
};

// The losses of all rows.
template <typename T>
std::vector<double> Run(const Cpu& cpu, const FeatureDistanceArgs<T>& args,
                        const Accumulator<T>* cotangents, double scale, bool gradients) {
  using A = Accumulator<T>;
  int64_t bytes = 0;
  for (int64_t k = 0; k < args.count; ++k) {
    const FeatureLayer<T>& layer = args.layers[k];
    bytes += args.rows * layer.positions * layer.channels * static_cast<int64_t>(sizeof(T));
  }
  FeaturePlan<A> plan{};
  plan.metric = args.metric;
  plan.channels_last = args.channels_last;
  plan.epsilon_in_root = args.epsilon_in_root || args.metric != FeatureMetric::kLpips;
  plan.epsilon = static_cast<A>(args.epsilon);
  plan.stream = bytes >= kStreamBytes;

  std::vector<Layer<T>> layers;
  std::vector<int64_t> ends, summed_ends;  // of the layers' blocks
  layers.reserve(args.count);
  int64_t blocks = 0, summed_blocks = 0;
  for (int64_t k = 0; k < args.count; ++k) {
    layers.emplace_back(args, plan, args.layers[k], args.layer_weights[k], cotangents, scale,
                        gradients);
    ends.push_back(blocks += layers[k].blocks());
    summed_ends.push_back(summed_blocks += layers[k].summed_blocks());
  }
  cpu.ParallelFor(blocks, [&](int64_t block) {
    const size_t k = std::upper_bound(ends.begin(), ends.end(), block) - ends.begin();
    layers[k].RunBlock(block - (k ? ends[k - 1] : 0));
  });
  if (summed_blocks > 0) {
    cpu.ParallelFor(summed_blocks, [&](int64_t block) {
      const size_t k =
          std::upper_bound(summed_ends.begin(), summed_ends.end(), block) - summed_ends.begin();
      layers[k].RunSummedBlock(block - (k ? summed_ends[k - 1] : 0));
    });
  }
  std::vector<double> loss(args.rows);
  for (const Layer<T>& layer : layers) layer.AddTo(loss.data());
  return loss;
}

}  // namespace

template <typename T>
void FeatureDistance(const Cpu& cpu, const FeatureDistanceArgs<T>& args, Accumulator<T>* loss) {
  const std::vector<double> losses = Run<T>(cpu, args, nullptr, 1, false);
  std::transform(losses.begin(), losses.end(), loss,
                 [](double x) { return static_cast<Accumulator<T>>(x); });
}

template <typename T>
void FeatureDistanceGrad(const Cpu& cpu, const FeatureDistanceArgs<T>& args,
                         const Accumulator<T>* dloss) {
  Run<T>(cpu, args, dloss, 1, true);
}

template <typename T>
void FeatureDistanceReduced(const Cpu& cpu, const FeatureDistanceArgs<T>& args,
                            const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss) {
  const std::vector<double> losses = Run<T>(cpu, args, row_weight, scale, true);
  double sum = 0;
  for (int64_t i = 0; i < args.rows; ++i) sum += row_weight ? row_weight[i] * losses[i] : losses[i];
  *loss = static_cast<Accumulator<T>>(scale * sum);
}

#define FUSEDLOSS_INSTANTIATE(T)                                                             \
  template void FeatureDistance(const Cpu&, const FeatureDistanceArgs<T>&, Accumulator<T>*); \
  template void FeatureDistanceGrad(const Cpu&, const FeatureDistanceArgs<T>&,               \
                                    const Accumulator<T>*);                                  \
  template void FeatureDistanceReduced(const Cpu&, const FeatureDistanceArgs<T>&,            \
                                       const Accumulator<T>*, double, Accumulator<T>*);
FUSEDLOSS_INSTANTIATE(float)
FUSEDLOSS_INSTANTIATE(double)
FUSEDLOSS_INSTANTIATE(Half)
FUSEDLOSS_INSTANTIATE(BFloat16)
#undef FUSEDLOSS_INSTANTIATE

}  // namespace fusedloss
