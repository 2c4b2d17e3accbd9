// Softmax cross-entropy over all classes, over a subset S of them, or over a mixture of both.
//
//   loss[i] = subset_weight · L_S[i] + full_weight · L_all[i]                             (nats)
//   y^F[i, c] = class_weight[c] · ((1 − label_smoothing) · y[i, c] + label_smoothing / |F|), c in F
//
// for F = S or all, with y the targets, or the one-hot rows of the labels. From logits z:
//
//   L_F[i] = Σ_{c in F} y^F[i, c] · (lse[i] − z[i, c]),   lse[i] = log Σ_{c in N} exp z[i, c]
//
// with N = all for L_all; N = S, or all under normalize_full, for L_S. From probabilities p, as
// Keras:
//
//   labels:   z = log(clip(p, ε, 1 − ε)), then as above
//   targets:  L_F[i] = −Σ_{c in F} y^F[i, c] · log(clip(p[i, c] / Σ_{c in N} p[i, c], ε, 1 − ε))
//
// and clipping stops the gradient. A term whose y^F is 0 is 0, whatever its logit. Without a
// subset, loss = L_all. With one, a row that has no target in it (Σ_{c in S} y[i, c] = 0) has L_S =
// 0 and no gradient from it. Rows whose label is ignore_class have loss 0 and gradient 0. NaN and
// Inf propagate. No classes: loss 0.
//
// The predictions may be a weighted sum of two arrays, blend[0] · predictions + blend[1] · blended,
// rounded to T. It is made in pieces where it is read, never as a whole, and its gradient goes on
// to both arrays in the same pass.
#ifndef FUSEDLOSS_KERNELS_SOFTMAX_XENT_H_
#define FUSEDLOSS_KERNELS_SOFTMAX_XENT_H_

#include <cstdint>

#include "kernels/device.h"
#include "kernels/half.h"

namespace fusedloss {

struct SoftmaxXentOptions {
  bool from_logits = true;
  bool normalize_full = false;
  bool has_ignore_class = false;
  int64_t ignore_class = 0;
  double subset_weight = 1;
  double full_weight = 0;
  double label_smoothing = 0;
  double epsilon = 1e-7;  // of probabilities
};

template <typename T>
struct SoftmaxXentArgs {
  using A = Accumulator<T>;
  int64_t rows, classes;  // either may be 0
  const T* predictions;   // [rows, classes], row-major: logits or probabilities
  const T* blended;       // [rows, classes], or null: the predictions are used as they are
  double blend[2];        // weights of both; read where there are two
  T* dblended;            // [rows, classes] out, where there are two and a gradient is wanted
  // Exactly one of these three is set.
  const int32_t* labels32;  // [rows]
  const int64_t* labels64;  // [rows]
  const A* targets;         // [rows, classes]
  const A* class_weight;    // [classes], or null: all 1
  const int64_t* subset;    // [subset_size] class ids in ascending order, or null: no subset
  int64_t subset_size;
  SoftmaxXentOptions options;
};

// What the backward pass needs of a row: 2 numbers without a subset, class weights and label
// smoothing; else 5.
template <typename T>
int SoftmaxXentStats(const SoftmaxXentArgs<T>& args) {
  bool rich =
      args.subset != nullptr || args.class_weight != nullptr || args.options.label_smoothing != 0;
  return rich ? 5 : 2;
}

// Each returns the first row whose label lies outside [0, classes) and is not ignore_class, or −1;
// if there is one, the outputs are not to be used. Results do not depend on the number of threads.

// loss: [rows] out; stats: [rows, SoftmaxXentStats(args)] out.
template <typename T>
int64_t SoftmaxXent(const Cpu& cpu, const SoftmaxXentArgs<T>& args, Accumulator<T>* loss,
                    Accumulator<T>* stats);

// dpredictions[i, c] = dloss[i] · ∂loss[i] / ∂predictions[i, c]: [rows, classes] out; dblended
// likewise.
template <typename T>
int64_t SoftmaxXentGrad(const Cpu& cpu, const SoftmaxXentArgs<T>& args, const Accumulator<T>* dloss,
                        const Accumulator<T>* stats, T* dpredictions);

// Both at once, reading the predictions once: loss (one number, out) is
// scale · Σ_i row_weight[i] · loss[i], and gradient, [rows, classes] out, its derivative;
// dblended likewise. row_weight: [rows], or null: all 1.
template <typename T>
int64_t SoftmaxXentReduced(const Cpu& cpu, const SoftmaxXentArgs<T>& args,
                           const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss,
                           T* gradient);

// The same on a GPU, where all pointers are device pointers and no label can be reported: a row
// whose label lies outside [0, classes) and is not ignore_class has loss NaN and gradient NaN, as
// with TensorFlow's ops. So has every row if the subset is not in ascending order or names a class
// that is not there. At most 2^30 classes. Results are the same for every run on one model of GPU.
template <typename T>
GpuError SoftmaxXent(const Gpu& gpu, const SoftmaxXentArgs<T>& args, Accumulator<T>* loss,
                     Accumulator<T>* stats);
template <typename T>
GpuError SoftmaxXentGrad(const Gpu& gpu, const SoftmaxXentArgs<T>& args,
                         const Accumulator<T>* dloss, const Accumulator<T>* stats, T* dpredictions);
template <typename T>
GpuError SoftmaxXentReduced(const Gpu& gpu, const SoftmaxXentArgs<T>& args,
                            const Accumulator<T>* row_weight, double scale, Accumulator<T>* loss,
                            T* gradient);

// No call asks Gpu::allocate for more bytes than these, every piece rounded up to a multiple of
// 256: a number for every row and for every 2^14 of them, a bit for every class, and a few more.
// Only SoftmaxXentReduced asks for the rows' share.
inline int64_t SoftmaxXentWorkspace(int64_t rows, int64_t classes) {
  if (classes == 0) return 0;
  return 8 * rows + 8 * (rows >> 14) + classes / 8 + 4096;
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_KERNELS_SOFTMAX_XENT_H_
