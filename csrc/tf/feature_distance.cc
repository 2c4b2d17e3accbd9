#include "kernels/feature_distance.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "tf/op_glue.h"
#include "tf/penalty.h"

namespace fusedloss {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::shape_inference::InferenceContext;

// The first prediction among an op's inputs, which the others that all ops share follow, and the
// first gradient among its outputs; −1 where it has none.
struct Places {
  int predictions, gradients;
};
constexpr Places kForward{0, -1}, kGrad{1, 0}, kReduced{0, 1};

bool ChannelsLast(const Attributes& attributes) {
  return attributes.String("data_format") == "channels_last";
}

bool ToFirst(const Attributes& attributes) { return attributes.String("reference") == "first"; }

std::vector<std::string> InputShapes(const Attributes& attributes) {
  const int64_t layers = attributes.Int("layers");
  auto features = [&](absl::string_view rows, int64_t k) {
    return ChannelsLast(attributes) ? absl::StrCat(rows, " ...", k, " channels", k)
                                    : absl::StrCat(rows, " channels", k, " ...", k);
  };
  std::vector<std::string> shapes;
  for (int64_t k = 0; k < layers; ++k) {
    shapes.push_back(absl::StrCat("predictions[", k, "]: ", features("rows", k)));
  }
  for (int64_t k = 0; k < layers; ++k) {
    shapes.push_back(absl::StrCat(
        "targets[", k, "]: ",
        ToFirst(attributes) ? "0" : absl::StrCat(features("rows", k), " | ", features("1", k))));
  }
  for (int64_t k = 0; k < layers; ++k) {
    shapes.push_back(absl::StrCat("channel_weights[", k, "]: channels", k, " | 0"));
  }
  shapes.push_back(absl::StrCat("layer_weights: ", layers));
  return shapes;
}

void AddGradients(const Attributes& attributes, const Places& at, Shapes* shapes) {
  const int64_t inputs = shapes->inputs.size();
  for (int64_t k = 0; k < attributes.Int("differentiated"); ++k) {
    // More than the predictions and targets are refused when the op runs.
    shapes->outputs.push_back(absl::StrCat("*", std::min(at.predictions + k, inputs - 1)));
  }
}

Shapes ForwardShapes(const Attributes& attributes, const InputElements&) {
  return {InputShapes(attributes), {"rows"}};
}

Shapes GradShapes(const Attributes& attributes, const InputElements&) {
  Shapes shapes{InputShapes(attributes), {}};
  shapes.inputs.insert(shapes.inputs.begin(), "dloss: rows");
  AddGradients(attributes, kGrad, &shapes);
  return shapes;
}

Shapes ReducedShapes(const Attributes& attributes, const InputElements&) {
  Shapes shapes{InputShapes(attributes), {""}};
  shapes.inputs.push_back("row_weight: rows | 0");
  AddGradients(attributes, kReduced, &shapes);
  return shapes;
}

int64_t Workspace(const std::vector<Dims>& inputs) {
  const int64_t rows = inputs[0][0];  // of dloss or of predictions
  // The maps are one run of the inputs. Behind them lie the channel weights, one a layer, and one
  // or two arrays more; under "first" as many empty targets, too. So the maps are told apart.
  auto is_map = [](const Dims& dims) { return dims.size() >= 2; };
  const auto first = std::find_if(inputs.begin(), inputs.end(), is_map);
  const auto past = std::find_if_not(first, inputs.end(), is_map);
  const bool to_first = std::find_if(past, inputs.end(), is_map) - past > 2 * (past - first);
  int64_t shared_features = 0;
  for (auto map = first; map != past; ++map) {
    if (!to_first && ((*map)[0] != 1 || rows == 1)) continue;
    int64_t features = 1;
    for (size_t axis = 1; axis < map->size(); ++axis) features *= (*map)[axis];
    shared_features += features;
  }
  return FeatureDistanceWorkspace(rows, past - first, shared_features);
}

FeatureMetric MetricOf(const std::string& metric) {
  if (metric == "mse") return FeatureMetric::kSquared;
  if (metric == "mae") return FeatureMetric::kAbsolute;
  if (metric == "charbonnier") return FeatureMetric::kCharbonnier;
  if (metric == "cosine") return FeatureMetric::kCosine;
  return FeatureMetric::kLpips;
}

absl::Status CheckAttributes(const Attributes& attributes, const Places& at, DataType features,
                             DataType sums) {
  if (attributes.Type("A") != sums) {
    return absl::InvalidArgumentError(absl::StrCat(
        "`channel_weights`, `row_weight` and `dloss` must be ", tensorflow::DataTypeString(sums),
        " for predictions of type ", tensorflow::DataTypeString(features), "; got ",
        tensorflow::DataTypeString(attributes.Type("A"))));
  }
  if (at.gradients < 0) return absl::OkStatus();
  const int64_t layers = attributes.Int("layers"), gradients = attributes.Int("differentiated");
  if (gradients == layers || (gradients == 2 * layers && !ToFirst(attributes))) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("`differentiated` must be ", layers, ", for the predictions, or ", 2 * layers,
                   ", for the targets too where there are any; got ", gradients));
}

