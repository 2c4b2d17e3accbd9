// fusedloss_gpu: the CUDA kernels on device arrays of any framework, without TensorFlow.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/device.h"
#include "kernels/feature_distance.h"
#include "kernels/penalty.h"
#include "kernels/pointwise.h"
#include "kernels/softmax_xent.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

using Shape = std::vector<int64_t>;
using TypeStrings = std::vector<std::string>;  // as NumPy spells them

// Those of elements of type T. NumPy has no bfloat16: its bits come as 16-bit integers.
template <typename T>
TypeStrings TypesOf() {
  if constexpr (std::is_same_v<T, float>) return {"<f4"};
  if constexpr (std::is_same_v<T, double>) return {"<f8"};
  if constexpr (std::is_same_v<T, Half>) return {"<f2"};
  if constexpr (std::is_same_v<T, BFloat16>) return {"<i2", "<u2"};
}

// A C-contiguous array with __cuda_array_interface__, which the caller keeps alive.
struct DeviceArray {
  DeviceArray(const py::object& array, const char* name) : name(name) {
    py::dict interface = array.attr("__cuda_array_interface__");
    type = interface["typestr"].cast<std::string>();
    shape = interface["shape"].cast<Shape>();
    auto address = interface["data"].cast<std::pair<uintptr_t, bool>>().first;
    pointer = reinterpret_cast<void*>(address);
    int64_t stride = std::stoi(type.substr(2));
    if (!interface.contains("strides") || interface["strides"].is_none()) return;
    Shape strides = interface["strides"].cast<Shape>();
    for (size_t axis = shape.size(); axis-- > 0; stride *= shape[axis]) {
      if (shape[axis] > 1 && strides[axis] != stride) Refuse("is not C-contiguous");
    }
  }

  [[noreturn]] void Refuse(const std::string& why) const {
    throw py::value_error(std::string(name) + " " + why);
  }
  bool Is(const TypeStrings& types) const {
    for (const std::string& known : types) {
      if (type == known) return true;
    }
    return false;
  }
  template <typename T>
  T* As(const TypeStrings& types, const Shape& expected) const {
    if (!Is(types)) Refuse("has elements of type " + type + ", not " + types[0]);
    if (shape != expected) Refuse("has the wrong shape");
    return static_cast<T*>(pointer);
  }

  const char* name;
  std::string type;
  Shape shape;
  void* pointer;
};

template <typename T>
T* Read(const py::object& array, const char* name, const Shape& expected) {
  return DeviceArray(array, name).As<T>(TypesOf<std::remove_const_t<T>>(), expected);
}

