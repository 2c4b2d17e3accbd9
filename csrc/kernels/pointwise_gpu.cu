// Pointwise losses on a GPU: predictions and targets are read once, in vectors of 16 bytes, and the
// gradient is written once. All arrays are flat; the row and the output of an element matter only
// where something belongs to rows or outputs, and for the loss of every row.
#include <type_traits>

#include "kernels/gpu.cuh"
#include "kernels/pointwise.h"

namespace fusedloss {
namespace {

template <typename T>
constexpr int kVector = 16 / sizeof(T);
// Vectors of the predictions, and as many of the targets, that a thread loads before it uses the
// first; with the registers that the blocks of a multiprocessor get, they hide the wait for memory.
template <bool kFlat>
constexpr int kBatch = kFlat ? 2 : 1;
#if __CUDA_ARCH__ == 750  // of 1024 threads a multiprocessor, where others have more
constexpr int kMostBlocksAtOnce = 4;
#else
constexpr int kMostBlocksAtOnce = 5;
#endif
template <typename T>
constexpr int kBlocksAtOnce = sizeof(T) == 8 ? 3 : kMostBlocksAtOnce;
// The partial sums of that many blocks fit the workspace, and are added up in no time.
constexpr int64_t kMaxSums = 8192;
constexpr int64_t kMaxBlocks = 1 << 30;
constexpr int64_t kMaxOutputs = 1 << 30;  // places in a row are 32-bit numbers
constexpr int64_t kTileBytes = 32 << 10;  // of losses of elements, in shared memory

// What the kernels are given.
template <typename T, typename Y>
struct Task {
  using A = Accumulator<T>;
  int64_t rows, outputs;
  const T* predictions;
  const Y* targets;
  bool one_target_a_row;
  bool wide;  // predictions, targets and gradient begin where 16 bytes begin
  const A* output_weights;
  const A* quantiles;
  A parameter, lowest, highest;
  const A* cotangents;  // [rows], or null: all 1
  A scale;              // of the gradient
  T* gradient;          // out
  double* sums;         // [blocks] out, or null: Σ cotangent · Σ w·f of what the block had
  A* loss;              // [rows] out
};

// ---- The formulas.

template <typename A>
struct Point {
  A loss, slope;  // f and ∂f/∂p
};

// x where it is 0 or NaN, else one of the others.
template <typename A>
FUSEDLOSS_DEVICE A BySign(A x, A if_positive, A if_negative) {
  return x > 0 ? if_positive : x < 0 ? if_negative : x;
}

template <typename A>
FUSEDLOSS_DEVICE A Smoothed(A y, A smoothing) {
  return y * (1 - smoothing) + A(0.5) * smoothing;
}

// `parameter` is δ, quantile or label_smoothing.
template <Pointwise kKind, typename A>
FUSEDLOSS_DEVICE Point<A> Formula(A p, A y, A parameter, A lowest, A highest) {
  const A e = p - y;
  if constexpr (kKind == Pointwise::kHuber) {
    const A slope = Abs(e) > parameter ? WithSign(parameter, e) : e;
    return {slope * (e - A(0.5) * slope), slope};
  } else if constexpr (kKind == Pointwise::kSquared) {
    return {e * e, e + e};
  } else if constexpr (kKind == Pointwise::kAbsolute) {
    return {Abs(e), BySign(e, A(1), A(-1))};
  } else if constexpr (kKind == Pointwise::kLogCosh) {
    // With u = e^(−|e|): log cosh e = log(1 + (u − 1)²/2u), and where u² is small enough to be
    // added to 1, |e| − log 2 + log(1 + u²). tanh |e| = (1 − u)(1 + u)/(1 + u²).
    const A size = Abs(e);
    const bool is_near = size < 1;
    const A power = Exp(-size);
    const A less_1 = is_near ? ExpMinus1(-size) : power - 1;
    const A u = is_near ? less_1 + 1 : power;
    const A beyond_1 = is_near ? less_1 * less_1 * Reciprocal(u + u) : u * u;
    const A rest = is_near ? A(0) : size - A(0.69314718055994530942);
    const A slope = -less_1 * (1 + u) * Reciprocal(1 + u * u);
    return {rest + Log1p(beyond_1), WithSign(slope, e)};
  } else if constexpr (kKind == Pointwise::kQuantile) {
    const A slope = parameter > 0 ? BySign(e, 1 - parameter, -parameter)
                                  : BySign(e, -parameter, -1 - parameter);
    return {e * slope, slope};
  } else if constexpr (kKind == Pointwise::kBinaryLogits) {
    const A share = Smoothed(y, parameter);
    const A t = Exp(-Abs(p));
    const A rest = t * Reciprocal(1 + t);  // the sigmoid of −|p|; that of |p| is 1 − rest
    const A slope = p < 0 ? rest - share : (1 - share) - rest;
    return {Max(p, A(0)) - p * share + Log1p(t), slope};
  } else {
    const A share = Smoothed(y, parameter);
    const A c = p < lowest ? lowest : p > highest ? highest : p;
    const A loss = -(share * Log(c) + (1 - share) * Log(1 - c));
    const A slope = (c - share) * Reciprocal(c * (1 - c));
    return {loss, p == c ? slope : p != p ? p : A(0)};
  }
}

// Where an element of a tile lies; the tile's first row is 0.
struct Place {
  int row, output;
};

// `count` elements on.
FUSEDLOSS_DEVICE Place Behind(Place place, int count, int outputs) {
  const int past = place.output + count - outputs;
  if (past < 0) return {place.row, past + outputs};
  if (past < outputs) return {place.row + 1, past};
  const unsigned unsigned_past = past, divisor = outputs;  // in half the time
  const unsigned rows = unsigned_past / divisor;
  return {place.row + 1 + static_cast<int>(rows), static_cast<int>(unsigned_past - rows * divisor)};
}

// The task from a row on, as far as what belongs to rows goes.
template <typename T, typename Y>
FUSEDLOSS_DEVICE Task<T, Y> From(Task<T, Y> task, int64_t row) {
  if (task.one_target_a_row) task.targets += row;
  if (task.cotangents) task.cotangents += row;
  return task;
}

// The element at `place`, whose target is y unless the row has one.
template <Pointwise kKind, typename T, typename Y, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE Point<A> Weighted(const Task<T, Y>& task, const Place& place, T x, Y y) {
  const A parameter = task.quantiles ? task.quantiles[place.output] : task.parameter;
  if (task.one_target_a_row) y = task.targets[place.row];
  Point<A> point = Formula<kKind, A>(ToSum(x), ToSum(y), parameter, task.lowest, task.highest);
  if (task.output_weights) {
    const A weight = task.output_weights[place.output];
    point.loss = weight == 0 ? A(0) : weight * point.loss;
    point.slope = weight == 0 ? A(0) : weight * point.slope;
  }
  return point;
}

// ---- The kernels.

// Elements that a block takes at once. Of those that are not flat more, since it has to divide to
// know where they lie.
template <typename T, bool kFlat>
constexpr int kTile = kThreads * kVector<T> * (kFlat ? kBatch<kFlat> : 4);

// The gradient, and the sum of the losses. kFlat: no array but predictions and targets, and both
// are wide.
template <Pointwise kKind, typename T, typename Y, bool kFlat>
FUSEDLOSS_KERNEL_OF(kThreads, kBlocksAtOnce<T>)
OverElements(Task<T, Y> task) {
  using A = Accumulator<T>;
  const int64_t elements = task.rows * task.outputs;
  const bool wide = kFlat || task.wide, dense = kFlat || !task.one_target_a_row;
  constexpr int kStep = kTile<T, kFlat>;
  double sum = 0;
  for (int64_t begin = BlockId() * kStep; begin < elements; begin += Blocks() * kStep) {
    const int64_t end = begin + kStep < elements ? begin + kStep : elements;
    const int64_t row = kFlat ? 0 : begin / task.outputs;
    const int output = kFlat ? 0 : static_cast<int>(begin - row * task.outputs);
    const int outputs = static_cast<int>(task.outputs);
    const Task<T, Y> here = From(task, row);
    auto take = [&](int offset, const auto& x, const auto& y) {
      constexpr int kCount = sizeof(x.values) / sizeof(T);
      Vector<T, kCount> gradient;
      A losses = 0;
      if constexpr (kFlat) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const auto point = Formula<kKind, A>(ToSum(x.values[i]), ToSum(y.values[i]),
                                               task.parameter, task.lowest, task.highest);
          losses += point.loss;
          Round(task.scale * point.slope, &gradient.values[i]);
        }
      } else {
        Place place = Behind({0, output}, offset, outputs);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const auto point = Weighted<kKind>(here, place, x.values[i], y.values[i]);
          const A cotangent = here.cotangents ? here.cotangents[place.row] : A(1);
          losses += cotangent * point.loss;
          Round(task.scale * cotangent * point.slope, &gradient.values[i]);
          if (++place.output == outputs) place = {place.row + 1, 0};
        }
      }
      sum += losses;
      Store(task.gradient + begin + offset, gradient);
    };
    EachVector<kBatch<kFlat>>(task.predictions, task.targets, dense, begin, end, wide, take);
  }
  if (task.sums == nullptr) return;
  sum = SumOfBlock(sum);
  if (ThreadId() == 0) task.sums[BlockId()] = sum;
}

