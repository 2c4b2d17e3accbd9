// Distances of feature maps on a GPU: one kernel runs over the tiles of all layers, reads what
// belongs together once, and writes the gradient in the same read.
//
// A feature map is cut into units: the vectors of 16 bytes of an elementwise metric, else its
// positions, each the work of a team of lanes of a warp that have its channels in registers. A
// squad, one or more teams of a warp, works on a strip of units:
//   kLoss    of one row; the sum of their distances goes to the strip's place among the sums
//   kOwn     of the units of all rows, one after the other, with the gradient
//   kShared  of all rows of a range, one after the other, with the gradient in a target that they
//            share, which is summed over the rows in registers
// More channels than registers hold, and channels that lie apart, are read again for every sweep
// over them, from a cache; the gradient in a shared target is then summed in the workspace.
#include <type_traits>
#include <vector>

#include "kernels/feature_distance.h"
#include "kernels/gpu.cuh"

namespace fusedloss {
namespace {

using Metric = FeatureMetric;

enum class Pass { kLoss, kOwn, kShared };

// How a layer is read.
enum class Way {
  kVectors,       // 16 bytes at a time, held
  kVectorsAgain,  // 16 bytes at a time, for every sweep
  kElements,      // element by element: held of an elementwise metric, else for every sweep
  kApart,         // channels that lie apart: neighbouring lanes have neighbouring positions
};

template <Metric kMetric>
constexpr bool kElementwise = kMetric != Metric::kCosine && kMetric != Metric::kLpips;
template <typename T>
constexpr int kVector = 16 / sizeof(T);
// Vectors of the predictions, and as many of the targets, that a thread loads before it uses the
// first: of as many units of an elementwise metric, or of one position. Where their gradients in a
// shared target are held as well, those of narrow types would not fit the registers.
template <typename T, Pass kPass>
constexpr int kBatch = kPass == Pass::kShared && sizeof(T) == 2 ? 2 : 4;
constexpr int kBlocksAtOnce = 2;
constexpr int64_t kMaxSums = 8192;  // of blocks: fit the workspace, and are added up in no time
constexpr int64_t kMaxBlocks = 1 << 30;
// Strips of all layers under kLoss, but for one of every row; their sums fit the workspace.
constexpr int64_t kMaxStrips = 32768;
// Of a target that the rows share, there are as many ranges of rows as make so many threads busy,
// but none of few rows, whose sums would cost as much as they.
constexpr int64_t kThreadsAtOnce = 1 << 17;
constexpr int64_t kLeastRows = 4;
// Of what is left to do for more threads than these, each does some steps more, up to so many.
constexpr int64_t kManyThreads = 1 << 19, kMostSteps = 8;
constexpr int64_t kPartialBytes = 8 << 20;  // in the workspace, but for one range of every layer
constexpr int64_t kRangeTile = 1024;        // elements of a target whose ranges a block adds up
// What the slices of the channels add up at once, three numbers of every thread.
constexpr int64_t kSliceBytes = 3 * kThreads * sizeof(double);

// A layer that there is something to do for.
template <typename T>
struct Entry {
  using A = Accumulator<T>;
  const T* predictions;
  const T* targets;
  const A* weights;  // or null
  T* dpredictions;
  T* dtargets;  // or null
  A* partials;  // [ranges, feature map], or null: dtargets is written at once, or not wanted
  int64_t positions, channels;
  double share;          // of a unit's distance in the layer's
  int64_t index;         // of all layers
  int64_t first_tile;    // of all tiles of all layers
  int64_t first_sum;     // kLoss: of [rows, parts]
  int64_t parts, strip;  // strips of a row, or of a range, and units of a strip
  int64_t ranges;        // of rows
  // Lanes of a team and of a squad; kApart: slices of the channels, and positions of a block.
  int16_t lanes, width;
  Way way;
  bool one_target;
  bool is_counted;  // its distances are; not of a layer's second entry
};

// What the kernels are given.
template <typename T>
struct Task {
  using A = Accumulator<T>;
  const Entry<T>* table;
  int64_t count;
  const double* layer_weights;
  int64_t rows, first_row;  // rows before it have distance 0, and are not looked at
  int64_t tiles, block_tiles;
  bool channels_last, epsilon_in_root;
  A epsilon;
  const A* cotangents;  // [rows], or null: all 1
  double scale;         // of the gradient
  double* sums;  // [blocks], Σ cotangent · distance, or null; kLoss: of the strips, distances
};

// ---- The formulas.

template <typename A>
struct Point {
  A distance, slope;
};

template <Metric kMetric, typename A>
FUSEDLOSS_DEVICE Point<A> Formula(A e, A epsilon) {
  if constexpr (kMetric == Metric::kSquared) {
    return {e * e, e + e};
  } else if constexpr (kMetric == Metric::kAbsolute) {
    return {Abs(e), e > 0 ? A(1) : e < 0 ? A(-1) : e};
  } else {
    const A root = Sqrt(e * e + epsilon * epsilon);
    return {root, root == 0 ? A(0) : e / root};
  }
}

// One over |x|, and the factor of x in the derivative of that: −slope · x · inverse.
template <typename A>
struct Norm {
  A inverse, slope;
};

template <typename A>
FUSEDLOSS_DEVICE Norm<A> NormOf(A squares, A epsilon, bool epsilon_in_root) {
  if (epsilon_in_root) {
    const A inverse = 1 / Sqrt(squares + epsilon);
    return {inverse, inverse * inverse};
  }
  const A root = Sqrt(squares);
  const A inverse = 1 / (root + epsilon);
  return {inverse, root > 0 ? inverse / root : A(0)};
}

// The distance at a position, or this thread's part of it, and its gradients times `cotangent`.
//   each(fn)         calls fn(k, channel, a, b) for this thread's vectors of the position
//   weights(channel) of a vector from that channel on
//   add(values)      adds up values over the threads that share the position
//   emit(k, channel, da, db) takes the gradients
template <Metric kMetric, Pass kPass, int kSize, typename Sum, typename T, typename A,
          typename Each, typename Weights, typename Add, typename Emit>
FUSEDLOSS_DEVICE A AtPosition(const Task<T>& task, bool is_first, A cotangent, Each&& each,
                              Weights&& weights, Add&& add, Emit&& emit) {
  using Features = Vector<T, kSize>;
  if constexpr (kMetric == Metric::kCosine) {
    Sum sums[3] = {};  // Σ w·a², Σ w·b², Σ w·a·b
    each([&](int, int64_t channel, const Features& a, const Features& b) {
      const Vector<A, kSize> w = weights(channel);
      A of_vector[3] = {};
#pragma unroll
      for (int v = 0; v < kSize; ++v) {
        const A x = ToSum(a.values[v]), y = ToSum(b.values[v]);
        of_vector[0] += w.values[v] * x * x;
        of_vector[1] += w.values[v] * y * y;
        of_vector[2] += w.values[v] * x * y;
      }
#pragma unroll
      for (int s = 0; s < 3; ++s) sums[s] += of_vector[s];
    });
    add(sums);
    const A p = NormOf(static_cast<A>(sums[0]), task.epsilon, true).inverse;
    const A q = NormOf(static_cast<A>(sums[1]), task.epsilon, true).inverse;
    const A cosine = static_cast<A>(sums[2]) * p * q;
    if constexpr (kPass != Pass::kLoss) {
      each([&](int k, int64_t channel, const Features& a, const Features& b) {
        const Vector<A, kSize> w = weights(channel);
        Vector<A, kSize> da, db;
#pragma unroll
        for (int v = 0; v < kSize; ++v) {
          const A x = ToSum(a.values[v]) * p, y = ToSum(b.values[v]) * q;
          da.values[v] = cotangent * p * w.values[v] * (cosine * x - y);
          db.values[v] = cotangent * q * w.values[v] * (cosine * y - x);
        }
        emit(k, channel, da, db);
      });
    }
    return is_first ? 1 - cosine : A(0);
  } else {
    Sum squares[2] = {};
    each([&](int, int64_t, const Features& a, const Features& b) {
      A of_a = 0, of_b = 0;
#pragma unroll
      for (int v = 0; v < kSize; ++v) {
        of_a += ToSum(a.values[v]) * ToSum(a.values[v]);
        of_b += ToSum(b.values[v]) * ToSum(b.values[v]);
      }
      squares[0] += of_a;
      squares[1] += of_b;
    });
    add(squares);
    const auto of_a = NormOf(static_cast<A>(squares[0]), task.epsilon, task.epsilon_in_root);
    const auto of_b = NormOf(static_cast<A>(squares[1]), task.epsilon, task.epsilon_in_root);
    // Products are rounded before they are subtracted: between equal features, 0.
    auto difference = [&](T x, T y) {
      return Product(ToSum(x), of_a.inverse) - Product(ToSum(y), of_b.inverse);
    };
    constexpr int kProducts = kPass == Pass::kShared ? 2 : 1;
    Sum distance = 0, products[kProducts] = {};  // Σ w·u·a, Σ w·u·b, with u the difference
    each([&](int, int64_t channel, const Features& a, const Features& b) {
      const Vector<A, kSize> w = weights(channel);
      A of_vector = 0, with_a = 0, with_b = 0;
#pragma unroll
      for (int v = 0; v < kSize; ++v) {
        const A u = difference(a.values[v], b.values[v]), weighted = w.values[v] * u;
        of_vector += weighted * u;
        with_a += weighted * ToSum(a.values[v]);
        with_b += weighted * ToSum(b.values[v]);
      }
      distance += of_vector;
      products[0] += with_a;
      if constexpr (kProducts == 2) products[1] += with_b;
    });
    if constexpr (kPass != Pass::kLoss) {
      add(products);
      const A p = 2 * cotangent * of_a.inverse, q = 2 * cotangent * of_b.inverse;
      const A back_a = p * (of_a.slope * static_cast<A>(products[0]));
      const A back_b = q * (of_b.slope * static_cast<A>(products[kProducts - 1]));
      each([&](int k, int64_t channel, const Features& a, const Features& b) {
        const Vector<A, kSize> w = weights(channel);
        Vector<A, kSize> da, db;
#pragma unroll
        for (int v = 0; v < kSize; ++v) {
          const A weighted = w.values[v] * difference(a.values[v], b.values[v]);
          da.values[v] = p * weighted - back_a * ToSum(a.values[v]);
          db.values[v] = back_b * ToSum(b.values[v]) - q * weighted;
        }
        emit(k, channel, da, db);
      });
    }
    return static_cast<A>(distance);
  }
}

// ---- The kernels.

// What a squad, or of channels that lie apart a block, works on.
struct Strip {
  int64_t begin, end;  // units of a row, or, under kOwn, of all rows
  int64_t first_row, past_row;
  int64_t range;
  int64_t number;  // kLoss: of all of the layer, or −1 if it is not one
};

template <Pass kPass, typename T>
FUSEDLOSS_DEVICE Strip StripOf(const Task<T>& task, const Entry<T>& entry, int64_t units,
                               int64_t number) {
  Strip strip{number * entry.strip, task.rows * units, 0, 1, 0, 0};
  if constexpr (kPass != Pass::kOwn) {
    strip.begin = number % entry.parts * entry.strip;
    strip.end = units;
    strip.range = number / entry.parts;
  }
  if (strip.begin + entry.strip < strip.end) strip.end = strip.begin + entry.strip;
  if constexpr (kPass == Pass::kLoss) {
    strip.first_row = strip.range;
    strip.past_row = strip.range + 1;
    strip.number = strip.range < task.rows ? number : -1;
    if (strip.range < task.first_row || strip.number < 0) strip.end = strip.begin;
  } else if constexpr (kPass == Pass::kShared) {
    const int64_t rows = task.rows - task.first_row;
    const int64_t share = (rows + entry.ranges - 1) / entry.ranges;
    strip.first_row = task.first_row + strip.range * share;
    strip.past_row = strip.first_row + share < task.rows ? strip.first_row + share : task.rows;
    if (strip.range >= entry.ranges) strip.end = strip.begin;
  }
  return strip;
}

template <typename A, typename T, int kSize>
FUSEDLOSS_DEVICE void StoreRounded(const Vector<A, kSize>& from, T* to) {
  Vector<T, kSize> rounded;
#pragma unroll
  for (int v = 0; v < kSize; ++v) Round(from.values[v], &rounded.values[v]);
  Store(to, rounded);
}

template <typename A, int kSize>
FUSEDLOSS_DEVICE void AddTo(Vector<A, kSize>& sum, const Vector<A, kSize>& values) {
#pragma unroll
  for (int v = 0; v < kSize; ++v) sum.values[v] += values.values[v];
}

// The weights of the channels of kSize elements of a map, or of many maps one behind the other.
template <int kSize, typename T, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE Vector<A, kSize> WeightsOfElements(const Task<T>& task, const Entry<T>& entry,
                                                    int64_t element) {
  Vector<A, kSize> w;
  const int64_t period = task.channels_last ? 1 : entry.positions;
  int64_t within = element % period, channel = element / period % entry.channels;
#pragma unroll
  for (int v = 0; v < kSize; ++v) {
    w.values[v] = entry.weights[channel];
    if (++within < period) continue;
    within = 0;
    if (++channel == entry.channels) channel = 0;
  }
  return w;
}

// Squads of lanes that have the elements, or the channels of their positions, side by side: held in
// registers, or read for every sweep. Returns this thread's share of Σ cotangent · distance.
template <Metric kMetric, Pass kPass, int kSize, bool kIsHeld, typename T>
FUSEDLOSS_DEVICE double OverSquads(const Task<T>& task, const Entry<T>& entry,
                                   Accumulator<T> factor, int64_t tile) {
  using A = Accumulator<T>;
  using Features = Vector<T, kSize>;
  using Sums = Vector<A, kSize>;
  constexpr int kAtOnce = kElementwise<kMetric> ? kBatch<T, kPass> : 1;            // units
  constexpr int kKept = kIsHeld && !kElementwise<kMetric> ? kBatch<T, kPass> : 1;  // their vectors
  const int lanes = kElementwise<kMetric> ? 1 : entry.lanes, teams = entry.width / lanes;
  const int lane = ThreadId() & (lanes - 1), member = ThreadId() & (entry.width - 1);
  const int team = member / lanes;
  const uint32_t among = AmongLanes(lanes);
  const int64_t map = entry.positions * entry.channels;
  const int64_t unit_size = kElementwise<kMetric> ? kSize : entry.channels;
  const int64_t units = kElementwise<kMetric> ? map / kSize : entry.positions;
  const int64_t vectors = unit_size / kSize;
  const bool one_target = kPass == Pass::kShared || entry.one_target;
  const Strip strip = StripOf<kPass>(task, entry, units,
                                     tile * (kThreads / entry.width) + ThreadId() / entry.width);
  A* partials = nullptr;
  if (kPass == Pass::kShared && entry.partials) partials = entry.partials + strip.range * map;

  double sum = 0;
  for (int64_t first = strip.begin; first < strip.end; first += teams * kAtOnce) {
    // Beyond the strip its last unit is read again, and not written: conditions on loads would keep
    // one waiting for the other.
    int64_t begins[kAtOnce];  // of the units
    bool is_there[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t unit = first + i * teams + team;
      is_there[i] = unit < strip.end;
      begins[i] = (is_there[i] ? unit : strip.end - 1) * unit_size;
    }
    auto has = [&](int k) { return kElementwise<kMetric> || lane + k * lanes < vectors; };
    auto channel_of = [&](int k) {
      return kElementwise<kMetric> ? 0 : (has(k) ? lane + k * lanes : lane) * kSize;
    };
    auto load = [&](auto again, const T* from, auto& to) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          Load<decltype(again)::value>(from + begins[i] + channel_of(k), to[i][k]);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          if (!has(k)) to[i][k] = {};
        }
      }
    };
    [[maybe_unused]] Features a[kAtOnce][kKept], b[kAtOnce][kKept];
    [[maybe_unused]] Sums dtargets[kAtOnce][kKept] = {};
    if constexpr (kPass == Pass::kShared && kIsHeld) load(std::true_type(), entry.targets, b);
    if (!kIsHeld && partials && is_there[0]) {
      for (int64_t vector = lane; vector < vectors; vector += lanes) {
        Keep(partials + begins[0] + vector * kSize, Sums{});
      }
    }