// The arguments that all passes of softmax_xent share; `form` holds class_weight, what S is made
// of, the options, and metrics if they are wanted.
template <typename T>
SoftmaxXentArgs<T> ReadArgs(const py::object& predictions, const py::object& targets,
                            const py::kwargs& form) {
  using A = Accumulator<T>;
  SoftmaxXentArgs<T> args{};
  DeviceArray scores(predictions, "predictions");
  if (scores.shape.size() != 2) scores.Refuse("must be [rows, classes]");
  args.rows = scores.shape[0];
  args.classes = scores.shape[1];
  args.predictions = scores.As<const T>(TypesOf<T>(), scores.shape);
  args.options.full_weight = 0;
  for (std::pair<py::handle, py::handle> item : form) {
    std::string name = item.first.cast<std::string>();
    py::object given = py::reinterpret_borrow<py::object>(item.second);
    SoftmaxXentOptions& options = args.options;
    if (given.is_none()) {
      continue;
    } else if (name == "class_weight") {
      args.class_weight = Read<const A>(given, "class_weight", {args.classes});
    } else if (name == "subset") {
      DeviceArray ids(given, "subset");
      args.subset_kind = SubsetKind::kIds;
      args.subset_size = ids.shape.at(0);
      args.subset = ids.As<const int64_t>({"<i8"}, {args.subset_size});
    } else if (name == "mask") {
      args.subset_kind = SubsetKind::kMask;
      args.mask = DeviceArray(given, "mask").As<const bool>({"|b1"}, scores.shape);
    } else if (name == "candidates") {
      DeviceArray ids(given, "candidates");
      args.subset_kind = SubsetKind::kCandidates;
      args.subset_size = ids.shape.at(1);
      const Shape shape{args.rows, args.subset_size};
      if (ids.Is({"<i4"})) {
        args.candidates32 = ids.As<const int32_t>({"<i4"}, shape);
      } else {
        args.candidates64 = ids.As<const int64_t>({"<i8"}, shape);
      }
    } else if (name == "metrics") {
      args.metrics = Read<A>(given, "metrics", {args.rows, 3});
    } else if (name == "ignore_class") {
      options.has_ignore_class = true;
      options.ignore_class = given.cast<int64_t>();
    } else if (name == "from_logits") {
      options.from_logits = given.cast<bool>();
    } else if (name == "normalize_full") {
      options.normalize_full = given.cast<bool>();
    } else if (name == "subset_weight") {
      options.subset_weight = given.cast<double>();
    } else if (name == "full_weight") {
      options.full_weight = given.cast<double>();
    } else if (name == "label_smoothing") {
      options.label_smoothing = given.cast<double>();
    } else if (name == "mask_negative_targets") {
      options.mask_negative = given.cast<bool>();
    } else if (name == "temperature") {
      options.temperature = given.cast<double>();
    } else if (name == "z_loss") {
      options.z_loss = given.cast<double>();
    } else if (name == "softcap") {
      options.softcap = given.cast<double>();
    } else if (name == "gamma") {
      options.focal = true;
      options.gamma = given.cast<double>();
    } else {
      throw py::type_error("unknown argument " + name);
    }
  }
  if (!HasSubset(args)) args.options.full_weight = 1;
  DeviceArray wanted(targets, "targets");
  if (wanted.Is({"<i4"})) {
    args.labels32 = wanted.As<const int32_t>({"<i4"}, {args.rows});
  } else if (wanted.Is({"<i8"})) {
    args.labels64 = wanted.As<const int64_t>({"<i8"}, {args.rows});
  } else {
    const bool listed = args.subset_kind == SubsetKind::kCandidates;
    args.targets = wanted.As<const A>(TypesOf<A>(),
                                      listed ? Shape{args.rows, args.subset_size} : scores.shape);
  }
  return args;
}

// The arguments that all passes of pointwise share; `form` holds the arrays of the outputs and the
// numbers.
template <typename T, typename Y>
PointwiseArgs<T, Y> ReadPointwiseArgs(const py::object& predictions, const py::object& targets,
                                      const std::string& kind, const py::kwargs& form) {
  using A = Accumulator<T>;
  static const std::vector<std::string> kKinds = {"huber",
                                                  "squared",
                                                  "absolute",
                                                  "log_cosh",
                                                  "quantile",
                                                  "binary_logits",
                                                  "binary_probabilities"};
  PointwiseArgs<T, Y> args{};
  DeviceArray given(predictions, "predictions");
  if (given.shape.size() != 2) given.Refuse("must be [rows, outputs]");
  args.rows = given.shape[0];
  args.outputs = given.shape[1];
  args.predictions = given.As<const T>(TypesOf<T>(), given.shape);
  DeviceArray wanted(targets, "targets");
  args.one_target_a_row = wanted.shape.size() == 1;
  args.targets =
      wanted.As<const Y>(TypesOf<Y>(), args.one_target_a_row ? Shape{args.rows} : given.shape);
  const auto known = std::find(kKinds.begin(), kKinds.end(), kind);
  if (known == kKinds.end()) throw py::value_error("unknown kind " + kind);
  args.kind = static_cast<Pointwise>(known - kKinds.begin());
  for (std::pair<py::handle, py::handle> item : form) {
    std::string name = item.first.cast<std::string>();
    py::object value = py::reinterpret_borrow<py::object>(item.second);
    if (value.is_none()) {
      continue;
    } else if (name == "parameter") {
      args.parameter = value.cast<double>();
    } else if (name == "output_weights") {
      args.output_weights = Read<const A>(value, "output_weights", {args.outputs});
    } else if (name == "quantiles") {
      args.quantiles = Read<const A>(value, "quantiles", {args.outputs});
    } else {
      throw py::type_error("unknown argument " + name);
    }
  }
  return args;
}

