// What is the same on every CPU: preparing a call, cutting it into blocks of rows, adding up.
#include <emmintrin.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "kernels/blend.h"
#include "kernels/softmax_xent.h"
#include "kernels/softmax_xent_plan.h"

namespace fusedloss {
namespace {

// Blocks are large enough to amortise claiming one and small enough to balance the threads. Their
// size depends on the shape alone: results are the same for any number of threads.
constexpr int64_t kMinBlockElements = 16 << 10, kMaxBlockElements = 512 << 10, kBlocks = 64;
constexpr int64_t kRowMultiple = 16;  // the most lanes of any level
// From here on the gradient leaves the caches before anybody reads it.
constexpr int64_t kStreamBytes = 8 << 20;
// A subset of at most 1/8 of the classes is gathered: a cache line holds 16 floats, and reading
// along a row is twice as fast as jumping.
constexpr int64_t kGatherShare = 8;
// From here on it pays to put a row's own few classes side by side.
constexpr int64_t kMinSparseClasses = 32;
// Blended or converted predictions and their gradient are made in pieces that fit a first-level
// cache together.
constexpr int64_t kBlendBytes = 16 << 10;
constexpr int kMetrics = 3;

template <typename T>
SoftmaxXentPasses<T> Passes() {
  switch (ChosenCpuLevel()) {
    case CpuLevel::kAvx512:
      return avx512::GetSoftmaxXentPasses<T>();
    case CpuLevel::kAvx2:
      return avx2::GetSoftmaxXentPasses<T>();
    default:
      return baseline::GetSoftmaxXentPasses<T>();
  }
}

template <typename T>
BlendPasses<T> PassesOfBlend() {
  switch (ChosenCpuLevel()) {
    case CpuLevel::kAvx512:
      return avx512::GetBlendPasses<T>();
    case CpuLevel::kAvx2:
      return avx2::GetBlendPasses<T>();
    default:
      return baseline::GetBlendPasses<T>();
  }
}

enum class Pass { kForward, kBackward, kBoth };

template <typename T>
auto Choose(const SoftmaxXentPasses<T>& passes, Pass pass) {
  return pass == Pass::kForward    ? passes.forward
         : pass == Pass::kBackward ? passes.backward
                                   : passes.both;
}

// A bit for each of 16 numbers or booleans.
inline uint64_t AreNegative(const float* x) {
  uint64_t bits = 0;
  for (int i = 0; i < 16; i += 4) {
    const __m128 negative = _mm_cmplt_ps(_mm_loadu_ps(x + i), _mm_setzero_ps());
    bits |= static_cast<uint64_t>(_mm_movemask_ps(negative)) << i;
  }
  return bits;
}
inline uint64_t AreNegative(const double* x) {
  uint64_t bits = 0;
  for (int i = 0; i < 16; i += 2) {
    const __m128d negative = _mm_cmplt_pd(_mm_loadu_pd(x + i), _mm_setzero_pd());
    bits |= static_cast<uint64_t>(_mm_movemask_pd(negative)) << i;
  }
  return bits;
}
inline uint64_t AreSet(const bool* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return ~_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128())) & 0xFFFF;
}

// How many bits are set. The compiler's own needs an instruction that not every CPU has.
inline int CountBits(uint64_t x) {
  x -= (x >> 1) & 0x5555555555555555;
  x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333);
  x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F;
  return static_cast<int>((x * 0x0101010101010101) >> 56);
}

// Bits of 64 places from `first` on, a multiple of 64; zeros follow a bit set.
inline uint64_t Word(const uint8_t* bits, int64_t first) {
  uint64_t word;
  __builtin_memcpy(&word, bits + first / 8, sizeof(word));
  return word;
}

// Calls fn(place) for every bit that is set among the first `size`, in ascending order.
template <typename Fn>
void EachSetBit(const uint8_t* bits, int64_t size, Fn&& fn) {
  for (int64_t first = 0; first < size; first += 64) {
    for (uint64_t word = Word(bits, first); word != 0; word &= word - 1) {
      fn(first + __builtin_ctzll(word));
    }
  }
}

template <typename T>
class Call {
 public:
  using A = Accumulator<T>;

