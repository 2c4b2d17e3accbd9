#include "kernels/softmax_xent.h"

#include "absl/strings/str_cat.h"
#include "tf/op_glue.h"
#include "tf/penalty.h"

namespace fusedloss {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::shape_inference::InferenceContext;

// The predictions' place among an op's inputs.
constexpr int kForward = 0, kGrad = 1, kReduced = 0;

// The inputs that the three ops share, by their place, and the first that follows them.
struct Places {
  Places(int predictions, const Attributes& attributes)
      : predictions(predictions), parts(static_cast<int>(attributes.Int("parts"))) {}
  const int predictions, parts;  // one array, or two that are blended
  const int targets = predictions + parts, class_weight = targets + 1, subset = targets + 2;
  const int next = targets + 3;
};

bool IsLabels(DataType dtype) {
  return dtype == tensorflow::DT_INT32 || dtype == tensorflow::DT_INT64;
}

std::vector<std::string> InputShapes(const Attributes& attributes) {
  std::string targets = IsLabels(attributes.Type("Targets")) ? "..." : "... classes";
  std::vector<std::string> shapes{"predictions: ... classes"};
  shapes.insert(shapes.end(), attributes.Int("parts") - 1, "blended predictions: ... classes");
  shapes.insert(shapes.end(),
                {"targets: " + targets, "class_weight: classes | 0", "subset: subset_size"});
  return shapes;
}

// Of the gradients, which follow `before`.
std::vector<std::string> GradientShapes(const Attributes& attributes,
                                        std::vector<std::string> before) {
  before.insert(before.end(), attributes.Int("parts"), "... classes");
  return before;
}

// As SoftmaxXentStats, as far as it is known.
std::string StatsShape(const Places& at, const Attributes& attributes,
                       const InputElements& elements) {
  int64_t weights = elements(at.class_weight), subset = elements(at.subset);
  if (weights > 0 || subset > 0 || attributes.Number("label_smoothing") != 0) return "... 5";
  return weights == 0 && subset == 0 ? "... 2" : "... stats";
}

Shapes ForwardShapes(const Attributes& attributes, const InputElements& elements) {
  const Places at(kForward, attributes);
  return {InputShapes(attributes), {"...", StatsShape(at, attributes, elements)}};
}

Shapes GradShapes(const Attributes& attributes, const InputElements& elements) {
  std::vector<std::string> shapes = InputShapes(attributes);
  shapes.insert(shapes.begin(), "dloss: ...");
  const Places at(kGrad, attributes);
  shapes.push_back("stats: " + StatsShape(at, attributes, elements));
  return {shapes, GradientShapes(attributes, {})};
}

Shapes ReducedShapes(const Attributes& attributes, const InputElements&) {
  std::vector<std::string> shapes = InputShapes(attributes);
  shapes.push_back("row_weight: ... | 0");
  return {shapes, GradientShapes(attributes, {""})};
}

template <int kPredictions>
int64_t Workspace(const std::vector<Dims>& inputs) {
  return SoftmaxXentWorkspace(/*rows=*/0, inputs[kPredictions].back());
}

int64_t ReducedWorkspace(const std::vector<Dims>& inputs) {
  const Dims& predictions = inputs[kReduced];
  const int64_t rows = OpCall::Elements(Dims(predictions.begin(), predictions.end() - 1));
  return SoftmaxXentWorkspace(rows, predictions.back());
}

template <typename T>
absl::Status CheckSubset(const SoftmaxXentArgs<T>& args) {
  for (int64_t k = 0; k < args.subset_size; ++k) {
    int64_t id = args.subset[k];
    if (id < 0 || id >= args.classes) {
      return absl::InvalidArgumentError(
          absl::StrCat("`subset` names class ", id, ", but there are ", args.classes,
                       " classes: ids lie in [0, ", args.classes, ")"));
    }
    if (k > 0 && id <= args.subset[k - 1]) {
      return absl::InvalidArgumentError(
          absl::StrCat("`subset` must be in ascending order without repetition; got ",
                       args.subset[k - 1], " before ", id));
    }
  }
  return absl::OkStatus();
}

// All but dblended.
template <typename T>
absl::Status ReadArgs(const OpCall& call, const Places& at, SoftmaxXentArgs<T>* args) {
  using A = Accumulator<T>;
  constexpr DataType kSums = kDataType<A>;
  const DataType targets = call.input(at.targets).dtype;
  if (call.input(at.class_weight).dtype != kSums || !(IsLabels(targets) || targets == kSums)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "`class_weight`, `row_weight`, `stats` and dense `targets` must be ",
        tensorflow::DataTypeString(kSums), " for predictions of type ",
        tensorflow::DataTypeString(call.input(at.predictions).dtype), "; got `targets` of type ",
        tensorflow::DataTypeString(targets), ", the others of type ",
        tensorflow::DataTypeString(call.input(at.class_weight).dtype)));
  }
  if (at.parts > 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("`predictions` are one array, or two that are blended; got ", at.parts));
  }
  const Dims& dims = call.input(at.predictions).dims;
  args->classes = dims.back();
  args->rows = OpCall::Elements(Dims(dims.begin(), dims.end() - 1));
  args->predictions = call.Input<T>(at.predictions);
  args->blended = at.parts == 2 ? call.Input<T>(at.predictions + 1) : nullptr;
  args->dblended = nullptr;
  args->labels32 = nullptr;
  args->labels64 = nullptr;
  args->targets = nullptr;
  switch (call.input(at.targets).dtype) {
    case tensorflow::DT_INT32:
      args->labels32 = call.Input<int32_t>(at.targets);
      break;
    case tensorflow::DT_INT64:
      args->labels64 = call.Input<int64_t>(at.targets);
      break;
    default:
      args->targets = call.Input<A>(at.targets);
  }
  args->class_weight = call.InputOrNull<A>(at.class_weight);
  args->subset = call.InputOrNull<int64_t>(at.subset);
  args->subset_size = call.input(at.subset).dims[0];
  const Attributes& attributes = call.attributes;
  args->blend[0] = attributes.Number("prediction_weight");
  args->blend[1] = attributes.Number("blended_weight");
  args->options = {attributes.Bool("from_logits"),       attributes.Bool("normalize_full"),
                   attributes.Bool("has_ignore_class"),  attributes.Int("ignore_class"),
                   attributes.Number("subset_weight"),   attributes.Number("full_weight"),
                   attributes.Number("label_smoothing"), attributes.Number("epsilon")};
  // The host cannot read a GPU's memory: there the kernels answer a bad subset with NaN.
  return call.cpu ? CheckSubset(*args) : absl::OkStatus();
}