// By default every wait returns the freed workspace to the driver, and the next call waits for it.
bool KeepWorkspace() {
  int device;
  cudaMemPool_t pool;
  uint64_t bytes = UINT64_MAX;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetDefaultMemPool(&pool, device) == cudaSuccess) {
    cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &bytes);
  }
  return cudaGetLastError() == cudaSuccess;
}

// Workspace in the order of the stream: given back as soon as what has been enqueued is done.
class Workspace {
 public:
  explicit Workspace(uintptr_t stream)
      : stream_(reinterpret_cast<cudaStream_t>(stream)),
        gpu_{stream_,
             [](void* self, int64_t bytes) {
               return static_cast<Workspace*>(self)->Allocate(bytes);
             },
             this} {}
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    for (void* block : blocks_) cudaFreeAsync(block, stream_);
  }
  const Gpu& gpu() const { return gpu_; }

 private:
  void* Allocate(int64_t bytes) {
    [[maybe_unused]] static const bool kept = KeepWorkspace();
    void* block = nullptr;
    if (cudaMallocAsync(&block, bytes, stream_) != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    blocks_.push_back(block);
    return block;
  }

  cudaStream_t stream_;
  Gpu gpu_;
  std::vector<void*> blocks_;
};

void Check(GpuError error) {
  if (error) throw std::runtime_error(error);
}

// Calls fn with a T of that name.
template <typename Fn>
auto WithType(const std::string& dtype, Fn&& fn) {
  if (dtype == "float32") return fn(float{});
  if (dtype == "float64") return fn(double{});
  if (dtype == "float16") return fn(Half{});
  if (dtype == "bfloat16") return fn(BFloat16{});
  throw py::value_error("unknown dtype " + dtype);
}

int Stats(const std::string& dtype, const py::object& predictions, const py::object& targets,
          const py::kwargs& form) {
  return WithType(dtype, [&](auto element) {
    return SoftmaxXentStats(ReadArgs<decltype(element)>(predictions, targets, form));
  });
}

void Forward(const std::string& dtype, const py::object& predictions, const py::object& targets,
             const py::object& loss, const py::object& stats, uintptr_t stream,
             const py::kwargs& form) {
  WithType(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    auto args = ReadArgs<T>(predictions, targets, form);
    Workspace workspace(stream);
    Check(SoftmaxXent<T>(workspace.gpu(), args, Read<A>(loss, "loss", {args.rows}),
                         Read<A>(stats, "stats", {args.rows, SoftmaxXentStats(args)})));
  });
}

void Grad(const std::string& dtype, const py::object& predictions, const py::object& targets,
          const py::object& dloss, const py::object& stats, const py::object& dpredictions,
          uintptr_t stream, const py::kwargs& form) {
  WithType(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    auto args = ReadArgs<T>(predictions, targets, form);
    Workspace workspace(stream);
    Check(SoftmaxXentGrad<T>(workspace.gpu(), args, Read<const A>(dloss, "dloss", {args.rows}),
                             Read<const A>(stats, "stats", {args.rows, SoftmaxXentStats(args)}),
                             Read<T>(dpredictions, "dpredictions", {args.rows, args.classes})));
  });
}

void Reduced(const std::string& dtype, const py::object& predictions, const py::object& targets,
             const py::object& row_weight, double scale, const py::object& loss,
             const py::object& gradient, uintptr_t stream, const py::kwargs& form) {
  WithType(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    auto args = ReadArgs<T>(predictions, targets, form);
    const A* weight =
        row_weight.is_none() ? nullptr : Read<const A>(row_weight, "row_weight", {args.rows});
    Workspace workspace(stream);
    Check(SoftmaxXentReduced<T>(workspace.gpu(), args, weight, scale, Read<A>(loss, "loss", {1}),
                                Read<T>(gradient, "gradient", {args.rows, args.classes})));
  });
}