  explicit Call(const SoftmaxXentArgs<T>& args)
      : args_(args),
        stats_(SoftmaxXentStats(args)),
        is_of_candidates_(args.subset_kind == SubsetKind::kCandidates),
        target_columns_(is_of_candidates_ ? args.subset_size : args.classes),
        passes_(Passes<T>()),
        passes_of_sums_(Passes<A>()) {
    const SoftmaxXentOptions& options = args.options;
    plan_ = {};
    plan_.classes = args.classes;
    plan_.from_logits = options.from_logits;
    plan_.focal = options.focal;
    plan_.rich = !IsPlain(args);
    plan_.has_subset = HasSubset(args) && (options.subset_weight != 0 || args.metrics);
    plan_.normalize_full = plan_.has_subset && options.normalize_full;
    plan_.class_weight = args.class_weight;
    plan_.full_class_weight = static_cast<A>(args.classes);
    if (args.class_weight) {
      double sum = 0;
      for (int64_t c = 0; c < args.classes; ++c) sum += args.class_weight[c];
      plan_.full_class_weight = static_cast<A>(sum);
    }
    plan_.subset_weight = plan_.has_subset ? static_cast<A>(options.subset_weight) : A(0);
    plan_.full_weight = static_cast<A>(options.full_weight);
    plan_.label_smoothing = static_cast<A>(options.label_smoothing);
    plan_.one_minus_smoothing = static_cast<A>(1 - options.label_smoothing);
    plan_.lowest = static_cast<A>(options.epsilon);
    plan_.highest = static_cast<A>(1 - options.epsilon);
    plan_.lowest_target = options.mask_negative ? A(0) : -std::numeric_limits<A>::infinity();
    plan_.inverse_temperature = static_cast<A>(1 / options.temperature);
    plan_.z_loss = static_cast<A>(options.z_loss);
    plan_.softcap = static_cast<A>(options.softcap);
    plan_.gamma = static_cast<A>(options.gamma);
    int64_t elements = args.rows * args.classes;
    streams_ = elements * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    plan_.stream = streams_ && args.blended == nullptr;
    over_subset_ = plan_.has_subset && !plan_.normalize_full && plan_.full_weight == 0;
    own_subsets_ = HasSubsetsOfRows(args) && (plan_.has_subset || is_of_candidates_);
    subset_ = {nullptr, A(args.classes), plan_.full_class_weight};
    if (args.subset_kind == SubsetKind::kIds && plan_.has_subset) UseSubset();
    converts_ = options.softcap != 0 || (options.focal && !std::is_same_v<T, A>);
    pipelines_ = !plan_.rich && plan_.from_logits && args.targets == nullptr &&
                 args.metrics == nullptr && args.classes >= kMinPipelineClasses &&
                 args.classes * static_cast<int64_t>(sizeof(A)) <= kPipelineBytes;

    int64_t block_elements = std::clamp(elements / kBlocks, kMinBlockElements, kMaxBlockElements);
    block_rows_ = std::max<int64_t>(1, block_elements / std::max<int64_t>(1, args.classes));
    if (block_rows_ > kRowMultiple) block_rows_ -= block_rows_ % kRowMultiple;
    blocks_ = (args.rows + block_rows_ - 1) / block_rows_;
  }

  int64_t blocks() const { return blocks_; }

  // Runs `pass` over all rows; finish(block number, its rows) follows each block on its thread.
  // loss and stats may be null. Cotangents are cotangents[row], or 1 if null, times scale.
  template <typename Finish>
  int64_t Run(const Cpu& cpu, Pass pass, A* loss, A* stats, const A* cotangents, A scale,
              T* gradient, Finish&& finish) {
    if (pass == Pass::kBackward && stats_ == 0) pass = Pass::kBoth;
    std::atomic<int64_t> bad_row{args_.rows};
    cpu.ParallelFor(blocks_, [&](int64_t number) {
      int64_t begin = number * block_rows_;
      int64_t rows = std::min(block_rows_, args_.rows - begin);
      std::vector<int64_t> labels;
      int64_t bad = BadCandidates(begin, rows);
      if (args_.targets == nullptr) {
        labels.resize(rows);
        int64_t bad_label = ReadLabels(begin, rows, labels.data());
        if (bad < 0 || (bad_label >= 0 && bad_label < bad)) bad = bad_label;
      }
      if (bad >= 0) {
        int64_t first = bad_row.load();
        while (bad < first && !bad_row.compare_exchange_weak(first, bad)) {
        }
        return;
      }
      std::vector<A> block_cotangents, block_loss;
      if (gradient) {
        block_cotangents.resize(rows);
        for (int64_t r = 0; r < rows; ++r) {
          block_cotangents[r] = (cotangents ? cotangents[begin + r] : A(1)) * scale;
        }
      }
      SoftmaxXentBlock<T> block{};
      block.rows = rows;
      block.predictions = args_.predictions + begin * args_.classes;
      block.labels = labels.empty() ? nullptr : labels.data();
      block.targets = args_.targets ? args_.targets + begin * target_columns_ : nullptr;
      block.subsets = &subset_;
      block.loss = loss ? loss + begin : nullptr;
      if (pass != Pass::kBackward && loss == nullptr) {
        block_loss.resize(rows);
        block.loss = block_loss.data();
      }
      block.stats = stats && stats_ > 0 ? stats + begin * stats_ : nullptr;
      block.metrics = args_.metrics ? args_.metrics + begin * kMetrics : nullptr;
      block.cotangents = block_cotangents.data();
      block.gradient = gradient ? gradient + begin * args_.classes : nullptr;
      struct Free {
        void operator()(A* scratch) const { ::operator delete(scratch, std::align_val_t(64)); }
      };
      std::unique_ptr<A, Free> scratch;
      if (pass == Pass::kBoth && pipelines_) {
        size_t bytes = (args_.classes + kRowMultiple) * sizeof(A);
        scratch.reset(static_cast<A*>(::operator new(bytes, std::align_val_t(64))));
        block.scratch = scratch.get();
      }
      if (args_.blended) {
        RunBlended(pass, block, begin);
      } else {
        RunRows(pass, block, begin);
      }
      finish(number, begin, block);
    });
    return bad_row.load() < args_.rows ? bad_row.load() : -1;
  }

