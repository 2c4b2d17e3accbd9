// Losses of a prediction p and its target y, output by output, mean over the outputs of a row.
//
//   loss[i] = 1/outputs · Σ_j w[j] · f(p[i, j], y[i, j]),   e = p − y
//
//   kHuber                f = e²/2 where |e| <= δ, else δ·(|e| − δ/2)
//   kSquared              f = e²
//   kAbsolute             f = |e|
//   kLogCosh              f = log cosh e
//   kQuantile             f = q·max(−e, 0) + (1 − q)·max(e, 0)                     (pinball)
//   kBinaryLogits         f = max(p, 0) − p·s + log(1 + exp(−|p|))                 (nats)
//   kBinaryProbabilities  f = −s·log c − (1 − s)·log(1 − c),   c = clip(p, ε, 1 − ε)
//
// with q the quantile, or 1 + quantile if that is negative: so 1 − q keeps its digits where it is
// small; with s = (1 − label_smoothing)·y + label_smoothing/2. Clipping stops the gradient, and
// where f has a corner its derivative is 0. An output whose w is 0 is left out: what it holds, NaN
// or not, is not looked at, and its gradient is 0. NaN and Inf propagate else. No outputs: loss 0.
#ifndef FUSEDLOSS_KERNELS_POINTWISE_H_
#define FUSEDLOSS_KERNELS_POINTWISE_H_

#include <cstdint>

#include "kernels/device.h"
#include "kernels/half.h"

namespace fusedloss {

enum class Pointwise {
  kHuber,
  kSquared,
  kAbsolute,
  kLogCosh,
  kQuantile,
  kBinaryLogits,
  kBinaryProbabilities
};

// The types of predictions and targets, T and Accumulator<T>, that there are kernels for.
#define FUSEDLOSS_POINTWISE_TYPES(X) \
  X(float, float)                    \
  X(double, double) X(Half, Half) X(Half, float) X(BFloat16, BFloat16) X(BFloat16, float)

template <typename T, typename Y>
struct PointwiseArgs {
  using A = Accumulator<T>;
  int64_t rows, outputs;  // either may be 0
  const T* predictions;   // [rows, outputs], row-major
  const Y* targets;       // [rows, outputs], or [rows] if one target serves a whole row
  bool one_target_a_row;
  const A* output_weights;  // [outputs], w, or null: all 1
  const A* quantiles;       // [outputs], or null: `parameter` is that of all
  Pointwise kind;
  double parameter = 0;   // δ, quantile or label_smoothing
  double epsilon = 1e-7;  // of probabilities
};

// Results do not depend on the number of threads. The functions on a GPU are the same on device
// pointers, for at most 2^30 outputs, and give the same results for every run on one model of GPU.

// loss: [rows] out.
template <typename T, typename Y>
void PointwiseLoss(const Cpu& cpu, const PointwiseArgs<T, Y>& args, Accumulator<T>* loss);
template <typename T, typename Y>
GpuError PointwiseLoss(const Gpu& gpu, const PointwiseArgs<T, Y>& args, Accumulator<T>* loss);

// dpredictions[i, j] = dloss[i] · ∂loss[i] / ∂predictions[i, j]: [rows, outputs] out.
template <typename T, typename Y>
void PointwiseGrad(const Cpu& cpu, const PointwiseArgs<T, Y>& args, const Accumulator<T>* dloss,
                   T* dpredictions);
template <typename T, typename Y>
GpuError PointwiseGrad(const Gpu& gpu, const PointwiseArgs<T, Y>& args, const Accumulator<T>* dloss,
                       T* dpredictions);

// Both at once, reading the predictions once: loss (one number, out) is
// scale · Σ_i row_weight[i] · loss[i], and gradient, [rows, outputs] out, its derivative.
// row_weight: [rows], or null: all 1.
template <typename T, typename Y>
void PointwiseReduced(const Cpu& cpu, const PointwiseArgs<T, Y>& args,
                      const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss,
                      T* gradient);
template <typename T, typename Y>
GpuError PointwiseReduced(const Gpu& gpu, const PointwiseArgs<T, Y>& args,
                          const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss,
                          T* gradient);

// No call asks Gpu::allocate for more bytes than these, every piece rounded up to a multiple of
// 256. Only PointwiseReduced asks for any.
inline int64_t PointwiseWorkspace(int64_t rows, int64_t outputs) {
  return rows * outputs == 0 ? 0 : 64 << 10;
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_POINTWISE_H_
