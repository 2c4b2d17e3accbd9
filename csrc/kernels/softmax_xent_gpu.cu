// Softmax cross-entropy on a GPU. Memory is read once and written once: a row, or a tile of short
// rows, stays in shared memory between the sweeps over it. The kinds of row offer the same
// operations, so the formulas stand once:
//   TileRow    short rows: a block holds many, and 1 to 32 lanes of a warp work on each
//   WideRow    long rows: a block works on one, or up to eight blocks that hold a share of it each
//   LongRow    the same in the general forms, where a thread takes class after class
//   ListedRow  a row with candidates: a block works on it, and reads no other class if none counts
// A row that fits nowhere is read from memory in every sweep.
#include "kernels/gpu.cuh"
#include "kernels/softmax_xent.h"

namespace fusedloss {
namespace {

constexpr int64_t kMaxClasses = 1 << 30;       // places in a row are 32-bit numbers
constexpr int64_t kTileRowBytes = 4 << 10;     // up to here rows are short
constexpr int64_t kTileBytes = 40 << 10;       // several blocks at once on a multiprocessor hide
constexpr int64_t kWideBlockBytes = 64 << 10;  // each other's waits for memory
constexpr int kMaxCluster = 8;                 // as many as every GPU with clusters has
constexpr int64_t kMaxBlocks = 1 << 30;
constexpr int kSumsPerRow = 9;

// What a kernel is compiled for: plain cross-entropy, which is from logits and labels, without a
// subset, class weights and smoothing; the other forms; all these of blended predictions; and,
// blended or not, the general forms: rows with subsets of their own, the focal form, a softcap, and
// whatever is to give metrics. A kernel for them all would need more registers than each.
enum class Form { kPlain, kAny, kBlended, kGeneral };

// How many vectors a thread loads before it uses the first: more of them hide more of the wait,
// and take more registers.
template <Form kForm>
constexpr int kBatch = kForm == Form::kPlain ? 4 : 2;

enum class Pass { kForward, kBackward, kBoth };

// What the kernels that run over the rows are given.
template <typename T>
struct Task {
  using A = Accumulator<T>;
  Pass pass;
  int64_t rows;
  int classes;
  int length;  // of a row as it is worked on: `classes`, or the size of the subset if gathered
  const T* predictions;
  const T* blended;  // or null
  A blend[2];        // weights of predictions and blended
  const int32_t* labels32;
  const int64_t* labels64;
  const A* targets;
  const A* class_weight;
  const int64_t* gathered;      // [length] class ids, or null: all classes, in their order
  const uint32_t* in_subset;    // bit set over the classes, or null: all
  const bool* mask;             // [rows, classes], or null
  const int32_t* candidates32;  // [rows, listed], or both null
  const int64_t* candidates64;
  int listed;
  const A* prepared;  // kPrepared numbers, or null: no subset of ids and no class weights
  bool dense, from_logits, has_subset, normalize_full, mask_negative, has_ignore_class, focal;
  int64_t ignore_class;
  A subset_size, subset_weight, full_weight, label_smoothing, lowest, highest;
  A sharpness, z_loss, softcap, gamma;  // sharpness: 1 / temperature
  A* loss;                              // [rows] out
  A* metrics;                           // [rows, 3] out, or null
  A* stats;  // [rows, stats_per_row] out of the forward pass, in to the backward one
  int stats_per_row;
  const A* cotangents;  // [rows], or null: all 1
  A scale;              // of the cotangents, 1 / temperature included
  T* gradient;          // out
  T* dblended;          // out, if there are blended predictions
};

// What is the same for all rows and only the device knows: Σ of the class weights over all classes
// and over the subset, and whether the subset is in order.
enum Prepared { kFullWeight, kSubsetWeight, kInOrder, kPrepared };

template <typename A>
FUSEDLOSS_DEVICE A Infinity() {
  return static_cast<A>(__builtin_huge_valf());
}
template <typename A>
FUSEDLOSS_DEVICE A NotANumber() {
  return static_cast<A>(__builtin_nanf(""));
}

// −Inf becomes the lowest finite number: −Inf − −Inf would be NaN.
template <typename A>
FUSEDLOSS_DEVICE A Finite(A x) {
  if constexpr (sizeof(A) == 4) return Max(x, -3.40282346638528859812e38f);
  return Max(x, static_cast<A>(-1.79769313486231570815e308));
}

template <typename T, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE A ClassWeight(const Task<T>& task, int c) {
  return task.class_weight ? task.class_weight[c] : A(1);
}
template <typename T>
FUSEDLOSS_DEVICE bool InSubset(const Task<T>& task, int c) {
  return task.in_subset == nullptr || (task.in_subset[c / 32] >> (c % 32)) & 1;
}

template <typename T, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE T Blend(const A (&weights)[2], T x, T y) {
  T sum;
  Round(weights[0] * ToSum(x) + weights[1] * ToSum(y), &sum);
  return sum;
}

struct Greater {
  template <typename A>
  FUSEDLOSS_DEVICE A operator()(A a, A b) const {
    return Max(a, b);
  }
};

// Places in a row among sums: their bits, for a float does not hold all of them.
template <typename A>
using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <typename A>
FUSEDLOSS_DEVICE A FromBits(Bits<A> bits) {
  A value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
template <typename A>
FUSEDLOSS_DEVICE Bits<A> ToBits(A value) {
  Bits<A> bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
struct FirstPlace {
  template <typename A>
  FUSEDLOSS_DEVICE A operator()(A a, A b) const {
    return ToBits(a) < ToBits(b) ? a : b;
  }
};

// Where a sweep finds the row.
enum class Source {
  kMemory,  // in device memory, for the first time: kept if there is room
  kKept,    // where the first sweep kept it
};

// A row of a tile that lies in shared memory.
template <typename T, Form kForm>
struct TileRow {
  using A = Accumulator<T>;
  static constexpr bool kMayBeDense = kForm != Form::kPlain, kListed = false;
  T* predictions;
  const A* targets;
  int length, lane, lanes;
  uint32_t among;

  FUSEDLOSS_DEVICE bool IsFirst() const { return lane == 0; }
  // As long as there is no gradient.
  FUSEDLOSS_DEVICE A At(const Task<T>&, int c) const { return ToSum(predictions[c]); }

  // Calls fn(class, prediction, target) for every class that falls to this thread.
  template <typename Fn>
  FUSEDLOSS_DEVICE void Each(const Task<T>& task, Source, Fn&& fn) const {
    const bool dense = kMayBeDense && task.targets;
    for (int c = lane; c < length; c += lanes) {
      fn(c, ToSum(predictions[c]), dense ? targets[c] : A(0));
    }
  }
  // The same; the gradient becomes what fn returns.
  template <typename Fn>
  FUSEDLOSS_DEVICE void Emit(const Task<T>& task, Source, Fn&& fn) {
    const bool dense = kMayBeDense && task.targets;
    for (int c = lane; c < length; c += lanes) {
      Round(fn(c, ToSum(predictions[c]), dense ? targets[c] : A(0)), &predictions[c]);
    }
  }
  // The gradient becomes `value`.
  FUSEDLOSS_DEVICE void Fill(const Task<T>&, A value) {
    for (int c = lane; c < length; c += lanes) Round(value, &predictions[c]);
  }
  template <int kValues, typename Op>
  FUSEDLOSS_DEVICE void Reduce(A (&values)[kValues], Op op) {
    ReduceLanes(lanes, among, values, op);
  }

  // peak = max s, sum = Σ e^{s − peak}: the first sweep of plain cross-entropy.
  FUSEDLOSS_DEVICE void SumPowers(const Task<T>& task, A* peak, A* sum) {
    A peaks[1] = {-Infinity<A>()}, sums[1] = {};
    Each(task, Source::kMemory, [&](int, A z, A) { peaks[0] = Max(peaks[0], z); });
    Reduce(peaks, Greater());
    *peak = peaks[0] * task.sharpness;
    Each(task, Source::kKept, [&](int, A z, A) { sums[0] += Exp(z * task.sharpness - *peak); });
    Reduce(sums, Plus());
    *sum = sums[0];
  }
};

// The shared memory of a block of a wide row begins with these.
template <typename A>
struct Reductions {
  A of_warps[2][kWarps][kSumsPerRow];
  A of_block[2][kSumsPerRow];
};
template <typename A>
constexpr int64_t kReductionBytes = (sizeof(Reductions<A>) + 15) / 16 * 16;

// The block, or the cluster of blocks, that works on a row.
template <typename A>
struct Team {
  static constexpr bool kListed = false;
  Reductions<A>* reductions;
  int cluster, rank;
  int turn;  // the half of `reductions` to use next: the other may still be read

  FUSEDLOSS_DEVICE bool IsFirst() const { return ThreadId() == 0 && rank == 0; }

  template <int kValues, typename Op>
  FUSEDLOSS_DEVICE void Reduce(A (&values)[kValues], Op op) {
    static_assert(kValues <= kSumsPerRow);
    ReduceLanes(kWarp, 0xffffffffu, values, op);
    auto& of_warps = reductions->of_warps[turn];
    if (ThreadId() % kWarp == 0) {
      for (int i = 0; i < kValues; ++i) of_warps[ThreadId() / kWarp][i] = values[i];
    }
    SyncBlock();
    for (int i = 0; i < kValues; ++i) {
      values[i] = of_warps[0][i];
      for (int warp = 1; warp < kWarps; ++warp) values[i] = op(values[i], of_warps[warp][i]);
    }
    if (cluster > 1) {
      auto& of_block = reductions->of_block[turn];
      if (ThreadId() == 0) {
        for (int i = 0; i < kValues; ++i) of_block[i] = values[i];
        PublishToCluster();
      }
      SyncCluster();
      for (int i = 0; i < kValues; ++i) {
        values[i] = ReadPeer(&of_block[i], 0);
        for (int peer = 1; peer < cluster; ++peer) {
          values[i] = op(values[i], ReadPeer(&of_block[i], peer));
        }
      }
    }
    turn ^= 1;
  }
};

// A row that the block, or the cluster of blocks, works on. It is cut into vectors of kVector
// classes that are aligned in memory; the outermost may reach beyond the row.
template <typename T, int kVector, Form kForm>
struct WideRow : Team<Accumulator<T>> {
  using A = Accumulator<T>;
  static constexpr bool kMayBeDense = kForm != Form::kPlain, kBlended = kForm == Form::kBlended;
  struct alignas(kVector * sizeof(T)) Vector {
    T values[kVector];
  };

  const T* predictions;  // of the row
  const T* blended;
  A blend[2];
  const A* targets;
  T *gradient, *dblended;
  const int64_t* gathered;
  int length;
  int before;       // classes that the first vector reaches before the row
  int begin, end;   // vectors of this block
  Vector* kept;     // [end − begin], or null
  A* kept_targets;  // [(end − begin) · kVector]
  using Team<A>::cluster, Team<A>::rank, Team<A>::Reduce;

  FUSEDLOSS_DEVICE int FirstClass(int vector) const { return vector * kVector - before; }
  FUSEDLOSS_DEVICE int Class(int c) const {
    if constexpr (kVector == 1) {  // gathered classes do not come in vectors
      if (gathered) return static_cast<int>(gathered[c]);
    }
    return c;
  }
  FUSEDLOSS_DEVICE bool IsDense() const { return kMayBeDense && targets; }

  // A vector that lies in the row as a whole.
  FUSEDLOSS_DEVICE void Load(int vector, Vector& x, A (&t)[kVector]) const {
    const int first = FirstClass(vector);
    if constexpr (sizeof(Vector) == 16) {
      x = LoadOnce<Vector>(predictions + first);
      if constexpr (kBlended) {
        const auto y = LoadOnce<Vector>(blended + first);
        for (int i = 0; i < kVector; ++i) x.values[i] = Blend(blend, x.values[i], y.values[i]);
      }
      if (!IsDense()) return;
      struct alignas(16) Part {
        A values[16 / sizeof(A)];
      };
      constexpr int kPart = 16 / sizeof(A);
      for (int i = 0; i < kVector; i += kPart) {
        const Part part = LoadOnce<Part>(targets + first + i);
        for (int j = 0; j < kPart; ++j) t[i + j] = part.values[j];
      }
    } else {
      LoadEdge(vector, x, t, T{});
    }
  }
  // Any vector; beyond the row it holds `fill`.
  FUSEDLOSS_DEVICE void LoadEdge(int vector, Vector& x, A (&t)[kVector], T fill) const {
    for (int i = 0; i < kVector; ++i) {
      const int c = FirstClass(vector) + i;
      const bool inside = c >= 0 && c < length;
      x.values[i] = inside ? predictions[Class(c)] : fill;
      if (kBlended && inside) x.values[i] = Blend(blend, x.values[i], blended[Class(c)]);
      t[i] = inside && IsDense() ? targets[Class(c)] : A(0);
    }
  }
  FUSEDLOSS_DEVICE void LoadKept(int vector, Vector& x, A (&t)[kVector]) const {
    x = kept[vector - begin];
    for (int i = 0; IsDense() && i < kVector; ++i) {
      t[i] = kept_targets[(vector - begin) * kVector + i];
    }
  }
  FUSEDLOSS_DEVICE void Keep(int vector, const Vector& x, const A (&t)[kVector]) const {
    kept[vector - begin] = x;
    for (int i = 0; IsDense() && i < kVector; ++i) {
      kept_targets[(vector - begin) * kVector + i] = t[i];
    }
  }

  struct Whole {
    static constexpr bool value = true;
  };
  struct Edge {
    static constexpr bool value = false;
  };

  // Calls fn(vector's number, predictions, targets, Whole or Edge) for every vector of this thread.
  template <typename Fn>
  FUSEDLOSS_DEVICE void EachVector(Source source, T fill, Fn&& fn) const {
    constexpr int kAtOnce = kBatch<kForm>;
    const bool from_kept = source == Source::kKept && kept;
    const bool keeps = source == Source::kMemory && kept;
    const int first_whole = begin == 0 && before > 0 ? 1 : begin;
    const int past = (before + length) / kVector;  // all vectors that end in the row
    const int last_whole = end < past ? end : past;
    for (int first = first_whole + ThreadId(); first < last_whole; first += kAtOnce * kThreads) {
      Vector x[kAtOnce];
      A t[kAtOnce][kVector];
      if (from_kept) {
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b) {
          const int vector = first + b * kThreads;
          if (vector < last_whole) LoadKept(vector, x[b], t[b]);
        }
      } else {
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b) {
          const int vector = first + b * kThreads;
          if (vector < last_whole) Load(vector, x[b], t[b]);
        }
      }
#pragma unroll
      for (int b = 0; b < kAtOnce; ++b) {
        const int vector = first + b * kThreads;
        if (vector >= last_whole) break;
        if (keeps) Keep(vector, x[b], t[b]);
        fn(vector, x[b], t[b], Whole{});
      }
    }
    if constexpr (kVector > 1) {  // at most two are left: the first, and the last
      int edge = -1;
      if (ThreadId() == 0 && begin < first_whole) edge = begin;
      if (ThreadId() == 1 && end > last_whole && last_whole >= first_whole) edge = last_whole;
      if (edge < 0) return;
      Vector x;
      A t[kVector];
      LoadEdge(edge, x, t, fill);
      fn(edge, x, t, Edge{});
    }
  }

  template <typename Fn>
  FUSEDLOSS_DEVICE void Each(const Task<T>&, Source source, Fn&& fn) const {
    EachVector(source, T{}, [&](int vector, const Vector& x, const A(&t)[kVector], auto kind) {
      for (int i = 0; i < kVector; ++i) {
        const int c = FirstClass(vector) + i;
        if (!kind.value && (c < 0 || c >= length)) continue;
        fn(Class(c), ToSum(x.values[i]), IsDense() ? t[i] : A(0));
      }
    });
  }
  template <typename Fn>
  FUSEDLOSS_DEVICE void Emit(const Task<T>&, Source source, Fn&& fn) {
    EachVector(source, T{}, [&](int vector, const Vector& x, const A(&t)[kVector], auto kind) {
      const int first = FirstClass(vector);
      Vector g;
      [[maybe_unused]] Vector h;  // in the blended predictions
      for (int i = 0; i < kVector; ++i) {
        const int c = first + i;
        if (!kind.value && (c < 0 || c >= length)) continue;
        A pull = fn(Class(c), ToSum(x.values[i]), IsDense() ? t[i] : A(0));
        if constexpr (kBlended) {
          Round(pull * blend[1], &h.values[i]);
          if (!kind.value || kVector == 1) dblended[Class(c)] = h.values[i];
          pull *= blend[0];
        }
        Round(pull, &g.values[i]);
        if (!kind.value || kVector == 1) gradient[Class(c)] = g.values[i];
      }
      if constexpr (kind.value && sizeof(Vector) == 16) {
        StoreOnce(gradient + first, g);
        if constexpr (kBlended) StoreOnce(dblended + first, h);
      }
    });
  }

  // All classes, gathered or not: the ids may be why the row is filled.
  FUSEDLOSS_DEVICE void Fill(const Task<T>& task, A value) {
    for (int c = rank * kThreads + ThreadId(); c < task.classes; c += cluster * kThreads) {
      Round(value, &gradient[c]);
      if constexpr (kBlended) Round(value, &dblended[c]);
    }
  }

  // In one sweep, relative to the greatest logit that the thread has seen.
  FUSEDLOSS_DEVICE void SumPowers(const Task<T>& task, A* peak, A* sum) {
    T fill;
    Round(-Infinity<A>(), &fill);
    A peaks[1] = {-Infinity<A>()}, sums[1] = {};
    auto take = [&](int, const Vector& x, const A(&)[kVector], auto) {
      A z[kVector], highest = peaks[0];
      for (int i = 0; i < kVector; ++i) {
        z[i] = ToSum(x.values[i]);
        highest = Max(highest, z[i]);
      }
      const A reference = Finite(highest * task.sharpness);
      if (highest > peaks[0]) {
        sums[0] *= Exp(peaks[0] * task.sharpness - reference);
        peaks[0] = highest;
      }
      for (int i = 0; i < kVector; ++i) sums[0] += Exp(z[i] * task.sharpness - reference);
    };
    EachVector(Source::kMemory, fill, take);
    const A own = peaks[0];
    Reduce(peaks, Greater());
    *peak = peaks[0] * task.sharpness;
    // A thread without a finite logit has 0 or NaN to give.
    sums[0] = own == peaks[0] ? sums[0] : sums[0] * Exp(Finite(own * task.sharpness) - *peak);
    Reduce(sums, Plus());
    *sum = sums[0];
  }
};

// A row of a general form, which the block, or the cluster of blocks, works on a class at a time.
template <typename T>
struct LongRow : Team<Accumulator<T>> {
  using A = Accumulator<T>;
  const T* predictions;  // of the row
  const T* blended;      // or null
  const A* targets;      // or null
  T *gradient, *dblended;
  int begin, end;         // places of this block: classes, or their places among the gathered
  const T* kept;          // [end − begin], blended, or null
  const A* kept_targets;  // [end − begin], likewise
  using Team<A>::cluster, Team<A>::rank;

