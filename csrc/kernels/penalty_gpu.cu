// A penalty on any number of variables on a GPU: one kernel runs over the tiles of them all.
#include <vector>

#include "kernels/gpu.cuh"
#include "kernels/penalty.h"

namespace fusedloss {
namespace {

constexpr int kBatch = 4;  // vectors that a thread loads before it uses the first
constexpr int64_t kTileBytes = kThreads * kBatch * 16;
constexpr int64_t kMaxBlocks = 8192;  // their sums are added up in no time

// A variable that has elements.
struct Entry {
  const void* values;
  void* gradient;  // or null
  int64_t size;
  int64_t first_tile;  // of all tiles of all variables
  int64_t index;       // of all variables
  FloatType type;
  bool wide;  // both begin where 16 bytes begin
};

// Writes the gradient of a tile, and returns this thread's share of its penalty.
template <typename T>
FUSEDLOSS_DEVICE double OverTile(const Entry& entry, const double* coefficients, int64_t tile,
                                 double dpenalty) {
  using A = Accumulator<T>;
  constexpr int64_t kTile = kTileBytes / sizeof(T);
  const int64_t begin = tile * kTile;
  const int64_t end = begin + kTile < entry.size ? begin + kTile : entry.size;
  auto* gradient = static_cast<T*>(entry.gradient);
  // A term with coefficient 0 is not there: it makes no NaN of an Inf.
  const double of_l1 = coefficients[2 * entry.index], of_l2 = coefficients[2 * entry.index + 1];
  const bool has_l1 = of_l1 != 0, has_l2 = of_l2 != 0;
  const A l1 = static_cast<A>(dpenalty * of_l1);
  const A twice_l2 = static_cast<A>(2 * dpenalty * of_l2);
  double magnitudes = 0, squares = 0;
  auto take = [&](int offset, const auto& w, const auto&) {
    constexpr int kCount = sizeof(w.values) / sizeof(T);
    Vector<T, kCount> dw;
    A magnitude = 0, square = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const A x = ToSum(w.values[i]);
      magnitude += Abs(x);
      square += x * x;
      const A sign = x > 0 ? A(1) : x < 0 ? A(-1) : x;  // of NaN, NaN
      Round((has_l1 ? l1 * sign : A(0)) + (has_l2 ? twice_l2 * x : A(0)), &dw.values[i]);
    }
    magnitudes += magnitude;
    squares += square;
    if (gradient) Store(gradient + begin + offset, dw);
  };
  const T* nothing = nullptr;
  EachVector<kBatch>(static_cast<const T*>(entry.values), nothing, false, begin, end, entry.wide,
                     take);
  return (has_l1 ? of_l1 * magnitudes : 0) + (has_l2 ? of_l2 * squares : 0);
}

// A block takes block_tiles tiles in a row. `dpenalty` (null: 1) is one number; sums: [blocks] out,
// or null.
template <typename A>
FUSEDLOSS_KERNEL_OF(kThreads, 4)
OverVariables(const Entry* table, int64_t count, const double* coefficients, int64_t tiles,
              int64_t block_tiles, const A* dpenalty, double* sums) {
  const double cotangent = dpenalty ? static_cast<double>(*dpenalty) : 1;
  int64_t tile = BlockId() * block_tiles;
  const int64_t end = tile + block_tiles < tiles ? tile + block_tiles : tiles;
  int64_t variable = EntryOf(table, count, tile);
  double sum = 0;
  for (; tile < end; ++tile) {
    if (variable + 1 < count && table[variable + 1].first_tile == tile) ++variable;
    const Entry entry = table[variable];
    const int64_t own_tile = tile - entry.first_tile;
    switch (entry.type) {
      case FloatType::kFloat:
        sum += OverTile<float>(entry, coefficients, own_tile, cotangent);
        break;
      case FloatType::kDouble:
        sum += OverTile<double>(entry, coefficients, own_tile, cotangent);
        break;
      case FloatType::kHalf:
        sum += OverTile<Half>(entry, coefficients, own_tile, cotangent);
        break;
      default:
        sum += OverTile<BFloat16>(entry, coefficients, own_tile, cotangent);
    }
  }
  if (sums == nullptr) return;
  sum = SumOfBlock(sum);
  if (ThreadId() == 0) sums[BlockId()] = sum;
}

}  // namespace

template <typename A>
GpuError Penalty(const Gpu& gpu, const PenaltyArgs<A>& args) {
  std::vector<Entry> entries;
  int64_t tiles = 0;
  for (int64_t k = 0; k < args.count; ++k) {
    const PenaltyVariable& from = args.variables[k];
    if (from.size == 0) continue;
    entries.push_back({from.values, from.gradient, from.size, tiles, k, from.type,
                       IsAligned(from.values) && IsAligned(from.gradient)});
    tiles += CeilDiv(from.size * SizeOf(from.type), kTileBytes);
  }
  if (entries.empty()) return args.penalty ? Zero(gpu, args.penalty, sizeof(A)) : nullptr;
  auto* sums = static_cast<double*>(gpu.allocate(gpu.owner, kMaxBlocks * sizeof(double)));
  if (sums == nullptr) return kNoMemory;
  const Entry* table = nullptr;
  FUSEDLOSS_RETURN_IF_ERROR(MakeTable(gpu, entries, &table));

  const int64_t block_tiles = CeilDiv(tiles, kMaxBlocks);
  const int64_t blocks = CeilDiv(tiles, block_tiles);
  if (args.penalty == nullptr) sums = nullptr;
  FUSEDLOSS_RETURN_IF_ERROR(Launch(gpu, OverVariables<A>, blocks, kThreads, 1, kSumBytes, table,
                                   static_cast<int64_t>(entries.size()), args.coefficients, tiles,
                                   block_tiles, args.dpenalty, sums));
  return args.penalty ? AddUp(gpu, sums, blocks, 1, args.penalty) : nullptr;
}

template GpuError Penalty(const Gpu&, const PenaltyArgs<float>&);
template GpuError Penalty(const Gpu&, const PenaltyArgs<double>&);

}  // namespace fusedloss