    for (int64_t row = strip.first_row; row < strip.past_row; ++row) {
      const int64_t of_row = kPass == Pass::kOwn ? 0 : row * map;
      const T* predictions = entry.predictions + of_row;
      const T* targets = entry.targets + (one_target ? 0 : of_row);
      if constexpr (kIsHeld) {
        load(std::false_type(), predictions, a);
        if constexpr (kPass != Pass::kShared)
          load(std::integral_constant<bool, kPass == Pass::kLoss>(), targets, b);
      }
      A of_rows[kAtOnce], cotangents[kAtOnce], distances[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        of_rows[i] = 1;
        if (task.cotangents) {
          of_rows[i] = task.cotangents[kPass == Pass::kOwn ? begins[i] / map : row];
        }
        cotangents[i] = factor * of_rows[i];
      }
      auto emit = [&](int i, int k, int64_t channel, const Sums& da, const Sums& db) {
        if (!is_there[i] || (kIsHeld && !has(k))) return;
        const int64_t at = begins[i] + channel;
        StoreRounded(da, entry.dpredictions + of_row + at);
        if constexpr (kPass == Pass::kShared) {
          if constexpr (kIsHeld) {
            AddTo(dtargets[i][k], db);
          } else if (partials) {
            Sums so_far;
            Load<true>(partials + at, so_far);
            AddTo(so_far, db);
            Keep(partials + at, so_far);
          }
        }
      };
      if constexpr (kElementwise<kMetric>) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          Sums w, da, db;
          if (entry.weights) w = WeightsOfElements<kSize>(task, entry, begins[i]);
          distances[i] = 0;
#pragma unroll
          for (int v = 0; v < kSize; ++v) {
            const auto point = Formula<kMetric, A>(
                ToSum(a[i][0].values[v]) - ToSum(b[i][0].values[v]), task.epsilon);
            const A weight = entry.weights ? w.values[v] : A(1);
            distances[i] += weight * point.distance;
            da.values[v] = cotangents[i] * weight * point.slope;
            db.values[v] = -da.values[v];
          }
          if constexpr (kPass != Pass::kLoss) emit(i, 0, 0, da, db);
        }
      } else {
        auto each = [&](auto&& fn) {
          if constexpr (kIsHeld) {
#pragma unroll
            for (int k = 0; k < kKept; ++k) fn(k, channel_of(k), a[0][k], b[0][k]);
          } else {
#pragma unroll 2
            for (int64_t vector = lane; vector < vectors; vector += lanes) {
              Features x, y;
              Load<true>(predictions + begins[0] + vector * kSize, x);
              Load<true>(targets + begins[0] + vector * kSize, y);
              fn(0, vector * kSize, x, y);
            }
          }
        };
        auto weights = [&](int64_t channel) {
          Sums w;
          if (entry.weights) {
            Load<true>(entry.weights + channel, w);
          } else {
#pragma unroll
            for (int v = 0; v < kSize; ++v) w.values[v] = 1;
          }
          return w;
        };
        auto add = [&](auto& values) { ReduceLanes(lanes, among, values, Plus()); };
        using Sum = std::conditional_t<kIsHeld, A, double>;
        auto emit_first = [&](int k, int64_t channel, const Sums& da, const Sums& db) {
          emit(0, k, channel, da, db);
        };
        distances[0] = AtPosition<kMetric, kPass, kSize, Sum>(task, lane == 0, cotangents[0], each,
                                                              weights, add, emit_first);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (is_there[i]) sum += static_cast<double>(of_rows[i]) * distances[i];
      }
    }

    if constexpr (kPass == Pass::kShared && kIsHeld) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          if (!is_there[i] || !has(k)) continue;
          const int64_t at = begins[i] + channel_of(k);
          if (partials) {
            Keep(partials + at, dtargets[i][k]);
          } else if (entry.dtargets) {
            StoreRounded(dtargets[i][k], entry.dtargets + at);
          }
        }
      }
    }
  }
  if constexpr (kPass == Pass::kLoss) {
    double values[1] = {sum};
    ReduceLanes(entry.width, AmongLanes(entry.width), values, Plus());
    if (member == 0 && strip.number >= 0) task.sums[entry.first_sum + strip.number] = values[0];
  }
  return sum;
}