  FUSEDLOSS_DEVICE A At(const Task<T>& task, int c) const {
    return ToSum(blended ? Blend(task.blend, predictions[c], blended[c]) : predictions[c]);
  }
  FUSEDLOSS_DEVICE void Put(const Task<T>& task, int c, A pull) const {
    if (blended) {
      Round(pull * task.blend[1], &dblended[c]);
      pull *= task.blend[0];
    }
    Round(pull, &gradient[c]);
  }

  template <typename Fn>
  FUSEDLOSS_DEVICE void Each(const Task<T>& task, Source, Fn&& fn) const {
    for (int k = begin + ThreadId(); k < end; k += kThreads) {
      const int c = task.gathered ? static_cast<int>(task.gathered[k]) : k;
      if (kept) {
        fn(c, ToSum(kept[k - begin]), targets ? kept_targets[k - begin] : A(0));
      } else {
        fn(c, At(task, c), targets ? targets[c] : A(0));
      }
    }
  }
  template <typename Fn>
  FUSEDLOSS_DEVICE void Emit(const Task<T>& task, Source source, Fn&& fn) const {
    Each(task, source, [&](int c, A x, A target) { Put(task, c, fn(c, x, target)); });
  }
  FUSEDLOSS_DEVICE void Fill(const Task<T>& task, A value) const {
    for (int c = rank * kThreads + ThreadId(); c < task.classes; c += cluster * kThreads) {
      Put(task, c, value);
    }
  }
};

// A row with candidates. Its classes are not kept: there may be no need to read them.
template <typename T>
struct ListedRow : LongRow<T> {
  using A = Accumulator<T>;
  static constexpr bool kListed = true;
  const int32_t* candidates32;  // [listed], or null
  const int64_t* candidates64;
  const A* listed_targets;  // [listed], or null

