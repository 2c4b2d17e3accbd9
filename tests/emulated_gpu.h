// gpu.cuh's CUDA on a CPU: every thread of a block, and of the other blocks of its cluster, is a
// fiber that runs until it waits for others. Shared memory begins as NaN and ends in a guard.
#ifndef FUSEDLOSS_TESTS_EMULATED_GPU_H_
#define FUSEDLOSS_TESTS_EMULATED_GPU_H_

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#define FUSEDLOSS_KERNEL_OF(threads, blocks) void
#define FUSEDLOSS_DEVICE inline

namespace fusedloss {

// What the emulated device is like; a test may change it.
struct EmulatedDevice {
  int64_t shared_memory_limit = 227 << 10;
  bool has_clusters = true;
  bool runs_backwards = false;  // the order in which threads get on, which must not matter
};
inline EmulatedDevice emulated_device;

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct EmulatedBlock {
  int64_t id;
  int rank, threads;
  std::vector<char> shared;
  Barrier barrier;
  std::map<std::pair<int, uint32_t>, Barrier> of_lanes;  // by warp and the lanes that take part
  std::vector<double> swapped;                           // a value of every thread
};

struct EmulatedCluster {
  std::vector<std::unique_ptr<EmulatedBlock>> blocks;
  Barrier barrier;
  int64_t grid = 0;
};

struct Fiber {
  static constexpr int kStackBytes = 128 << 10;
  ucontext_t context;
  EmulatedBlock* block;
  int thread;
  bool done = false;
};

inline EmulatedCluster* cluster_now = nullptr;
inline Fiber* fiber_now = nullptr;
inline ucontext_t scheduler;
inline int64_t progress = 0;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of fibers, by all launches
inline std::function<void()> kernel_now;
// What the stream has to do before its next kernel: until then the host does not see its results.
inline std::function<void()> pending = [] {};

inline void WaitFor(Barrier& barrier, int expected) {
  ++progress;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  const int64_t generation = barrier.generation;
  while (barrier.generation == generation) swapcontext(&fiber_now->context, &scheduler);
}

inline int ThreadId() { return fiber_now->thread; }
inline int64_t BlockId() { return fiber_now->block->id; }
inline int64_t Blocks() { return cluster_now->grid; }
inline char* SharedMemory() { return fiber_now->block->shared.data(); }
inline void SyncBlock() { WaitFor(fiber_now->block->barrier, fiber_now->block->threads); }
inline int ClusterRank() { return fiber_now->block->rank; }
inline void PublishToCluster() {}
inline void SyncCluster() {
  int threads = 0;
  for (const auto& block : cluster_now->blocks) threads += block->threads;
  WaitFor(cluster_now->barrier, threads);
}

inline void LeaveCluster() { SyncCluster(); }

template <typename A>
A Swap(uint32_t among, A value, int lanes) {
  EmulatedBlock& block = *fiber_now->block;
  const int thread = fiber_now->thread;
  if (!(among >> (thread % 32) & 1) || !(among >> ((thread ^ lanes) % 32) & 1)) {
    std::fprintf(stderr, "a lane swaps with lanes that do not take part\n");
    std::abort();
  }
  Barrier& barrier = block.of_lanes[{thread / 32, among}];
  std::memcpy(&block.swapped[thread], &value, sizeof(value));
  WaitFor(barrier, __builtin_popcount(among));
  A other;
  std::memcpy(&other, &block.swapped[thread ^ lanes], sizeof(other));
  WaitFor(barrier, __builtin_popcount(among));
  return other;
}

inline void AtomicOr(uint32_t* word, uint32_t bits) { *word |= bits; }

template <typename A>
A ReadPeer(const A* place, int rank) {
  const int64_t offset = reinterpret_cast<const char*>(place) - SharedMemory();
  return *reinterpret_cast<const A*>(cluster_now->blocks[rank]->shared.data() + offset);
}

inline float ToSum(float x) { return x; }
inline double ToSum(double x) { return x; }
inline float ToSum(Half x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof(half));
  return static_cast<float>(half);
}
inline float ToSum(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}
inline void Round(float x, float* to) { *to = x; }
inline void Round(double x, double* to) { *to = x; }
inline void Round(float x, Half* to) {
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&to->bits, &half, sizeof(half));
}
inline void Round(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  to->bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

inline float Exp(float x) { return std::exp2(x * 1.44269504088896340736f); }
inline double Exp(double x) { return std::exp(x); }
inline float Log(float x) { return std::log(x); }
inline double Log(double x) { return std::log(x); }
template <typename A>
A Max(A a, A b) {
  return std::fmax(a, b);
}
template <typename A>
A Min(A a, A b) {
  return std::fmin(a, b);
}

template <typename A>
A Abs(A x) {
  return std::fabs(x);
}
template <typename A>
A WithSign(A size, A x) {
  return std::copysign(size, x);
}
template <typename A>
A Reciprocal(A x) {
  return 1 / x;
}
template <typename A>
A Sqrt(A x) {
  return std::sqrt(x);
}
template <typename A>
A Product(A x, A y) {
  return x * y;
}

inline void CheckAligned(const void* memory) {
  if (reinterpret_cast<uintptr_t>(memory) % 16 == 0) return;
  std::fprintf(stderr, "16 bytes at an address that is not aligned to them\n");
  std::abort();
}
template <typename Vector>
Vector LoadOnce(const void* from) {
  CheckAligned(from);
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <typename Vector>
Vector LoadAgain(const void* from) {
  return LoadOnce<Vector>(from);
}
template <typename Vector>
void StoreOnce(void* to, const Vector& vector) {
  CheckAligned(to);
  std::memcpy(to, &vector, sizeof(vector));
}

inline GpuError Zero(const Gpu&, void* memory, int64_t bytes) {
  std::memset(memory, 0, bytes);
  return nullptr;
}
inline GpuError SharedMemoryLimit(int64_t* bytes) {
  *bytes = emulated_device.shared_memory_limit;
  return nullptr;
}
template <typename... Args>
GpuError HasClusters(void (*)(Args...), bool* has) {
  *has = emulated_device.has_clusters;
  return nullptr;
}

inline void RunFiber() {
  kernel_now();
  fiber_now->done = true;
  ++progress;
  swapcontext(&fiber_now->context, &scheduler);
}

inline void RunCluster() {
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (const auto& block : cluster_now->blocks) {
    for (int thread = 0; thread < block->threads; ++thread) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = block.get();
      fiber->thread = thread;
      if (stacks.size() == fibers.size()) stacks.emplace_back(new char[Fiber::kStackBytes]);
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = stacks[fibers.size()].get();
      fiber->context.uc_stack.ss_size = Fiber::kStackBytes;
      makecontext(&fiber->context, RunFiber, 0);
      fibers.push_back(std::move(fiber));
    }
  }
  if (emulated_device.runs_backwards) std::reverse(fibers.begin(), fibers.end());
  for (bool running = true; running;) {
    running = false;
    const int64_t before = progress;
    for (const auto& fiber : fibers) {
      if (fiber->done) continue;
      running = true;
      fiber_now = fiber.get();
      swapcontext(&scheduler, &fiber->context);
    }
    if (running && progress == before) {
      std::fprintf(stderr, "threads wait for others that never come\n");
      std::abort();
    }
  }
}

template <typename... Args>
GpuError Launch(const Gpu&, void (*kernel)(Args...), int64_t blocks, int threads, int cluster,
                int64_t shared_bytes, const Args&... args) {
  constexpr int kGuardBytes = 64;
  if (shared_bytes > emulated_device.shared_memory_limit) return "too much shared memory";
  if (blocks < 1 || blocks % cluster != 0) return "no such grid";
  pending();
  kernel_now = [=] { kernel(args...); };
  for (int64_t first = 0; first < blocks; first += cluster) {
    EmulatedCluster now;
    now.grid = blocks;
    for (int rank = 0; rank < cluster; ++rank) {
      auto block = std::make_unique<EmulatedBlock>();
      block->id = first + rank;
      block->rank = rank;
      block->threads = threads;
      block->shared.assign(shared_bytes + kGuardBytes, '\xff');
      block->swapped.resize(threads);
      now.blocks.push_back(std::move(block));
    }
    cluster_now = &now;
    RunCluster();
    for (const auto& block : now.blocks) {
      for (int i = 0; i < kGuardBytes; ++i) {
        if (block->shared[shared_bytes + i] != '\xff') return "wrote beyond the shared memory";
      }
    }
  }
  return nullptr;
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_TESTS_EMULATED_GPU_H_