// A block whose lanes have neighbouring positions, and whose warps are slices of the channels.
// Returns as above.
template <Metric kMetric, Pass kPass, typename T>
FUSEDLOSS_DEVICE double OverApart(const Task<T>& task, const Entry<T>& entry, Accumulator<T> factor,
                                  int64_t tile) {
  using A = Accumulator<T>;
  const int slices = entry.lanes, warp = ThreadId() / kWarp, slice = warp % slices;
  const int member = warp / slices * kWarp + ThreadId() % kWarp;
  const int64_t positions = entry.positions, map = positions * entry.channels;
  const bool one_target = kPass == Pass::kShared || entry.one_target;
  const Strip strip = StripOf<kPass>(task, entry, positions, tile);
  A* partials = nullptr;
  if (kPass == Pass::kShared && entry.partials) partials = entry.partials + strip.range * map;
  auto* of_slices = reinterpret_cast<double*>(SharedMemory());
  auto add = [&](auto& values) {
    constexpr int kValues = sizeof(values) / sizeof(values[0]);
    SyncBlock();  // what was there before may still be read
    for (int i = 0; i < kValues; ++i) of_slices[i * kThreads + ThreadId()] = values[i];
    SyncBlock();
    for (int i = 0; i < kValues; ++i) {
      values[i] = 0;
      for (int other = 0; other < slices; ++other) {
        values[i] += of_slices[i * kThreads + ThreadId() + (other - slice) * kWarp];
      }
    }
  };

  double sum = 0;
  for (int64_t first = strip.begin; first < strip.end; first += entry.width) {
    const bool is_there = first + member < strip.end;
    const int64_t unit = is_there ? first + member : strip.end - 1;
    const int64_t row_of_unit = kPass == Pass::kOwn ? unit / positions : 0;
    const int64_t position = unit - row_of_unit * positions;
    auto for_channels = [&](auto&& fn) {
#pragma unroll 4
      for (int64_t channel = slice; channel < entry.channels; channel += slices) fn(channel);
    };
    if (partials && is_there) {
      for_channels([&](int64_t channel) { partials[channel * positions + position] = 0; });
    }
    for (int64_t next = strip.first_row; next < strip.past_row; ++next) {
      const int64_t row = kPass == Pass::kOwn ? row_of_unit : next;
      const T* predictions = entry.predictions + row * map + position;
      const T* targets = entry.targets + (one_target ? 0 : row * map) + position;
      const A of_row = task.cotangents ? task.cotangents[row] : A(1);
      auto each = [&](auto&& fn) {
        for_channels([&](int64_t channel) {
          fn(0, channel, Vector<T, 1>{predictions[channel * positions]},
             Vector<T, 1>{targets[channel * positions]});
        });
      };
      auto weights = [&](int64_t channel) {
        return Vector<A, 1>{entry.weights ? entry.weights[channel] : A(1)};
      };
      auto emit = [&](int, int64_t channel, const Vector<A, 1>& da, const Vector<A, 1>& db) {
        if (!is_there) return;
        const int64_t at = channel * positions + position;
        Round(da.values[0], &entry.dpredictions[row * map + at]);
        if (partials) partials[at] += db.values[0];
      };
      const A distance = AtPosition<kMetric, kPass, 1, double>(task, slice == 0, factor * of_row,
                                                               each, weights, add, emit);
      if (is_there) sum += static_cast<double>(of_row) * distance;
    }
  }
  if constexpr (kPass == Pass::kLoss) {
    sum = SumOfBlock(sum);
    if (ThreadId() == 0) task.sums[entry.first_sum + strip.number] = sum;
  }
  return sum;
}

