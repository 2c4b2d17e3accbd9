// The GPU kernels on a CPU, for tests to call through ctypes.
#include "kernels/feature_distance.h"
#include "kernels/gpu.cuh"
#include "kernels/penalty.h"
#include "kernels/pointwise.h"
#include "kernels/softmax_xent.h"

namespace fusedloss {
namespace {

// These are mirrored in test_gpu_kernels.py and test_gpu_feature_distance.py.
struct SoftmaxXentArguments {
  int64_t rows, classes, subset_size, ignore_class;
  int64_t from_logits, normalize_full, has_ignore_class, subset_kind, mask_negative, focal;
  double subset_weight, full_weight, label_smoothing, epsilon, scale, blend[2];
  double temperature, z_loss, softcap, gamma;
  const void *predictions, *labels32, *labels64, *targets, *class_weight, *subset;
  const void *mask, *candidates32, *candidates64, *dloss, *row_weight;
  void *loss, *stats, *gradient, *metrics;
  const void* blended;
  void* dblended;
};
struct PointwiseArguments {
  int64_t rows, outputs, one_target_a_row, kind;
  double parameter, epsilon, scale;
  const void *predictions, *targets, *output_weights, *quantiles;
  const void *dloss, *row_weight;
  void *loss, *gradient;
};
struct PenaltyArguments {
  const PenaltyVariable* variables;
  int64_t count;
  const double* coefficients;
  const void* dpenalty;
  void* penalty;
};
struct FeatureLayerArguments {
  int64_t positions, channels, reference;
  const void *predictions, *targets, *channel_weights;
  void *dpredictions, *dtargets;
};
struct FeatureDistanceArguments {
  int64_t rows, count, metric, channels_last, epsilon_in_root;
  double epsilon, scale;
  const FeatureLayerArguments* layers;
  const double* layer_weights;
  const void *dloss, *row_weight;
  void* loss;
};

// As much memory as the contract promises to suffice, and no more.
struct Workspace {
  explicit Workspace(int64_t bytes) : memory(bytes + kAlignment, '\xff'), left(bytes) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    next = memory.data() + (kAlignment - address % kAlignment) % kAlignment;
  }

  static void* Allocate(void* owner, int64_t bytes) {
    auto* workspace = static_cast<Workspace*>(owner);
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > workspace->left) return nullptr;
    workspace->left -= bytes;
    workspace->next += bytes;
    return workspace->next - bytes;
  }

  static constexpr int64_t kAlignment = 256;
  std::vector<char> memory;
  char* next;
  int64_t left;
};

template <typename T>
SoftmaxXentArgs<T> Arguments(const SoftmaxXentArguments& from) {
  using A = Accumulator<T>;
  SoftmaxXentArgs<T> args{};
  args.rows = from.rows;
  args.classes = from.classes;
  args.predictions = static_cast<const T*>(from.predictions);
  args.blended = static_cast<const T*>(from.blended);
  args.blend[0] = from.blend[0];
  args.blend[1] = from.blend[1];
  args.dblended = static_cast<T*>(from.dblended);
  args.labels32 = static_cast<const int32_t*>(from.labels32);
  args.labels64 = static_cast<const int64_t*>(from.labels64);
  args.targets = static_cast<const A*>(from.targets);
  args.class_weight = static_cast<const A*>(from.class_weight);
  args.subset = static_cast<const int64_t*>(from.subset);
  args.subset_size = from.subset_size;
  args.subset_kind = static_cast<SubsetKind>(from.subset_kind);
  args.mask = static_cast<const bool*>(from.mask);
  args.candidates32 = static_cast<const int32_t*>(from.candidates32);
  args.candidates64 = static_cast<const int64_t*>(from.candidates64);
  args.metrics = static_cast<A*>(from.metrics);
  SoftmaxXentOptions& options = args.options;
  options.from_logits = from.from_logits != 0;
  options.normalize_full = from.normalize_full != 0;
  options.mask_negative = from.mask_negative != 0;
  options.has_ignore_class = from.has_ignore_class != 0;
  options.ignore_class = from.ignore_class;
  options.subset_weight = from.subset_weight;
  options.full_weight = from.full_weight;
  options.label_smoothing = from.label_smoothing;
  options.epsilon = from.epsilon;
  options.temperature = from.temperature;
  options.z_loss = from.z_loss;
  options.softcap = from.softcap;
  options.focal = from.focal != 0;
  options.gamma = from.gamma;
  return args;
}

