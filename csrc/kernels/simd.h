// Vectors of the widest kind that the translation unit is compiled for, on GCC's vector extension.
// Everything lies in a namespace named after that kind, so that the linker cannot replace one
// version by another. FUSEDLOSS_CPU_LEVEL is baseline, avx2 or avx512.
#ifndef FUSEDLOSS_KERNELS_SIMD_H_
#define FUSEDLOSS_KERNELS_SIMD_H_

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "kernels/half.h"

#define FUSEDLOSS_INLINE inline __attribute__((always_inline))
// On a lambda, which takes no `inline`.
#define FUSEDLOSS_FLATTEN __attribute__((always_inline))

namespace fusedloss::FUSEDLOSS_CPU_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float Value __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double Value __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
};

template <typename A>
using Vec = typename VectorOf<A>::Value;
template <typename A>
using Mask = typename VectorOf<A>::Mask;  // a lane is 0 or −1
template <typename A>
inline constexpr int kLanes = VectorOf<A>::kLanes;

template <typename To, typename From>
FUSEDLOSS_INLINE To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename A>
FUSEDLOSS_INLINE Vec<A> Set(A x) {
  return x - Vec<A>{};  // −0 − 0 is −0: every x comes back as it is
}

template <typename A>
FUSEDLOSS_INLINE Mask<A> LaneIds() {
  Mask<A> ids;
  for (int i = 0; i < kLanes<A>; ++i) ids[i] = i;
  return ids;
}

template <typename A>
FUSEDLOSS_INLINE Vec<A> Select(Mask<A> mask, Vec<A> yes, Vec<A> no) {
  // Not `mask ? yes : no`: GCC 12 breaks on it where it combines with a comparison.
  return BitCast<Vec<A>>((BitCast<Mask<A>>(yes) & mask) | (BitCast<Mask<A>>(no) & ~mask));
}

// x as it is, rounded: what a product becomes part of is not contracted with it.
template <typename A>
FUSEDLOSS_INLINE Vec<A> Rounded(Vec<A> x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#else
  asm("" : "+x"(x));
#endif
  return x;
}

// x where the mask is set, else 0, whatever x is.
template <typename A>
FUSEDLOSS_INLINE Vec<A> Keep(Mask<A> mask, Vec<A> x) {
  return BitCast<Vec<A>>(BitCast<Mask<A>>(x) & mask);
}

