// What is the same on every CPU: cutting the variables into blocks, adding up.
#include <algorithm>
#include <vector>

#include "kernels/penalty.h"
#include "kernels/penalty_plan.h"

namespace fusedloss {
namespace {

// A block is a part of one large variable or several small ones: large enough to amortise claiming
// it, small enough to balance the threads. The sizes alone decide: results are the same for any
// number of threads.
constexpr int64_t kBlockElements = 64 << 10;
// From here on the gradients leave the caches before anybody reads them.
constexpr int64_t kStreamBytes = 8 << 20;

template <typename T>
PenaltyPass PassOf() {
  switch (ChosenCpuLevel()) {
    case CpuLevel::kAvx512:
      return avx512::RunPenalty<T>;
    case CpuLevel::kAvx2:
      return avx2::RunPenalty<T>;
    default:
      return baseline::RunPenalty<T>;
  }
}

PenaltyPass PassOf(FloatType type) {
  switch (type) {
    case FloatType::kFloat:
      return PassOf<float>();
    case FloatType::kDouble:
      return PassOf<double>();
    case FloatType::kHalf:
      return PassOf<Half>();
    default:
      return PassOf<BFloat16>();
  }
}

struct Step {
  PenaltyPass pass;
  PenaltySpan span;
};

}  // namespace

template <typename A>
void Penalty(const Cpu& cpu, const PenaltyArgs<A>& args) {
  int64_t bytes = 0;
  for (int64_t k = 0; k < args.count; ++k) {
    bytes += args.variables[k].size * SizeOf(args.variables[k].type);
  }
  const bool stream = bytes >= kStreamBytes;
  const double dpenalty = args.dpenalty ? *args.dpenalty : 1;

  std::vector<Step> steps;
  std::vector<size_t> blocks;  // the first step of each
  int64_t room = 0;            // elements that the last block still takes
  for (int64_t k = 0; k < args.count; ++k) {
    const PenaltyVariable& variable = args.variables[k];
    const PenaltyPass pass = PassOf(variable.type);
    const char* values = static_cast<const char*>(variable.values);
    char* gradient = static_cast<char*>(variable.gradient);
    for (int64_t begin = 0; begin < variable.size; begin += kBlockElements) {
      const int64_t size = std::min(kBlockElements, variable.size - begin);
      const int64_t offset = begin * SizeOf(variable.type);
      if (size > room) {
        blocks.push_back(steps.size());
        room = kBlockElements;
      }
      room -= size;
      steps.push_back({pass,
                       {size, values + offset, gradient ? gradient + offset : nullptr,
                        args.coefficients[2 * k], args.coefficients[2 * k + 1], dpenalty, stream}});
    }
  }

  std::vector<double> sums(blocks.size());
  blocks.push_back(steps.size());
  cpu.ParallelFor(sums.size(), [&](int64_t block) {
    double sum = 0;
    for (size_t i = blocks[block]; i < blocks[block + 1]; ++i) sum += steps[i].pass(steps[i].span);
    sums[block] = sum;
  });
  if (args.penalty == nullptr) return;
  double penalty = 0;
  for (double sum : sums) penalty += sum;
  *args.penalty = static_cast<A>(penalty);
}

template void Penalty(const Cpu&, const PenaltyArgs<float>&);
template void Penalty(const Cpu&, const PenaltyArgs<double>&);

}  // namespace fusedloss