// A block takes block_tiles tiles in a row.
template <Metric kMetric, Pass kPass, typename T>
FUSEDLOSS_KERNEL_OF(kThreads, kBlocksAtOnce)
OverLayers(Task<T> task) {
  using A = Accumulator<T>;
  int64_t tile = BlockId() * task.block_tiles;
  const int64_t end = tile + task.block_tiles < task.tiles ? tile + task.block_tiles : task.tiles;
  int64_t layer = EntryOf(task.table, task.count, tile);
  double sum = 0;
  for (; tile < end; ++tile) {
    if (layer + 1 < task.count && task.table[layer + 1].first_tile == tile) ++layer;
    const Entry<T> entry = task.table[layer];
    const double weight = task.layer_weights[entry.index] * entry.share;
    const A factor = static_cast<A>(task.scale * weight);
    const int64_t own_tile = tile - entry.first_tile;
    constexpr int kSize = kVector<T>;
    double of_tile;
    const bool is_wide = entry.way == Way::kVectors;
    if constexpr (kElementwise<kMetric>) {
      of_tile = is_wide ? OverSquads<kMetric, kPass, kSize, true>(task, entry, factor, own_tile)
                        : OverSquads<kMetric, kPass, 1, true>(task, entry, factor, own_tile);
    } else if (is_wide) {
      of_tile = OverSquads<kMetric, kPass, kSize, true>(task, entry, factor, own_tile);
    } else if (entry.way == Way::kVectorsAgain) {
      of_tile = OverSquads<kMetric, kPass, kSize, false>(task, entry, factor, own_tile);
    } else if (entry.way == Way::kElements) {
      of_tile = OverSquads<kMetric, kPass, 1, false>(task, entry, factor, own_tile);
    } else {
      of_tile = OverApart<kMetric, kPass>(task, entry, factor, own_tile);
    }
    if (entry.is_counted) sum += weight * of_tile;
  }
  if (kPass == Pass::kLoss || task.sums == nullptr) return;
  sum = SumOfBlock(sum);
  if (ThreadId() == 0) task.sums[BlockId()] = sum;
}