 private:
  using Block = SoftmaxXentBlock<T>;
  using Plan = SoftmaxXentPlan<A>;
  using Subset = SoftmaxXentSubset<A>;

  // A row's own subset: its classes side by side, and what the row has for them.
  struct Collected {
    std::vector<int64_t> ids;
    std::vector<A> targets, class_weight;
    std::vector<T> predictions, gradient;
    std::vector<A> sums;
    std::vector<int32_t> places;  // of classes among the ids; −1: none
  };

  // The subset of all rows: gathered, or a bit set.
  void UseSubset() {
    subset_.size = static_cast<A>(args_.subset_size);
    subset_.class_weight = subset_.size;
    if (args_.class_weight) {
      double sum = 0;
      for (int64_t k = 0; k < args_.subset_size; ++k) sum += args_.class_weight[args_.subset[k]];
      subset_.class_weight = static_cast<A>(sum);
    }
    gathers_ = over_subset_ && !own_subsets_ && args_.subset_size > 0 &&
               args_.subset_size * kGatherShare <= args_.classes;
    if (gathers_) {
      plan_.classes = args_.subset_size;
      plan_.stream = false;
      if (args_.class_weight) {
        class_weight_.resize(args_.subset_size);
        for (int64_t k = 0; k < args_.subset_size; ++k) {
          class_weight_[k] = args_.class_weight[args_.subset[k]];
        }
        plan_.class_weight = class_weight_.data();
      }
    } else {
      in_subset_.resize(BitBytes());
      for (int64_t k = 0; k < args_.subset_size; ++k) {
        in_subset_[args_.subset[k] / 8] |= 1 << (args_.subset[k] % 8);
      }
      subset_.bits = in_subset_.data();
    }
  }

  // Of a bit set over the classes, in whole words, and the zeros behind it.
  int64_t BitBytes() const { return (args_.classes + 63) / 64 * 8 + 8; }

  // Candidate k of a row, or −1.
  int64_t Candidate(int64_t row, int64_t k) const {
    const int64_t at = row * args_.subset_size + k;
    return args_.candidates32 ? args_.candidates32[at] : args_.candidates64[at];
  }

  // The first row with a candidate that is no class, or −1.
  int64_t BadCandidates(int64_t begin, int64_t rows) const {
    if (!is_of_candidates_) return -1;
    for (int64_t row = begin; row < begin + rows; ++row) {
      for (int64_t k = 0; k < args_.subset_size; ++k) {
        const int64_t id = Candidate(row, k);
        if (id < -1 || id >= args_.classes) return row;
      }
    }
    return -1;
  }