  FUSEDLOSS_DEVICE int64_t Candidate(int k) const {
    return candidates32 ? candidates32[k] : candidates64[k];
  }
  FUSEDLOSS_DEVICE bool HasBadCandidate(const Task<T>& task) {
    A bad[1] = {};
    for (int k = ThreadId(); k < task.listed; k += kThreads) {
      const int64_t c = Candidate(k);
      if (c < -1 || c >= task.classes) bad[0] = 1;
    }
    this->Reduce(bad, Greater());
    return bad[0] != 0;
  }

  // Calls fn(place, class, prediction, target) for the candidates of this thread.
  template <typename Fn>
  FUSEDLOSS_DEVICE void EachListed(const Task<T>& task, Fn&& fn) const {
    for (int k = ThreadId(); k < task.listed; k += kThreads) {
      const int c = static_cast<int>(Candidate(k));
      if (c >= 0) fn(k, c, this->At(task, c), listed_targets ? listed_targets[k] : A(0));
    }
  }
};

// ---- The formulas; see softmax_xent_simd.cc, which they follow.

// What the backward pass needs of a row.
template <typename A>
struct RowStats {
  A subset_peak, subset_scale, full_peak, full_scale, subset_weight;
};

template <typename T, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE void SaveStats(const Task<T>& task, int64_t row, const RowStats<A>& stats) {
  A* to = task.stats + row * task.stats_per_row;
  if (task.stats_per_row == 2) {
    to[0] = stats.full_peak;
    to[1] = stats.full_scale;
  } else if (task.stats_per_row == 5) {
    to[0] = stats.subset_peak;
    to[1] = stats.subset_scale;
    to[2] = stats.full_peak;
    to[3] = stats.full_scale;
    to[4] = stats.subset_weight;
  }
}
template <typename T, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE RowStats<A> LoadStats(const Task<T>& task, int64_t row) {
  const A* from = task.stats + row * task.stats_per_row;
  if (task.stats_per_row == 2) return {A(0), A(0), from[0], from[1], A(0)};
  return {from[0], from[1], from[2], from[3], from[4]};
}

// What the log-sum-exp of a normaliser adds to a loss.
template <typename T, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE A ZLoss(const Task<T>& task, A log_sum_exp) {
  return task.z_loss == 0 ? A(0) : task.z_loss * log_sum_exp * log_sum_exp;
}

// Plain cross-entropy: from logits and labels, without a subset, class weights and smoothing.
template <typename T, typename Row, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE void Plain(const Task<T>& task, Row& row, int64_t i, int label, A logit) {
  RowStats<A> stats{};
  if (task.pass == Pass::kBackward) {
    stats = LoadStats(task, i);
  } else {
    A sum;
    row.SumPowers(task, &stats.full_peak, &sum);
    const A log_sum = Log(sum), log_sum_exp = log_sum + stats.full_peak;
    stats.full_scale = (1 + 2 * task.z_loss * log_sum_exp) / sum;
    if (row.IsFirst()) {
      const A score = logit * task.sharpness;
      task.loss[i] = log_sum - (score - stats.full_peak) + ZLoss(task, log_sum_exp);
      if (task.pass == Pass::kForward) SaveStats(task, i, stats);
    }
  }
  if (task.pass == Pass::kForward) return;
  const A cotangent = (task.cotangents ? task.cotangents[i] : A(1)) * task.scale;
  const A scale = stats.full_scale * cotangent;
  auto gradient = [&](int c, A z, A) {
    return Exp(z * task.sharpness - stats.full_peak) * scale - (c == label ? cotangent : A(0));
  };
  row.Emit(task, task.pass == Pass::kBoth ? Source::kKept : Source::kMemory, gradient);
}

// From logits, and from probabilities with labels, whose logits are log(clip(p)).
template <typename T, typename Row, typename A = Accumulator<T>>
struct Softmax {
  const Task<T>& task;
  Row& row;
  const int label;  // −1 with dense targets
  const bool dense = task.dense, smoothing = task.label_smoothing != 0;
  // Which normalisers are needed: over all classes, over S alone.
  const bool full = !task.has_subset || task.normalize_full || task.full_weight != 0;
  const bool subset = task.has_subset && !task.normalize_full;
  const A unsmoothed = 1 - task.label_smoothing;
  const A full_classes = task.prepared ? task.prepared[kFullWeight] : A(task.classes);
  const A subset_classes = task.prepared ? task.prepared[kSubsetWeight] : task.subset_size;

  FUSEDLOSS_DEVICE A Clip(A p) const {
    p = p < task.lowest ? task.lowest : p;
    return p > task.highest ? task.highest : p;
  }
  FUSEDLOSS_DEVICE A Power(A x, A peak) const {
    return task.from_logits ? Exp(x * task.sharpness - peak) : Clip(x);
  }
  FUSEDLOSS_DEVICE A Logit(A x) const {
    return task.from_logits ? x * task.sharpness : Log(Clip(x));
  }
  FUSEDLOSS_DEVICE A Smoothed(A of_targets, A of_classes, A size) const {
    if (!smoothing) return of_targets;
    return of_targets * unsmoothed + of_classes * (task.label_smoothing / size);
  }

  FUSEDLOSS_DEVICE A Forward(RowStats<A>& stats) const {
    A peaks[2] = {-Infinity<A>(), -Infinity<A>()};  // over all classes, over S
    row.Each(task, Source::kMemory, [&](int c, A x, A) {
      peaks[0] = Max(peaks[0], x);
      if (subset && InSubset(task, c)) peaks[1] = Max(peaks[1], x);
    });
    if (task.from_logits) {
      row.Reduce(peaks, Greater());
      peaks[0] *= task.sharpness;
      peaks[1] *= task.sharpness;
      // Where the peaks are close, e^{z − peak} of all classes is exact enough for S as well.
      if (!subset || (full && peaks[0] - peaks[1] <= A(8))) peaks[1] = peaks[0];
    } else {
      peaks[0] = peaks[1] = 0;
    }
    // Per family: Σ y, Σ w·y, Σ w·y·(z − peak), Σ w·(z − peak), w the class weights.
    enum { kFull, kSubset, kTargets, kWeighted, kDot, kLogits, kAllWeighted, kAllDot, kAllLogits };
    A sums[kSumsPerRow] = {};
    const bool same = peaks[0] == peaks[1];
    row.Each(task, Source::kKept, [&](int c, A x, A target) {
      const bool in = InSubset(task, c);
      A power = full ? Power(x, peaks[0]) : A(0);
      sums[kFull] += power;
      if (subset && in) sums[kSubset] += full && same ? power : Power(x, peaks[1]);
      if (!dense && !smoothing && c != label) return;
      const A z = Logit(x), weight = ClassWeight(task, c);
      const A weighted = weight * (dense ? target : A(c == label));
      sums[kAllWeighted] += weighted;
      if (weighted != 0) sums[kAllDot] += weighted * (z - peaks[0]);
      if (smoothing && weight != 0) sums[kAllLogits] += weight * (z - peaks[0]);
      if (!in) return;
      sums[kTargets] += dense ? target : A(c == label);
      sums[kWeighted] += weighted;
      if (weighted != 0) sums[kDot] += weighted * (z - peaks[1]);
      if (smoothing && weight != 0) sums[kLogits] += weight * (z - peaks[1]);
    });
    row.Reduce(sums, Plus());
    const A log_sum = Log(sums[kFull]);
    stats.full_peak = peaks[0];
    stats.subset_peak = peaks[1];
    A loss = 0;
    if (task.full_weight != 0) {
      const A size = A(task.classes);
      const A nats = sums[kAllWeighted] * log_sum - sums[kAllDot];
      const A of_classes = full_classes * log_sum - sums[kAllLogits];
      const A log_sum_exp = log_sum + peaks[0];
      const A pull =
          Smoothed(sums[kAllWeighted], full_classes, size) + 2 * task.z_loss * log_sum_exp;
      loss = task.full_weight * (Smoothed(nats, of_classes, size) + ZLoss(task, log_sum_exp));
      stats.full_scale = task.full_weight * pull / sums[kFull];
    }
    if (task.has_subset && sums[kTargets] != 0) {
      const A sum = subset ? sums[kSubset] : sums[kFull], subset_log_sum = Log(sum);
      const A nats = sums[kWeighted] * subset_log_sum - sums[kDot];
      const A of_classes = subset_classes * subset_log_sum - sums[kLogits];
      const A log_sum_exp = subset_log_sum + peaks[1];
      const A pull = Smoothed(sums[kWeighted], subset_classes, task.subset_size) +
                     2 * task.z_loss * log_sum_exp;
      loss += task.subset_weight *
              (Smoothed(nats, of_classes, task.subset_size) + ZLoss(task, log_sum_exp));
      const A scale = task.subset_weight * pull / sum;
      (subset ? stats.subset_scale : stats.full_scale) += scale;
      stats.subset_weight = task.subset_weight;
    }
    return loss;
  }

