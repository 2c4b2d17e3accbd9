#include "kernels/pointwise.h"

#include "absl/strings/str_cat.h"
#include "tf/op_glue.h"
#include "tf/penalty.h"

namespace fusedloss {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::shape_inference::InferenceContext;

// The inputs that the three ops share, by their place among an op's inputs.
struct Places {
  int predictions, targets, output_weights, quantiles;
};
constexpr Places kForward{0, 1, 2, 3}, kGrad{1, 2, 3, 4}, kReduced{0, 1, 2, 3};

std::vector<std::string> InputShapes() {
  return {"predictions: ... outputs", "targets: ... outputs | ... 1", "output_weights: outputs | 0",
          "quantiles: outputs | 0"};
}

Shapes ForwardShapes(const Attributes&, const InputElements&) { return {InputShapes(), {"..."}}; }

Shapes GradShapes(const Attributes&, const InputElements&) {
  std::vector<std::string> shapes = InputShapes();
  shapes.insert(shapes.begin(), "dloss: ...");
  return {shapes, {"... outputs"}};
}

Shapes ReducedShapes(const Attributes&, const InputElements&) {
  std::vector<std::string> shapes = InputShapes();
  shapes.push_back("row_weight: ... | 0");
  return {shapes, {"", "... outputs"}};
}

int64_t NoWorkspace(const std::vector<Dims>&) { return 0; }

int64_t ReducedWorkspace(const std::vector<Dims>& inputs) {
  const Dims& predictions = inputs[kReduced.predictions];
  const int64_t rows = OpCall::Elements(Dims(predictions.begin(), predictions.end() - 1));
  return PointwiseWorkspace(rows, predictions.back());
}

Pointwise KindOf(const std::string& kind) {
  if (kind == "huber") return Pointwise::kHuber;
  if (kind == "squared") return Pointwise::kSquared;
  if (kind == "absolute") return Pointwise::kAbsolute;
  if (kind == "log_cosh") return Pointwise::kLogCosh;
  if (kind == "quantile") return Pointwise::kQuantile;
  if (kind == "binary_logits") return Pointwise::kBinaryLogits;
  return Pointwise::kBinaryProbabilities;
}

template <typename T, typename Y>
PointwiseArgs<T, Y> ReadArgs(const OpCall& call, const Places& at) {
  using A = Accumulator<T>;
  const Dims& dims = call.input(at.predictions).dims;
  PointwiseArgs<T, Y> args{};
  args.outputs = dims.back();
  args.rows = OpCall::Elements(Dims(dims.begin(), dims.end() - 1));
  args.predictions = call.Input<T>(at.predictions);
  args.targets = call.Input<Y>(at.targets);
  args.one_target_a_row = call.input(at.targets).dims.back() != args.outputs;
  args.output_weights = call.InputOrNull<A>(at.output_weights);
  args.quantiles = call.InputOrNull<A>(at.quantiles);
  args.kind = KindOf(call.attributes.String("kind"));
  args.parameter = call.attributes.Number("parameter");
  args.epsilon = call.attributes.Number("epsilon");
  return args;
}

// Calls run(device, args) with the arguments in the types of predictions, T, and targets.
template <typename T, typename Run>
absl::Status RunOn(const OpCall& call, const Places& at, const Run& run) {
  using A = Accumulator<T>;
  auto run_as = [&](auto target) {
    const auto args = ReadArgs<T, decltype(target)>(call, at);
    return call.Run([&](const auto& device) { return run(device, args); });
  };
  const DataType targets = call.input(at.targets).dtype;
  if (call.input(at.output_weights).dtype == kDataType<A>) {
    if (targets == kDataType<T>) return run_as(T{});
    if (targets == kDataType<A>) return run_as(A{});
  }
  return absl::InvalidArgumentError(
      absl::StrCat("`output_weights`, `quantiles`, `row_weight` and `dloss` must be ",
                   tensorflow::DataTypeString(kDataType<A>), " for predictions of type ",
                   tensorflow::DataTypeString(kDataType<T>),
                   ", `targets` that or of the predictions' type; got `targets` of type ",
                   tensorflow::DataTypeString(targets), ", the others of type ",
                   tensorflow::DataTypeString(call.input(at.output_weights).dtype)));
}

template <typename T>
absl::Status Forward(const OpCall& call) {
  using A = Accumulator<T>;
  return RunOn<T>(call, kForward, [&](const auto& device, const auto& args) {
    return PointwiseLoss(device, args, call.Output<A>(0));
  });
}

template <typename T>
absl::Status Grad(const OpCall& call) {
  using A = Accumulator<T>;
  return RunOn<T>(call, kGrad, [&](const auto& device, const auto& args) {
    return PointwiseGrad(device, args, call.Input<A>(0), call.Output<T>(0));
  });
}

template <typename T>
absl::Status Reduced(const OpCall& call) {
  using A = Accumulator<T>;
  return RunOn<T>(call, kReduced, [&](const auto& device, const auto& args) {
    double divisor = 1;
    if (call.attributes.String("reduction") == "mean") {
      divisor = static_cast<double>(args.rows) * call.attributes.Int("replicas");
    }
    return PointwiseReduced(device, args, call.InputOrNull<A>(4), 1 / divisor, call.Output<A>(0),
                            call.Output<T>(1));
  });
}

constexpr RunFn kRunReduced = FUSEDLOSS_FOR_DTYPE(Reduced, kReduced.predictions);

}  // namespace