// Calls fn with a T of that name and a Y of the elements of `targets`.
template <typename Fn>
void WithTypes(const std::string& dtype, const py::object& targets, Fn&& fn) {
  WithType(dtype, [&](auto element) {
    using T = decltype(element);
    if (DeviceArray(targets, "targets").Is(TypesOf<T>())) {
      fn(T{}, T{});
    } else {
      fn(T{}, Accumulator<T>{});
    }
  });
}

void Loss(const std::string& dtype, const py::object& predictions, const py::object& targets,
          const std::string& kind, const py::object& loss, uintptr_t stream,
          const py::kwargs& form) {
  WithTypes(dtype, targets, [&](auto element, auto target) {
    using T = decltype(element);
    auto args = ReadPointwiseArgs<T, decltype(target)>(predictions, targets, kind, form);
    Workspace workspace(stream);
    Check(PointwiseLoss(workspace.gpu(), args, Read<Accumulator<T>>(loss, "loss", {args.rows})));
  });
}

void LossGrad(const std::string& dtype, const py::object& predictions, const py::object& targets,
              const std::string& kind, const py::object& dloss, const py::object& dpredictions,
              uintptr_t stream, const py::kwargs& form) {
  WithTypes(dtype, targets, [&](auto element, auto target) {
    using T = decltype(element);
    auto args = ReadPointwiseArgs<T, decltype(target)>(predictions, targets, kind, form);
    Workspace workspace(stream);
    Check(PointwiseGrad(workspace.gpu(), args,
                        Read<const Accumulator<T>>(dloss, "dloss", {args.rows}),
                        Read<T>(dpredictions, "dpredictions", {args.rows, args.outputs})));
  });
}

void LossReduced(const std::string& dtype, const py::object& predictions, const py::object& targets,
                 const std::string& kind, const py::object& row_weight, double scale,
                 const py::object& loss, const py::object& gradient, uintptr_t stream,
                 const py::kwargs& form) {
  WithTypes(dtype, targets, [&](auto element, auto target) {
    using T = decltype(element);
    using A = Accumulator<T>;
    auto args = ReadPointwiseArgs<T, decltype(target)>(predictions, targets, kind, form);
    const A* weight =
        row_weight.is_none() ? nullptr : Read<const A>(row_weight, "row_weight", {args.rows});
    Workspace workspace(stream);
    Check(PointwiseReduced(workspace.gpu(), args, weight, scale, Read<A>(loss, "loss", {1}),
                           Read<T>(gradient, "gradient", {args.rows, args.outputs})));
  });
}

// Both arrays may be None.
template <typename A>
void RunPenalty(const std::vector<PenaltyVariable>& variables, const py::object& coefficients,
                const py::object& dpenalty, const py::object& penalty, uintptr_t stream) {
  PenaltyArgs<A> args{};
  args.variables = variables.data();
  args.count = static_cast<int64_t>(variables.size());
  args.coefficients = Read<const double>(coefficients, "coefficients", {args.count, 2});
  if (!dpenalty.is_none()) args.dpenalty = Read<const A>(dpenalty, "dpenalty", {1});
  if (!penalty.is_none()) args.penalty = Read<A>(penalty, "penalty", {1});
  Workspace workspace(stream);
  Check(Penalty(workspace.gpu(), args));
}

