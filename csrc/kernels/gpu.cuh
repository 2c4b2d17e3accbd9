// What CUDA kernels share: conversions, memory, sums, launching. Kernels use CUDA through this file
// alone; a test puts its own in the place of the first part and runs them on a CPU.
#ifndef FUSEDLOSS_KERNELS_GPU_CUH_
#define FUSEDLOSS_KERNELS_GPU_CUH_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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
FUSEDLOSS_DEVICE float Abs(float x) { return fabsf(x); }
FUSEDLOSS_DEVICE double Abs(double x) { return fabs(x); }
// `size` with the sign of x.
FUSEDLOSS_DEVICE float WithSign(float size, float x) { return copysignf(size, x); }
FUSEDLOSS_DEVICE double WithSign(double size, double x) { return copysign(size, x); }
// 1 / x to within an ulp, for x and 1 / x normal.
FUSEDLOSS_DEVICE float Reciprocal(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}
FUSEDLOSS_DEVICE double Reciprocal(double x) { return 1 / x; }
FUSEDLOSS_DEVICE float Sqrt(float x) { return sqrtf(x); }
FUSEDLOSS_DEVICE double Sqrt(double x) { return sqrt(x); }
// x · y, rounded before it is added to anything.
FUSEDLOSS_DEVICE float Product(float x, float y) { return __fmul_rn(x, y); }
FUSEDLOSS_DEVICE double Product(double x, double y) { return __dmul_rn(x, y); }