// The loss of every row. A block takes tile_rows rows at once, whose elements' losses lie in shared
// memory, and `lanes` lanes of a warp add up a row; or one long row, if tile_rows is 0.
template <Pointwise kKind, typename T, typename Y>
FUSEDLOSS_KERNEL_OF(kThreads, kBlocksAtOnce<T>)
OverRows(Task<T, Y> task, int tile_rows, int lanes) {
  using A = Accumulator<T>;
  A* losses = tile_rows ? reinterpret_cast<A*>(SharedMemory()) : nullptr;
  const int outputs = static_cast<int>(task.outputs), step = tile_rows ? tile_rows : 1;
  const int lane = ThreadId() % lanes;
  const uint32_t among = (lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1)
                         << (ThreadId() % kWarp - lane);
  for (int64_t row = BlockId() * step; row < task.rows; row += Blocks() * step) {
    const int rows = row + step < task.rows ? step : static_cast<int>(task.rows - row);
    const int64_t begin = row * outputs, end = begin + int64_t{rows} * outputs;
    const Task<T, Y> here = From(task, row);
    double sum = 0;
    auto take = [&](int offset, const auto& x, const auto& y) {
      constexpr int kCount = sizeof(x.values) / sizeof(T);
      Place place = Behind({0, 0}, offset, outputs);
      Vector<A, kCount> of_elements;
      A of_vector = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        of_elements.values[i] = Weighted<kKind>(here, place, x.values[i], y.values[i]).loss;
        of_vector += of_elements.values[i];
        if (++place.output == outputs) place = {place.row + 1, 0};
      }
      if (losses) {
        Keep(losses + offset, of_elements);
      } else {
        sum += of_vector;
      }
    };
    EachVector<kBatch<false>>(task.predictions, task.targets, !task.one_target_a_row, begin, end,
                              task.wide, take);
    if (losses == nullptr) {
      sum = SumOfBlock(sum);
      if (ThreadId() == 0) task.loss[row] = static_cast<A>(sum / outputs);
      continue;
    }
    SyncBlock();
    for (int r = ThreadId() / lanes; r < rows; r += kThreads / lanes) {
      A of_row[1] = {};
      for (int i = lane; i < outputs; i += lanes) of_row[0] += losses[r * outputs + i];
      ReduceLanes(lanes, among, of_row, Plus());
      if (lane == 0) task.loss[row + r] = of_row[0] / static_cast<A>(outputs);
    }
    SyncBlock();
  }
}

