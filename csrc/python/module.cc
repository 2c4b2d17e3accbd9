// fusedloss._core: build facts, CPU features, and the raw kernels on NumPy arrays. No TensorFlow.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/device.h"
#include "kernels/feature_distance.h"
#include "kernels/softmax_xent.h"
#include "kernels/stream.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

py::dict BuildInfo() {
  py::dict info;
  info["version"] = FUSEDLOSS_VERSION;
  info["tensorflow"] = FUSEDLOSS_TENSORFLOW;
  info["cxx11_abi"] = FUSEDLOSS_CXX11_ABI;
  info["compiler"] = FUSEDLOSS_COMPILER;
  info["cpu_levels"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
  info["cuda_version"] = FUSEDLOSS_CUDA_VERSION;  // "" without CUDA, as the list below is empty
  std::istringstream architectures(FUSEDLOSS_CUDA_ARCHITECTURES);
  info["cuda_architectures"] = std::vector<std::string>(
      std::istream_iterator<std::string>(architectures), std::istream_iterator<std::string>());
  return info;
}

std::vector<std::string> CpuFeatures() {
  std::vector<std::string> features;
#define FUSEDLOSS_FEATURE(name) \
  if (__builtin_cpu_supports(name)) features.push_back(name)
  FUSEDLOSS_FEATURE("sse2");
  FUSEDLOSS_FEATURE("avx2");
  FUSEDLOSS_FEATURE("fma");
  FUSEDLOSS_FEATURE("f16c");
  FUSEDLOSS_FEATURE("avx512f");
  FUSEDLOSS_FEATURE("avx512bw");
  FUSEDLOSS_FEATURE("avx512dq");
  FUSEDLOSS_FEATURE("avx512vl");
#undef FUSEDLOSS_FEATURE
  return features;
}

// Threads for measurements without TensorFlow, made anew for every call.
class Threads {
 public:
  explicit Threads(int count)
      : count_(count),
        cpu_{[](void* self, int64_t blocks, void (*fn)(void*, int64_t), void* context) {
               static_cast<Threads*>(self)->Run(blocks, fn, context);
             },
             this} {}
  const Cpu& cpu() const { return cpu_; }

 private:
  void Run(int64_t blocks, void (*fn)(void*, int64_t), void* context) const {
    std::atomic<int64_t> next{0};
    auto work = [&] {
      for (int64_t block; (block = next.fetch_add(1)) < blocks;) fn(context, block);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min<int64_t>(count_, blocks); ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
  }

  int count_;
  Cpu cpu_;
};

template <typename A>
using Array = py::array_t<A, py::array::c_style>;

// The training path on float32 or float64 logits and integer labels, gradient written in place.
template <typename T>
T SoftmaxXentReducedOf(const Array<T>& predictions, const Array<int64_t>& labels,
                       Array<T>& gradient, int threads) {
  if (predictions.ndim() != 2 || labels.ndim() != 1 || labels.shape(0) != predictions.shape(0) ||
      gradient.ndim() != 2 || gradient.shape(0) != predictions.shape(0) ||
      gradient.shape(1) != predictions.shape(1)) {
    throw py::value_error(
        "softmax_xent_reduced: predictions and gradient must be [rows, classes], labels [rows]");
  }
  SoftmaxXentArgs<T> args{};
  args.rows = predictions.shape(0);
  args.classes = predictions.shape(1);
  args.predictions = predictions.data();
  args.labels64 = labels.data();
  T loss = 0;
  T* to = gradient.mutable_data();
  int64_t bad_row;
  {
    py::gil_scoped_release release;
    Threads pool(threads);
    bad_row = SoftmaxXentReduced<T>(pool.cpu(), args, nullptr,
                                    1.0 / std::max<int64_t>(1, args.rows), &loss, to);
  }
  if (bad_row >= 0) {
    throw py::value_error("softmax_xent_reduced: labels[" + std::to_string(bad_row) +
                          "] is not in [0, " + std::to_string(args.classes) + ")");
  }
  return loss;
}

// The training path on one layer of float32 or float64 features, gradient written in place.
template <typename T>
T FeatureDistanceReducedOf(const Array<T>& predictions, const Array<T>& targets, Array<T>& gradient,
                           FeatureMetric metric, double epsilon, int threads) {
  auto fits = [&](const Array<T>& other) {
    return other.ndim() == 3 && std::equal(other.shape(), other.shape() + 3, predictions.shape());
  };
  if (predictions.ndim() != 3 || !fits(targets) || !fits(gradient)) {
    throw py::value_error(
        "feature_distance_reduced: predictions, targets and gradient must be [rows, positions, "
        "channels]");
  }
  FeatureLayer<T> layer{};
  layer.positions = predictions.shape(1);
  layer.channels = predictions.shape(2);
  layer.predictions = predictions.data();
  layer.targets = targets.data();
  layer.dpredictions = gradient.mutable_data();
  const double layer_weight = 1;
  FeatureDistanceArgs<T> args{};
  args.rows = predictions.shape(0);
  args.layers = &layer;
  args.count = 1;
  args.layer_weights = &layer_weight;
  args.metric = metric;
  args.epsilon = epsilon;
  T loss = 0;
  py::gil_scoped_release release;
  Threads pool(threads);
  FeatureDistanceReduced<T>(pool.cpu(), args, nullptr, 1.0 / std::max<int64_t>(1, args.rows),
                            &loss);
  return loss;
}

void CheckSameSize(py::ssize_t to, py::ssize_t from) {
  if (to != from) throw py::value_error("the arrays differ in size");
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Build facts, CPU features, and the raw kernels on NumPy arrays.";
  m.def("build_info", &BuildInfo, "What the library was built for and with.");
  m.def("cpu_features", &CpuFeatures, "The CPU's instruction sets that the kernels can use.");
  m.def(
      "cpu_level", [] { return CpuLevelName(ChosenCpuLevel()); },
      "The kernels in use: baseline, avx2 or avx512.");
  m.def("cpu_level_error", &CpuLevelError, "Why FUSEDLOSS_CPU is not obeyed, or ''.");
  m.def("softmax_xent_reduced", &SoftmaxXentReducedOf<float>, py::arg("predictions").noconvert(),
        py::arg("labels").noconvert(), py::arg("gradient").noconvert(), py::arg("threads") = 1,
        "Mean loss of [rows, classes] logits; writes its gradient.");
  m.def("softmax_xent_reduced", &SoftmaxXentReducedOf<double>, py::arg("predictions").noconvert(),
        py::arg("labels").noconvert(), py::arg("gradient").noconvert(), py::arg("threads") = 1);
  py::enum_<FeatureMetric>(m, "FeatureMetric")
      .value("mse", FeatureMetric::kSquared)
      .value("mae", FeatureMetric::kAbsolute)
      .value("charbonnier", FeatureMetric::kCharbonnier)
      .value("cosine", FeatureMetric::kCosine)
      .value("lpips", FeatureMetric::kLpips);
  m.def("feature_distance_reduced", &FeatureDistanceReducedOf<float>,
        py::arg("predictions").noconvert(), py::arg("targets").noconvert(),
        py::arg("gradient").noconvert(), py::arg("metric"), py::arg("epsilon"),
        py::arg("threads") = 1,
        "Mean distance of [rows, positions, channels] features; writes its gradient.");
  m.def("feature_distance_reduced", &FeatureDistanceReducedOf<double>,
        py::arg("predictions").noconvert(), py::arg("targets").noconvert(),
        py::arg("gradient").noconvert(), py::arg("metric"), py::arg("epsilon"),
        py::arg("threads") = 1);
  m.def(
      "copy",
      [](Array<float>& to, const Array<float>& from, int threads) {
        CheckSameSize(to.size(), from.size());
        float* out = to.mutable_data();
        py::gil_scoped_release release;
        Threads pool(threads);
        StreamCopy(pool.cpu(), from.size(), from.data(), out);
      },
      py::arg("to").noconvert(), py::arg("from").noconvert(), py::arg("threads") = 1,
      "to = from, past the caches.");
  m.def(
      "triad",
      [](Array<float>& to, const Array<float>& a, const Array<float>& b, int threads) {
        CheckSameSize(to.size(), a.size());
        CheckSameSize(to.size(), b.size());
        float* out = to.mutable_data();
        py::gil_scoped_release release;
        Threads pool(threads);
        StreamTriad(pool.cpu(), a.size(), a.data(), b.data(), out);
      },
      py::arg("to").noconvert(), py::arg("a").noconvert(), py::arg("b").noconvert(),
      py::arg("threads") = 1, "to = a + b, past the caches.");
}

}  // namespace fusedloss