// ---- 16 bytes of memory, aligned, that are touched once, or again. Clang has no intrinsics.

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
FUSEDLOSS_DEVICE Vector LoadAgain(const void* from) {
  static_assert(sizeof(Vector) == 16);
  uint4 bits;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
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

// ---- What is built on the above alone.

namespace fusedloss {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;  // of a block

// log(1 + t) for t in [0, 1] and e^x − 1 for x in [−1, 0], to within an ulp. The polynomials are
// minimax fits (Remez) of log(1 + t)/t and (e^x − 1)/x, to 4.7e-9 and 2.5e-9.
FUSEDLOSS_DEVICE float Log1p(float t) {
  float sum = -3.2440119e-3f;
  sum = sum * t + 1.98514005e-2f;
  sum = sum * t - 5.69594133e-2f;
  sum = sum * t + 1.06036420e-1f;
  sum = sum * t - 1.53055845e-1f;
  sum = sum * t + 1.96759363e-1f;
  sum = sum * t - 2.49541330e-1f;
  sum = sum * t + 3.33299623e-1f;
  sum = sum * t - 4.99999024e-1f;
  return t + t * t * sum;
}
FUSEDLOSS_DEVICE double Log1p(double t) { return log1p(t); }
FUSEDLOSS_DEVICE float ExpMinus1(float x) {
  float sum = 1.28380725e-4f;
  sum = sum * x + 1.29866376e-3f;
  sum = sum * x + 8.27309556e-3f;
  sum = sum * x + 4.16455774e-2f;
  sum = sum * x + 1.66663098e-1f;
  sum = sum * x + 4.99999770e-1f;
  return x + x * x * sum;
}
FUSEDLOSS_DEVICE double ExpMinus1(double x) { return expm1(x); }

// ---- Arrays in vectors of 16 bytes.

// Elements in registers.
template <typename T, int kCount>
struct Vector {
  T values[kCount];
};
template <typename T>
struct alignas(16) Aligned : Vector<T, 16 / sizeof(T)> {};

// One element, or a multiple of 16 bytes at an aligned address; kAgain: that others read, too.
template <bool kAgain = false, typename T, int kCount>
FUSEDLOSS_DEVICE void Load(const T* from, Vector<T, kCount>& to) {
  if constexpr (kCount == 1) {
    to.values[0] = *from;
  } else {
    constexpr int kPart = 16 / sizeof(T);
    static_assert(kCount % kPart == 0);
#pragma unroll
    for (int i = 0; i < kCount; i += kPart) {
      const auto part = kAgain ? LoadAgain<Aligned<T>>(from + i) : LoadOnce<Aligned<T>>(from + i);
      memcpy(&to.values[i], part.values, sizeof(part.values));
    }
  }
}
template <typename T, int kCount>
FUSEDLOSS_DEVICE void Store(T* to, const Vector<T, kCount>& from) {
  if constexpr (kCount == 1) {
    *to = from.values[0];
  } else {
    Aligned<T> aligned;
    static_assert(sizeof(aligned) == sizeof(from));
    memcpy(aligned.values, from.values, sizeof(from));
    StoreOnce(to, aligned);
  }
}

// The same into shared memory, or where it will be read again.
template <typename T, int kCount>
FUSEDLOSS_DEVICE void Keep(T* to, const Vector<T, kCount>& from) {
  if constexpr (kCount == 1) {
    *to = from.values[0];
  } else {
    constexpr int kPart = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kCount; i += kPart) {
      auto& part = *reinterpret_cast<Aligned<T>*>(to + i);
      memcpy(part.values, &from.values[i], sizeof(part.values));
    }
  }
}

// Calls fn(offset from begin, xs, ys) for all of [begin, end), at most 2^30 elements, of two
// arrays, or of one if not has_y: if `wide`, both arrays begin at aligned addresses, for vectors of
// 16 bytes of x that lie at a multiple of their size, and for what is left for single elements. The
// threads of the block share the work; each loads kBatch vectors before it uses the first.
template <int kBatch, typename X, typename Y, typename Fn>
FUSEDLOSS_DEVICE void EachVector(const X* x, const Y* y, bool has_y, int64_t begin, int64_t end,
                                 bool wide, Fn&& fn) {
  constexpr int kVector = 16 / sizeof(X);
  x += begin;
  if (has_y) y += begin;
  const int count = static_cast<int>(end - begin);
  const int to_aligned = static_cast<int>((kVector - begin % kVector) % kVector);
  const int head = wide && to_aligned < count ? to_aligned : count;
  const int vectors = (count - head) / kVector;
  // Without a condition on a load of a batch: the compiler would move the load to its use.
  auto batch = [&](int v, auto size) {
    constexpr int kSize = decltype(size)::value;
    Vector<X, kVector> xs[kSize];
    Vector<Y, kVector> ys[kSize];
#pragma unroll
    for (int b = 0; b < kSize; ++b) {
      const int64_t at = head + int64_t{v + b * kThreads} * kVector;
      Load(x + at, xs[b]);
      if (has_y) Load(y + at, ys[b]);
    }
#pragma unroll
    for (int b = 0; b < kSize; ++b) fn(head + (v + b * kThreads) * kVector, xs[b], ys[b]);
  };
  int v = ThreadId();
  for (; kBatch > 1 && v + (kBatch - 1) * kThreads < vectors; v += kBatch * kThreads) {
    batch(v, std::integral_constant<int, kBatch>());
  }
#pragma unroll 1
  for (; v < vectors; v += kThreads) batch(v, std::integral_constant<int, 1>());
#pragma unroll 1
  for (int i = ThreadId(); i < count - vectors * kVector; i += kThreads) {
    const int at = i < head ? i : i + vectors * kVector;
    fn(at, Vector<X, 1>{x[at]}, Vector<Y, 1>{has_y ? y[at] : Y{}});
  }
}

// ---- Sums.

struct Plus {
  template <typename A>
  FUSEDLOSS_DEVICE A operator()(A a, A b) const {
    return a + b;
  }
};

// Of lanes whose numbers agree above log2(lanes): every one of them gets the same result.
template <typename A, int kValues, typename Op>
FUSEDLOSS_DEVICE void ReduceLanes(int lanes, uint32_t among, A (&values)[kValues], Op op) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    for (int i = 0; i < kValues; ++i) {
      values[i] = op(values[i], Swap(among, values[i], distance));
    }
  }
}

// The lanes of its warp that are in one run of `lanes`, a power of two, with the calling thread.
FUSEDLOSS_DEVICE uint32_t AmongLanes(int lanes) {
  const uint32_t first = (lanes == kWarp ? 0 : 1u << lanes) - 1u;
  return first << (ThreadId() % kWarp / lanes * lanes);
}