// variables: (dtype, values, gradient or None) each.
void PenaltyOf(const std::vector<std::tuple<std::string, py::object, py::object>>& variables,
               const py::object& coefficients, const py::object& dpenalty,
               const py::object& penalty, uintptr_t stream) {
  static const std::vector<std::string> kTypes = {"float32", "float64", "float16", "bfloat16"};
  std::vector<PenaltyVariable> read;
  bool in_double = false;
  for (size_t k = 0; k < variables.size(); ++k) {
    const auto& [dtype, values, gradient] = variables[k];
    WithType(dtype, [&](auto element) {
      using T = decltype(element);
      DeviceArray array(values, "values");
      PenaltyVariable variable{};
      variable.type =
          static_cast<FloatType>(std::find(kTypes.begin(), kTypes.end(), dtype) - kTypes.begin());
      variable.size = 1;
      for (int64_t size : array.shape) variable.size *= size;
      variable.values = array.As<const T>(TypesOf<T>(), array.shape);
      if (!gradient.is_none()) variable.gradient = Read<T>(gradient, "gradient", array.shape);
      read.push_back(variable);
      in_double = in_double || std::is_same_v<T, double>;
    });
  }
  if (in_double) {
    RunPenalty<double>(read, coefficients, dpenalty, penalty, stream);
  } else {
    RunPenalty<float>(read, coefficients, dpenalty, penalty, stream);
  }
}

// What a call of feature_distance is given, and the layers that its arguments point to.
template <typename T>
struct FeatureCall {
  FeatureDistanceArgs<T> args{};
  std::vector<FeatureLayer<T>> layers;
};

using LayerArrays = std::vector<py::object>;

// layers: [predictions, targets, channel weights, dpredictions, dtargets] each, all but the first
// may be None. Predictions are [rows, positions, channels] or [rows, channels, positions]; targets
// that, one row of it for all examples, or None under "first".
template <typename T>
void ReadLayers(const std::vector<LayerArrays>& layers, const py::object& layer_weights,
                const std::string& metric, bool channels_last, double epsilon, bool epsilon_in_root,
                FeatureCall<T>& call) {
  using A = Accumulator<T>;
  static const std::vector<std::string> kMetrics = {"mse", "mae", "charbonnier", "cosine", "lpips"};
  const auto known = std::find(kMetrics.begin(), kMetrics.end(), metric);
  if (known == kMetrics.end()) throw py::value_error("unknown metric " + metric);
  for (const LayerArrays& arrays : layers) {
    DeviceArray features(arrays.at(0), "predictions");
    Shape shape = features.shape;
    if (shape.size() != 3) features.Refuse("must have three dimensions");
    FeatureLayer<T> layer{};
    call.args.rows = shape[0];
    layer.positions = shape[channels_last ? 1 : 2];
    layer.channels = shape[channels_last ? 2 : 1];
    layer.predictions = features.As<const T>(TypesOf<T>(), shape);
    Shape of_targets = shape;
    layer.reference = FeatureReference::kFirst;
    if (!arrays.at(1).is_none()) {
      DeviceArray targets(arrays[1], "targets");
      of_targets[0] = targets.shape.at(0);
      layer.reference = of_targets[0] == 1 && shape[0] != 1 ? FeatureReference::kOneTarget
                                                            : FeatureReference::kTarget;
      if (layer.reference == FeatureReference::kTarget) of_targets = shape;
      layer.targets = targets.As<const T>(TypesOf<T>(), of_targets);
    }
    if (!arrays.at(2).is_none()) {
      layer.channel_weights = Read<const A>(arrays[2], "channel weights", {layer.channels});
    }
    if (!arrays.at(3).is_none()) layer.dpredictions = Read<T>(arrays[3], "dpredictions", shape);
    if (!arrays.at(4).is_none()) layer.dtargets = Read<T>(arrays[4], "dtargets", of_targets);
    call.layers.push_back(layer);
  }
  call.args.layers = call.layers.data();
  call.args.count = static_cast<int64_t>(layers.size());
  call.args.layer_weights = Read<const double>(layer_weights, "layer weights", {call.args.count});
  call.args.metric = static_cast<FeatureMetric>(known - kMetrics.begin());
  call.args.channels_last = channels_last;
  call.args.epsilon = epsilon;
  call.args.epsilon_in_root = epsilon_in_root;
}

