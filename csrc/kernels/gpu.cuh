// What CUDA kernels share: conversions, memory, reductions within a warp, launching. Kernels use
// CUDA through this file alone, so that a test can run them on a CPU in its place.
#ifndef FUSEDLOSS_KERNELS_GPU_CUH_
#define FUSEDLOSS_KERNELS_GPU_CUH_

#include <cstdint>
#include <cstring>

#include "kernels/device.h"
#include "kernels/half.h"

#if defined(FUSEDLOSS_EMULATED_GPU)
#include "emulated_gpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A kernel of that many threads a block, of which so many blocks fit a multiprocessor's registers.
#define FUSEDLOSS_KERNEL_OF(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FUSEDLOSS_DEVICE __device__ __forceinline__

namespace fusedloss {

FUSEDLOSS_DEVICE int ThreadId() { return threadIdx.x; }
FUSEDLOSS_DEVICE int64_t BlockId() { return blockIdx.x; }
FUSEDLOSS_DEVICE int64_t Blocks() { return gridDim.x; }
FUSEDLOSS_DEVICE void SyncBlock() { __syncthreads(); }

// The block's shared memory, as much as it was launched with.
FUSEDLOSS_DEVICE char* SharedMemory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// `value` of the lane whose number differs in the bits of `lanes`; `among` has a bit for every lane
// of the warp that takes part.
template <typename A>
FUSEDLOSS_DEVICE A Swap(uint32_t among, A value, int lanes) {
  return __shfl_xor_sync(among, value, lanes);
}

FUSEDLOSS_DEVICE void AtomicOr(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }

// ---- Blocks of a cluster, from compute capability 9.0 on. Elsewhere each is on its own.

FUSEDLOSS_DEVICE int ClusterRank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
// Before SyncCluster by a thread whose writes to shared memory the other blocks are to see: a fence
// by every thread would wait for all that they have under way.
FUSEDLOSS_DEVICE void PublishToCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
}
FUSEDLOSS_DEVICE void SyncCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}
// The last of a kernel: what this block has read of the others' memory, it has read before.
FUSEDLOSS_DEVICE void LeaveCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}
// What lies at the same place in the shared memory of another block of the cluster.
template <typename A>
FUSEDLOSS_DEVICE A ReadPeer(const A* place, int rank) {
  A value = *place;
#if __CUDA_ARCH__ >= 900
  uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(place)), there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  if constexpr (sizeof(A) == 4) {
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  } else {
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(there) : "memory");
  }
#endif
  return value;
}

// ---- Numbers.

FUSEDLOSS_DEVICE float ToSum(float x) { return x; }
FUSEDLOSS_DEVICE double ToSum(double x) { return x; }
FUSEDLOSS_DEVICE float ToSum(Half x) { return __half2float(__ushort_as_half(x.bits)); }
FUSEDLOSS_DEVICE float ToSum(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

// To the nearest, ties to even.
FUSEDLOSS_DEVICE void Round(float x, float* to) { *to = x; }
FUSEDLOSS_DEVICE void Round(double x, double* to) { *to = x; }
FUSEDLOSS_DEVICE void Round(float x, Half* to) { to->bits = __half_as_ushort(__float2half_rn(x)); }
FUSEDLOSS_DEVICE void Round(float x, BFloat16* to) {
  to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// e^x for x <= 0, to within 2 ulp near 0 and |x|/2 ulp more away from it: the error of a softmax is
// relative to its largest term. Subnormal results are 0.
FUSEDLOSS_DEVICE float Exp(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504088896340736f));
  return power;
}
FUSEDLOSS_DEVICE double Exp(double x) { return exp(x); }
FUSEDLOSS_DEVICE float Log(float x) { return logf(x); }
FUSEDLOSS_DEVICE double Log(double x) { return log(x); }
// Of a NaN and something else, the other.
FUSEDLOSS_DEVICE float Max(float a, float b) { return fmaxf(a, b); }
FUSEDLOSS_DEVICE double Max(double a, double b) { return fmax(a, b); }
FUSEDLOSS_DEVICE float Min(float a, float b) { return fminf(a, b); }
FUSEDLOSS_DEVICE double Min(double a, double b) { return fmin(a, b); }

// ---- Memory that is touched once: 16 bytes, aligned. Clang has no intrinsics for them.

template <typename Vector>
FUSEDLOSS_DEVICE Vector LoadOnce(const void* from) {
  static_assert(sizeof(Vector) == 16);
  uint4 bits;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(__cvta_generic_to_global(from)));
  Vector vector;
  memcpy(&vector, &bits, sizeof(bits));
  return vector;
}
template <typename Vector>
FUSEDLOSS_DEVICE void StoreOnce(void* to, const Vector& vector) {
  static_assert(sizeof(Vector) == 16);
  uint4 bits;
  memcpy(&bits, &vector, sizeof(bits));
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}

// ---- The host's side.

inline GpuError InWords(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline GpuError Zero(const Gpu& gpu, void* memory, int64_t bytes) {
  if (bytes == 0) return nullptr;
  return InWords(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(gpu.stream)));
}

// The most shared memory that a block can have on the current device, in bytes.
inline GpuError SharedMemoryLimit(int64_t* bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  *bytes = limit;
  return InWords(error);
}

// Whether the code of `kernel` that runs on the current device knows of clusters.
template <typename... Args>
GpuError HasClusters(void (*kernel)(Args...), bool* has) {
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  *has = attributes.ptxVersion >= 90;
  return InWords(error);
}

constexpr int64_t kSharedBytesUnasked = 48 << 10;  // what every kernel may have

template <typename... Args>
GpuError Launch(const Gpu& gpu, void (*kernel)(Args...), int64_t blocks, int threads, int cluster,
                int64_t shared_bytes, const Args&... args) {
  if (shared_bytes > kSharedBytesUnasked) {
    // The limit belongs to the kernel, not to the launch: always the same, or one thread would
    // lower it for another.
    int64_t limit = 0;
    if (GpuError error = SharedMemoryLimit(&limit)) return error;
    cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit));
    if (error != cudaSuccess) return InWords(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(gpu.stream);
  cudaLaunchAttribute clusters{};
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim.x = cluster;
  clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
  config.attrs = &clusters;
  config.numAttrs = cluster > 1 ? 1 : 0;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  return InWords(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers));
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_EMULATED_GPU

#endif  // FUSEDLOSS_KERNELS_GPU_CUH_