template <typename A>
FUSEDLOSS_INLINE bool Any(Mask<A> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask(BitCast<__m512i>(mask), BitCast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(BitCast<__m256i>(mask), BitCast<__m256i>(mask));
#else
  return _mm_movemask_epi8(BitCast<__m128i>(mask)) != 0;
#endif
}

// a > b ? a : b, and a < b ? a : b: of a NaN and something else, b. GCC does not find them itself.
#if defined(__AVX512F__)
#define FUSEDLOSS_OF_WIDTH(name) _mm512_##name
#elif defined(__AVX2__)
#define FUSEDLOSS_OF_WIDTH(name) _mm256_##name
#else
#define FUSEDLOSS_OF_WIDTH(name) _mm_##name
#endif
template <typename A>
FUSEDLOSS_INLINE Vec<A> Max(Vec<A> a, Vec<A> b) {
  if constexpr (std::is_same_v<A, float>) return FUSEDLOSS_OF_WIDTH(max_ps)(a, b);
  if constexpr (std::is_same_v<A, double>) return FUSEDLOSS_OF_WIDTH(max_pd)(a, b);
}
template <typename A>
FUSEDLOSS_INLINE Vec<A> Min(Vec<A> a, Vec<A> b) {
  if constexpr (std::is_same_v<A, float>) return FUSEDLOSS_OF_WIDTH(min_ps)(a, b);
  if constexpr (std::is_same_v<A, double>) return FUSEDLOSS_OF_WIDTH(min_pd)(a, b);
}
template <typename A>
FUSEDLOSS_INLINE Vec<A> Sqrt(Vec<A> x) {
  if constexpr (std::is_same_v<A, float>) return FUSEDLOSS_OF_WIDTH(sqrt_ps)(x);
  if constexpr (std::is_same_v<A, double>) return FUSEDLOSS_OF_WIDTH(sqrt_pd)(x);
}
#undef FUSEDLOSS_OF_WIDTH
FUSEDLOSS_INLINE float SqrtOfOne(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
FUSEDLOSS_INLINE double SqrtOfOne(double x) {
  return _mm_cvtsd_f64(_mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(x)));
}

// least and greatest with the lanes of v taken in where `where` is not 0.
FUSEDLOSS_INLINE void WidenRange(Vec<float> where, Vec<float> v, Vec<float>& least,
                                 Vec<float>& greatest) {
#if defined(__AVX512F__)
  __mmask16 taken = _mm512_cmp_ps_mask(where, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  least = _mm512_mask_min_ps(least, taken, v, least);
  greatest = _mm512_mask_max_ps(greatest, taken, v, greatest);
#else
  Mask<float> taken = where != 0.0f;
  least = Min<float>(Select<float>(taken, v, least), least);
  greatest = Max<float>(Select<float>(taken, v, greatest), greatest);
#endif
}
FUSEDLOSS_INLINE void WidenRange(Vec<double> where, Vec<double> v, Vec<double>& least,
                                 Vec<double>& greatest) {
  Mask<double> taken = where != 0.0;
  least = Min<double>(Select<double>(taken, v, least), least);
  greatest = Max<double>(Select<double>(taken, v, greatest), greatest);
}

// Butterflies: every lane ends up with the same sum (or greatest) of all lanes.
template <typename A>
FUSEDLOSS_INLINE Vec<A> SumOfLanes(Vec<A> v) {
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    v += __builtin_shuffle(v, LaneIds<A>() ^ width);
  }
  return v;
}
template <typename A>
FUSEDLOSS_INLINE Vec<A> MaxOfLanes(Vec<A> v) {
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    v = Max<A>(v, __builtin_shuffle(v, LaneIds<A>() ^ width));
  }
  return v;
}

// ---- Memory: a vector of A from kLanes<A> consecutive T, and back, rounding to nearest even.