  // Labels as the passes want them; returns the first bad row, or −1.
  int64_t ReadLabels(int64_t begin, int64_t rows, int64_t* labels) const {
    for (int64_t r = 0; r < rows; ++r) {
      int64_t label = args_.labels32 ? args_.labels32[begin + r] : args_.labels64[begin + r];
      if (args_.options.has_ignore_class && label == args_.options.ignore_class) {
        label = -1;
      } else if (label < 0 || label >= args_.classes) {
        return begin + r;
      } else if (gathers_) {
        // Its place in the subset; a row outside it has no loss and no gradient.
        const int64_t* end = args_.subset + args_.subset_size;
        const int64_t* place = std::lower_bound(args_.subset, end, label);
        label = place != end && *place == label ? place - args_.subset : -1;
      }
      labels[r] = label;
    }
    return -1;
  }

  // Some of a block's rows.
  Block Part(const Block& block, int64_t row, int64_t rows) const {
    Block part = block;
    part.rows = rows;
    part.predictions += row * args_.classes;
    if (part.labels) part.labels += row;
    if (part.targets) part.targets += row * target_columns_;
    part.subsets += row * part.subset_stride;
    if (part.loss) part.loss += row;
    if (part.stats) part.stats += row * stats_;
    if (part.metrics) part.metrics += row * kMetrics;
    if (part.cotangents) part.cotangents += row;
    if (part.gradient) part.gradient += row * args_.classes;
    return part;
  }

  // `first_row`: of the block, among all rows.
  void RunRows(Pass pass, const Block& block, int64_t first_row) const {
    if (own_subsets_) {
      RunOwnSubsets(pass, block, first_row);
    } else if (gathers_) {
      RunGathered(pass, block);
    } else {
      RunPass(pass, plan_, block);
    }
  }

  void RunPass(Pass pass, const Plan& plan, const Block& block) const {
    if (converts_ && block.scratch == nullptr) {
      RunConverted(pass, plan, block);
    } else {
      Choose(passes_, pass)(plan, block);
    }
  }

  // The pass over predictions that are converted to A and capped, in groups of rows.
  void RunConverted(Pass pass, const Plan& plan, const Block& block) const {
    int64_t group = std::clamp<int64_t>(kBlendBytes / (plan.classes * sizeof(A)), 1, block.rows);
    if (group > kRowMultiple) group -= group % kRowMultiple;
    std::unique_ptr<A[]> predictions(new A[group * plan.classes]), gradient;
    if (block.gradient) gradient.reset(new A[group * plan.classes]);
    Plan sums_plan = plan;
    sums_plan.stream = false;
    for (int64_t row = 0; row < block.rows; row += group) {
      SoftmaxXentBlock<A> part{};
      part.rows = std::min(group, block.rows - row);
      const int64_t elements = part.rows * plan.classes, offset = row * plan.classes;
      passes_.cap(elements, block.predictions + offset, plan.softcap, predictions.get());
      part.predictions = predictions.get();
      part.labels = block.labels ? block.labels + row : nullptr;
      part.targets = block.targets ? block.targets + offset : nullptr;
      part.subsets = block.subsets + row * block.subset_stride;
      part.subset_stride = block.subset_stride;
      part.loss = block.loss + row;
      part.metrics = block.metrics ? block.metrics + row * kMetrics : nullptr;
      part.cotangents = block.cotangents ? block.cotangents + row : nullptr;
      part.gradient = gradient.get();
      Choose(passes_of_sums_, pass)(sums_plan, part);
      if (gradient == nullptr) continue;
      passes_.uncap(elements, gradient.get(), predictions.get(), plan.softcap,
                    block.gradient + offset, plan.stream);
    }
  }

  // The pass over blended predictions.
  void RunBlended(Pass pass, const Block& block, int64_t first_row) const {
    const BlendPasses<T> blend = PassesOfBlend<T>();
    const A weights[] = {static_cast<A>(args_.blend[0]), static_cast<A>(args_.blend[1])};
    const int64_t classes = args_.classes, row_bytes = classes * sizeof(T);
    int64_t group = std::clamp<int64_t>(kBlendBytes / row_bytes, 1, block.rows);
    if (group > kRowMultiple) group -= group % kRowMultiple;
    std::unique_ptr<T[]> predictions(new T[group * classes]), gradient;
    if (block.gradient) gradient.reset(new T[group * classes]);
    for (int64_t row = 0; row < block.rows; row += group) {
      const Block whole = Part(block, row, std::min(group, block.rows - row));
      const int64_t elements = whole.rows * classes, offset = (first_row + row) * classes;
      blend.blend(elements, whole.predictions, weights[0], args_.blended + offset, weights[1],
                  predictions.get());
      Block part = whole;
      part.predictions = predictions.get();
      part.gradient = gradient.get();
      RunRows(pass, part, first_row + row);
      if (gradient == nullptr) continue;
      blend.scale(elements, gradient.get(), weights[0], whole.gradient, streams_);
      blend.scale(elements, gradient.get(), weights[1], args_.dblended + offset, streams_);
    }
  }