// loss[row] = Σ of what its strips have summed, by `lanes` lanes a row.
template <typename T>
FUSEDLOSS_KERNEL_OF(kThreads, 1)
SumRows(Task<T> task, int lanes, Accumulator<T>* loss) {
  const int lane = ThreadId() % lanes;
  const int64_t row = (BlockId() * kThreads + ThreadId()) / lanes;
  if (row >= task.rows) return;
  double sums[1] = {};
  for (int64_t layer = 0; layer < task.count; ++layer) {
    const Entry<T>& entry = task.table[layer];
    double sum = 0;
    for (int64_t part = lane; part < entry.parts; part += lanes) {
      sum += task.sums[entry.first_sum + row * entry.parts + part];
    }
    sums[0] += task.layer_weights[entry.index] * entry.share * sum;
  }
  ReduceLanes(lanes, AmongLanes(lanes), sums, Plus());
  if (lane == 0) loss[row] = static_cast<Accumulator<T>>(sums[0]);
}

// dtargets = Σ of what the ranges have summed. A block takes block_tiles tiles in a row.
template <typename T>
FUSEDLOSS_KERNEL_OF(kThreads, 1)
SumRanges(const Entry<T>* table, int64_t count, int64_t tiles, int64_t block_tiles) {
  int64_t tile = BlockId() * block_tiles;
  const int64_t end = tile + block_tiles < tiles ? tile + block_tiles : tiles;
  for (; tile < end; ++tile) {
    const Entry<T>& entry = table[EntryOf(table, count, tile)];
    const int64_t map = entry.positions * entry.channels;
    const int64_t begin = (tile - entry.first_tile) * kRangeTile;
    for (int64_t i = begin + ThreadId(); i < map && i < begin + kRangeTile; i += kThreads) {
      Accumulator<T> sum = 0;
#pragma unroll 4
      for (int64_t range = 0; range < entry.ranges; ++range) sum += entry.partials[range * map + i];
      Round(sum, &entry.dtargets[i]);
    }
  }
}