template <typename T>
auto LabelCheck(const SoftmaxXentArgs<T>& args) {
  return [&args](int64_t bad_row) -> absl::Status {
    if (bad_row < 0) return absl::OkStatus();
    int64_t label = args.labels32 ? args.labels32[bad_row] : args.labels64[bad_row];
    return absl::InvalidArgumentError(
        absl::StrCat("`labels` holds ", label, " at position ", bad_row,
                     " (of the flattened labels), outside [0, ", args.classes, ") for ",
                     args.classes, " classes. Rows to leave out can be marked by `ignore_class`."));
  };
}

template <typename T>
absl::Status Forward(const OpCall& call) {
  SoftmaxXentArgs<T> args;
  TF_RETURN_IF_ERROR(ReadArgs(call, Places(kForward, call.attributes), &args));
  using A = Accumulator<T>;
  return call.Run(
      [&](const auto& device) {
        return SoftmaxXent<T>(device, args, call.Output<A>(0), call.Output<A>(1));
      },
      LabelCheck(args));
}

template <typename T>
absl::Status Grad(const OpCall& call) {
  const Places at(kGrad, call.attributes);
  SoftmaxXentArgs<T> args;
  TF_RETURN_IF_ERROR(ReadArgs(call, at, &args));
  if (args.blended) args.dblended = call.Output<T>(1);
  using A = Accumulator<T>;
  return call.Run(
      [&](const auto& device) {
        return SoftmaxXentGrad<T>(device, args, call.Input<A>(0), call.Input<A>(at.next),
                                  call.Output<T>(0));
      },
      LabelCheck(args));
}

template <typename T>
absl::Status Reduced(const OpCall& call) {
  const Places at(kReduced, call.attributes);
  SoftmaxXentArgs<T> args;
  TF_RETURN_IF_ERROR(ReadArgs(call, at, &args));
  if (args.blended) args.dblended = call.Output<T>(2);
  using A = Accumulator<T>;
  double divisor = 1;
  if (call.attributes.String("reduction") == "mean") {
    divisor = static_cast<double>(args.rows) * call.attributes.Int("replicas");
  }
  return call.Run(
      [&](const auto& device) {
        return SoftmaxXentReduced<T>(device, args, call.InputOrNull<A>(at.next), 1 / divisor,
                                     call.Output<A>(0), call.Output<T>(1));
      },
      LabelCheck(args));
}

