// Plain copies and sums of large arrays: what memory allows, to compare the kernels with. Stores go
// past the caches, the fastest way for arrays larger than they are.
#ifndef FUSEDLOSS_KERNELS_STREAM_H_
#define FUSEDLOSS_KERNELS_STREAM_H_

#include <cstdint>

#include "kernels/device.h"

namespace fusedloss {

// to[i] = from[i]
void StreamCopy(const Cpu& cpu, int64_t size, const float* from, float* to);
// to[i] = a[i] + b[i]
void StreamTriad(const Cpu& cpu, int64_t size, const float* a, const float* b, float* to);

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_STREAM_H_