// ---- The host's side.

template <typename Fn>
GpuError ByMetric(Metric metric, Fn&& fn) {
  switch (metric) {
    case Metric::kSquared:
      return fn(std::integral_constant<Metric, Metric::kSquared>());
    case Metric::kAbsolute:
      return fn(std::integral_constant<Metric, Metric::kAbsolute>());
    case Metric::kCharbonnier:
      return fn(std::integral_constant<Metric, Metric::kCharbonnier>());
    case Metric::kCosine:
      return fn(std::integral_constant<Metric, Metric::kCosine>());
    default:
      return fn(std::integral_constant<Metric, Metric::kLpips>());
  }
}

// The least power of two that is not below `size`, or `most` if that is less.
int PowerOfTwo(int64_t size, int most) {
  int power = 1;
  while (power < size && power < most) power *= 2;
  return power;
}

template <typename T>
class Call {
 public:
  using A = Accumulator<T>;

  Call(const Gpu& gpu, const FeatureDistanceArgs<T>& args)
      : gpu_(gpu),
        args_(args),
        elementwise_(args.metric != Metric::kCosine && args.metric != Metric::kLpips) {
    task_.layer_weights = args.layer_weights;
    task_.rows = args.rows;
    task_.channels_last = args.channels_last;
    task_.epsilon_in_root = args.metric != Metric::kLpips || args.epsilon_in_root;
    task_.epsilon = static_cast<A>(args.epsilon);
  }

  GpuError Loss(A* loss) {
    FUSEDLOSS_RETURN_IF_ERROR(Prepare<Pass::kLoss>());
    if (task_.count == 0) return Zero(gpu_, loss, task_.rows * int64_t{sizeof(A)});
    task_.sums = static_cast<double*>(gpu_.allocate(gpu_.owner, strips_ * sizeof(double)));
    if (task_.sums == nullptr) return kNoMemory;
    FUSEDLOSS_RETURN_IF_ERROR(RunLayers<Pass::kLoss>());
    const int lanes = PowerOfTwo(most_parts_, kWarp);
    return Launch(gpu_, SumRows<T>, CeilDiv(task_.rows, kThreads / lanes), kThreads, 1, 0, task_,
                  lanes, loss);
  }

  // loss: one number out, or null.
  GpuError Gradient(const A* cotangents, double scale, A* loss) {
    task_.cotangents = cotangents;
    task_.scale = scale;
    double* sums = nullptr;
    if (loss) {
      sums = static_cast<double*>(gpu_.allocate(gpu_.owner, 2 * kMaxSums * sizeof(double)));
      if (sums == nullptr) return kNoMemory;
    }
    int64_t count = 0;  // of sums
    FUSEDLOSS_RETURN_IF_ERROR(Prepare<Pass::kOwn>());
    if (task_.count > 0) {
      task_.sums = sums;
      FUSEDLOSS_RETURN_IF_ERROR(RunLayers<Pass::kOwn>());
      count = blocks_;
    }
    FUSEDLOSS_RETURN_IF_ERROR(Prepare<Pass::kShared>());
    if (task_.count > 0) {
      task_.sums = sums ? sums + count : nullptr;
      FUSEDLOSS_RETURN_IF_ERROR(RunLayers<Pass::kShared>());
      FUSEDLOSS_RETURN_IF_ERROR(AddUpRanges());
      count += blocks_;
    }
    if (loss == nullptr) return nullptr;
    if (count == 0 || args_.rows == 0) return Zero(gpu_, loss, sizeof(A));  // for any scale
    return AddUp(gpu_, sums, count, scale, loss);
  }

