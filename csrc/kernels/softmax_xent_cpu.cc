// What is the same on every CPU: preparing a call, cutting it into blocks of rows, adding up.
#include <algorithm>
#include <atomic>
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
// Blended predictions and their gradient are made in pieces that fit a first-level cache together.
constexpr int64_t kBlendBytes = 16 << 10;

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

template <typename T>
class Call {
 public:
  using A = Accumulator<T>;

  explicit Call(const SoftmaxXentArgs<T>& args) : args_(args), passes_(Passes<T>()) {
    const SoftmaxXentOptions& options = args.options;
    plan_ = {};
    plan_.classes = args.classes;
    plan_.from_logits = options.from_logits;
    plan_.rich = SoftmaxXentStats(args) > 2;
    plan_.has_subset = args.subset != nullptr && options.subset_weight != 0;
    plan_.normalize_full = plan_.has_subset && options.normalize_full;
    plan_.class_weight = args.class_weight;
    plan_.subset_weight = plan_.has_subset ? static_cast<A>(options.subset_weight) : A(0);
    plan_.full_weight = args.subset ? static_cast<A>(options.full_weight) : A(1);
    plan_.label_smoothing = static_cast<A>(options.label_smoothing);
    plan_.one_minus_smoothing = static_cast<A>(1 - options.label_smoothing);
    plan_.lowest = static_cast<A>(options.epsilon);
    plan_.highest = static_cast<A>(1 - options.epsilon);
    plan_.subset_size = static_cast<A>(plan_.has_subset ? args.subset_size : 1);
    plan_.full_class_weight = static_cast<A>(args.classes);
    plan_.subset_class_weight = plan_.subset_size;
    if (args.class_weight) {
      double full = 0, subset = 0;
      for (int64_t c = 0; c < args.classes; ++c) full += args.class_weight[c];
      for (int64_t k = 0; k < args.subset_size; ++k) subset += args.class_weight[args.subset[k]];
      plan_.full_class_weight = static_cast<A>(full);
      plan_.subset_class_weight = static_cast<A>(subset);
    }
    int64_t elements = args.rows * args.classes;
    streams_ = elements * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    plan_.stream = streams_ && args.blended == nullptr;

    gathers_ = plan_.has_subset && !plan_.normalize_full && plan_.full_weight == 0 &&
               args.subset_size * kGatherShare <= args.classes;
    if (gathers_) {
      plan_.classes = args.subset_size;
      plan_.stream = false;
      if (args.class_weight) {
        class_weight_.resize(args.subset_size);
        for (int64_t k = 0; k < args.subset_size; ++k) {
          class_weight_[k] = args.class_weight[args.subset[k]];
        }
        plan_.class_weight = class_weight_.data();
      }
    } else if (plan_.has_subset) {
      in_subset_.resize(args.classes / 8 + 9);
      for (int64_t k = 0; k < args.subset_size; ++k) {
        in_subset_[args.subset[k] / 8] |= 1 << (args.subset[k] % 8);
      }
      plan_.in_subset = in_subset_.data();
    }

    pipelines_ = !plan_.rich && plan_.from_logits && args.targets == nullptr &&
                 args.classes >= kMinPipelineClasses &&
                 args.classes * static_cast<int64_t>(sizeof(A)) <= kPipelineBytes;

    int64_t block_elements = std::clamp(elements / kBlocks, kMinBlockElements, kMaxBlockElements);
    block_rows_ = std::max<int64_t>(1, block_elements / std::max<int64_t>(1, args.classes));
    if (block_rows_ > kRowMultiple) block_rows_ -= block_rows_ % kRowMultiple;
    blocks_ = (args.rows + block_rows_ - 1) / block_rows_;
  }

  int64_t blocks() const { return blocks_; }
  int64_t block_rows() const { return block_rows_; }
  const SoftmaxXentPasses<T>& passes() const { return passes_; }