  FUSEDLOSS_DEVICE A Gradient(const RowStats<A>& stats, A cotangent, int c, A x, A target) const {
    if (task.length == 1 && task.z_loss == 0) {
      return (Logit(x) - Logit(x)) * cotangent;  // constant: exactly 0
    }
    const bool in = stats.subset_weight != 0 && InSubset(task, c);
    A pull = 0, weight = task.full_weight, smooth = 0;
    A power = full ? Power(x, stats.full_peak) : A(0);
    if (stats.full_scale != 0) pull = stats.full_scale * cotangent * power;
    if (smoothing) smooth = task.full_weight * (task.label_smoothing / A(task.classes));
    if (in) {
      if (subset) {
        if (!full || stats.full_peak != stats.subset_peak) power = Power(x, stats.subset_peak);
        pull += stats.subset_scale * cotangent * power;
      }
      weight += stats.subset_weight;
      if (smoothing) smooth += stats.subset_weight * (task.label_smoothing / task.subset_size);
    }
    if (dense || smoothing || c == label) {
      const A y = weight * unsmoothed * (dense ? target : A(c == label)) + smooth;
      pull -= cotangent * ClassWeight(task, c) * y;
    }
    if (task.from_logits) return pull;
    // d log(clip(p)) / dp is 1/p between the bounds, else 0.
    return x < task.lowest || x > task.highest || pull == 0 ? A(0) : pull / x;
  }
};

// From probabilities with dense targets.
template <typename T, typename Row, typename A = Accumulator<T>>
struct Divided {
  const Task<T>& task;
  Row& row;
  const bool smoothing = task.label_smoothing != 0;
  const A unsmoothed = 1 - task.label_smoothing;
  const A smooth_all = smoothing ? task.label_smoothing / A(task.classes) : A(0);
  const A smooth_in = smoothing ? task.label_smoothing / task.subset_size : A(0);

  // Of p, whose share is p / sum.
  FUSEDLOSS_DEVICE bool IsBetween(A p, A sum) const {
    const A share = p / sum;
    return !(share < task.lowest || share > task.highest);
  }

  FUSEDLOSS_DEVICE A Forward(RowStats<A>& stats) const {
    A sums[3] = {};  // Σ p, and over S Σ p and Σ y
    row.Each(task, Source::kMemory, [&](int c, A p, A target) {
      sums[0] += p;
      if (!InSubset(task, c)) return;
      sums[1] += p;
      sums[2] += target;
    });
    row.Reduce(sums, Plus());
    const A full_sum = sums[0];
    const A subset_sum = task.has_subset && !task.normalize_full ? sums[1] : sums[0];
    const bool inside = task.has_subset && sums[2] != 0;
    const A full_log = Log(full_sum), subset_log = Log(subset_sum);
    const A log_lowest = Log(task.lowest), log_highest = Log(task.highest);
    // Per family Σ y^F·log(clip(share)), and Σ y^F of the shares between the bounds.
    enum { kAllDot, kAllBetween, kInDot, kInBetween };
    A of_targets[4] = {};
    row.Each(task, Source::kKept, [&](int c, A p, A target) {
      if (!smoothing && target == 0) return;
      const A weight = ClassWeight(task, c), log = Log(p);
      target *= unsmoothed;
      const A all_target = weight * (target + smooth_all);
      if (all_target != 0) {
        const A of_share = full_sum > 0 ? log - full_log : Log(p / full_sum);
        of_targets[kAllDot] += all_target * Min(Max(of_share, log_lowest), log_highest);
        if (IsBetween(p, full_sum)) of_targets[kAllBetween] += all_target;
      }
      const A in_target = weight * (target + smooth_in);
      if (in_target != 0 && InSubset(task, c)) {
        const A of_share = subset_sum > 0 ? log - subset_log : Log(p / subset_sum);
        of_targets[kInDot] += in_target * Min(Max(of_share, log_lowest), log_highest);
        if (IsBetween(p, subset_sum)) of_targets[kInBetween] += in_target;
      }
    });
    row.Reduce(of_targets, Plus());
    // NaN and Inf among the predictions reach loss and gradient through their sum, 0 through 0/0.
    const A full_poison = (full_sum + 1 / full_sum) * 0;
    A loss = 0;
    stats = {subset_sum, 0, full_sum, 0, 0};
    if (task.full_weight != 0) {
      loss = task.full_weight * (full_poison - of_targets[kAllDot]);
      stats.full_scale = task.full_weight * (of_targets[kAllBetween] / full_sum + full_poison);
    }
    if (inside) {
      const A poison = (subset_sum + 1 / subset_sum) * 0;
      loss += task.subset_weight * (poison - of_targets[kInDot]);
      const A scale = task.subset_weight * (of_targets[kInBetween] / subset_sum + poison);
      (task.normalize_full ? stats.full_scale : stats.subset_scale) += scale;
      stats.subset_weight = task.subset_weight;
    }
    return loss;
  }

  FUSEDLOSS_DEVICE A Gradient(const RowStats<A>& stats, A cotangent, int c, A p, A target) const {
    const bool in = stats.subset_weight != 0 && InSubset(task, c);
    A pull = cotangent * (stats.full_scale + (in ? stats.subset_scale : A(0)));
    if (!smoothing && target == 0) return pull;
    target *= unsmoothed;
    A kept = IsBetween(p, stats.full_peak) ? task.full_weight * (target + smooth_all) : A(0);
    if (in && IsBetween(p, stats.subset_peak)) kept += stats.subset_weight * (target + smooth_in);
    kept *= ClassWeight(task, c);
    return kept == 0 ? pull : pull - cotangent * kept / p;
  }
};

template <typename T, typename Row, typename Formula, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE void Run(const Task<T>& task, Row& row, int64_t i, const Formula& formula) {
  RowStats<A> stats{};
  if (task.pass == Pass::kBackward) {
    stats = LoadStats(task, i);
  } else {
    const A loss = formula.Forward(stats);
    if (row.IsFirst()) {
      task.loss[i] = loss;
      if (task.pass == Pass::kForward) SaveStats(task, i, stats);
    }
  }
  if (task.pass == Pass::kForward) return;
  const A cotangent = (task.cotangents ? task.cotangents[i] : A(1)) * task.scale;
  auto gradient = [&](int c, A x, A target) {
    return formula.Gradient(stats, cotangent, c, x, target);
  };
  row.Emit(task, task.pass == Pass::kBoth ? Source::kKept : Source::kMemory, gradient);
}

// ---- The general forms: slower than memory in any case, so a sweep for each step.

enum { kOfSubset, kOfAll, kLosses };

// L_S or L_all of a row.
template <typename A>
struct PartOfLoss {
  bool wanted;  // by the loss, or by the metrics
  A weight;     // 0: it adds nothing
  A smoothing;  // label_smoothing / |F|
  A peak, sum;  // over N: max s, Σ e^{s − peak}; from probabilities 0, Σ p
  A pull;       // what Σ e^{s − peak} adds to the gradient of a class, by its own e^{s − peak}
};

// A class, or a candidate, in both.
template <typename A>
struct Place {
  A normalizes[kLosses], counts[kLosses];  // how often it is in N, in F
  A targets[kLosses];
};

template <typename A>
struct Tanh {
  A value, slope;  // slope: 1 − tanh²
  FUSEDLOSS_DEVICE explicit Tanh(A x) {
    const A size = Abs(x);
    // e^{−2|x|} − 1, near 0 without a difference of like numbers
    const A below = size < A(0.5) ? ExpMinus1(-2 * size) : Exp(-2 * size) - 1;
    const A power = 1 + below, reciprocal = Reciprocal(1 + power);
    value = WithSign(-below * reciprocal, x);
    slope = 4 * power * reciprocal * reciprocal;
  }
};

template <typename T, typename Row, typename A = Accumulator<T>>
struct General {
  const Task<T>& task;
  Row& row;
  const int64_t i;
  const int label;
  // Terms of shares that are divided out and clipped; else of scores.
  const bool divided = task.dense && !task.from_logits, clips = divided || task.focal;
  const bool sweeps_classes =
      !Row::kListed || task.full_weight != 0 || (task.has_subset && task.normalize_full);
  A of_label = 1;  // target of a place that is the label: all of such candidates have their share
  bool inside = true;
  PartOfLoss<A> parts[kLosses] = {};

  // ---- The row as places.

  FUSEDLOSS_DEVICE Place<A> Of(A in_subset, A in_all, A target, A target_of_all) const {
    return {{task.normalize_full ? in_all : in_subset, in_all},
            {in_subset, in_all},
            {target, target_of_all}};
  }
  FUSEDLOSS_DEVICE Place<A> OfClass(int c, A target) const {
    if constexpr (Row::kListed) return Of(0, 1, 0, A(c == label));
    const bool in = (task.mask == nullptr || task.mask[i * task.classes + c]) &&
                    InSubset(task, c) && !(task.mask_negative && target < 0);
    A y = task.dense ? target : A(c == label);
    if (task.mask_negative && y < 0) y = 0;
    return Of(in, 1, in ? y : A(0), y);
  }
  FUSEDLOSS_DEVICE bool IsListed(A target) const { return !(task.mask_negative && target < 0); }
  FUSEDLOSS_DEVICE A ListedTarget(int c, A target) const {
    return task.dense ? target : c == label ? of_label : A(0);
  }

  // Calls fn(number, class, prediction, place) for every place of this thread.
  template <typename Fn>
  FUSEDLOSS_DEVICE void Each(Source source, Fn&& fn) const {
    if constexpr (Row::kListed) {
      row.EachListed(task, [&](int k, int c, A x, A target) {
        if (!IsListed(target)) return;
        const A y = ListedTarget(c, target);
        Place<A> place = Of(1, 0, y, task.dense ? y : A(0));
        fn(k, c, x, place);
      });
      if (!sweeps_classes) return;
    }
    row.Each(task, source, [&](int c, A x, A target) { fn(c, c, x, OfClass(c, target)); });
  }

  // ---- Scores and their powers.