template <typename T>
FeatureLayer<T> ReadLayer(const OpCall& call, const Places& at, int k) {
  const int layers = static_cast<int>(call.attributes.Int("layers"));
  const int prediction = at.predictions + k, target = prediction + layers;
  const Dims& dims = call.input(prediction).dims;
  const int channels = ChannelsLast(call.attributes) ? dims.size() - 1 : 1;
  FeatureLayer<T> layer{};
  layer.channels = dims[channels];
  layer.positions = 1;
  for (int d = 1; d < static_cast<int>(dims.size()); ++d) {
    if (d != channels) layer.positions *= dims[d];
  }
  layer.predictions = call.Input<T>(prediction);
  layer.targets = call.InputOrNull<T>(target);
  layer.channel_weights = call.InputOrNull<Accumulator<T>>(target + layers);
  if (ToFirst(call.attributes)) {
    layer.reference = FeatureReference::kFirst;
  } else if (call.input(target).dims[0] == dims[0]) {
    layer.reference = FeatureReference::kTarget;
  } else {
    layer.reference = FeatureReference::kOneTarget;
  }
  if (at.gradients >= 0) {
    layer.dpredictions = call.Output<T>(at.gradients + k);
    if (call.attributes.Int("differentiated") > layers) {
      layer.dtargets = call.Output<T>(at.gradients + layers + k);
    }
  }
  return layer;
}

// Calls run(device, args).
template <typename T, typename Run>
absl::Status RunOn(const OpCall& call, const Places& at, const Run& run) {
  const Attributes& attributes = call.attributes;
  TF_RETURN_IF_ERROR(CheckAttributes(attributes, at, kDataType<T>, kDataType<Accumulator<T>>));
  std::vector<FeatureLayer<T>> layers(attributes.Int("layers"));
  for (size_t k = 0; k < layers.size(); ++k) layers[k] = ReadLayer<T>(call, at, k);
  FeatureDistanceArgs<T> args{};
  args.rows = call.input(at.predictions).dims[0];
  args.layers = layers.data();
  args.count = layers.size();
  args.layer_weights = call.Input<double>(at.predictions + 3 * layers.size());
  args.metric = MetricOf(attributes.String("metric"));
  args.channels_last = ChannelsLast(attributes);
  args.epsilon_in_root = attributes.Bool("epsilon_in_root");
  args.epsilon = attributes.Number("epsilon");
  return call.Run([&](const auto& device) { return run(device, args); });
}

template <typename T>
absl::Status Forward(const OpCall& call) {
  return RunOn<T>(call, kForward, [&](const auto& device, const auto& args) {
    return FeatureDistance<T>(device, args, call.Output<Accumulator<T>>(0));
  });
}

template <typename T>
absl::Status Grad(const OpCall& call) {
  return RunOn<T>(call, kGrad, [&](const auto& device, const auto& args) {
    return FeatureDistanceGrad<T>(device, args, call.Input<Accumulator<T>>(0));
  });
}

