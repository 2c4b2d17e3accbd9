// Softmax cross-entropy over all classes, over a subset S of them, or over a mixture of both.
//
//   loss[i] = subset_weight · L_S[i] + full_weight · L_all[i]                             (nats)
//   y^F[i, c] = class_weight[c] · ((1 − label_smoothing) · y[i, c] + label_smoothing / |F|), c in F
//
// for F = S or all, with y the targets, or the one-hot rows of the labels. From logits z, with
// s[i, c] = cap(z[i, c]) / temperature and cap(z) = softcap · tanh(z / softcap), or z without one:
//
//   L_F[i] = Σ_{c in F} y^F[i, c] · (lse[i] − s[i, c]) + z_loss · lse[i]²
//   lse[i] = log Σ_{c in N} exp s[i, c]
//
// with N = all for L_all; N = S, or all under normalize_full, for L_S. From probabilities p, as
// Keras:
//
//   labels:   s = log(clip(p, ε, 1 − ε)), then as above
//   targets:  L_F[i] = −Σ_{c in F} y^F[i, c] · log(clip(p[i, c] / Σ_{c in N} p[i, c], ε, 1 − ε))
//
// and clipping stops the gradient. The focal form (Lin et al. 2017, arXiv:1708.02002), as Keras:
//
//   L_F[i] = −Σ_{c in F} y^F[i, c] · (1 − q[i, c])^gamma · log q[i, c] + z_loss · lse[i]²
//   q = clip(share, ε, 1 − ε), the share of exp s in its sum over N, or of p from targets
//
// S is the same for all rows, ids in ascending order; or it is a row's own: the classes where its
// mask is true, or its candidates. Candidates are class ids in any order, −1 where there is none;
// one that is listed twice counts twice, and a label means the first that is equal. Their targets
// are [rows, subset_size], one a candidate; in L_all those of the same class add up. Under
// mask_negative classes with a negative target leave S, and count as targets of 0.
//
// A term whose y^F is 0 is 0, whatever its logit. Without any S, loss = full_weight · L_all. With
// one, a row that has no target in it (Σ_{c in S} y[i, c] = 0) has L_S = 0 and no gradient from it.
// Rows whose label is ignore_class have loss 0 and gradient 0. NaN and Inf propagate. No classes:
// loss 0.
//
// The metrics of a row are those of S, or without it of all classes:
//
//   rank           how many classes of S score higher than the row's own, its label or the first of
//                  its greatest targets in S; of equal scores the first is the highest. A NaN, the
//                  row's own too, counts as higher. Scores that a softcap rounds to the cap are
//                  equal
//   entropy        of the softmax over N, in nats
//   log_sum_exp    over N, of s; from targets and probabilities log Σ p
//
// A row that is ignored or has no target in S has rank −1 and 0 for the others.
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

// What S is made of; mask_negative narrows it.
enum class SubsetKind { kAll, kIds, kMask, kCandidates };

struct SoftmaxXentOptions {
  bool from_logits = true;
  bool normalize_full = false;
  bool mask_negative = false;  // with targets
  bool has_ignore_class = false;
  int64_t ignore_class = 0;
  double subset_weight = 1;  // where there is an S
  double full_weight = 1;
  double label_smoothing = 0;
  double epsilon = 1e-7;   // of probabilities
  double temperature = 1;  // positive; with z_loss and softcap: from logits
  double z_loss = 0;
  double softcap = 0;  // 0: none
  bool focal = false;
  double gamma = 0;  // of the focal form
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
  const A* targets;         // [rows, classes]; of candidates [rows, subset_size]
  const A* class_weight;    // [classes], or null: all 1
  SubsetKind subset_kind;
  const int64_t* subset;        // kIds: [subset_size] class ids in ascending order
  const bool* mask;             // kMask: [rows, classes]
  const int32_t* candidates32;  // kCandidates: [rows, subset_size]
  const int64_t* candidates64;  // likewise; exactly one of the two is set, unless subset_size is 0
  int64_t subset_size;
  A* metrics;  // [rows, 3] out: rank, entropy, log_sum_exp; or null
  SoftmaxXentOptions options;
};

// Whether there is an S.
template <typename T>
bool HasSubset(const SoftmaxXentArgs<T>& args) {
  return args.subset_kind != SubsetKind::kAll || args.options.mask_negative;
}

// Whether rows have an S of their own.
template <typename T>
bool HasSubsetsOfRows(const SoftmaxXentArgs<T>& args) {
  return args.subset_kind == SubsetKind::kMask || args.subset_kind == SubsetKind::kCandidates ||
         args.options.mask_negative;
}

// Whether a row's loss is log-sum-exp minus logit, and nothing else weighs in but temperature,
// z_loss and softcap.
template <typename T>
bool IsPlain(const SoftmaxXentArgs<T>& args) {
  const SoftmaxXentOptions& options = args.options;
  return !HasSubset(args) && args.class_weight == nullptr && options.label_smoothing == 0 &&
         options.full_weight == 1 && !options.focal;
}

// How many numbers the backward pass needs of a row. It does without where rows have an S of their
// own, and in the forms that are slower than their memory in any case.
template <typename T>
int SoftmaxXentStats(const SoftmaxXentArgs<T>& args) {
  if (HasSubsetsOfRows(args) || args.options.focal || args.options.softcap != 0) return 0;
  return IsPlain(args) ? 2 : 5;
}

// Each returns the first row that names a class that is not there, or −1: by a label outside
// [0, classes) that is not ignore_class, or by a candidate outside [−1, classes). If there is one,
// the outputs are not to be used. Results do not depend on the number of threads.

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

// The same on a GPU, where all pointers are device pointers and no row can be reported: one that
// names a class that is not there has loss NaN and gradient NaN, as with TensorFlow's ops. So has
// every row if the subset is not in ascending order or names a class that is not there. At most
// 2^30 classes. Results are the same for every run on one model of GPU.
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