  FUSEDLOSS_DEVICE A Clip(A p) const {
    p = p < task.lowest ? task.lowest : p;
    return p > task.highest ? task.highest : p;
  }
  FUSEDLOSS_DEVICE A Score(A z) const {
    if (task.softcap != 0) z = task.softcap * Tanh<A>(z / task.softcap).value;
    return z * task.sharpness;
  }
  FUSEDLOSS_DEVICE A Power(A x, A score, const PartOfLoss<A>& part) const {
    if (task.from_logits) return Exp(score - part.peak);
    return divided ? x : Clip(x);
  }
  // log of the power, above the peak.
  FUSEDLOSS_DEVICE A Height(A score, A power, const PartOfLoss<A>& part) const {
    return task.from_logits ? score - part.peak : Log(power);
  }
  // y^F of a class.
  FUSEDLOSS_DEVICE A Target(int f, int c, const Place<A>& place) const {
    const A y =
        place.targets[f] * (1 - task.label_smoothing) + place.counts[f] * parts[f].smoothing;
    return y == 0 ? A(0) : y * ClassWeight(task, c);
  }
  // A term of clipped shares and its derivative in the logarithm of the share.
  FUSEDLOSS_DEVICE A Clipped(A target, A power, const PartOfLoss<A>& part, A* slope) const {
    const A share = power / part.sum, clipped = Clip(share), rest = 1 - clipped, log = Log(clipped);
    A focus = 1, bend = 0;
    if (task.gamma != 0) {
      focus = task.gamma == 2 ? rest * rest : Exp(task.gamma * Log(rest));
      bend = task.gamma * clipped * log / rest;
    }
    const bool is_clipped = share < task.lowest || share > task.highest;
    *slope = is_clipped ? A(0) : target * focus * (bend - 1);
    return -target * focus * log;
  }

  // ---- The passes.

  FUSEDLOSS_DEVICE A Forward() {
    A peaks[kLosses] = {-Infinity<A>(), -Infinity<A>()}, of_subset[2] = {};  // |S|, Σ y
    Each(Source::kMemory, [&](int, int, A x, const Place<A>& place) {
#pragma unroll
      for (int f = 0; f < kLosses; ++f) {
        if (place.normalizes[f] != 0) peaks[f] = Max(peaks[f], x);
      }
      of_subset[0] += place.counts[kOfSubset];
      of_subset[1] += place.targets[kOfSubset];
    });
    row.Reduce(peaks, Greater());
    row.Reduce(of_subset, Plus());
    if (task.has_subset) inside = of_subset[1] != 0;
    if (Row::kListed && !task.dense && inside) of_label = 1 / of_subset[1];
    const A sizes[kLosses] = {of_subset[0], A(task.classes)};
    const A weights[kLosses] = {inside ? task.subset_weight : A(0), task.full_weight};
#pragma unroll
    for (int f = 0; f < kLosses; ++f) {
      parts[f].weight = weights[f];
      parts[f].wanted = weights[f] != 0 || (f == kOfSubset && inside && task.metrics);
      parts[f].smoothing = task.label_smoothing == 0 ? A(0) : task.label_smoothing / sizes[f];
      parts[f].peak = task.from_logits ? Score(peaks[f]) : A(0);
    }

    A powers[kLosses] = {}, terms[2 * kLosses] = {};  // Σ of the terms, Σ of their derivatives
    Each(Source::kKept, [&](int, int c, A x, const Place<A>& place) {
      const A score = task.from_logits ? Score(x) : A(0);
#pragma unroll
      for (int f = 0; f < kLosses; ++f) {
        if (!parts[f].wanted) continue;
        const A power = Power(x, score, parts[f]);
        if (place.normalizes[f] != 0) powers[f] += power;
        const A target = clips ? A(0) : Target(f, c, place);
        if (target == 0) continue;
        terms[f] -= target * Height(score, power, parts[f]);
        terms[kLosses + f] -= target;
      }
    });
    row.Reduce(powers, Plus());
#pragma unroll
    for (int f = 0; f < kLosses; ++f) parts[f].sum = powers[f];
    if (clips) {
      Each(Source::kKept, [&](int, int c, A x, const Place<A>& place) {
        const A score = task.from_logits ? Score(x) : A(0);
#pragma unroll
        for (int f = 0; f < kLosses; ++f) {
          const A target = parts[f].weight == 0 ? A(0) : Target(f, c, place);
          if (target == 0) continue;
          A slope;
          terms[f] += Clipped(target, Power(x, score, parts[f]), parts[f], &slope);
          terms[kLosses + f] += slope;
        }
      });
    }
    row.Reduce(terms, Plus());

    A loss = 0;
#pragma unroll
    for (int f = 0; f < kLosses; ++f) {
      PartOfLoss<A>& part = parts[f];
      if (part.weight == 0) continue;
      const A log_sum = Log(part.sum), log_sum_exp = log_sum + part.peak;
      // NaN and Inf reach loss and gradient through the sum, 0 through 0/0.
      const A poison = (part.sum + 1 / part.sum) * 0;
      const A of_sum = clips ? poison : -terms[kLosses + f] * log_sum;
      loss += part.weight * (terms[f] + of_sum + ZLoss(task, log_sum_exp));
      part.pull = (2 * task.z_loss * log_sum_exp - terms[kLosses + f]) / part.sum + poison;
    }
    return loss;
  }

  // As the other forms save them. Without a choice between the parts: they would go into memory.
  FUSEDLOSS_DEVICE RowStats<A> Stats() const {
    const PartOfLoss<A>&subset = parts[kOfSubset], &all = parts[kOfAll];
    const A subset_peak = divided ? subset.sum : subset.peak,
            all_peak = divided ? all.sum : all.peak;
    const A subset_scale = subset.weight * subset.pull, all_scale = all.weight * all.pull;
    return {subset_peak, task.normalize_full ? A(0) : subset_scale,
            all.weight == 0 ? subset_peak : all_peak,
            all_scale + (task.normalize_full ? subset_scale : A(0)), subset.weight};
  }

  FUSEDLOSS_DEVICE A Gradient(A cotangent, int c, A x, const Place<A>& place) const {
    A score = 0, slope = 1;
    if (task.from_logits) score = Score(x);
    if (task.softcap != 0) slope = Tanh<A>(x / task.softcap).slope;
    A of_sums = 0, of_terms = 0;
#pragma unroll
    for (int f = 0; f < kLosses; ++f) {
      const PartOfLoss<A>& part = parts[f];
      if (part.weight == 0) continue;
      const A power = Power(x, score, part), target = Target(f, c, place);
      if (place.normalizes[f] != 0) {
        of_sums += part.weight * place.normalizes[f] * part.pull * (divided ? A(1) : power);
      }
      A derivative = -target;
      if (clips && target != 0) Clipped(target, power, part, &derivative);
      of_terms += part.weight * derivative;
    }
    if (divided) return cotangent * (of_sums + (of_terms == 0 ? A(0) : of_terms / x));
    const A pull = cotangent * (of_sums + of_terms);
    if (task.from_logits) return pull == 0 ? A(0) : pull * slope;  // 0 whatever the logit
    // d log(clip(p)) / dp is 1/p between the bounds, else 0.
    return x < task.lowest || x > task.highest || pull == 0 ? A(0) : pull / x;
  }

  FUSEDLOSS_DEVICE void Emit(A cotangent) {
    if (!Row::kListed || sweeps_classes) {
      row.Emit(task, Source::kKept,
               [&](int c, A x, A target) { return Gradient(cotangent, c, x, OfClass(c, target)); });
    }
    if constexpr (Row::kListed) {
      SyncBlock();  // what is written next has been written
      // The first of the candidates of a class answers for them all.
      row.EachListed(task, [&](int k, int c, A x, A) {
        A count = 0, y = 0;
        for (int other = 0; other < task.listed; ++other) {
          if (row.Candidate(other) != c) continue;
          if (other < k) return;
          const A target = task.dense ? row.listed_targets[other] : A(0);
          if (!IsListed(target)) continue;
          count += 1;
          y += target;
        }
        if (!task.dense) y = c == label;
        const Place<A> place = Of(count, 1, y, y);
        row.Put(task, c, Gradient(cotangent, c, x, place));
      });
    }
  }