FUSEDLOSS_INLINE Vec<float> Load(const float* from) {
  Vec<float> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
FUSEDLOSS_INLINE Vec<double> Load(const double* from) {
  Vec<double> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

FUSEDLOSS_INLINE HalfBits LoadBits(const void* from) {
  HalfBits bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return bits;
}

// Sixteen bits to thirty-two and back; __builtin_convertvector takes three times the instructions.
FUSEDLOSS_INLINE FloatBits Widen(HalfBits bits) {
#if defined(__AVX512F__)
  return BitCast<FloatBits>(_mm512_cvtepu16_epi32(BitCast<__m256i>(bits)));
#elif defined(__AVX2__)
  return BitCast<FloatBits>(_mm256_cvtepu16_epi32(BitCast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, FloatBits);
#endif
}
FUSEDLOSS_INLINE HalfBits Narrow(FloatBits bits) {
#if defined(__AVX512F__)
  return BitCast<HalfBits>(_mm512_cvtepi32_epi16(BitCast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, HalfBits);
#endif
}

FUSEDLOSS_INLINE Vec<float> Load(const BFloat16* from) {
  return BitCast<Vec<float>>(Widen(LoadBits(from)) << 16);
}

#if defined(__AVX512F__)
// One instruction of some of the CPUs that have the others: worth a branch, not a level of its own.
inline const bool kHasBFloat16 = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16"));
#endif

FUSEDLOSS_INLINE HalfBits Round(Vec<float> v, BFloat16) {
#if defined(__AVX512F__)
  if (kHasBFloat16) {
    HalfBits rounded;
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
    return rounded;
  }
#endif
  FloatBits bits = BitCast<FloatBits>(v);
  FloatBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  FloatBits quiet_nan = FloatBits{} + 0x7fc0;
  return Narrow(v == v ? rounded : quiet_nan);
}

#if defined(__AVX512F__)
FUSEDLOSS_INLINE Vec<float> Load(const Half* from) {
  return _mm512_cvtph_ps(BitCast<__m256i>(LoadBits(from)));
}
FUSEDLOSS_INLINE HalfBits Round(Vec<float> v, Half) {
  return BitCast<HalfBits>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
FUSEDLOSS_INLINE Vec<float> Load(const Half* from) {
  return _mm256_cvtph_ps(BitCast<__m128i>(LoadBits(from)));
}
FUSEDLOSS_INLINE HalfBits Round(Vec<float> v, Half) {
  return BitCast<HalfBits>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
FUSEDLOSS_INLINE Vec<float> Load(const Half* from) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(BitCast<_Float16>(from[i]));
  return v;
}
FUSEDLOSS_INLINE HalfBits Round(Vec<float> v, Half) {
  HalfBits bits;
  for (int i = 0; i < kLanes<float>; ++i) {
    bits[i] = BitCast<uint16_t>(static_cast<_Float16>(v[i]));
  }
  return bits;
}
#endif

FUSEDLOSS_INLINE void Store(float* to, Vec<float> v) { __builtin_memcpy(to, &v, sizeof(v)); }
FUSEDLOSS_INLINE void Store(double* to, Vec<double> v) { __builtin_memcpy(to, &v, sizeof(v)); }
template <typename T>
FUSEDLOSS_INLINE void Store(T* to, Vec<float> v) {
  HalfBits bits = Round(v, T{});
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// Past the caches, for what is larger than they are: an ordinary store first reads the line that
// it overwrites. `to` is aligned to the bytes stored.
FUSEDLOSS_INLINE void StreamBits(void* to, const void* from, int bytes) {
#if defined(__AVX512F__)
  if (bytes == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(to),
                               _mm512_loadu_si512(static_cast<const __m512i*>(from)));
  }
#endif
#if defined(__AVX2__)
  if (bytes == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to),
                               _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }
#endif
  if (bytes == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(to),
                            _mm_loadu_si128(static_cast<const __m128i*>(from)));
  }
  long long word;
  __builtin_memcpy(&word, from, sizeof(word));
  _mm_stream_si64(static_cast<long long*>(to), word);
}
FUSEDLOSS_INLINE void Stream(float* to, Vec<float> v) { StreamBits(to, &v, sizeof(v)); }
FUSEDLOSS_INLINE void Stream(double* to, Vec<double> v) { StreamBits(to, &v, sizeof(v)); }
template <typename T>
FUSEDLOSS_INLINE void Stream(T* to, Vec<float> v) {
  HalfBits bits = Round(v, T{});
  StreamBits(to, &bits, sizeof(bits));
}

// The first `count` < kLanes<A> of a vector; the others load as zero and are not stored.
#if defined(__AVX512F__)
FUSEDLOSS_INLINE __mmask16 FirstBits(int count) {
  return static_cast<__mmask16>((1u << count) - 1);
}
FUSEDLOSS_INLINE Vec<float> LoadFirst(const float* from, int count) {
  return _mm512_maskz_loadu_ps(FirstBits(count), from);
}
FUSEDLOSS_INLINE Vec<double> LoadFirst(const double* from, int count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(FirstBits(count)), from);
}
template <typename T>
FUSEDLOSS_INLINE Vec<float> LoadFirst(const T* from, int count) {
  T padded[kLanes<float>];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(padded),
                      _mm256_maskz_loadu_epi16(FirstBits(count), from));
  return Load(padded);
}
FUSEDLOSS_INLINE void StoreFirst(float* to, Vec<float> v, int count) {
  _mm512_mask_storeu_ps(to, FirstBits(count), v);
}
FUSEDLOSS_INLINE void StoreFirst(double* to, Vec<double> v, int count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(FirstBits(count)), v);
}
template <typename T>
FUSEDLOSS_INLINE void StoreFirst(T* to, Vec<float> v, int count) {
  _mm256_mask_storeu_epi16(to, FirstBits(count), BitCast<__m256i>(Round(v, T{})));
}
#else
template <typename T, typename A = Accumulator<T>>
FUSEDLOSS_INLINE Vec<A> LoadFirst(const T* from, int count) {
  T padded[kLanes<A>] = {};
  for (int i = 0; i < count; ++i) padded[i] = from[i];
  return Load(padded);
}
template <typename T, typename A = Accumulator<T>>
FUSEDLOSS_INLINE void StoreFirst(T* to, Vec<A> v, int count) {
  T padded[kLanes<A>];
  Store(padded, v);
  for (int i = 0; i < count; ++i) to[i] = padded[i];
}
#endif