  // The pass over the subset's columns alone, in groups of rows that stay in the first-level cache.
  void RunGathered(Pass pass, const Block& block) const {
    const int64_t size = args_.subset_size, classes = args_.classes;
    const int64_t group = size <= 512 ? kRowMultiple : 1;
    std::unique_ptr<T[]> predictions(new T[group * size]), gradient;
    std::unique_ptr<A[]> targets;
    if (block.targets) targets.reset(new A[group * size]);
    if (block.gradient) gradient.reset(new T[group * size]);
    for (int64_t row = 0; row < block.rows; row += group) {
      Block part = Part(block, row, std::min(group, block.rows - row));
      for (int64_t r = 0; r < part.rows; ++r) {
        const int64_t from = (row + r) * classes;
        for (int64_t k = 0; k < size; ++k) {
          predictions[r * size + k] = block.predictions[from + args_.subset[k]];
        }
        if (targets == nullptr) continue;
        for (int64_t k = 0; k < size; ++k) {
          targets[r * size + k] = block.targets[from + args_.subset[k]];
        }
      }
      part.predictions = predictions.get();
      part.targets = targets.get();
      part.gradient = gradient.get();
      RunPass(pass, plan_, part);
      if (gradient == nullptr) continue;
      for (int64_t r = 0; r < part.rows; ++r) {
        T* to = block.gradient + (row + r) * classes;
        std::fill_n(to, classes, T{});
        for (int64_t k = 0; k < size; ++k) to[args_.subset[k]] = gradient[r * size + k];
      }
    }
  }

  // The pass where every row has a subset of its own: over its classes alone where they are few and
  // nothing else counts, else over all classes with a bit set for each row.
  void RunOwnSubsets(Pass pass, const Block& block, int64_t first_row) const {
    Collected collected;
    if (is_of_candidates_) {
      for (int64_t row = 0; row < block.rows; ++row) {
        const Block part = Part(block, row, 1);
        if (row + 1 < block.rows) PrefetchCandidates(Part(block, row + 1, 1), first_row + row + 1);
        CollectCandidates(part, first_row + row, collected);
        if (over_subset_) {
          RunCollected(pass, part, collected);
        } else {
          RunMixture(pass, part, collected);
        }
      }
      return;
    }
    const int64_t stride = BitBytes(), classes = args_.classes;
    std::vector<uint8_t> bits(block.rows * stride);
    std::vector<Subset> subsets(block.rows);
    std::vector<int64_t> sizes(block.rows);
    for (int64_t row = 0; row < block.rows; ++row) {
      uint8_t* own = bits.data() + row * stride;
      sizes[row] = SetBits(block, row, first_row, own);
      subsets[row] = {own, static_cast<A>(sizes[row]), static_cast<A>(sizes[row])};
      if (args_.class_weight == nullptr) continue;
      double sum = 0;
      EachSetBit(own, classes, [&](int64_t c) { sum += args_.class_weight[c]; });
      subsets[row].class_weight = static_cast<A>(sum);
    }
    auto is_sparse = [&](int64_t row) {
      return over_subset_ && classes > kMinSparseClasses && sizes[row] * kGatherShare <= classes;
    };
    for (int64_t row = 0; row < block.rows;) {
      if (is_sparse(row)) {
        const Block part = Part(block, row, 1);
        CollectBits(part, subsets[row].bits, sizes[row], collected);
        RunCollected(pass, part, collected);
        ++row;
        continue;
      }
      int64_t end = row + 1;
      while (end < block.rows && !is_sparse(end)) ++end;
      Block part = Part(block, row, end - row);
      part.subsets = &subsets[row];
      part.subset_stride = 1;
      RunPass(pass, plan_, part);
      row = end;
    }
  }