  // Rank, entropy, log-sum-exp.
  FUSEDLOSS_DEVICE void Metrics(A (&metrics)[3]) {
    const PartOfLoss<A>& part = parts[kOfSubset];
    int own = label, own_class = label;
    if (task.dense || Row::kListed) {
      A best[1] = {-Infinity<A>()};
      Each(Source::kKept, [&](int, int, A, const Place<A>& place) {
        if (place.counts[kOfSubset] != 0) best[0] = Max(best[0], place.targets[kOfSubset]);
      });
      row.Reduce(best, Greater());
      A first[1] = {FromBits<A>(kMaxClasses)};
      Each(Source::kKept, [&](int k, int, A, const Place<A>& place) {
        const bool is_best = place.counts[kOfSubset] != 0 && place.targets[kOfSubset] == best[0];
        if (is_best) first[0] = FirstPlace()(first[0], FromBits<A>(k));
      });
      row.Reduce(first, FirstPlace());
      own = static_cast<int>(ToBits(first[0]));
      own_class = own;
      if constexpr (Row::kListed) {
        if (own < kMaxClasses) own_class = static_cast<int>(row.Candidate(own));
      }
    }
    // NaN scores highest, and targets of NaN are below all.
    const A x_own = own < kMaxClasses ? row.At(task, own_class) : NotANumber<A>();
    A sums[2] = {};  // higher places, Σ power · log power
    Each(Source::kKept, [&](int k, int, A x, const Place<A>& place) {
      const bool higher = !(x <= x_own) || (x == x_own && k < own);
      if (place.counts[kOfSubset] != 0 && higher) sums[0] += 1;
      if (place.normalizes[kOfSubset] == 0) return;
      const A score = task.from_logits ? Score(x) : A(0), power = Power(x, score, part);
      if (power != 0) sums[1] += power * Height(score, power, part);
    });
    row.Reduce(sums, Plus());
    const A log_sum = Log(part.sum);
    metrics[0] = sums[0];
    metrics[1] = log_sum - sums[1] / part.sum;
    metrics[2] = log_sum + part.peak;
  }
};

template <typename T, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE void SaveMetrics(const Task<T>& task, int64_t row, const A (&metrics)[3]) {
  for (int k = 0; k < 3; ++k) task.metrics[3 * row + k] = metrics[k];
}

template <typename T, typename Row, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE void RunGeneral(const Task<T>& task, Row& row, int64_t i, int label) {
  General<T, Row> general{task, row, i, label};
  const A loss = general.Forward();
  if (task.pass != Pass::kBackward) {
    A metrics[3] = {-1, 0, 0};
    if (task.metrics && general.inside) general.Metrics(metrics);
    if (row.IsFirst()) {
      task.loss[i] = loss;
      if (task.metrics) SaveMetrics(task, i, metrics);
      if (task.pass == Pass::kForward) SaveStats(task, i, general.Stats());
    }
  }
  if (task.pass == Pass::kForward) return;
  general.Emit((task.cotangents ? task.cotangents[i] : A(1)) * task.scale);
}

// Row i, whose predictions lie at `predictions` in device memory.
template <Form kForm, typename T, typename Row, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE void RunRow(const Task<T>& task, Row& row, int64_t i, const T* predictions) {
  int64_t label = -1;
  bool ignored = false, bad = task.prepared && task.prepared[kInOrder] == 0;
  if (!task.dense) {
    label = task.labels32 ? task.labels32[i] : task.labels64[i];
    ignored = task.has_ignore_class && label == task.ignore_class;
    bad = bad || label < 0 || label >= task.classes;
  }
  if constexpr (Row::kListed) bad = row.HasBadCandidate(task) || bad;
  if (ignored || bad) {
    const A value = ignored ? A(0) : NotANumber<A>();
    if (task.pass != Pass::kBackward && row.IsFirst()) {
      task.loss[i] = value;
      if (task.pass == Pass::kForward) SaveStats(task, i, RowStats<A>{});
      if (kForm == Form::kGeneral && task.metrics) {
        SaveMetrics<T>(task, i, {ignored ? A(-1) : value, value, value});
      }
    }
    if (task.pass != Pass::kForward) row.Fill(task, value);
    return;
  }
  if constexpr (kForm == Form::kGeneral) {
    RunGeneral(task, row, i, static_cast<int>(label));
  } else if constexpr (kForm == Form::kPlain) {
    Plain(task, row, i, static_cast<int>(label), ToSum(predictions[label]));
  } else if (task.from_logits || !task.dense) {
    Run(task, row, i, Softmax<T, Row>{task, row, static_cast<int>(label)});
  } else {
    Run(task, row, i, Divided<T, Row>{task, row});
  }
}

// `count` elements from device memory into shared memory, or back; both aligned if `aligned`.
template <bool kIn, typename T>
FUSEDLOSS_DEVICE void CopyTile(const T* from, T* to, int count, bool aligned) {
  struct alignas(16) Vector {
    T values[16 / sizeof(T)];
  };
  constexpr int kVector = 16 / sizeof(T), kTileBatch = 4;
  const int vectors = aligned ? count / kVector : 0;
  const auto* shared_from = reinterpret_cast<const Vector*>(from);
  auto* shared_to = reinterpret_cast<Vector*>(to);
  for (int first = ThreadId(); first < vectors; first += kTileBatch * kThreads) {
    Vector batch[kTileBatch];
#pragma unroll
    for (int b = 0; b < kTileBatch; ++b) {
      const int v = first + b * kThreads;
      if (v >= vectors) continue;
      batch[b] = kIn ? LoadOnce<Vector>(from + v * kVector) : shared_from[v];
    }
#pragma unroll
    for (int b = 0; b < kTileBatch; ++b) {
      const int v = first + b * kThreads;
      if (v >= vectors) continue;
      if (kIn) {
        shared_to[v] = batch[b];
      } else {
        StoreOnce(to + v * kVector, batch[b]);
      }
    }
  }
  for (int i = vectors * kVector + ThreadId(); i < count; i += kThreads) to[i] = from[i];
}

// Blended predictions from device memory into shared memory.
template <typename T>
FUSEDLOSS_DEVICE void BlendTile(const Task<T>& task, int64_t offset, T* to, int count,
                                bool aligned) {
  constexpr int kTileBatch = 2;
  EachVector<kTileBatch>(task.predictions, task.blended, /*has_y=*/true, offset, offset + count,
                         aligned, [&](int at, auto xs, const auto& ys) {
                           constexpr int kSize = sizeof(xs) / sizeof(T);
                           for (int i = 0; i < kSize; ++i) {
                             xs.values[i] = Blend(task.blend, xs.values[i], ys.values[i]);
                           }
                           Keep(to + at, xs);
                         });
}

// Back into one of the arrays that were blended, by its weight.
template <typename T, typename A = Accumulator<T>>
FUSEDLOSS_DEVICE void ScaleTile(const T* from, A weight, T* to, int count, bool aligned) {
  constexpr int kVector = 16 / sizeof(T);
  const int vectors = aligned ? count / kVector : 0;
  for (int v = ThreadId(); v < vectors; v += kThreads) {
    auto vector = reinterpret_cast<const Aligned<T>*>(from)[v];
    for (T& value : vector.values) Round(weight * ToSum(value), &value);
    StoreOnce(to + v * kVector, vector);
  }
  for (int i = vectors * kVector + ThreadId(); i < count; i += kThreads) {
    Round(weight * ToSum(from[i]), &to[i]);
  }
}

template <Form kForm, typename T>
FUSEDLOSS_KERNEL_OF(kThreads, 3)
OverTiles(Task<T> task, int tile_rows, int lanes, bool aligned) {
  using A = Accumulator<T>;
  A* targets = reinterpret_cast<A*>(SharedMemory());  // first: their type is the wider one
  T* predictions = reinterpret_cast<T*>(targets + (task.targets ? tile_rows * task.length : 0));
  const int64_t tiles = (task.rows + tile_rows - 1) / tile_rows;
  const int lane = ThreadId() % lanes;
  const int first_lane = ThreadId() % kWarp - lane;
  const uint32_t among = (lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1) << first_lane;
  for (int64_t tile = BlockId(); tile < tiles; tile += Blocks()) {
    const int64_t begin = tile * tile_rows;
    const int64_t left = task.rows - begin;
    const int rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
    const int64_t offset = begin * task.length;
    const int count = rows * task.length;
    const bool blends = kForm == Form::kBlended || (kForm == Form::kGeneral && task.blended);
    if (blends) {
      BlendTile(task, offset, predictions, count, aligned);
    } else {
      CopyTile<true>(task.predictions + offset, predictions, count, aligned);
    }
    if (task.targets) CopyTile<true>(task.targets + offset, targets, count, aligned);
    SyncBlock();
    for (int r = ThreadId() / lanes; r < rows; r += kThreads / lanes) {
      T* here = predictions + r * task.length;
      TileRow<T, kForm> row{here, targets + r * task.length, task.length, lane, lanes, among};
      RunRow<kForm>(task, row, begin + r, task.predictions + offset + r * task.length);
    }
    SyncBlock();
    if (task.pass != Pass::kForward) {
      if (blends) {
        ScaleTile(predictions, task.blend[0], task.gradient + offset, count, aligned);
        ScaleTile(predictions, task.blend[1], task.dblended + offset, count, aligned);
      } else {
        CopyTile<false>(predictions, task.gradient + offset, count, aligned);
      }
    }
    SyncBlock();
  }
}

// `keeps`: there is shared memory for a block's share of a row and its targets.
template <Form kForm, typename T, int kVector>
FUSEDLOSS_KERNEL_OF(kThreads, 3)
OverWideRows(Task<T> task, int cluster, bool keeps) {
  using Row = WideRow<T, kVector, kForm>;
  using A = Accumulator<T>;
  Row row{};
  row.reductions = reinterpret_cast<Reductions<A>*>(SharedMemory());
  auto* kept_targets = reinterpret_cast<A*>(SharedMemory() + kReductionBytes<A>);
  row.cluster = cluster;
  row.rank = cluster > 1 ? ClusterRank() : 0;
  row.length = task.length;
  row.gathered = task.gathered;
  row.blend[0] = task.blend[0];
  row.blend[1] = task.blend[1];
  const int64_t step = Blocks() / cluster;
  for (int64_t i = BlockId() / cluster; i < task.rows; i += step) {
    row.predictions = task.predictions + i * task.classes;
    row.targets = task.targets ? task.targets + i * task.classes : nullptr;
    row.gradient = task.gradient ? task.gradient + i * task.classes : nullptr;
    if constexpr (Row::kBlended) {
      row.blended = task.blended + i * task.classes;
      row.dblended = task.dblended ? task.dblended + i * task.classes : nullptr;
    }
    row.before = static_cast<int>(i * task.classes % kVector);
    const int vectors = (row.before + task.length + kVector - 1) / kVector;
    const int per_block = (vectors + cluster - 1) / cluster;
    row.begin = row.rank * per_block;
    row.end = row.begin + per_block < vectors ? row.begin + per_block : vectors;
    if (keeps) {
      // The targets come first: their type is the wider one.
      row.kept_targets = kept_targets;
      row.kept = reinterpret_cast<typename Row::Vector*>(kept_targets +
                                                         (task.targets ? per_block * kVector : 0));
    }
    RunRow<kForm>(task, row, i, row.predictions);
    SyncBlock();  // the next row's vectors fall to other threads
  }
  if (cluster > 1) LeaveCluster();  // peers may still read what this block has reduced
}

// Elements [begin, end) of an array, or of the blend of two, into shared memory from *memory on,
// which moves behind them: to the same place within 16 bytes as they have in an aligned array.
template <typename T, typename A>
FUSEDLOSS_DEVICE T* Fetch(const T* from, const T* blended, const A (&blend)[2], int64_t begin,
                          int64_t end, bool aligned, char** memory) {
  constexpr int kFetchBatch = 4;
  T* to = reinterpret_cast<T*>(*memory) + begin % (16 / sizeof(T));
  *memory += ((end - begin) * sizeof(T) + 31) / 16 * 16;
  EachVector<kFetchBatch>(from, blended, blended != nullptr, begin, end, aligned,
                          [&](int at, auto xs, const auto& ys) {
                            constexpr int kSize = sizeof(xs) / sizeof(T);
                            for (int i = 0; blended && i < kSize; ++i) {
                              xs.values[i] = Blend(blend, xs.values[i], ys.values[i]);
                            }
                            Keep(to + at, xs);
                          });
  return to;
}
template <typename T>
FUSEDLOSS_DEVICE void PlaceRow(const Task<T>& task, int64_t i, LongRow<T>& row) {
  const int64_t offset = i * task.classes;
  row.predictions = task.predictions + offset;
  row.blended = task.blended ? task.blended + offset : nullptr;
  row.targets = task.targets ? task.targets + offset : nullptr;
  row.gradient = task.gradient ? task.gradient + offset : nullptr;
  row.dblended = task.dblended ? task.dblended + offset : nullptr;
}

// `keeps`: there is shared memory for a block's share of a row and its targets.
template <typename T>
FUSEDLOSS_KERNEL_OF(kThreads, 3)
OverLongRows(Task<T> task, int cluster, bool keeps, bool aligned) {
  using A = Accumulator<T>;
  LongRow<T> row{};
  row.reductions = reinterpret_cast<Reductions<A>*>(SharedMemory());
  row.cluster = cluster;
  row.rank = cluster > 1 ? ClusterRank() : 0;
  const int per_block = (task.length + cluster - 1) / cluster;
  const int begin = row.rank * per_block;
  row.begin = begin < task.length ? begin : task.length;
  row.end = begin + per_block < task.length ? begin + per_block : task.length;
  const int64_t step = Blocks() / cluster;
  for (int64_t i = BlockId() / cluster; i < task.rows; i += step) {
    PlaceRow(task, i, row);
    if (keeps) {
      const int64_t first = i * task.classes + row.begin, last = i * task.classes + row.end;
      char* memory = SharedMemory() + kReductionBytes<A>;
      row.kept = Fetch(task.predictions, task.blended, task.blend, first, last, aligned, &memory);
      if (task.targets) {
        const A* nothing = nullptr;
        row.kept_targets = Fetch(task.targets, nothing, task.blend, first, last, aligned, &memory);
      }
      SyncBlock();
    }
    RunRow<Form::kGeneral>(task, row, i, row.predictions);
    SyncBlock();  // before the next row takes the place of this one
  }
  if (cluster > 1) LeaveCluster();  // peers may still read what this block has reduced
}

template <typename T>
FUSEDLOSS_KERNEL_OF(kThreads, 3)
OverListedRows(Task<T> task) {
  ListedRow<T> row{};
  row.reductions = reinterpret_cast<Reductions<Accumulator<T>>*>(SharedMemory());
  row.cluster = 1;
  row.end = task.classes;
  for (int64_t i = BlockId(); i < task.rows; i += Blocks()) {
    PlaceRow(task, i, row);
    const int64_t offset = i * task.listed;
    row.targets = nullptr;
    row.listed_targets = task.targets ? task.targets + offset : nullptr;
    row.candidates32 = task.candidates32 ? task.candidates32 + offset : nullptr;
    row.candidates64 = task.candidates64 ? task.candidates64 + offset : nullptr;
    RunRow<Form::kGeneral>(task, row, i, row.predictions);
  }
}

// The metrics of rows without classes.
template <typename A>
FUSEDLOSS_KERNEL_OF(kThreads, 1)
NoMetrics(A* metrics, int64_t rows) {
  for (int64_t i = BlockId() * kThreads + ThreadId(); i < rows; i += Blocks() * kThreads) {
    metrics[3 * i] = -1;
    metrics[3 * i + 1] = metrics[3 * i + 2] = 0;
  }
}

// One block. Fills `in_subset`, unless it is null, and `prepared`.
template <typename A>
FUSEDLOSS_KERNEL_OF(kThreads, 1)
Prepare(const int64_t* subset, int64_t subset_size, int64_t classes, const A* class_weight,
        uint32_t* in_subset, A* prepared) {
  const int64_t words = in_subset ? (classes + 31) / 32 : 0;
  for (int64_t word = ThreadId(); word < words; word += kThreads) in_subset[word] = 0;
  SyncBlock();
  double full = 0, part = 0, disorder = 0;
  for (int64_t k = ThreadId(); k < subset_size; k += kThreads) {
    const int64_t id = subset[k];
    if (id < 0 || id >= classes || (k > 0 && id <= subset[k - 1])) {
      disorder += 1;
      continue;
    }
    part += class_weight ? class_weight[id] : A(1);
    if (in_subset) AtomicOr(&in_subset[id / 32], 1u << (id % 32));
  }
  for (int64_t c = ThreadId(); class_weight && c < classes; c += kThreads) full += class_weight[c];
  full = SumOfBlock(full);
  part = SumOfBlock(part);
  disorder = SumOfBlock(disorder);
  if (ThreadId() != 0) return;
  prepared[kFullWeight] = class_weight ? A(full) : A(classes);
  prepared[kSubsetWeight] = A(part);
  prepared[kInOrder] = disorder == 0;
}

// ---- The host's side.

constexpr int64_t kSumShare = 16 << 10;  // values that a block adds up

template <typename T>
class Call {
 public:
  using A = Accumulator<T>;

