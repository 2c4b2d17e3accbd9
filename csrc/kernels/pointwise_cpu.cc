// What is the same on every CPU: cutting a call into spans of elements, and adding up.
#include <algorithm>
#include <vector>

#include "kernels/pointwise.h"
#include "kernels/pointwise_plan.h"

namespace fusedloss {
namespace {

// Elements of a block: enough to amortise claiming it, few enough to balance the threads, and by
// the shape alone, so that results are the same for any number of threads.
constexpr int64_t kMinBlock = 16 << 10, kMaxBlock = 512 << 10, kBlocks = 64;
constexpr int64_t kAlignment = 32;  // elements: a cache line of the narrowest type
// From here on the gradient leaves the caches before anybody reads it.
constexpr int64_t kStreamBytes = 8 << 20;
// Rows from here on are spans of their own. Of shorter ones a span holds many, with what belongs to
// a row or an output written out for every element; kExpanded elements stay in the first-level
// cache.
constexpr int64_t kLongRow = 64, kExpanded = 1024;

template <typename T, typename Y>
PointwisePass<T, Y> Pass() {
  switch (ChosenCpuLevel()) {
    case CpuLevel::kAvx512:
      return avx512::RunPointwise<T, Y>;
    case CpuLevel::kAvx2:
      return avx2::RunPointwise<T, Y>;
    default:
      return baseline::RunPointwise<T, Y>;
  }
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, typename Y>
class Call {
 public:
  using A = Accumulator<T>;

  // `cotangents` of the rows (null: 1), times `scale`, go into the gradient. `loss` of the rows and
  // `gradient` may be null.
  Call(const PointwiseArgs<T, Y>& args, const A* cotangents, double scale, A* loss, T* gradient)
      : args_(args),
        cotangents_(cotangents),
        loss_(loss),
        gradient_(gradient),
        elements_(args.rows * args.outputs),
        pass_(Pass<T, Y>()) {
    plan_.kind = args.kind;
    plan_.parameter = static_cast<A>(args.parameter);
    plan_.lowest = static_cast<A>(args.epsilon);
    plan_.highest = static_cast<A>(1 - args.epsilon);
    plan_.stream = elements_ * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    scale_ = static_cast<A>(scale / args.outputs);
    block_ = std::clamp(elements_ / kBlocks, kMinBlock, kMaxBlock) / kAlignment * kAlignment;
  }

  // Returns Σ_i cotangents[i] · loss[i].
  double Run(const Cpu& cpu) const {
    const bool by_output = args_.output_weights || args_.quantiles;
    const bool by_row = cotangents_ || loss_ || args_.one_target_a_row;
    double sum = !by_output && !by_row       ? RunFlat(cpu)
                 : args_.outputs >= kLongRow ? RunLongRows(cpu)
                                             : RunShortRows(cpu);
    return sum / args_.outputs;
  }

 private:
  using Span = PointwiseSpan<T, Y>;

  Span SpanAt(int64_t begin, int64_t size) const {
    Span span{};
    span.size = size;
    span.predictions = args_.predictions + begin;
    span.targets = args_.targets + begin;
    span.scale = scale_;
    span.gradient = gradient_ ? gradient_ + begin : nullptr;
    return span;
  }

  static double Total(const std::vector<double>& sums) {
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
  }

  // All elements are alike.
  double RunFlat(const Cpu& cpu) const {
    std::vector<double> sums(CeilDiv(elements_, block_));
    cpu.ParallelFor(sums.size(), [&](int64_t number) {
      const int64_t begin = number * block_;
      sums[number] = pass_(plan_, SpanAt(begin, std::min(block_, elements_ - begin)));
    });
    return Total(sums);
  }

  // A row is one piece or, if it is longer than a block, several.
  double RunLongRows(const Cpu& cpu) const {
    const int64_t outputs = args_.outputs, pieces = CeilDiv(outputs, block_);
    const int64_t units = args_.rows * pieces;
    const int64_t block_units = std::max<int64_t>(1, block_ / outputs);
    std::vector<double> sums(units);
    cpu.ParallelFor(CeilDiv(units, block_units), [&](int64_t number) {
      const int64_t end = std::min(units, (number + 1) * block_units);
      for (int64_t unit = number * block_units; unit < end; ++unit) {
        const int64_t row = unit / pieces, column = unit % pieces * block_;
        Span span = SpanAt(row * outputs + column, std::min(block_, outputs - column));
        if (args_.one_target_a_row) {
          span.targets = args_.targets + row;
          span.one_target = true;
        }
        if (args_.output_weights) span.output_weights = args_.output_weights + column;
        if (args_.quantiles) span.quantiles = args_.quantiles + column;
        if (cotangents_) span.scale *= cotangents_[row];
        sums[unit] = pass_(plan_, span);
      }
    });
    double total = 0;
    for (int64_t row = 0; row < args_.rows; ++row) {
      double sum = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) sum += sums[row * pieces + piece];
      if (loss_) loss_[row] = static_cast<A>(sum / outputs);
      total += cotangents_ ? cotangents_[row] * sum : sum;
    }
    return total;
  }

  double RunShortRows(const Cpu& cpu) const {
    const int64_t outputs = args_.outputs, rows = args_.rows;
    const int64_t span_rows = std::min(rows, CeilDiv(kExpanded, outputs));
    const int64_t block_rows = CeilDiv(block_, outputs);
    const std::vector<A> output_weights = Repeated(args_.output_weights, span_rows);
    const std::vector<A> quantiles = Repeated(args_.quantiles, span_rows);
    std::vector<double> sums(CeilDiv(rows, block_rows));
    cpu.ParallelFor(sums.size(), [&](int64_t number) {
      A cotangents[kExpanded + kLongRow], losses[kExpanded + kLongRow];
      Y targets[kExpanded + kLongRow];
      double sum = 0;
      const int64_t end = std::min(rows, (number + 1) * block_rows);
      for (int64_t row = number * block_rows; row < end; row += span_rows) {
        const int64_t count = std::min(span_rows, end - row);
        Span span = SpanAt(row * outputs, count * outputs);
        if (args_.output_weights) span.output_weights = output_weights.data();
        if (args_.quantiles) span.quantiles = quantiles.data();
        if (args_.one_target_a_row) span.targets = OfRows(args_.targets + row, count, targets);
        if (cotangents_) span.cotangents = OfRows(cotangents_ + row, count, cotangents);
        if (loss_) span.losses = outputs == 1 ? loss_ + row : losses;
        sum += pass_(plan_, span);
        if (loss_ && outputs > 1) {
          for (int64_t r = 0; r < count; ++r) {
            A row_sum = 0;
            for (int64_t j = 0; j < outputs; ++j) row_sum += losses[r * outputs + j];
            loss_[row + r] = row_sum / static_cast<A>(outputs);
          }
        }
      }
      sums[number] = sum;
    });
    return Total(sums);
  }

  // What belongs to the outputs, for every element of `rows` rows.
  std::vector<A> Repeated(const A* of_outputs, int64_t rows) const {
    std::vector<A> all;
    if (of_outputs) all.reserve(rows * args_.outputs);
    for (int64_t r = 0; of_outputs && r < rows; ++r) {
      all.insert(all.end(), of_outputs, of_outputs + args_.outputs);
    }
    return all;
  }

  // What belongs to the rows, for every element of `rows` rows.
  template <typename Value>
  const Value* OfRows(const Value* of_rows, int64_t rows, Value* all) const {
    if (args_.outputs == 1) return of_rows;
    for (int64_t r = 0; r < rows; ++r)
      std::fill_n(all + r * args_.outputs, args_.outputs, of_rows[r]);
    return all;
  }

  const PointwiseArgs<T, Y>& args_;
  const A* const cotangents_;
  A* const loss_;
  T* const gradient_;
  const int64_t elements_;
  const PointwisePass<T, Y> pass_;
  PointwisePlan<A> plan_;
  A scale_;
  int64_t block_;
};

}  // namespace

template <typename T, typename Y>
void PointwiseLoss(const Cpu& cpu, const PointwiseArgs<T, Y>& args, Accumulator<T>* loss) {
  if (args.outputs == 0) {
    std::fill_n(loss, args.rows, 0);
  } else {
    Call<T, Y>(args, nullptr, 1, loss, nullptr).Run(cpu);
  }
}

template <typename T, typename Y>
void PointwiseGrad(const Cpu& cpu, const PointwiseArgs<T, Y>& args, const Accumulator<T>* dloss,
                   T* dpredictions) {
  if (args.outputs == 0) return;
  Call<T, Y>(args, dloss, 1, nullptr, dpredictions).Run(cpu);
}

template <typename T, typename Y>
void PointwiseReduced(const Cpu& cpu, const PointwiseArgs<T, Y>& args,
                      const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss,
                      T* gradient) {
  *loss = 0;
  if (args.rows == 0 || args.outputs == 0) return;
  double sum = Call<T, Y>(args, row_weight, scale, nullptr, gradient).Run(cpu);
  *loss = static_cast<Accumulator<T>>(scale * sum);
}

#define FUSEDLOSS_INSTANTIATE(T, Y)                                                               \
  template void PointwiseLoss(const Cpu&, const PointwiseArgs<T, Y>&, Accumulator<T>*);           \
  template void PointwiseGrad(const Cpu&, const PointwiseArgs<T, Y>&, const Accumulator<T>*, T*); \
  template void PointwiseReduced(const Cpu&, const PointwiseArgs<T, Y>&, const Accumulator<T>*,   \
                                 double, Accumulator<T>*, T*);
FUSEDLOSS_POINTWISE_TYPES(FUSEDLOSS_INSTANTIATE)
#undef FUSEDLOSS_INSTANTIATE

}  // namespace fusedloss