 private:
  // Of one pass: the layers that it is for, cut into tiles.
  template <Pass kPass>
  GpuError Prepare() {
    std::vector<Entry<T>> entries;
    int64_t features = 0;
    for (int64_t k = 0; k < args_.count; ++k) {
      const FeatureLayer<T>& from = args_.layers[k];
      const int64_t map = from.positions * from.channels;
      const bool is_first = from.reference == FeatureReference::kFirst;
      const bool one_target = from.reference != FeatureReference::kTarget;
      const bool is_wanted = kPass == Pass::kLoss || one_target == (kPass == Pass::kShared);
      // Without rows there still is the gradient in a target that they share: 0.
      const bool is_empty = args_.rows == 0 && !(kPass == Pass::kShared && from.dtargets);
      if (map == 0 || !is_wanted || is_empty) continue;
      features += map;
      task_.first_row = is_first ? 1 : 0;
      Entry<T> entry{};
      entry.predictions = from.predictions;
      entry.targets = is_first ? from.predictions : from.targets;
      entry.weights = from.channel_weights;
      if (kPass != Pass::kLoss) entry.dpredictions = from.dpredictions;
      if (kPass == Pass::kShared) entry.dtargets = is_first ? from.dpredictions : from.dtargets;
      entry.positions = from.positions;
      entry.channels = from.channels;
      entry.share = 1.0 / static_cast<double>(elementwise_ ? map : from.positions);
      entry.index = k;
      entry.one_target = one_target;
      entry.is_counted = true;
      entries.push_back(entry);
      if (kPass != Pass::kOwn || from.dtargets == nullptr) continue;
      // Distances are symmetric: the gradient in the targets is that in predictions.
      entry.predictions = from.targets;
      entry.targets = from.predictions;
      entry.dpredictions = from.dtargets;
      entry.is_counted = false;
      entries.push_back(entry);
    }
    task_.count = static_cast<int64_t>(entries.size());
    task_.tiles = strips_ = 0;
    most_parts_ = 1;
    shared_bytes_ = kSumBytes;
    for (Entry<T>& entry : entries) {
      ChooseWay<kPass>(entry);
      Cut<kPass>(entry, static_cast<double>(entry.positions * entry.channels) / features);
    }
    if constexpr (kPass == Pass::kShared) FUSEDLOSS_RETURN_IF_ERROR(PlacePartials(entries));
    return MakeTable(gpu_, entries, &task_.table);
  }

  // How the features are read, and by how many lanes a unit.
  template <Pass kPass>
  void ChooseWay(Entry<T>& entry) const {
    if (!elementwise_ && !args_.channels_last && entry.positions > 1 && entry.channels > 1) {
      entry.way = Way::kApart;
      entry.lanes = static_cast<int16_t>(PowerOfTwo(entry.channels, kWarps));
      return;
    }
    const int64_t run = elementwise_ ? entry.positions * entry.channels : entry.channels;
    const bool wide = run % kVector<T> == 0 && IsAligned(entry.predictions) &&
                      IsAligned(entry.targets) && IsAligned(entry.dpredictions) &&
                      IsAligned(entry.dtargets) && (elementwise_ || IsAligned(entry.weights));
    const int64_t vectors = elementwise_ ? 1 : wide ? run / kVector<T> : run;
    const int64_t of_lane = wide && !elementwise_ ? kBatch<T, kPass> : 1;  // if that is enough
    entry.lanes = static_cast<int16_t>(PowerOfTwo(CeilDiv(vectors, of_lane), kWarp));
    entry.way = !wide                             ? Way::kElements
                : entry.lanes * of_lane < vectors ? Way::kVectorsAgain
                                                  : Way::kVectors;
  }

  bool IsHeld(const Entry<T>& entry) const {
    return entry.way == Way::kVectors || (elementwise_ && entry.way == Way::kElements);
  }

  // Strips and tiles. `share`: of the features of all layers.
  template <Pass kPass>
  void Cut(Entry<T>& entry, double share) {
    const int64_t rows = args_.rows, map = entry.positions * entry.channels;
    const bool is_apart = entry.way == Way::kApart;
    int64_t units = entry.positions;
    if (elementwise_) units = entry.way == Way::kVectors ? map / kVector<T> : map;
    if (is_apart) {
      entry.width = static_cast<int16_t>(kThreads / entry.lanes);
      if (shared_bytes_ < kSliceBytes) shared_bytes_ = kSliceBytes;
    } else {
      const int64_t together = kPass == Pass::kOwn ? rows * units : units;
      entry.width = static_cast<int16_t>(entry.lanes * PowerOfTwo(together, kWarp / entry.lanes));
    }
    const int64_t threads = is_apart ? kThreads : entry.width;  // of a strip
    const int64_t step =
        is_apart ? entry.width : entry.width / entry.lanes * (elementwise_ ? kBatch<T, kPass> : 1);
    const int64_t steps = CeilDiv(units, step);
    entry.first_tile = task_.tiles;
    entry.strip = step;
    entry.parts = steps;
    entry.ranges = 1;
    int64_t strips = CeilDiv(rows * units, step);
    if (kPass == Pass::kOwn) {
      const int64_t rounds = strips * threads / kManyThreads;
      entry.strip *= rounds > kMostSteps ? kMostSteps : rounds < 1 ? 1 : rounds;
      strips = CeilDiv(rows * units, entry.strip);
    }
    if constexpr (kPass == Pass::kLoss) {
      const auto fair = static_cast<int64_t>(share * kMaxStrips / rows);
      entry.strip = CeilDiv(steps, fair > 1 ? fair : 1) * step;
      entry.parts = CeilDiv(units, entry.strip);
      entry.first_sum = strips_;
      strips = rows * entry.parts;
      strips_ += strips;
      if (most_parts_ < entry.parts) most_parts_ = entry.parts;
    } else if constexpr (kPass == Pass::kShared) {
      const auto fair = static_cast<int64_t>(share * kThreadsAtOnce / (steps * threads));
      const auto room = static_cast<int64_t>(share * kPartialBytes / (map * int64_t{sizeof(A)}));
      entry.ranges = CeilDiv(rows, kLeastRows);
      if (entry.ranges > fair) entry.ranges = fair;
      if (entry.ranges > room) entry.ranges = room;
      if (entry.ranges < 1) entry.ranges = 1;
      strips = entry.ranges * steps;
    }
    task_.tiles += CeilDiv(strips, kThreads / threads);
  }