// `enqueue` takes the workspace's GPU, the arguments and the array of A.
template <typename Enqueue>
void FeaturesOf(const std::string& dtype, const std::vector<LayerArrays>& layers,
                const py::object& layer_weights, const std::string& metric, bool channels_last,
                double epsilon, bool epsilon_in_root, uintptr_t stream, Enqueue&& enqueue) {
  WithType(dtype, [&](auto element) {
    FeatureCall<decltype(element)> call;
    ReadLayers(layers, layer_weights, metric, channels_last, epsilon, epsilon_in_root, call);
    Workspace workspace(stream);
    Check(enqueue(workspace.gpu(), call.args, Accumulator<decltype(element)>{}));
  });
}

void Features(const std::string& dtype, const std::vector<LayerArrays>& layers,
              const py::object& layer_weights, const std::string& metric, bool channels_last,
              double epsilon, bool epsilon_in_root, const py::object& loss, uintptr_t stream) {
  FeaturesOf(dtype, layers, layer_weights, metric, channels_last, epsilon, epsilon_in_root, stream,
             [&](const Gpu& gpu, const auto& args, auto sum) {
               return FeatureDistance(gpu, args, Read<decltype(sum)>(loss, "loss", {args.rows}));
             });
}

void FeaturesGrad(const std::string& dtype, const std::vector<LayerArrays>& layers,
                  const py::object& layer_weights, const std::string& metric, bool channels_last,
                  double epsilon, bool epsilon_in_root, const py::object& dloss, uintptr_t stream) {
  FeaturesOf(dtype, layers, layer_weights, metric, channels_last, epsilon, epsilon_in_root, stream,
             [&](const Gpu& gpu, const auto& args, auto sum) {
               using A = decltype(sum);
               return FeatureDistanceGrad(gpu, args, Read<const A>(dloss, "dloss", {args.rows}));
             });
}

void FeaturesReduced(const std::string& dtype, const std::vector<LayerArrays>& layers,
                     const py::object& layer_weights, const std::string& metric, bool channels_last,
                     double epsilon, bool epsilon_in_root, const py::object& row_weight,
                     double scale, const py::object& loss, uintptr_t stream) {
  FeaturesOf(dtype, layers, layer_weights, metric, channels_last, epsilon, epsilon_in_root, stream,
             [&](const Gpu& gpu, const auto& args, auto sum) {
               using A = decltype(sum);
               const A* weight = row_weight.is_none()
                                     ? nullptr
                                     : Read<const A>(row_weight, "row_weight", {args.rows});
               return FeatureDistanceReduced(gpu, args, weight, scale, Read<A>(loss, "loss", {1}));
             });
}

}  // namespace

PYBIND11_MODULE(fusedloss_gpu, m) {
  m.doc() =
      "The CUDA kernels on device arrays. `dtype` is the word for that of the predictions, whose "
      "bfloat16 comes as 16-bit integers; `stream` is a cudaStream_t as an integer; the other "
      "keywords are the optional arguments of the kernel's header. RuntimeError holds the words of "
      "CUDA.";
  m.def("softmax_xent_stats", &Stats, "Numbers a row in `stats`.");
  m.def("softmax_xent", &Forward, "Writes loss and stats.");
  m.def("softmax_xent_grad", &Grad, "Writes dpredictions.");
  m.def("softmax_xent_reduced", &Reduced, "Writes loss and gradient.");
  m.def("pointwise", &Loss, "Writes loss.");
  m.def("pointwise_grad", &LossGrad, "Writes dpredictions.");
  m.def("pointwise_reduced", &LossReduced, "Writes loss and gradient.");
  m.def("feature_distance", &Features, "Writes loss.");
  m.def("feature_distance_grad", &FeaturesGrad, "Writes the gradients of the layers.");
  m.def("feature_distance_reduced", &FeaturesReduced, "Writes loss and gradients of the layers.");
  m.def("penalty", &PenaltyOf, "Writes penalty and gradients, as far as they are given.");
}

}  // namespace fusedloss
