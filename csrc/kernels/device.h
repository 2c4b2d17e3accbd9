// All that a kernel knows of the device it runs on.
#ifndef FUSEDLOSS_KERNELS_DEVICE_H_
#define FUSEDLOSS_KERNELS_DEVICE_H_

#include <cstdint>

namespace fusedloss {

// A CPU and the threads of whoever owns them: TensorFlow's pool, XLA's, or the caller alone.
struct Cpu {
  // Runs fn(context, block) once for every block in [0, blocks), on any threads, in any order, and
  // returns when all have run. Kernels make their results independent of threads and order.
  void (*parallel_for)(void* threads, int64_t blocks, void (*fn)(void* context, int64_t block),
                       void* context);
  void* threads;

  template <typename Fn>
  void ParallelFor(int64_t blocks, Fn&& fn) const {
    parallel_for(
        threads, blocks, [](void* context, int64_t block) { (*static_cast<Fn*>(context))(block); },
        &fn);
  }
};

// A CUDA device, as the caller has made it current: the stream that kernels are enqueued on, and
// memory of the device from whoever owns it. Kernels enqueue and return; they never wait.
struct Gpu {
  void* stream;  // cudaStream_t
  // `bytes` of device memory, aligned to 256 bytes, that stay valid until the work enqueued on the
  // stream so far and by this call is done; null if there are none left.
  void* (*allocate)(void* owner, int64_t bytes);
  void* owner;
};
// Why nothing or not everything was enqueued: a CUDA error in words, or null if all was.
using GpuError = const char*;

// The instruction sets a CPU kernel is compiled for, best last.
enum class CpuLevel { kBaseline, kAvx2, kAvx512 };

// The best level that this CPU has, or the one that FUSEDLOSS_CPU=baseline|avx2|avx512 forces.
// Read once. A forced level that the CPU lacks, or an unknown word, falls back to the best one;
// CpuLevelError() then says so.
CpuLevel ChosenCpuLevel();
const char* CpuLevelName(CpuLevel level);
const char* CpuLevelError();  // "" if FUSEDLOSS_CPU is unset or was obeyed

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_DEVICE_H_
