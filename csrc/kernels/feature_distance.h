// Distances of feature maps, example by example, summed over any number of layers.
//
//   loss[i] = Σ_k layer_weights[k] · D_k[i]
//
// With a the features that a layer predicts for an example, b those of its reference, w the weights
// of the channels, or 1, and e = a − b:
//
//   kSquared      D = mean of w·e²                over positions and channels
//   kAbsolute     D = mean of w·|e|
//   kCharbonnier  D = mean of w·√(e² + ε²)
//   kCosine       D = 1 − Σ_c w·a·b / (|a|·|b|),  |x| = √(Σ_c w·x² + ε)      mean over positions
//   kLpips        D = Σ_c w·(a/|a| − b/|b|)²,     |x| = √(Σ_c x² + ε), or, unless epsilon_in_root,
//                                                 √(Σ_c x²) + ε              mean over positions
//
// Divisors count channels of weight 0. The reference of an example is its own target, one target of
// all examples, or, under kFirst, the first example, whose own distance is 0. Where a distance has
// a corner, its derivative is 0; where a norm is 0, that of x/|x| is 1/|x|. NaN and Inf propagate.
// No positions or no channels: distance 0.
#ifndef FUSEDLOSS_KERNELS_FEATURE_DISTANCE_H_
#define FUSEDLOSS_KERNELS_FEATURE_DISTANCE_H_

#include <cstdint>

#include "kernels/device.h"
#include "kernels/half.h"

namespace fusedloss {

enum class FeatureMetric { kSquared, kAbsolute, kCharbonnier, kCosine, kLpips };
enum class FeatureReference { kTarget, kOneTarget, kFirst };

// Feature maps are row-major [positions, channels] under channels_last, else [channels, positions].
template <typename T>
struct FeatureLayer {
  using A = Accumulator<T>;
  int64_t positions, channels;  // either may be 0
  const T* predictions;         // [rows, feature map]
  const T* targets;             // that; [feature map] under kOneTarget; not read under kFirst
  const A* channel_weights;     // [channels], or null: all 1
  FeatureReference reference;   // kFirst of all layers or of none
  T* dpredictions;              // [rows, feature map] out; not written by FeatureDistance
  T* dtargets;  // as targets, out; or null: not wanted. Null under kFirst, whose dpredictions hold
                // the whole derivative.
};

// `layers` lie on the host even for a GPU, all other pointers on the device.
template <typename T>
struct FeatureDistanceArgs {
  int64_t rows;  // may be 0
  const FeatureLayer<T>* layers;
  int64_t count;
  const double* layer_weights;  // [count]
  FeatureMetric metric;
  bool channels_last = true;
  bool epsilon_in_root = true;  // of kLpips; the others have it there
  double epsilon = 0;
};

// Results do not depend on the number of threads. The functions on a GPU are the same on device
// pointers, enqueue and never wait, and give the same results for every run on one model of GPU.

// loss: [rows] out.
template <typename T>
void FeatureDistance(const Cpu& cpu, const FeatureDistanceArgs<T>& args, Accumulator<T>* loss);
template <typename T>
GpuError FeatureDistance(const Gpu& gpu, const FeatureDistanceArgs<T>& args, Accumulator<T>* loss);

// The gradient of Σ_i dloss[i] · loss[i] in predictions and, where wanted, targets.
template <typename T>
void FeatureDistanceGrad(const Cpu& cpu, const FeatureDistanceArgs<T>& args,
                         const Accumulator<T>* dloss);
template <typename T>
GpuError FeatureDistanceGrad(const Gpu& gpu, const FeatureDistanceArgs<T>& args,
                             const Accumulator<T>* dloss);

// Both at once, reading the features once: loss (one number, out) is
// scale · Σ_i row_weight[i] · loss[i], and the gradients its derivatives. row_weight: [rows], or
// null: all 1.
template <typename T>
void FeatureDistanceReduced(const Cpu& cpu, const FeatureDistanceArgs<T>& args,
                            const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss);
template <typename T>
GpuError FeatureDistanceReduced(const Gpu& gpu, const FeatureDistanceArgs<T>& args,
                                const Accumulator<T>* row_weight, double scale,
                                Accumulator<T>* loss);

// No call asks Gpu::allocate for more bytes than these, every piece rounded up to a multiple of
// 256. shared_features: elements of one example, of all layers under kOneTarget or kFirst.
inline int64_t FeatureDistanceWorkspace(int64_t rows, int64_t layers, int64_t shared_features) {
  const int64_t of_targets = shared_features == 0 ? 0 : 8 * shared_features + (8 << 20);
  return layers * (8 * rows + 512) + (1 << 19) + of_targets;
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_FEATURE_DISTANCE_H_