// One number, converted as a vector's lanes are.
template <typename T>
FUSEDLOSS_INLINE Accumulator<T> LoadOne(const T* from) {
  return LoadFirst(from, 1)[0];
}

// Bits [first, first + kLanes) of a bit set as a mask. Reads up to 4 bytes from the first of them.
template <typename A>
FUSEDLOSS_INLINE Mask<A> LoadMask(const uint8_t* bits, int64_t first) {
  uint32_t word;
  __builtin_memcpy(&word, bits + first / 8, sizeof(word));
  word >>= first % 8;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    return BitCast<Mask<A>>(_mm512_movm_epi32(static_cast<__mmask16>(word)));
  } else {
    return BitCast<Mask<A>>(_mm512_movm_epi64(static_cast<__mmask8>(word)));
  }
#else
  Mask<A> lane_bit = (Mask<A>{} + 1) << LaneIds<A>();
  return ((Mask<A>{} + static_cast<int>(word & 0xff)) & lane_bit) == lane_bit;
#endif
}

// ---- Loops over long arrays, vector by vector.

// Which lanes of a vector count: all, or the first few.
struct AllLanes {};
template <typename A>
struct FirstLanes {
  int count;
  Mask<A> mask;
};
template <typename A>
FUSEDLOSS_INLINE FirstLanes<A> First(int64_t count) {
  int lanes = static_cast<int>(count);
  return {lanes, LaneIds<A>() < Mask<A>{} + lanes};
}
template <typename A>
FUSEDLOSS_INLINE Vec<A> KeepLanes(AllLanes, Vec<A> v) {
  return v;
}
template <typename A>
FUSEDLOSS_INLINE Vec<A> KeepLanes(FirstLanes<A> lanes, Vec<A> v) {
  return Keep<A>(lanes.mask, v);
}
template <typename A>
FUSEDLOSS_INLINE Mask<A> MaskOf(AllLanes) {
  return ~Mask<A>{};
}
template <typename A>
FUSEDLOSS_INLINE Mask<A> MaskOf(FirstLanes<A> lanes) {
  return lanes.mask;
}
template <typename T>
FUSEDLOSS_INLINE Vec<Accumulator<T>> LoadLanes(const T* from, AllLanes) {
  return Load(from);
}
template <typename T>
FUSEDLOSS_INLINE Vec<Accumulator<T>> LoadLanes(const T* from, FirstLanes<Accumulator<T>> lanes) {
  return LoadFirst(from, lanes.count);
}

template <typename T>
FUSEDLOSS_INLINE void StoreLanes(T* to, Vec<Accumulator<T>> v, AllLanes, bool stream) {
  if (stream) {
    Stream(to, v);
  } else {
    Store(to, v);
  }
}
template <typename T>
FUSEDLOSS_INLINE void StoreLanes(T* to, Vec<Accumulator<T>> v, FirstLanes<Accumulator<T>> lanes,
                                 bool) {
  StoreFirst(to, v, lanes.count);
}

// Several sums (or maxima) side by side, since one would wait for its own latency.
inline constexpr int kSlots = 4;
template <int kIndex>
struct Slot {
  static constexpr int value = kIndex;
};

// Calls fn(first element, lanes, slot) for every vector of [i, end).
template <typename A, typename Fn>
FUSEDLOSS_INLINE void EachVector(int64_t i, int64_t end, Fn&& fn) {
  constexpr int kVector = kLanes<A>;
  for (; i + kSlots * kVector <= end; i += kSlots * kVector) {
    fn(i, AllLanes{}, Slot<0>{});
    fn(i + kVector, AllLanes{}, Slot<1>{});
    fn(i + 2 * kVector, AllLanes{}, Slot<2>{});
    fn(i + 3 * kVector, AllLanes{}, Slot<3>{});
  }
  for (; i + kVector <= end; i += kVector) fn(i, AllLanes{}, Slot<0>{});
  if (i < end) fn(i, First<A>(end - i), Slot<0>{});
}