  Call(const Gpu& gpu, const SoftmaxXentArgs<T>& args, Pass pass) : gpu_(gpu), args_(args) {
    const SoftmaxXentOptions& options = args.options;
    task_ = {};
    task_.pass = pass;
    task_.rows = args.rows;
    task_.classes = task_.length = static_cast<int>(args.classes);
    task_.predictions = args.predictions;
    task_.blended = args.blended;
    task_.mask = args.mask;
    task_.candidates32 = args.candidates32;
    task_.candidates64 = args.candidates64;
    if (args.subset_kind == SubsetKind::kCandidates) task_.listed = args.subset_size;
    if (args.blended) {
      task_.blend[0] = static_cast<A>(args.blend[0]);
      task_.blend[1] = static_cast<A>(args.blend[1]);
    }
    task_.labels32 = args.labels32;
    task_.labels64 = args.labels64;
    task_.targets = args.targets;
    task_.class_weight = args.class_weight;
    task_.dense = args.labels32 == nullptr && args.labels64 == nullptr;
    task_.from_logits = options.from_logits;
    const bool is_general = HasSubsetsOfRows(args) || options.focal || options.softcap != 0 ||
                            (args.metrics && pass != Pass::kBackward);
    task_.has_subset = HasSubset(args) && (is_general || options.subset_weight != 0);
    task_.normalize_full = task_.has_subset && options.normalize_full;
    task_.mask_negative = options.mask_negative;
    task_.has_ignore_class = options.has_ignore_class;
    task_.ignore_class = options.ignore_class;
    task_.focal = options.focal;
    task_.subset_size = static_cast<A>(task_.has_subset ? args.subset_size : 1);
    task_.subset_weight = task_.has_subset ? static_cast<A>(options.subset_weight) : A(0);
    task_.full_weight = static_cast<A>(options.full_weight);
    task_.label_smoothing = static_cast<A>(options.label_smoothing);
    task_.lowest = static_cast<A>(options.epsilon);
    task_.highest = static_cast<A>(1 - options.epsilon);
    task_.sharpness = task_.scale = static_cast<A>(1 / options.temperature);
    task_.z_loss = static_cast<A>(options.z_loss);
    task_.softcap = static_cast<A>(options.softcap);
    task_.gamma = static_cast<A>(options.gamma);
    task_.stats_per_row = SoftmaxXentStats(args);
    const int64_t bytes = args.classes * (sizeof(T) + (args.targets ? sizeof(A) : 0));
    if (args.subset_kind == SubsetKind::kIds && task_.has_subset && !task_.normalize_full &&
        task_.full_weight == 0 && bytes > kTileRowBytes && args.subset_size > 0 &&
        args.subset_size * kGatherShare <= args.classes) {
      task_.gathered = args.subset;
      task_.length = static_cast<int>(args.subset_size);
    }
    const bool is_plain = task_.stats_per_row == 2 && task_.from_logits && !task_.dense;
    form_ = is_general     ? Form::kGeneral
            : args.blended ? Form::kBlended
            : is_plain     ? Form::kPlain
                           : Form::kAny;
  }

  Task<T>& task() { return task_; }

  GpuError Run() {
    if (args_.classes > kMaxClasses) return "more than 2^30 classes";
    if (args_.subset_size > kMaxClasses) return "more than 2^30 candidates";
    FUSEDLOSS_RETURN_IF_ERROR(PrepareSubset());
    const bool only_listed = args_.subset_kind == SubsetKind::kCandidates &&
                             task_.full_weight == 0 && !task_.normalize_full;
    if ((task_.gathered || only_listed) && task_.gradient) {
      const int64_t bytes = task_.rows * args_.classes * int64_t{sizeof(T)};
      FUSEDLOSS_RETURN_IF_ERROR(Zero(gpu_, task_.gradient, bytes));
      if (task_.dblended) FUSEDLOSS_RETURN_IF_ERROR(Zero(gpu_, task_.dblended, bytes));
    }
    switch (form_) {
      case Form::kPlain:
        return OverRows<Form::kPlain>();
      case Form::kBlended:
        return OverRows<Form::kBlended>();
      case Form::kGeneral:
        return OverGeneralRows();
      default:
        return OverRows<Form::kAny>();
    }
  }

  // *loss = scale · Σ_i weights[i] · losses[i]
  GpuError AddUp(const A* losses, const A* weights, double scale, A* loss) {
    const int64_t blocks = CeilDiv(task_.rows, kSumShare);
    if (blocks == 1) {
      return Launch(gpu_, SumUp<A, A>, 1, kThreads, 1, kSumBytes, losses, weights, task_.rows,
                    scale, loss);
    }
    auto* sums = static_cast<double*>(gpu_.allocate(gpu_.owner, blocks * sizeof(double)));
    if (sums == nullptr) return kNoMemory;
    FUSEDLOSS_RETURN_IF_ERROR(Launch(gpu_, SumUp<A, double>, blocks, kThreads, 1, kSumBytes, losses,
                                     weights, task_.rows, 1.0, sums));
    return fusedloss::AddUp(gpu_, sums, blocks, scale, loss);
  }