  // Writes the subset of row `row` of a block; returns its size.
  int64_t SetBits(const Block& block, int64_t row, int64_t first_row, uint8_t* bits) const {
    const int64_t classes = args_.classes;
    const bool* mask = args_.mask ? args_.mask + (first_row + row) * classes : nullptr;
    const A* targets = args_.options.mask_negative ? block.targets + row * classes : nullptr;
    int64_t size = 0;
    for (int64_t first = 0; first < classes; first += 64) {
      uint64_t word = 0;
      const int64_t end = std::min(classes, first + 64), whole = end - (end - first) % 16;
      for (int64_t c = first; c < whole; c += 16) {
        uint64_t in = mask ? AreSet(mask + c) : 0xFFFF;
        if (targets) in &= ~AreNegative(targets + c);
        word |= in << (c - first);
      }
      for (int64_t c = whole; c < end; ++c) {
        const bool in = (!mask || mask[c]) && !(targets && targets[c] < 0);
        word |= static_cast<uint64_t>(in) << (c - first);
      }
      if (subset_.bits) word &= Word(subset_.bits, first);
      __builtin_memcpy(bits + first / 8, &word, sizeof(word));
      size += CountBits(word);
    }
    return size;
  }

  void CollectBits(const Block& row, const uint8_t* bits, int64_t size, Collected& to) const {
    to.ids.resize(size);
    int64_t* end = to.ids.data();
    EachSetBit(bits, args_.classes, [&](int64_t c) { *end++ = c; });
    if (row.targets == nullptr) return;
    to.targets.resize(size);
    for (int64_t k = 0; k < size; ++k) to.targets[k] = row.targets[to.ids[k]];
  }

  // Their predictions lie far apart: waiting for each takes longer than all that is done with it.
  void PrefetchCandidates(const Block& row, int64_t number) const {
    for (int64_t k = 0; k < args_.subset_size; ++k) {
      __builtin_prefetch(row.predictions + std::max<int64_t>(0, Candidate(number, k)), 0, 3);
    }
  }

  void CollectCandidates(const Block& row, int64_t number, Collected& to) const {
    to.ids.clear();
    to.targets.clear();
    for (int64_t k = 0; k < args_.subset_size; ++k) {
      const int64_t id = Candidate(number, k);
      if (id < 0 || (args_.options.mask_negative && row.targets[k] < 0)) continue;
      to.ids.push_back(id);
      if (row.targets) to.targets.push_back(row.targets[k]);
    }
  }

  // What a row is that has no loss. Its gradient is set where it is wanted.
  void Clear(const Block& row) const {
    *row.loss = 0;
    if (row.metrics) {
      row.metrics[0] = -1;
      row.metrics[1] = row.metrics[2] = 0;
    }
    if (row.gradient) std::fill_n(row.gradient, args_.classes, T{});
  }

  // L_S of a row, normalised over S, and its gradient.
  void RunCollected(Pass pass, const Block& row, Collected& collected) const {
    Clear(row);
    AddCollected(pass, row, collected);
  }

  // Adds it to what is there, and sets the metrics.
  void AddCollected(Pass pass, const Block& row, Collected& collected) const {
    const std::vector<int64_t>& ids = collected.ids;
    const int64_t size = ids.size();
    int64_t label = 0;
    if (row.labels) {  // its first place; −1, which is ignored, has none
      label = std::find(ids.begin(), ids.end(), *row.labels) - ids.begin();
    }
    if (label >= size) return;
    collected.predictions.resize(size);
    collected.gradient.resize(size);
    for (int64_t k = 0; k < size; ++k) collected.predictions[k] = row.predictions[ids[k]];
    Plan plan = plan_;
    plan.classes = size;
    plan.has_subset = true;
    plan.normalize_full = plan.stream = false;
    plan.full_weight = 0;
    Subset subset{nullptr, static_cast<A>(size), static_cast<A>(size)};
    if (args_.class_weight) {
      double sum = 0;
      collected.class_weight.clear();
      for (int64_t id : ids) {
        collected.class_weight.push_back(args_.class_weight[id]);
        sum += args_.class_weight[id];
      }
      plan.class_weight = collected.class_weight.data();
      subset.class_weight = static_cast<A>(sum);
    }
    A loss = 0;
    Block part = row;
    part.predictions = collected.predictions.data();
    part.labels = row.labels ? &label : nullptr;
    part.targets = row.targets ? collected.targets.data() : nullptr;
    part.subsets = &subset;
    part.subset_stride = 0;
    part.loss = &loss;
    part.gradient = row.gradient ? collected.gradient.data() : nullptr;
    RunPass(pass, plan, part);
    *row.loss += loss;
    if (row.gradient == nullptr) return;
    if constexpr (!std::is_same_v<T, A>) {
      if (is_of_candidates_) AddRepeats(collected);
    }
    for (int64_t k = 0; k < size; ++k) Add(collected.gradient[k], row.gradient + ids[k]);
  }