// Long sums are taken in runs of this many vectors, so that rounding errors grow with the number of
// runs or with their length, not with the product.
inline constexpr int64_t kRun = 64;
template <typename A>
struct RunningSum {
  Vec<A> run{}, total{};
  FUSEDLOSS_INLINE void operator+=(Vec<A> v) { run += v; }
  FUSEDLOSS_INLINE void EndRun() {
    total += run;
    run = Vec<A>{};
  }
};
template <typename... Sums>
FUSEDLOSS_INLINE void EndRuns(Sums&... sums) {
  (sums.EndRun(), ...);
}
template <typename A>
FUSEDLOSS_INLINE Vec<A> Sum(const RunningSum<A> (&slots)[kSlots]) {
  return (slots[0].total + slots[1].total) + (slots[2].total + slots[3].total);
}

// EachVector, and end_run() after every run, the last one included.
template <typename A, typename Fn, typename EndRun>
FUSEDLOSS_INLINE void EachVectorInRuns(int64_t i, int64_t end, Fn&& fn, EndRun&& end_run) {
  constexpr int64_t kElements = kRun * kLanes<A>;
  do {
    const int64_t run_end = end - i > kElements ? i + kElements : end;
    EachVector<A>(i, run_end, fn);
    end_run();
    i = run_end;
  } while (i < end);
}

// The elements before the first one, at most `size`, that a vector can be streamed to.
template <typename T>
FUSEDLOSS_INLINE int64_t UnalignedHead(const T* to, int64_t size) {
  constexpr int64_t kBytes = kLanes<Accumulator<T>> * sizeof(T);
  int64_t head = (kBytes - reinterpret_cast<uintptr_t>(to) % kBytes) % kBytes / sizeof(T);
  return head < size ? head : size;
}

// ---- exp and log. The polynomials are minimax fits (Remez, in 40 digits) of the functions named.

template <typename A>
struct Float;  // what exp and log know of a format
template <>
struct Float<float> {
  static constexpr int kMantissaBits = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to the nearest integer
  static constexpr float kMostNegative = -127;
  // (2^f − 1) / f on [−½, ½]; the relative error of 1 + f·q(f) is 9.2e-8.
  static constexpr float kExp2[] = {1.3264674577856944e-3f, 9.6715551695350270e-3f,
                                    5.5507342519798344e-2f, 2.4022241436213270e-1f,
                                    6.9314697711680302e-1f};
  // (log((1 + s) / (1 − s)) − 2s) / s³ in s² on [0, 0.0295]; 4.8e-12 of log.
  static constexpr float kLog[] = {2.3583568964333714e-1f, 2.8537238318480415e-1f,
                                   4.0000336219369826e-1f, 6.6666665641292473e-1f};
};
template <>
struct Float<double> {
  static constexpr int kMantissaBits = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kMostNegative = -1023;
  static constexpr double kExp2[] = {
      // 3.4e-18
      4.4347603559936507e-10, 7.0737982422145944e-9, 1.0178199767868759e-7, 1.3215435200521603e-6,
      1.5252733492350249e-5,  1.5403530457263790e-4, 1.3333558146775756e-3, 9.6181291076109405e-3,
      5.5504108664820077e-2,  2.4022650695910131e-1, 6.9314718055994533e-1};
  static constexpr double kLog[] = {
      // 8.2e-21
      1.3252752755181986e-1, 1.3249961980135773e-1, 1.5387097653321644e-1, 1.8181775508475526e-1,
      2.2222222648751624e-1, 2.8571428569072953e-1, 4.0000000000006288e-1, 6.6666666666666661e-1};
};

template <typename A, int kTerms>
FUSEDLOSS_INLINE Vec<A> Polynomial(const A (&coefficients)[kTerms], Vec<A> x) {
  Vec<A> sum = Set(coefficients[0]);
  for (int i = 1; i < kTerms; ++i) sum = sum * x + coefficients[i];
  return sum;
}

// 2^whole · (1 + rest) = e^x for x <= 0, |rest| < 0.42. NaN stays NaN.
template <typename A>
struct Power {
  Vec<A> whole, rest;