// Σ of `mine` over the block's threads, in the first kSumBytes of shared memory.
constexpr int64_t kSumBytes = kWarps * sizeof(double);
FUSEDLOSS_DEVICE double SumOfBlock(double mine) {
  auto* sums = reinterpret_cast<double*>(SharedMemory());
  double values[1] = {mine};
  ReduceLanes(kWarp, 0xffffffffu, values, Plus());
  SyncBlock();  // what was there before may still be read
  if (ThreadId() % kWarp == 0) sums[ThreadId() / kWarp] = values[0];
  SyncBlock();
  double sum = sums[0];
  for (int warp = 1; warp < kWarps; ++warp) sum += sums[warp];
  return sum;
}

// sums[block] = scale · Σ weight · value over the block's share. Null weights are 1.
template <typename In, typename Out>
FUSEDLOSS_KERNEL_OF(kThreads, 1)
SumUp(const In* values, const In* weights, int64_t count, double scale, Out* sums) {
  const int64_t share = (count + Blocks() - 1) / Blocks();
  const int64_t begin = BlockId() * share;
  const int64_t end = begin + share < count ? begin + share : count;
  double sum = 0;
#pragma unroll 8
  for (int64_t i = begin + ThreadId(); i < end; i += kThreads) {
    sum += (weights ? static_cast<double>(weights[i]) : 1) * values[i];
  }
  sum = SumOfBlock(sum);
  if (ThreadId() == 0) sums[BlockId()] = static_cast<Out>(scale * sum);
}

// ---- Tables of arrays, for one kernel that runs over the tiles of them all. An Entry has the
// number of its first_tile.

template <typename Entry>
struct Entries {
  static constexpr int kCount = (4096 - 64) / sizeof(Entry);  // that a kernel's parameters hold
  Entry entries[kCount];
};

template <typename Entry>
FUSEDLOSS_KERNEL_OF(kWarp, 1)
Fill(Entries<Entry> from, int count, Entry* table) {
  for (int i = ThreadId(); i < count; i += kWarp) table[i] = from.entries[i];
}

// The last entry that begins at or before the tile.
template <typename Entry>
FUSEDLOSS_DEVICE int64_t EntryOf(const Entry* table, int64_t count, int64_t tile) {
  int64_t entry = 0;
  for (int64_t past = count; past - entry > 1;) {
    const int64_t middle = (entry + past) / 2;
    (table[middle].first_tile <= tile ? entry : past) = middle;
  }
  return entry;
}

// ---- The host's side.

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool IsAligned(const void* memory) { return reinterpret_cast<uintptr_t>(memory) % 16 == 0; }

// *sum = scale · Σ values[i]
template <typename A>
GpuError AddUp(const Gpu& gpu, const double* values, int64_t count, double scale, A* sum) {
  const double* ones = nullptr;
  return Launch(gpu, SumUp<double, A>, 1, kThreads, 1, kSumBytes, values, ones, count, scale, sum);
}

constexpr GpuError kNoMemory = "out of memory";

#define FUSEDLOSS_RETURN_IF_ERROR(call) \
  if (GpuError error = call) return error

// *table: of these entries. They travel to device memory as parameters of small kernels: a copy
// from the host's memory would have to wait, and could not be recorded in a CUDA graph.
template <typename Entry>
GpuError MakeTable(const Gpu& gpu, const std::vector<Entry>& entries, const Entry** table) {
  const auto count = static_cast<int64_t>(entries.size());
  if (count == 0) return nullptr;
  auto* made = static_cast<Entry*>(gpu.allocate(gpu.owner, count * int64_t{sizeof(Entry)}));
  if (made == nullptr) return kNoMemory;
  for (int64_t first = 0; first < count; first += Entries<Entry>::kCount) {
    Entries<Entry> some{};
    const int64_t left = count - first;
    const int size = left < some.kCount ? static_cast<int>(left) : some.kCount;
    for (int i = 0; i < size; ++i) some.entries[i] = entries[first + i];
    FUSEDLOSS_RETURN_IF_ERROR(Launch(gpu, Fill<Entry>, 1, kWarp, 1, 0, some, size, made + first));
  }
  *table = made;
  return nullptr;
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_GPU_CUH_