template <typename T>
GpuError Run(int op, const SoftmaxXentArguments& from) {
  using A = Accumulator<T>;
  const SoftmaxXentArgs<T> args = Arguments<T>(from);
  Workspace workspace(SoftmaxXentWorkspace(op == 2 ? args.rows : 0, args.classes));
  Gpu gpu{nullptr, Workspace::Allocate, &workspace};
  auto* loss = static_cast<A*>(from.loss);
  auto* stats = static_cast<A*>(from.stats);
  auto* gradient = static_cast<T*>(from.gradient);
  switch (op) {
    case 0:
      return SoftmaxXent<T>(gpu, args, loss, stats);
    case 1:
      return SoftmaxXentGrad<T>(gpu, args, static_cast<const A*>(from.dloss), stats, gradient);
    default:
      return SoftmaxXentReduced<T>(gpu, args, static_cast<const A*>(from.row_weight), from.scale,
                                   loss, gradient);
  }
}

template <typename T, typename Y>
GpuError Run(int op, const PointwiseArguments& from) {
  using A = Accumulator<T>;
  PointwiseArgs<T, Y> args{};
  args.rows = from.rows;
  args.outputs = from.outputs;
  args.predictions = static_cast<const T*>(from.predictions);
  args.targets = static_cast<const Y*>(from.targets);
  args.one_target_a_row = from.one_target_a_row != 0;
  args.output_weights = static_cast<const A*>(from.output_weights);
  args.quantiles = static_cast<const A*>(from.quantiles);
  args.kind = static_cast<Pointwise>(from.kind);
  args.parameter = from.parameter;
  args.epsilon = from.epsilon;
  Workspace workspace(op == 2 ? PointwiseWorkspace(args.rows, args.outputs) : 0);
  Gpu gpu{nullptr, Workspace::Allocate, &workspace};
  auto* loss = static_cast<A*>(from.loss);
  auto* gradient = static_cast<T*>(from.gradient);
  switch (op) {
    case 0:
      return PointwiseLoss<T, Y>(gpu, args, loss);
    case 1:
      return PointwiseGrad<T, Y>(gpu, args, static_cast<const A*>(from.dloss), gradient);
    default:
      return PointwiseReduced<T, Y>(gpu, args, static_cast<const A*>(from.row_weight), from.scale,
                                    loss, gradient);
  }
}

template <typename A>
GpuError Run(const PenaltyArguments& from) {
  Workspace workspace(PenaltyWorkspace(from.count));
  Gpu gpu{nullptr, Workspace::Allocate, &workspace};
  std::vector<double> coefficients(2 * from.count, std::nan(""));
  pending = [&] { std::copy_n(from.coefficients, coefficients.size(), coefficients.begin()); };
  GpuError error =
      Penalty<A>(gpu, {from.variables, from.count, coefficients.data(),
                       static_cast<const A*>(from.dpenalty), static_cast<A*>(from.penalty)});
  pending = [] {};
  return error;
}