  // Where a class is listed repeatedly, its first place gets the gradient of all: adding them up in
  // half precision would round each time.
  void AddRepeats(Collected& collected) const {
    const std::vector<int64_t>& ids = collected.ids;
    const int64_t size = ids.size();
    collected.places.resize(args_.classes, -1);
    collected.sums.resize(size);
    passes_.cap(size, collected.gradient.data(), /*softcap=*/0, collected.sums.data());
    bool repeats = false;
    for (int64_t k = 0; k < size; ++k) {
      int32_t& first = collected.places[ids[k]];
      if (first < 0) {
        first = static_cast<int32_t>(k);
        continue;
      }
      repeats = true;
      collected.sums[first] += collected.sums[k];
      collected.sums[k] = 0;
    }
    for (int64_t id : ids) collected.places[id] = -1;
    if (!repeats) return;
    passes_.uncap(size, collected.sums.data(), nullptr, /*softcap=*/0, collected.gradient.data(),
                  /*stream=*/false);
  }

  void Add(T term, T* to) const {
    if constexpr (std::is_same_v<T, A>) {
      *to += term;
    } else {
      A sums[2];
      passes_.cap(1, &term, 0, &sums[0]);
      passes_.cap(1, to, 0, &sums[1]);
      sums[0] += sums[1];
      passes_.uncap(1, sums, nullptr, 0, to, /*stream=*/false);
    }
  }

  // A row of candidates where all classes count: L_all, and L_S with a normaliser of its own or, as
  // L_all of other targets, with that of all classes.
  void RunMixture(Pass pass, const Block& row, Collected& collected) const {
    Clear(row);
    if (row.labels && *row.labels < 0) return;
    const std::vector<int64_t>& ids = collected.ids;
    const int64_t size = ids.size(), classes = args_.classes;
    std::vector<A> targets(row.targets ? classes : 0);
    Plan plan = plan_;
    plan.has_subset = plan.normalize_full = plan.stream = false;
    Block part = row;
    part.metrics = nullptr;
    if (plan_.full_weight != 0) {
      for (int64_t k = 0; row.targets && k < size; ++k) targets[ids[k]] += collected.targets[k];
      part.targets = row.targets ? targets.data() : nullptr;
      AddAll(pass, plan, part);
    }
    if (!plan_.has_subset) return;
    if (!plan_.normalize_full) return AddCollected(pass, row, collected);

    // Σ_{c in S} y^S[c] · …, class by class of S.
    std::vector<A> shares(size);
    const int64_t label =
        row.labels ? std::find(ids.begin(), ids.end(), *row.labels) - ids.begin() : 0;
    double sum = 0;
    for (int64_t k = 0; k < size; ++k) {
      shares[k] = row.targets ? collected.targets[k] : A(k == label);
      sum += shares[k];
    }
    if (sum == 0) return;
    for (int64_t k = 0; k < size; ++k) {
      shares[k] = plan.one_minus_smoothing * shares[k] + plan.label_smoothing / A(size);
      if (args_.class_weight) shares[k] *= args_.class_weight[ids[k]];
    }
    plan.label_smoothing = 0;
    plan.one_minus_smoothing = 1;
    plan.class_weight = nullptr;
    plan.full_class_weight = static_cast<A>(classes);
    A metrics[kMetrics];
    if (row.metrics) {  // the rank is among S, the others are of all classes
      Block ranked = row;
      A loss = 0;
      ranked.loss = &loss;
      ranked.gradient = nullptr;
      AddCollected(Pass::kForward, ranked, collected);
      part.metrics = metrics;
    }
    if (row.targets || plan.from_logits) {
      targets.assign(classes, 0);
      for (int64_t k = 0; k < size; ++k) targets[ids[k]] += shares[k];
      part.labels = nullptr;
      part.targets = targets.data();
      plan.full_weight = plan_.subset_weight;
      AddAll(pass, plan, part);
    } else {  // there are no dense targets in the arithmetic of labels and probabilities
      for (int64_t k = 0; k < size; ++k) {
        part.labels = &ids[k];
        plan.full_weight = plan_.subset_weight * shares[k];
        AddAll(pass, plan, part);
      }
    }
    if (row.metrics) std::copy(metrics + 1, metrics + kMetrics, row.metrics + 1);
  }

  // Adds the loss and gradient of a row over all classes.
  void AddAll(Pass pass, const Plan& plan, const Block& row) const {
    const Subset everything{nullptr, static_cast<A>(plan.classes), plan.full_class_weight};
    std::unique_ptr<T[]> gradient(row.gradient ? new T[plan.classes] : nullptr);
    A loss = 0;
    Block part = row;
    part.subsets = &everything;
    part.loss = &loss;
    part.gradient = gradient.get();
    RunPass(pass, plan, part);
    *row.loss += loss;
    for (int64_t c = 0; gradient && c < plan.classes; ++c) Add(gradient[c], row.gradient + c);
  }