 private:
  // Gathered columns lie apart, a memory transaction each: worth it for few of them in long rows.
  static constexpr int64_t kGatherShare = 8;

  GpuError PrepareSubset() {
    const bool is_of_ids = args_.subset_kind == SubsetKind::kIds;
    if (!is_of_ids && (args_.class_weight == nullptr || form_ == Form::kGeneral)) return nullptr;
    const bool wants_set = is_of_ids && task_.has_subset && task_.gathered == nullptr;
    const int64_t words = wants_set ? CeilDiv(task_.classes, 32) : 0;
    auto* memory = static_cast<char*>(
        gpu_.allocate(gpu_.owner, kPrepared * sizeof(double) + words * sizeof(uint32_t)));
    if (memory == nullptr) return kNoMemory;
    auto* prepared = reinterpret_cast<A*>(memory);
    auto* in_subset =
        wants_set ? reinterpret_cast<uint32_t*>(memory + kPrepared * sizeof(double)) : nullptr;
    task_.prepared = prepared;
    task_.in_subset = in_subset;
    return Launch(gpu_, Prepare<A>, 1, kThreads, 1, kSumBytes, args_.subset,
                  is_of_ids ? args_.subset_size : 0, args_.classes, args_.class_weight, in_subset,
                  prepared);
  }

  bool IsAlignedThroughout() const {
    return IsAligned(task_.predictions) && IsAligned(task_.gradient) && IsAligned(task_.targets) &&
           IsAligned(task_.blended) && IsAligned(task_.dblended);
  }
  // Of a row that is not gathered.
  int64_t RowBytes() const {
    return int64_t{task_.classes} * (sizeof(T) + (task_.targets ? sizeof(A) : 0));
  }

  template <Form kForm>
  GpuError OverRows() {
    // Plain rows at odd addresses are too rare for kernels of their own.
    constexpr Form kOfSingles = kForm == Form::kPlain ? Form::kAny : kForm;
    constexpr int kVector = 16 / sizeof(T);
    const bool aligned = IsAlignedThroughout() && task_.gathered == nullptr;
    if (RowBytes() <= kTileRowBytes) return OverTilesOf<kForm>(aligned);
    return aligned ? OverWideRowsOf<kForm, kVector>() : OverWideRowsOf<kOfSingles, 1>();
  }

  GpuError OverGeneralRows() {
    const int64_t blocks = task_.rows < kMaxBlocks ? task_.rows : kMaxBlocks;
    if (args_.subset_kind == SubsetKind::kCandidates) {
      return Launch(gpu_, OverListedRows<T>, blocks, kThreads, 1, kReductionBytes<A>, task_);
    }
    if (RowBytes() <= kTileRowBytes) return OverTilesOf<Form::kGeneral>(IsAlignedThroughout());
    auto share = [&](int cluster) {
      const int64_t count = CeilDiv(task_.length, cluster);
      return count * (sizeof(T) + (task_.targets ? sizeof(A) : 0)) + 2 * 32;  // see Fetch
    };
    return OverTeams(OverLongRows<T>, share, task_.gathered == nullptr, IsAlignedThroughout());
  }

  template <Form kForm>
  GpuError OverTilesOf(bool aligned) {
    const int64_t row_bytes = RowBytes();
    int lanes = 1;
    while (lanes < kWarp && lanes * 8 < task_.length) lanes *= 2;
    // A multiple of 8 rows begins where 16 bytes begin.
    int64_t tile_rows = kTileBytes / row_bytes / 8 * 8;
    const int64_t share = CeilDiv(CeilDiv(task_.rows, kTiles), 8) * 8;
    if (tile_rows > share) tile_rows = share;
    int64_t tiles = CeilDiv(task_.rows, tile_rows);
    if (tiles > kMaxBlocks) tiles = kMaxBlocks;
    return Launch(gpu_, OverTiles<kForm, T>, tiles, kThreads, 1, tile_rows * row_bytes, task_,
                  static_cast<int>(tile_rows), lanes, aligned);
  }

  template <Form kForm, int kVector>
  GpuError OverWideRowsOf() {
    auto* kernel = OverWideRows<kForm, T, kVector>;
    const int64_t vectors = CeilDiv(int64_t{task_.length} + kVector - 1, kVector);  // at most
    const int64_t vector_bytes = kVector * (sizeof(T) + (task_.targets ? sizeof(A) : 0));
    auto share = [&](int cluster) { return CeilDiv(vectors, cluster) * vector_bytes; };
    // One sweep needs nothing kept.
    const bool sweeps_once =
        task_.pass == Pass::kBackward || (kForm == Form::kPlain && task_.pass == Pass::kForward);
    return OverTeams(kernel, share, !sweeps_once);
  }

  // By a block or a cluster for each row, which keeps it if it wants to and there is memory for its
  // share(blocks of the cluster) in bytes.
  template <typename... Parameters, typename Share, typename... Arguments>
  GpuError OverTeams(void (*kernel)(Task<T>, int, bool, Parameters...), Share&& share, bool keeps,
                     Arguments... arguments) {
    int64_t limit = 0;
    FUSEDLOSS_RETURN_IF_ERROR(SharedMemoryLimit(&limit));
    int cluster = 1;
    if (share(1) > kWideBlockBytes) {
      bool has_clusters = false;
      FUSEDLOSS_RETURN_IF_ERROR(HasClusters(kernel, &has_clusters));
      while (has_clusters && cluster < kMaxCluster && share(cluster) > kWideBlockBytes) {
        cluster *= 2;
      }
    }
    keeps = keeps && kReductionBytes<A> + share(cluster) <= limit;
    int64_t teams = task_.rows;
    if (teams > kMaxBlocks / cluster) teams = kMaxBlocks / cluster;
    return Launch(gpu_, kernel, teams * cluster, kThreads, cluster,
                  kReductionBytes<A> + (keeps ? share(cluster) : 0), task_, cluster, keeps,
                  arguments...);
  }

  // Enough for every multiprocessor to have several.
  static constexpr int64_t kTiles = 4096;

  const Gpu& gpu_;
  const SoftmaxXentArgs<T>& args_;
  Task<T> task_;
  Form form_;
};

// Of rows without classes.
template <typename T>
GpuError ClearMetrics(const Gpu& gpu, const SoftmaxXentArgs<T>& args) {
  if (args.metrics == nullptr || args.rows == 0) return nullptr;
  const int64_t blocks = CeilDiv(args.rows, kThreads);
  return Launch(gpu, NoMetrics<Accumulator<T>>, blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads,
                1, 0, args.metrics, args.rows);
}

}  // namespace

template <typename T>
GpuError SoftmaxXent(const Gpu& gpu, const SoftmaxXentArgs<T>& args, Accumulator<T>* loss,
                     Accumulator<T>* stats) {
  constexpr int64_t kBytes = sizeof(Accumulator<T>);
  if (args.rows == 0) return nullptr;
  if (args.classes == 0) {
    FUSEDLOSS_RETURN_IF_ERROR(Zero(gpu, loss, args.rows * kBytes));
    FUSEDLOSS_RETURN_IF_ERROR(ClearMetrics(gpu, args));
    return Zero(gpu, stats, args.rows * SoftmaxXentStats(args) * kBytes);
  }
  Call<T> call(gpu, args, Pass::kForward);
  call.task().loss = loss;
  call.task().metrics = args.metrics;
  call.task().stats = stats;
  return call.Run();
}

template <typename T>
GpuError SoftmaxXentGrad(const Gpu& gpu, const SoftmaxXentArgs<T>& args,
                         const Accumulator<T>* dloss, const Accumulator<T>* stats,
                         T* dpredictions) {
  if (args.rows == 0 || args.classes == 0) return nullptr;
  Call<T> call(gpu, args, Pass::kBackward);
  // The task takes statistics in and out by one pointer; backward only reads them.
  call.task().stats = const_cast<Accumulator<T>*>(stats);
  call.task().cotangents = dloss;
  call.task().gradient = dpredictions;
  call.task().dblended = args.dblended;
  return call.Run();
}

template <typename T>
GpuError SoftmaxXentReduced(const Gpu& gpu, const SoftmaxXentArgs<T>& args,
                            const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss,
                            T* gradient) {
  using A = Accumulator<T>;
  if (args.rows == 0 || args.classes == 0) {
    FUSEDLOSS_RETURN_IF_ERROR(ClearMetrics(gpu, args));
    return Zero(gpu, loss, sizeof(A));
  }
  auto* losses = static_cast<A*>(gpu.allocate(gpu.owner, args.rows * int64_t{sizeof(A)}));
  if (losses == nullptr) return kNoMemory;
  Call<T> call(gpu, args, Pass::kBoth);
  call.task().loss = losses;
  call.task().metrics = args.metrics;
  call.task().cotangents = row_weight;
  call.task().scale *= static_cast<A>(scale);
  call.task().gradient = gradient;
  call.task().dblended = args.dblended;
  FUSEDLOSS_RETURN_IF_ERROR(call.Run());
  return call.AddUp(losses, row_weight, scale, loss);
}

#define FUSEDLOSS_INSTANTIATE(T)                                                                  \
  template GpuError SoftmaxXent(const Gpu&, const SoftmaxXentArgs<T>&, Accumulator<T>*,           \
                                Accumulator<T>*);                                                 \
  template GpuError SoftmaxXentGrad(const Gpu&, const SoftmaxXentArgs<T>&, const Accumulator<T>*, \
                                    const Accumulator<T>*, T*);                                   \
  template GpuError SoftmaxXentReduced(const Gpu&, const SoftmaxXentArgs<T>&,                     \
                                       const Accumulator<T>*, double, Accumulator<T>*, T*);
FUSEDLOSS_INSTANTIATE(float)
FUSEDLOSS_INSTANTIATE(double)
FUSEDLOSS_INSTANTIATE(Half)
FUSEDLOSS_INSTANTIATE(BFloat16)
#undef FUSEDLOSS_INSTANTIATE

}  // namespace fusedloss