#define FUSEDLOSS_POINTWISE_ATTRS                                                            \
  Attr("T: {float, double, half, bfloat16}")                                                 \
      .Attr("A: {float, double}")                                                            \
      .Attr("Targets: {float, double, half, bfloat16}")                                      \
      .Attr(                                                                                 \
          "kind: {'huber', 'squared', 'absolute', 'log_cosh', 'quantile', 'binary_logits', " \
          "'binary_probabilities'}")                                                         \
      .Attr("parameter: string = '0'")                                                       \
      .Attr("epsilon: string = '1e-7'")

#define FUSEDLOSS_POINTWISE_INPUTS \
  Input("predictions: T").Input("targets: Targets").Input("output_weights: A").Input("quantiles: A")

REGISTER_OP("Fusedloss>Pointwise")
    .FUSEDLOSS_POINTWISE_ATTRS.FUSEDLOSS_POINTWISE_INPUTS.Output("loss: A")
    .SetShapeFn([](InferenceContext* c) { return InferShapes("Fusedloss>Pointwise", c); });
FUSEDLOSS_OP("Fusedloss>Pointwise", ForwardShapes, NoWorkspace,
             FUSEDLOSS_FOR_DTYPE(Forward, kForward.predictions));

REGISTER_OP("Fusedloss>PointwiseGrad")
    .FUSEDLOSS_POINTWISE_ATTRS.Input("dloss: A")
    .FUSEDLOSS_POINTWISE_INPUTS.Output("dpredictions: T")
    .SetShapeFn([](InferenceContext* c) { return InferShapes("Fusedloss>PointwiseGrad", c); });
FUSEDLOSS_OP("Fusedloss>PointwiseGrad", GradShapes, NoWorkspace,
             FUSEDLOSS_FOR_DTYPE(Grad, kGrad.predictions));

#define FUSEDLOSS_POINTWISE_REDUCED                            \
  FUSEDLOSS_POINTWISE_ATTRS.Attr("reduction: {'sum', 'mean'}") \
      .Attr("replicas: int >= 1 = 1")                          \
      .FUSEDLOSS_POINTWISE_INPUTS.Input("row_weight: A")       \
      .Output("loss: A")                                       \
      .Output("gradient: T")

REGISTER_OP("Fusedloss>PointwiseReduced")
    .FUSEDLOSS_POINTWISE_REDUCED.SetShapeFn([](InferenceContext* c) {
      return InferShapes("Fusedloss>PointwiseReduced", c);
    });
FUSEDLOSS_OP("Fusedloss>PointwiseReduced", ReducedShapes, ReducedWorkspace, kRunReduced);

REGISTER_OP("Fusedloss>PointwiseReducedPenalized")
    .FUSEDLOSS_POINTWISE_REDUCED.FUSEDLOSS_PENALTY_INPUTS.FUSEDLOSS_PENALTY_OUTPUTS.SetShapeFn(
        [](InferenceContext* c) { return InferShapes("Fusedloss>PointwiseReducedPenalized", c); });
FUSEDLOSS_OP("Fusedloss>PointwiseReducedPenalized", PenalizedShapes<ReducedShapes>,
             PenalizedWorkspace<ReducedWorkspace>, PenalizedRun<kRunReduced>);

}  // namespace fusedloss