  // Entries whose gradient in the target is first summed in the workspace get a place there.
  GpuError PlacePartials(std::vector<Entry<T>>& entries) {
    auto is_summed = [&](const Entry<T>& entry) {
      return entry.dtargets && (entry.ranges > 1 || !IsHeld(entry));
    };
    auto size = [](const Entry<T>& entry) {  // where 16 bytes begin
      return CeilDiv(entry.ranges * entry.positions * entry.channels, kVector<A>) * kVector<A>;
    };
    int64_t total = 0;
    for (const Entry<T>& entry : entries) total += is_summed(entry) ? size(entry) : 0;
    if (total == 0) return nullptr;
    auto* partials = static_cast<A*>(gpu_.allocate(gpu_.owner, total * int64_t{sizeof(A)}));
    if (partials == nullptr) return kNoMemory;
    for (Entry<T>& entry : entries) {
      if (!is_summed(entry)) continue;
      entry.partials = partials;
      partials += size(entry);
      summed_.push_back(entry);
    }
    return nullptr;
  }

  GpuError AddUpRanges() {
    if (summed_.empty()) return nullptr;
    int64_t tiles = 0;
    for (Entry<T>& entry : summed_) {
      entry.first_tile = tiles;
      tiles += CeilDiv(entry.positions * entry.channels, kRangeTile);
    }
    const Entry<T>* table = nullptr;
    FUSEDLOSS_RETURN_IF_ERROR(MakeTable(gpu_, summed_, &table));
    const int64_t block_tiles = CeilDiv(tiles, kMaxBlocks);
    return Launch(gpu_, SumRanges<T>, CeilDiv(tiles, block_tiles), kThreads, 1, 0, table,
                  static_cast<int64_t>(summed_.size()), tiles, block_tiles);
  }

  template <Pass kPass>
  GpuError RunLayers() {
    task_.block_tiles = CeilDiv(task_.tiles, kPass == Pass::kLoss ? kMaxBlocks : kMaxSums);
    blocks_ = CeilDiv(task_.tiles, task_.block_tiles);
    return ByMetric(args_.metric, [&](auto metric) {
      return Launch(gpu_, OverLayers<metric, kPass, T>, blocks_, kThreads, 1, shared_bytes_, task_);
    });
  }

  const Gpu& gpu_;
  const FeatureDistanceArgs<T>& args_;
  const bool elementwise_;
  Task<T> task_{};
  std::vector<Entry<T>> summed_;
  int64_t strips_ = 0, most_parts_ = 1, shared_bytes_ = 0, blocks_ = 0;
};

}  // namespace

template <typename T>
GpuError FeatureDistance(const Gpu& gpu, const FeatureDistanceArgs<T>& args, Accumulator<T>* loss) {
  if (args.rows == 0) return nullptr;
  return Call<T>(gpu, args).Loss(loss);
}

template <typename T>
GpuError FeatureDistanceGrad(const Gpu& gpu, const FeatureDistanceArgs<T>& args,
                             const Accumulator<T>* dloss) {
  return Call<T>(gpu, args).Gradient(dloss, 1, nullptr);
}

template <typename T>
GpuError FeatureDistanceReduced(const Gpu& gpu, const FeatureDistanceArgs<T>& args,
                                const Accumulator<T>* row_weight, double scale,
                                Accumulator<T>* loss) {
  return Call<T>(gpu, args).Gradient(row_weight, scale, loss);
}

#define FUSEDLOSS_INSTANTIATE(T)                                                                 \
  template GpuError FeatureDistance(const Gpu&, const FeatureDistanceArgs<T>&, Accumulator<T>*); \
  template GpuError FeatureDistanceGrad(const Gpu&, const FeatureDistanceArgs<T>&,               \
                                        const Accumulator<T>*);                                  \
  template GpuError FeatureDistanceReduced(const Gpu&, const FeatureDistanceArgs<T>&,            \
                                           const Accumulator<T>*, double, Accumulator<T>*);
FUSEDLOSS_INSTANTIATE(float)
FUSEDLOSS_INSTANTIATE(double)
FUSEDLOSS_INSTANTIATE(Half)
FUSEDLOSS_INSTANTIATE(BFloat16)
#undef FUSEDLOSS_INSTANTIATE

}  // namespace fusedloss