constexpr RunFn kRunReduced = FUSEDLOSS_FOR_DTYPE(Reduced, kReduced);

}  // namespace

#define FUSEDLOSS_SOFTMAX_XENT_ATTRS                  \
  Attr("parts: int >= 1 = 1")                         \
      .Attr("T: {float, double, half, bfloat16}")     \
      .Attr("A: {float, double}")                     \
      .Attr("Targets: {int32, int64, float, double}") \
      .Attr("from_logits: bool = true")               \
      .Attr("normalize_full: bool = false")           \
      .Attr("has_ignore_class: bool = false")         \
      .Attr("ignore_class: int = 0")                  \
      .Attr("subset_weight: string = '1'")            \
      .Attr("full_weight: string = '0'")              \
      .Attr("label_smoothing: string = '0'")          \
      .Attr("epsilon: string = '1e-7'")               \
      .Attr("prediction_weight: string = '1'")        \
      .Attr("blended_weight: string = '0'")

REGISTER_OP("Fusedloss>SoftmaxXent")
    .FUSEDLOSS_SOFTMAX_XENT_ATTRS.Input("predictions: parts * T")
    .Input("targets: Targets")
    .Input("class_weight: A")
    .Input("subset: int64")
    .Output("loss: A")
    .Output("stats: A")
    .SetShapeFn([](InferenceContext* c) { return InferShapes("Fusedloss>SoftmaxXent", c); });
FUSEDLOSS_OP("Fusedloss>SoftmaxXent", ForwardShapes, Workspace<kForward>,
             FUSEDLOSS_FOR_DTYPE(Forward, kForward));

REGISTER_OP("Fusedloss>SoftmaxXentGrad")
    .FUSEDLOSS_SOFTMAX_XENT_ATTRS.Input("dloss: A")
    .Input("predictions: parts * T")
    .Input("targets: Targets")
    .Input("class_weight: A")
    .Input("subset: int64")
    .Input("stats: A")
    .Output("dpredictions: parts * T")
    .SetShapeFn([](InferenceContext* c) { return InferShapes("Fusedloss>SoftmaxXentGrad", c); });
FUSEDLOSS_OP("Fusedloss>SoftmaxXentGrad", GradShapes, Workspace<kGrad>,
             FUSEDLOSS_FOR_DTYPE(Grad, kGrad));

#define FUSEDLOSS_SOFTMAX_XENT_REDUCED                            \
  FUSEDLOSS_SOFTMAX_XENT_ATTRS.Attr("reduction: {'sum', 'mean'}") \
      .Attr("replicas: int >= 1 = 1")                             \
      .Input("predictions: parts * T")                            \
      .Input("targets: Targets")                                  \
      .Input("class_weight: A")                                   \
      .Input("subset: int64")                                     \
      .Input("row_weight: A")                                     \
      .Output("loss: A")                                          \
      .Output("gradients: parts * T")

REGISTER_OP("Fusedloss>SoftmaxXentReduced")
    .FUSEDLOSS_SOFTMAX_XENT_REDUCED.SetShapeFn([](InferenceContext* c) {
      return InferShapes("Fusedloss>SoftmaxXentReduced", c);
    });
FUSEDLOSS_OP("Fusedloss>SoftmaxXentReduced", ReducedShapes, ReducedWorkspace, kRunReduced);

REGISTER_OP("Fusedloss>SoftmaxXentReducedPenalized")
    .FUSEDLOSS_SOFTMAX_XENT_REDUCED.FUSEDLOSS_PENALTY_INPUTS.FUSEDLOSS_PENALTY_OUTPUTS.SetShapeFn(
        [](InferenceContext* c) {
          return InferShapes("Fusedloss>SoftmaxXentReducedPenalized", c);
        });
FUSEDLOSS_OP("Fusedloss>SoftmaxXentReducedPenalized", PenalizedShapes<ReducedShapes>,
             PenalizedWorkspace<ReducedWorkspace>, PenalizedRun<kRunReduced>);

}  // namespace fusedloss