  // Runs `pass` over all rows; finish(block number, its rows) follows each block on its thread.
  // loss and stats may be null. Cotangents are cotangents[row], or 1 if null, times scale.
  template <typename Finish>
  int64_t Run(const Cpu& cpu, typename SoftmaxXentPasses<T>::Pass pass, A* loss, A* stats,
              const A* cotangents, A scale, T* gradient, Finish&& finish) {
    std::atomic<int64_t> bad_row{args_.rows};
    const int stats_per_row = SoftmaxXentStats(args_);
    cpu.ParallelFor(blocks_, [&](int64_t number) {
      int64_t begin = number * block_rows_;
      int64_t rows = std::min(block_rows_, args_.rows - begin);
      std::vector<int64_t> labels;
      if (args_.targets == nullptr) {
        labels.resize(rows);
        int64_t bad = ReadLabels(begin, rows, labels.data());
        if (bad >= 0) {
          int64_t first = bad_row.load();
          while (bad < first && !bad_row.compare_exchange_weak(first, bad)) {
          }
          return;
        }
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
      block.targets = args_.targets ? args_.targets + begin * args_.classes : nullptr;
      block.loss = loss ? loss + begin : nullptr;
      if (pass != passes_.backward && loss == nullptr) {
        block_loss.resize(rows);
        block.loss = block_loss.data();
      }
      block.stats = stats ? stats + begin * stats_per_row : nullptr;
      block.cotangents = block_cotangents.data();
      block.gradient = gradient ? gradient + begin * args_.classes : nullptr;
      struct Free {
        void operator()(A* scratch) const { ::operator delete(scratch, std::align_val_t(64)); }
      };
      std::unique_ptr<A, Free> scratch;
      if (pass == passes_.both && pipelines_) {
        size_t bytes = (args_.classes + kRowMultiple) * sizeof(A);
        scratch.reset(static_cast<A*>(::operator new(bytes, std::align_val_t(64))));
        block.scratch = scratch.get();
      }
      if (args_.blended) {
        RunBlended(pass, block, begin);
      } else {
        RunRows(pass, block);
      }
      finish(number, begin, block);
    });
    return bad_row.load() < args_.rows ? bad_row.load() : -1;
  }

 private:
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
  SoftmaxXentBlock<T> Part(const SoftmaxXentBlock<T>& block, int64_t row, int64_t rows) const {
    SoftmaxXentBlock<T> part = block;
    part.rows = rows;
    part.predictions += row * args_.classes;
    if (part.labels) part.labels += row;
    if (part.targets) part.targets += row * args_.classes;
    if (part.loss) part.loss += row;
    if (part.stats) part.stats += row * SoftmaxXentStats(args_);
    if (part.cotangents) part.cotangents += row;
    if (part.gradient) part.gradient += row * args_.classes;
    return part;
  }

  void RunRows(typename SoftmaxXentPasses<T>::Pass pass, const SoftmaxXentBlock<T>& block) {
    if (gathers_) {
      RunGathered(pass, block);
    } else {
      pass(plan_, block);
    }
  }

  // The pass over blended predictions. `begin`: the first row of the block.
  void RunBlended(typename SoftmaxXentPasses<T>::Pass pass, const SoftmaxXentBlock<T>& block,
                  int64_t begin) {
    const BlendPasses<T> blend = PassesOfBlend<T>();
    const A weights[] = {static_cast<A>(args_.blend[0]), static_cast<A>(args_.blend[1])};
    const int64_t classes = args_.classes, row_bytes = classes * sizeof(T);
    int64_t group = std::clamp<int64_t>(kBlendBytes / row_bytes, 1, block.rows);
    if (group > kRowMultiple) group -= group % kRowMultiple;
    std::unique_ptr<T[]> predictions(new T[group * classes]), gradient;
    if (block.gradient) gradient.reset(new T[group * classes]);
    for (int64_t row = 0; row < block.rows; row += group) {
      const SoftmaxXentBlock<T> whole = Part(block, row, std::min(group, block.rows - row));
      const int64_t elements = whole.rows * classes, offset = (begin + row) * classes;
      blend.blend(elements, whole.predictions, weights[0], args_.blended + offset, weights[1],
                  predictions.get());
      SoftmaxXentBlock<T> part = whole;
      part.predictions = predictions.get();
      part.gradient = gradient.get();
      RunRows(pass, part);
      if (gradient == nullptr) continue;
      blend.scale(elements, gradient.get(), weights[0], whole.gradient, streams_);
      blend.scale(elements, gradient.get(), weights[1], args_.dblended + offset, streams_);
    }
  }

  // The pass over the subset's columns alone, in groups of rows that stay in the first-level cache.
  void RunGathered(typename SoftmaxXentPasses<T>::Pass pass, const SoftmaxXentBlock<T>& block) {
    const int64_t size = args_.subset_size, classes = args_.classes;
    const int64_t group = size <= 512 ? kRowMultiple : 1;
    std::unique_ptr<T[]> predictions(new T[group * size]), gradient;
    std::unique_ptr<A[]> targets;
    if (block.targets) targets.reset(new A[group * size]);
    if (block.gradient) gradient.reset(new T[group * size]);
    for (int64_t row = 0; row < block.rows; row += group) {
      SoftmaxXentBlock<T> part = Part(block, row, std::min(group, block.rows - row));
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
      pass(plan_, part);
      if (gradient == nullptr) continue;
      for (int64_t r = 0; r < part.rows; ++r) {
        T* to = block.gradient + (row + r) * classes;
        std::fill_n(to, classes, T{});
        for (int64_t k = 0; k < size; ++k) to[args_.subset[k]] = gradient[r * size + k];
      }
    }
  }

  const SoftmaxXentArgs<T>& args_;
  const SoftmaxXentPasses<T> passes_;
  SoftmaxXentPlan<A> plan_;
  bool streams_, gathers_ = false, pipelines_ = false;
  std::vector<uint8_t> in_subset_;
  std::vector<A> class_weight_;
  int64_t block_rows_ = 1, blocks_ = 0;
};

constexpr auto kNothing = [](auto&&...) {};

}  // namespace