template <typename T>
absl::Status Reduced(const OpCall& call) {
  using A = Accumulator<T>;
  return RunOn<T>(call, kReduced, [&](const auto& device, const auto& args) {
    const A* row_weight = call.InputOrNull<A>(3 * args.count + 1);
    double divisor = 1;
    if (call.attributes.String("reduction") == "mean") {
      divisor = std::max<double>(args.rows, 1) * call.attributes.Int("replicas");
    }
    return FeatureDistanceReduced<T>(device, args, row_weight, 1 / divisor, call.Output<A>(0));
  });
}

constexpr RunFn kRunReduced = FUSEDLOSS_FOR_DTYPE(Reduced, kReduced.predictions);

}  // namespace

#define FUSEDLOSS_FEATURE_DISTANCE_ATTRS                                          \
  Attr("layers: int >= 1")                                                        \
      .Attr("T: {float, double, half, bfloat16}")                                 \
      .Attr("A: {float, double}")                                                 \
      .Attr("metric: {'mse', 'mae', 'charbonnier', 'cosine', 'lpips'}")           \
      .Attr("reference: {'target', 'first'} = 'target'")                          \
      .Attr("data_format: {'channels_last', 'channels_first'} = 'channels_last'") \
      .Attr("epsilon: string = '0'")                                              \
      .Attr("epsilon_in_root: bool = true")

#define FUSEDLOSS_FEATURE_DISTANCE_INPUTS   \
  Input("predictions: layers * T")          \
      .Input("targets: layers * T")         \
      .Input("channel_weights: layers * A") \
      .Input("layer_weights: double")

REGISTER_OP("Fusedloss>FeatureDistance")
    .FUSEDLOSS_FEATURE_DISTANCE_ATTRS.FUSEDLOSS_FEATURE_DISTANCE_INPUTS.Output("loss: A")
    .SetShapeFn([](InferenceContext* c) { return InferShapes("Fusedloss>FeatureDistance", c); });
FUSEDLOSS_OP("Fusedloss>FeatureDistance", ForwardShapes, Workspace,
             FUSEDLOSS_FOR_DTYPE(Forward, kForward.predictions));

REGISTER_OP("Fusedloss>FeatureDistanceGrad")
    .FUSEDLOSS_FEATURE_DISTANCE_ATTRS.Attr("differentiated: int >= 1")
    .Input("dloss: A")
    .FUSEDLOSS_FEATURE_DISTANCE_INPUTS.Output("gradients: differentiated * T")
    .SetShapeFn([](InferenceContext* c) {
      return InferShapes("Fusedloss>FeatureDistanceGrad", c);
    });
FUSEDLOSS_OP("Fusedloss>FeatureDistanceGrad", GradShapes, Workspace,
             FUSEDLOSS_FOR_DTYPE(Grad, kGrad.predictions));

#define FUSEDLOSS_FEATURE_DISTANCE_REDUCED                          \
  FUSEDLOSS_FEATURE_DISTANCE_ATTRS.Attr("differentiated: int >= 1") \
      .Attr("reduction: {'sum', 'mean'}")                           \
      .Attr("replicas: int >= 1 = 1")                               \
      .FUSEDLOSS_FEATURE_DISTANCE_INPUTS.Input("row_weight: A")     \
      .Output("loss: A")                                            \
      .Output("gradients: differentiated * T")

REGISTER_OP("Fusedloss>FeatureDistanceReduced")
    .FUSEDLOSS_FEATURE_DISTANCE_REDUCED.SetShapeFn([](InferenceContext* c) {
      return InferShapes("Fusedloss>FeatureDistanceReduced", c);
    });
FUSEDLOSS_OP("Fusedloss>FeatureDistanceReduced", ReducedShapes, Workspace, kRunReduced);

REGISTER_OP("Fusedloss>FeatureDistanceReducedPenalized")
    .FUSEDLOSS_FEATURE_DISTANCE_REDUCED.FUSEDLOSS_PENALTY_INPUTS.FUSEDLOSS_PENALTY_OUTPUTS
    .SetShapeFn([](InferenceContext* c) {
      return InferShapes("Fusedloss>FeatureDistanceReducedPenalized", c);
    });
FUSEDLOSS_OP("Fusedloss>FeatureDistanceReducedPenalized", PenalizedShapes<ReducedShapes>,
             PenalizedWorkspace<Workspace>, PenalizedRun<kRunReduced>);

}  // namespace fusedloss