  FUSEDLOSS_INLINE explicit Power(Vec<A> x) {
    using F = Float<A>;
    constexpr A kLog2E = A(1.44269504088896340736);
    Vec<A>
        fraction;  // of x · log2(e), from the product before it is rounded where that is possible
#if defined(__AVX512F__)
    x = Max<A>(Set(A(1.25 * F::kMostNegative / kLog2E)), x);  // where scalef has long reached 0
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    if constexpr (std::is_same_v<A, float>) {
      whole = _mm512_roundscale_ps(x * kLog2E, kNearest);
      fraction = _mm512_fmsub_ps(x, Set(kLog2E), whole);
    } else {
      whole = _mm512_roundscale_pd(x * kLog2E, kNearest);
      fraction = _mm512_fmsub_pd(x, Set(kLog2E), whole);
    }
#else
    x = Max<A>(Set(A(F::kMostNegative / kLog2E)), x);  // where the exponent's bits are those of 0
    whole = x * kLog2E + F::kRound;
    fraction = x * kLog2E - (whole - F::kRound);
#endif
    rest = Polynomial<A>(F::kExp2, fraction) * fraction;
  }

  // v · 2^whole
  FUSEDLOSS_INLINE Vec<A> Scale(Vec<A> v) const {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<A, float>) {
      return _mm512_scalef_ps(v, whole);
    } else {
      return _mm512_scalef_pd(v, whole);
    }
#else
    Mask<A> exponent = (BitCast<Mask<A>>(whole) + Float<A>::kBias) << Float<A>::kMantissaBits;
    return v * BitCast<Vec<A>>(exponent);
#endif
  }
};

// e^x for x <= 0, to within 1.5 ulp near 0 and |x|/8 ulp more away from it: the error of a softmax
// is relative to its largest term. Below the smallest normal number it is subnormal or 0, as the
// thread's mode has it, and for −Inf it is 0. NaN stays NaN.
template <typename A>
FUSEDLOSS_INLINE Vec<A> Exp(Vec<A> x) {
  const Power<A> power(x);
  return power.Scale(power.rest + A(1));
}

// e^x − 1 for x <= 0, relative to itself as accurate as Exp near 0.
template <typename A>
FUSEDLOSS_INLINE Vec<A> ExpMinus1(Vec<A> x) {
  const Power<A> power(x);
  return power.Scale(power.rest) + (power.Scale(Set(A(1))) - A(1));
}

// a / b within an ulp, for b, 1 / b and a / b normal: a vector division takes as long as ten
// products.
template <typename A>
FUSEDLOSS_INLINE Vec<A> Divide(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    Vec<A> reciprocal = _mm512_rcp14_ps(b);
    Vec<A> quotient = a * reciprocal;
    return quotient + (a - b * quotient) * reciprocal;
  }
#endif
  return a / b;
}

// The natural logarithm of a positive normal number, within 3 ulp.
template <typename A>
FUSEDLOSS_INLINE Vec<A> LogOfNormal(Vec<A> x) {
  using F = Float<A>;
  // Split x = mantissa · 2^exponent with the mantissa in [√½, √2).
  Mask<A> sqrt_half = BitCast<Mask<A>>(Set(A(0.70710678118654752440)));
  Mask<A> bits = BitCast<Mask<A>>(x);
  Mask<A> exponent = (bits - sqrt_half) >> F::kMantissaBits;
  Vec<A> mantissa = BitCast<Vec<A>>(bits - (exponent << F::kMantissaBits));
  Vec<A> scale = __builtin_convertvector(exponent, Vec<A>);
  Vec<A> s = Divide<A>(mantissa - A(1), mantissa + A(1));
  Vec<A> s2 = s * s;
  return scale * A(0.69314718055994530942) + s * (Polynomial<A>(F::kLog, s2) * s2 + A(2));
}

// The same; −Inf of 0. +Inf and NaN stay.
template <typename A>
FUSEDLOSS_INLINE Vec<A> Log(Vec<A> x) {
  Vec<A> log = LogOfNormal<A>(x);
  log = x == A(0) ? Set(A(-__builtin_inf())) : log;
  return x - x == A(0) ? log : x;
}

}  // namespace fusedloss::FUSEDLOSS_CPU_LEVEL

#endif  // FUSEDLOSS_KERNELS_SIMD_H_