// ---- The host's side.

template <typename Fn>
GpuError ByKind(Pointwise kind, Fn&& fn) {
  switch (kind) {
    case Pointwise::kHuber:
      return fn(std::integral_constant<Pointwise, Pointwise::kHuber>());
    case Pointwise::kSquared:
      return fn(std::integral_constant<Pointwise, Pointwise::kSquared>());
    case Pointwise::kAbsolute:
      return fn(std::integral_constant<Pointwise, Pointwise::kAbsolute>());
    case Pointwise::kLogCosh:
      return fn(std::integral_constant<Pointwise, Pointwise::kLogCosh>());
    case Pointwise::kQuantile:
      return fn(std::integral_constant<Pointwise, Pointwise::kQuantile>());
    case Pointwise::kBinaryLogits:
      return fn(std::integral_constant<Pointwise, Pointwise::kBinaryLogits>());
    default:
      return fn(std::integral_constant<Pointwise, Pointwise::kBinaryProbabilities>());
  }
}

template <typename T, typename Y>
class Call {
 public:
  using A = Accumulator<T>;

  Call(const Gpu& gpu, const PointwiseArgs<T, Y>& args) : gpu_(gpu), kind_(args.kind) {
    task_.rows = args.rows;
    task_.outputs = args.outputs;
    task_.predictions = args.predictions;
    task_.targets = args.targets;
    task_.one_target_a_row = args.one_target_a_row && args.outputs > 1;
    task_.output_weights = args.output_weights;
    task_.quantiles = args.quantiles;
    task_.parameter = static_cast<A>(args.parameter);
    task_.lowest = static_cast<A>(args.epsilon);
    task_.highest = static_cast<A>(1 - args.epsilon);
  }