template <typename T>
GpuError Run(int op, const FeatureDistanceArguments& from) {
  using A = Accumulator<T>;
  std::vector<FeatureLayer<T>> layers;
  int64_t shared_features = 0;
  for (int64_t k = 0; k < from.count; ++k) {
    const FeatureLayerArguments& layer = from.layers[k];
    const auto reference = static_cast<FeatureReference>(layer.reference);
    layers.push_back({layer.positions, layer.channels, static_cast<const T*>(layer.predictions),
                      static_cast<const T*>(layer.targets),
                      static_cast<const A*>(layer.channel_weights), reference,
                      static_cast<T*>(layer.dpredictions), static_cast<T*>(layer.dtargets)});
    if (reference != FeatureReference::kTarget) shared_features += layer.positions * layer.channels;
  }
  std::vector<double> layer_weights(from.count, std::nan(""));
  FeatureDistanceArgs<T> args{};
  args.rows = from.rows;
  args.layers = layers.data();
  args.count = from.count;
  args.layer_weights = layer_weights.data();
  args.metric = static_cast<FeatureMetric>(from.metric);
  args.channels_last = from.channels_last != 0;
  args.epsilon_in_root = from.epsilon_in_root != 0;
  args.epsilon = from.epsilon;
  Workspace workspace(FeatureDistanceWorkspace(args.rows, args.count, shared_features));
  Gpu gpu{nullptr, Workspace::Allocate, &workspace};
  auto* loss = static_cast<A*>(from.loss);
  pending = [&] { std::copy_n(from.layer_weights, args.count, layer_weights.begin()); };
  GpuError error = nullptr;
  if (op == 0) {
    error = FeatureDistance<T>(gpu, args, loss);
  } else if (op == 1) {
    error = FeatureDistanceGrad<T>(gpu, args, static_cast<const A*>(from.dloss));
  } else {
    const auto* row_weight = static_cast<const A*>(from.row_weight);
    error = FeatureDistanceReduced<T>(gpu, args, row_weight, from.scale, loss);
  }
  pending = [] {};
  return error;
}

}  // namespace
}  // namespace fusedloss

extern "C" void emulate(int64_t shared_memory_limit, int has_clusters, int runs_backwards) {
  fusedloss::emulated_device = {shared_memory_limit, has_clusters != 0, runs_backwards != 0};
}

// The length of a row of `stats`, for predictions of any type.
extern "C" int softmax_xent_stats(const fusedloss::SoftmaxXentArguments* arguments) {
  return fusedloss::SoftmaxXentStats(fusedloss::Arguments<float>(*arguments));
}

// op: 0 forward, 1 backward, 2 reduced; dtype: 0 float32, 1 float64, 2 float16, 3 bfloat16. Null if
// all went well.
extern "C" const char* run_softmax_xent(int op, int dtype,
                                        const fusedloss::SoftmaxXentArguments* arguments) {
  switch (dtype) {
    case 0:
      return fusedloss::Run<float>(op, *arguments);
    case 1:
      return fusedloss::Run<double>(op, *arguments);
    case 2:
      return fusedloss::Run<fusedloss::Half>(op, *arguments);
    default:
      return fusedloss::Run<fusedloss::BFloat16>(op, *arguments);
  }
}

// wide_targets: of the type of sums, where that is another one.
extern "C" const char* run_pointwise(int op, int dtype, int wide_targets,
                                     const fusedloss::PointwiseArguments* arguments) {
  using fusedloss::BFloat16, fusedloss::Half, fusedloss::Run;
  switch (dtype) {
    case 0:
      return Run<float, float>(op, *arguments);
    case 1:
      return Run<double, double>(op, *arguments);
    case 2:
      return wide_targets ? Run<Half, float>(op, *arguments) : Run<Half, Half>(op, *arguments);
    default:
      return wide_targets ? Run<BFloat16, float>(op, *arguments)
                          : Run<BFloat16, BFloat16>(op, *arguments);
  }
}

extern "C" const char* run_penalty(int in_double, const fusedloss::PenaltyArguments* arguments) {
  return in_double ? fusedloss::Run<double>(*arguments) : fusedloss::Run<float>(*arguments);
}

extern "C" const char* run_feature_distance(int op, int dtype,
                                            const fusedloss::FeatureDistanceArguments* arguments) {
  switch (dtype) {
    case 0:
      return fusedloss::Run<float>(op, *arguments);
    case 1:
      return fusedloss::Run<double>(op, *arguments);
    case 2:
      return fusedloss::Run<fusedloss::Half>(op, *arguments);
    default:
      return fusedloss::Run<fusedloss::BFloat16>(op, *arguments);
  }
}
