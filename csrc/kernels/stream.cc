#include "kernels/stream.h"

#include <immintrin.h>

#include <algorithm>

namespace fusedloss {
namespace {

constexpr int64_t kBlock = 256 << 10;  // floats

// Calls store(first index) for every four floats, past the caches where `to` allows it.
template <typename Four, typename One>
void Each(const Cpu& cpu, int64_t size, float* to, Four&& four, One&& one) {
  cpu.ParallelFor((size + kBlock - 1) / kBlock, [&](int64_t block) {
    int64_t i = block * kBlock, end = std::min(size, i + kBlock);
    for (; i < end && reinterpret_cast<uintptr_t>(to + i) % 16 != 0; ++i) to[i] = one(i);
    for (; i + 16 <= end; i += 16) {
      for (int part = 0; part < 16; part += 4) _mm_stream_ps(to + i + part, four(i + part));
    }
    for (; i < end; ++i) to[i] = one(i);
    _mm_sfence();
  });
}

}  // namespace

void StreamCopy(const Cpu& cpu, int64_t size, const float* from, float* to) {
  Each(
      cpu, size, to, [&](int64_t i) { return _mm_loadu_ps(from + i); },
      [&](int64_t i) { return from[i]; });
}

void StreamTriad(const Cpu& cpu, int64_t size, const float* a, const float* b, float* to) {
  Each(
      cpu, size, to,
      [&](int64_t i) { return _mm_add_ps(_mm_loadu_ps(a + i), _mm_loadu_ps(b + i)); },
      [&](int64_t i) { return a[i] + b[i]; });
}

}  // namespace fusedloss