  GpuError Loss(A* loss) {
    if (task_.outputs > kMaxOutputs) return kTooManyOutputs;
    task_.loss = loss;
    task_.wide = IsWide();
    // As many rows as the shared memory holds; fewer if not all multiprocessors had a tile then,
    // but enough for all threads to have a vector. Those of a multiple of kVector are aligned.
    auto whole = [](int64_t rows) { return rows / kVector<T> * kVector<T>; };
    const int64_t most = whole(kTileBytes / sizeof(A) / task_.outputs);
    const int64_t fair = CeilDiv(task_.rows, kTiles);
    const int64_t least = CeilDiv(kThreads * kVector<T>, task_.outputs);
    int64_t tile_rows = whole((fair > least ? fair : least) + kVector<T> - 1);
    if (tile_rows > most) tile_rows = most;
    int lanes = 1;
    while (lanes < kWarp && lanes * 2 < task_.outputs) lanes *= 2;
    int64_t blocks = CeilDiv(task_.rows, tile_rows > 0 ? tile_rows : 1);
    if (blocks > kMaxBlocks) blocks = kMaxBlocks;
    const int64_t bytes = tile_rows * task_.outputs * int64_t{sizeof(A)};
    return ByKind(kind_, [&](auto kind) {
      return Launch(gpu_, OverRows<kind, T, Y>, blocks, kThreads, 1,
                    bytes > kSumBytes ? bytes : kSumBytes, task_, static_cast<int>(tile_rows),
                    lanes);
    });
  }

  GpuError Gradient(const A* cotangents, T* gradient) {
    return RunElements(cotangents, 1, gradient);
  }

  GpuError Reduced(const A* row_weight, double scale, A* loss, T* gradient) {
    task_.sums = static_cast<double*>(gpu_.allocate(gpu_.owner, kMaxSums * sizeof(double)));
    if (task_.sums == nullptr) return kNoMemory;
    FUSEDLOSS_RETURN_IF_ERROR(RunElements(row_weight, scale, gradient));
    return AddUp(gpu_, task_.sums, blocks_, scale / task_.outputs, loss);
  }

 private:
  bool IsWide() const {
    return IsAligned(task_.predictions) && IsAligned(task_.gradient) &&
           (task_.one_target_a_row || IsAligned(task_.targets));
  }

  GpuError RunElements(const A* cotangents, double scale, T* gradient) {
    task_.cotangents = cotangents;
    task_.scale = static_cast<A>(scale / task_.outputs);
    task_.gradient = gradient;
    task_.wide = IsWide();
    const bool flat = task_.wide && !task_.one_target_a_row && !task_.output_weights &&
                      !task_.quantiles && !task_.cotangents;
    if (!flat && task_.outputs > kMaxOutputs) return kTooManyOutputs;
    blocks_ = CeilDiv(task_.rows * task_.outputs, flat ? kTile<T, true> : kTile<T, false>);
    if (blocks_ > kMaxSums) blocks_ = kMaxSums;
    return ByKind(kind_, [&](auto kind) {
      auto* kernel = flat ? OverElements<kind, T, Y, true> : OverElements<kind, T, Y, false>;
      return Launch(gpu_, kernel, blocks_, kThreads, 1, kSumBytes, task_);
    });
  }

  // Enough for every multiprocessor to have several.
  static constexpr int64_t kTiles = 4096;
  static constexpr GpuError kTooManyOutputs = "more than 2^30 outputs";

  const Gpu& gpu_;
  const Pointwise kind_;
  Task<T, Y> task_{};
  int64_t blocks_ = 0;
};

}  // namespace

template <typename T, typename Y>
GpuError PointwiseLoss(const Gpu& gpu, const PointwiseArgs<T, Y>& args, Accumulator<T>* loss) {
  if (args.rows == 0) return nullptr;
  if (args.outputs == 0) return Zero(gpu, loss, args.rows * int64_t{sizeof(*loss)});
  return Call<T, Y>(gpu, args).Loss(loss);
}

template <typename T, typename Y>
GpuError PointwiseGrad(const Gpu& gpu, const PointwiseArgs<T, Y>& args, const Accumulator<T>* dloss,
                       T* dpredictions) {
  if (args.rows == 0 || args.outputs == 0) return nullptr;
  return Call<T, Y>(gpu, args).Gradient(dloss, dpredictions);
}

template <typename T, typename Y>
GpuError PointwiseReduced(const Gpu& gpu, const PointwiseArgs<T, Y>& args,
                          const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss,
                          T* gradient) {
  if (args.rows == 0 || args.outputs == 0) return Zero(gpu, loss, sizeof(*loss));
  return Call<T, Y>(gpu, args).Reduced(row_weight, scale, loss, gradient);
}

#define FUSEDLOSS_INSTANTIATE(T, Y)                                                              \
  template GpuError PointwiseLoss(const Gpu&, const PointwiseArgs<T, Y>&, Accumulator<T>*);      \
  template GpuError PointwiseGrad(const Gpu&, const PointwiseArgs<T, Y>&, const Accumulator<T>*, \
                                  T*);                                                           \
  template GpuError PointwiseReduced(const Gpu&, const PointwiseArgs<T, Y>&,                     \
                                     const Accumulator<T>*, double, Accumulator<T>*, T*);
FUSEDLOSS_POINTWISE_TYPES(FUSEDLOSS_INSTANTIATE)
#undef FUSEDLOSS_INSTANTIATE

}  // namespace fusedloss