template <typename T>
int64_t SoftmaxXent(const Cpu& cpu, const SoftmaxXentArgs<T>& args, Accumulator<T>* loss,
                    Accumulator<T>* stats) {
  if (args.classes == 0) {
    std::fill_n(loss, args.rows, 0);
    std::fill_n(stats, args.rows * SoftmaxXentStats(args), 0);
    return -1;
  }
  Call<T> call(args);
  return call.Run(cpu, call.passes().forward, loss, stats, nullptr, 1, nullptr, kNothing);
}

template <typename T>
int64_t SoftmaxXentGrad(const Cpu& cpu, const SoftmaxXentArgs<T>& args, const Accumulator<T>* dloss,
                        const Accumulator<T>* stats, T* dpredictions) {
  if (args.classes == 0) return -1;
  Call<T> call(args);
  // The pass takes statistics in and out by one pointer; backward only reads them.
  return call.Run(cpu, call.passes().backward, nullptr, const_cast<Accumulator<T>*>(stats), dloss,
                  1, dpredictions, kNothing);
}

template <typename T>
int64_t SoftmaxXentReduced(const Cpu& cpu, const SoftmaxXentArgs<T>& args,
                           const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss,
                           T* gradient) {
  using A = Accumulator<T>;
  *loss = 0;
  if (args.rows == 0 || args.classes == 0) return -1;
  Call<T> call(args);
  std::vector<double> sums(call.blocks());
  int64_t bad_row =
      call.Run(cpu, call.passes().both, nullptr, nullptr, row_weight, static_cast<A>(scale),
               gradient, [&](int64_t number, int64_t begin, const SoftmaxXentBlock<T>& block) {
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