  const SoftmaxXentArgs<T>& args_;
  const int stats_;  // a row
  const bool is_of_candidates_;
  const int64_t target_columns_;
  const SoftmaxXentPasses<T> passes_;
  const SoftmaxXentPasses<A> passes_of_sums_;
  Plan plan_;
  bool streams_, over_subset_;  // over_subset_: nothing but S counts
  bool own_subsets_ = false, gathers_ = false, converts_, pipelines_;
  Subset subset_;  // of all rows
  std::vector<uint8_t> in_subset_;
  std::vector<A> class_weight_;
  int64_t block_rows_ = 1, blocks_ = 0;
};

constexpr auto kNothing = [](auto&&...) {};

// Where there are no classes.
template <typename T>
void ClearMetrics(const SoftmaxXentArgs<T>& args) {
  for (int64_t row = 0; args.metrics && row < args.rows; ++row) {
    args.metrics[row * kMetrics] = -1;
    args.metrics[row * kMetrics + 1] = args.metrics[row * kMetrics + 2] = 0;
  }
}

}  // namespace

template <typename T>
int64_t SoftmaxXent(const Cpu& cpu, const SoftmaxXentArgs<T>& args, Accumulator<T>* loss,
                    Accumulator<T>* stats) {
  if (args.classes == 0) {
    std::fill_n(loss, args.rows, 0);
    std::fill_n(stats, args.rows * SoftmaxXentStats(args), 0);
    ClearMetrics(args);
    return -1;
  }
  Call<T> call(args);
  return call.Run(cpu, Pass::kForward, loss, stats, nullptr, 1, nullptr, kNothing);
}

template <typename T>
int64_t SoftmaxXentGrad(const Cpu& cpu, const SoftmaxXentArgs<T>& args, const Accumulator<T>* dloss,
                        const Accumulator<T>* stats, T* dpredictions) {
  if (args.classes == 0) return -1;
  Call<T> call(args);
  // The pass takes statistics in and out by one pointer; backward only reads them.
  return call.Run(cpu, Pass::kBackward, nullptr, const_cast<Accumulator<T>*>(stats), dloss, 1,
                  dpredictions, kNothing);
}

template <typename T>
int64_t SoftmaxXentReduced(const Cpu& cpu, const SoftmaxXentArgs<T>& args,
                           const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss,
                           T* gradient) {
  using A = Accumulator<T>;
  *loss = 0;
  if (args.classes == 0) ClearMetrics(args);
  if (args.rows == 0 || args.classes == 0) return -1;
  Call<T> call(args);
  std::vector<double> sums(call.blocks());
  int64_t bad_row =
      call.Run(cpu, Pass::kBoth, nullptr, nullptr, row_weight, static_cast<A>(scale), gradient,
               [&](int64_t number, int64_t begin, const SoftmaxXentBlock<T>& block) {
                 double sum = 0;
                 for (int64_t r = 0; r < block.rows; ++r) {
                   double weight = row_weight ? row_weight[begin + r] : 1;
                   sum += weight * block.loss[r];
                 }
                 sums[number] = sum;
               });
  double sum = 0;
  for (double part : sums) sum += part;
  *loss = static_cast<A>(scale * sum);
  return bad_row;
}

#define FUSEDLOSS_INSTANTIATE(T)                                                                 \
  template int64_t SoftmaxXent(const Cpu&, const SoftmaxXentArgs<T>&, Accumulator<T>*,           \
                               Accumulator<T>*);                                                 \
  template int64_t SoftmaxXentGrad(const Cpu&, const SoftmaxXentArgs<T>&, const Accumulator<T>*, \
                                   const Accumulator<T>*, T*);                                   \
  template int64_t SoftmaxXentReduced(const Cpu&, const SoftmaxXentArgs<T>&,                     \
                                      const Accumulator<T>*, double, Accumulator<T>*, T*);
FUSEDLOSS_INSTANTIATE(float)
FUSEDLOSS_INSTANTIATE(double)
FUSEDLOSS_INSTANTIATE(Half)
FUSEDLOSS_INSTANTIATE(BFloat16)
#undef FUSEDLOSS_INSTANTIATE

}  // namespace fusedloss
