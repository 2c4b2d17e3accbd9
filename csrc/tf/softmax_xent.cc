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
  const int targets = predictions + parts, subset = targets + 1, class_weight = targets + 2;
  const int next = targets + 3;
};

bool IsLabels(DataType dtype) {
  return dtype == tensorflow::DT_INT32 || dtype == tensorflow::DT_INT64;
}

SubsetKind KindOfSubset(const Attributes& attributes) {
  const std::string& kind = attributes.String("subset_kind");
  return kind == "ids"          ? SubsetKind::kIds
         : kind == "mask"       ? SubsetKind::kMask
         : kind == "candidates" ? SubsetKind::kCandidates
                                : SubsetKind::kAll;
}

std::vector<std::string> InputShapes(const Attributes& attributes) {
  const SubsetKind kind = KindOfSubset(attributes);
  std::string targets = "... classes", subset = "subset: subset_size";
  if (kind == SubsetKind::kAll) subset = "subset: 0";
  if (kind == SubsetKind::kMask) subset = "mask: ... classes";
  if (kind == SubsetKind::kCandidates) {
    targets = "... candidates";
    subset = "candidates: " + targets;
  }
  if (IsLabels(attributes.Type("Targets"))) targets = "...";
  std::vector<std::string> shapes{"predictions: ... classes"};
  shapes.insert(shapes.end(), attributes.Int("parts") - 1, "blended predictions: ... classes");
  shapes.insert(shapes.end(), {"targets: " + targets, subset, "class_weight: classes | 0"});
  return shapes;
}

// Of the gradients, which follow `before`.
std::vector<std::string> GradientShapes(const Attributes& attributes,
                                        std::vector<std::string> before) {
  before.insert(before.end(), attributes.Int("parts"), "... classes");
  return before;
}

SoftmaxXentOptions ReadOptions(const Attributes& attributes) {
  SoftmaxXentOptions options;
  options.from_logits = attributes.Bool("from_logits");
  options.normalize_full = attributes.Bool("normalize_full");
  options.mask_negative = attributes.Bool("mask_negative");
  options.has_ignore_class = attributes.Bool("has_ignore_class");
  options.ignore_class = attributes.Int("ignore_class");
  options.subset_weight = attributes.Number("subset_weight");
  options.full_weight = attributes.Number("full_weight");
  options.label_smoothing = attributes.Number("label_smoothing");
  options.epsilon = attributes.Number("epsilon");
  options.temperature = attributes.Number("temperature");
  options.z_loss = attributes.Number("z_loss");
  options.softcap = attributes.Number("softcap");
  options.focal = attributes.Bool("focal");
  options.gamma = attributes.Number("gamma");
  return options;
}

std::string StatsShape(const Places& at, const Attributes& attributes,
                       const InputElements& elements) {
  const int64_t weights = elements(at.class_weight);
  const float any = 1;
  SoftmaxXentArgs<float> args{};
  args.subset_kind = KindOfSubset(attributes);
  args.options = ReadOptions(attributes);
  const int without_weights = SoftmaxXentStats(args);
  args.class_weight = &any;
  const int with_weights = SoftmaxXentStats(args);
  if (weights < 0 && with_weights != without_weights) return "... stats";
  return absl::StrCat("... ", weights == 0 ? without_weights : with_weights);
}

Shapes ForwardShapes(const Attributes& attributes, const InputElements& elements) {
  const Places at(kForward, attributes);
  Shapes shapes{InputShapes(attributes), {"...", StatsShape(at, attributes, elements)}};
  shapes.outputs.insert(shapes.outputs.end(), attributes.Int("metrics"), "... 3");
  return shapes;
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
  std::vector<std::string> outputs = GradientShapes(attributes, {""});
  outputs.insert(outputs.end(), attributes.Int("metrics"), "... 3");
  return {shapes, outputs};
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
  // Dense targets of no candidates have no memory.
  static constexpr A kNone = 0;
  if (!IsLabels(targets) && args->targets == nullptr) args->targets = &kNone;
  args->class_weight = call.InputOrNull<A>(at.class_weight);
  const OpCall::Buffer& subset = call.input(at.subset);
  args->subset_kind = KindOfSubset(call.attributes);
  args->subset_size = subset.dims.back();
  args->subset = nullptr;
  args->mask = nullptr;
  args->candidates32 = nullptr;
  args->candidates64 = nullptr;
  const bool is_mask = args->subset_kind == SubsetKind::kMask;
  const bool is_of_candidates = args->subset_kind == SubsetKind::kCandidates;
  if (is_mask != (subset.dtype == tensorflow::DT_BOOL) ||
      (!is_of_candidates && subset.dtype == tensorflow::DT_INT32)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a subset must be int64 class ids, a boolean mask, or int32 or int64 candidates; got ",
        tensorflow::DataTypeString(subset.dtype), " for '", call.attributes.String("subset_kind"),
        "'"));
  }
  if (is_mask) {
    args->mask = call.Input<bool>(at.subset);
  } else if (!is_of_candidates) {
    args->subset = call.InputOrNull<int64_t>(at.subset);
  } else if (subset.dtype == tensorflow::DT_INT32) {
    args->candidates32 = call.Input<int32_t>(at.subset);
  } else {
    args->candidates64 = call.Input<int64_t>(at.subset);
  }
  args->metrics = nullptr;
  const Attributes& attributes = call.attributes;
  args->blend[0] = attributes.Number("prediction_weight");
  args->blend[1] = attributes.Number("blended_weight");
  args->options = ReadOptions(attributes);
  if (args->options.mask_negative && IsLabels(targets)) {
    return absl::InvalidArgumentError("`mask_negative` needs dense `targets`; got labels");
  }
  // The host cannot read a GPU's memory: there the kernels answer a bad subset with NaN.
  return call.cpu && args->subset ? CheckSubset(*args) : absl::OkStatus();
}

// Says what is wrong with the row that a kernel has found.
template <typename T>
auto RowCheck(const SoftmaxXentArgs<T>& args) {
  return [&args](int64_t bad_row) -> absl::Status {
    if (bad_row < 0) return absl::OkStatus();
    for (int64_t k = 0; args.subset_kind == SubsetKind::kCandidates && k < args.subset_size; ++k) {
      const int64_t at = bad_row * args.subset_size + k;
      const int64_t id = args.candidates32 ? args.candidates32[at] : args.candidates64[at];
      if (id >= -1 && id < args.classes) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "`candidates` holds ", id, " at place ", k, " of row ", bad_row,
          " (of the flattened rows), but there are ", args.classes, " classes: ids lie in [0, ",
          args.classes, "), and -1 stands for no candidate."));
    }
    int64_t label = args.labels32 ? args.labels32[bad_row] : args.labels64[bad_row];
    return absl::InvalidArgumentError(absl::StrCat(
        "`labels` holds ", label, " at position ", bad_row,
        " (of the flattened labels), outside [0, ", args.classes, ") for ", args.classes,
        " classes. Rows to leave out can be marked by `ignore_class`, or have any label and a "
        "sample weight of 0."));
  };
}

template <typename T>
absl::Status Forward(const OpCall& call) {
  SoftmaxXentArgs<T> args;
  TF_RETURN_IF_ERROR(ReadArgs(call, Places(kForward, call.attributes), &args));
  using A = Accumulator<T>;
  if (call.attributes.Int("metrics") > 0) args.metrics = call.Output<A>(2);
  return call.Run(
      [&](const auto& device) {
        return SoftmaxXent<T>(device, args, call.Output<A>(0), call.Output<A>(1));
      },
      RowCheck(args));
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
      RowCheck(args));
}

template <typename T>
absl::Status Reduced(const OpCall& call) {
  const Places at(kReduced, call.attributes);
  SoftmaxXentArgs<T> args;
  TF_RETURN_IF_ERROR(ReadArgs(call, at, &args));
  if (args.blended) args.dblended = call.Output<T>(2);
  using A = Accumulator<T>;
  if (call.attributes.Int("metrics") > 0) args.metrics = call.Output<A>(1 + at.parts);
  double divisor = 1;
  if (call.attributes.String("reduction") == "mean") {
    divisor = static_cast<double>(args.rows) * call.attributes.Int("replicas");
  }
  return call.Run(
      [&](const auto& device) {
        return SoftmaxXentReduced<T>(device, args, call.InputOrNull<A>(at.next), 1 / divisor,
                                     call.Output<A>(0), call.Output<T>(1));
      },
      RowCheck(args));
}

constexpr RunFn kRunReduced = FUSEDLOSS_FOR_DTYPE(Reduced, kReduced);

}  // namespace

#define FUSEDLOSS_SOFTMAX_XENT_ATTRS                                     \
  Attr("parts: int >= 1 = 1")                                            \
      .Attr("T: {float, double, half, bfloat16}")                        \
      .Attr("A: {float, double}")                                        \
      .Attr("Targets: {int32, int64, float, double}")                    \
      .Attr("Subset: {bool, int32, int64} = DT_INT64")                   \
      .Attr("subset_kind: {'all', 'ids', 'mask', 'candidates'} = 'all'") \
      .Attr("from_logits: bool = true")                                  \
      .Attr("normalize_full: bool = false")                              \
      .Attr("mask_negative: bool = false")                               \
      .Attr("has_ignore_class: bool = false")                            \
      .Attr("ignore_class: int = 0")                                     \
      .Attr("subset_weight: string = '1'")                               \
      .Attr("full_weight: string = '1'")                                 \
      .Attr("label_smoothing: string = '0'")                             \
      .Attr("epsilon: string = '1e-7'")                                  \
      .Attr("temperature: string = '1'")                                 \
      .Attr("z_loss: string = '0'")                                      \
      .Attr("softcap: string = '0'")                                     \
      .Attr("focal: bool = false")                                       \
      .Attr("gamma: string = '0'")                                       \
      .Attr("prediction_weight: string = '1'")                           \
      .Attr("blended_weight: string = '0'")

REGISTER_OP("Fusedloss>SoftmaxXent")
    .FUSEDLOSS_SOFTMAX_XENT_ATTRS.Attr("metrics: int >= 0 = 0")
    .Input("predictions: parts * T")
    .Input("targets: Targets")
    .Input("subset: Subset")
    .Input("class_weight: A")
    .Output("loss: A")
    .Output("stats: A")
    .Output("residuals: metrics * A")
    .SetShapeFn([](InferenceContext* c) { return InferShapes("Fusedloss>SoftmaxXent", c); });
FUSEDLOSS_OP("Fusedloss>SoftmaxXent", ForwardShapes, Workspace<kForward>,
             FUSEDLOSS_FOR_DTYPE(Forward, kForward));

REGISTER_OP("Fusedloss>SoftmaxXentGrad")
    .FUSEDLOSS_SOFTMAX_XENT_ATTRS.Input("dloss: A")
    .Input("predictions: parts * T")
    .Input("targets: Targets")
    .Input("subset: Subset")
    .Input("class_weight: A")
    .Input("stats: A")
    .Output("dpredictions: parts * T")
    .SetShapeFn([](InferenceContext* c) { return InferShapes("Fusedloss>SoftmaxXentGrad", c); });
FUSEDLOSS_OP("Fusedloss>SoftmaxXentGrad", GradShapes, Workspace<kGrad>,
             FUSEDLOSS_FOR_DTYPE(Grad, kGrad));

#define FUSEDLOSS_SOFTMAX_XENT_REDUCED                            \
  FUSEDLOSS_SOFTMAX_XENT_ATTRS.Attr("reduction: {'sum', 'mean'}") \
      .Attr("replicas: int >= 1 = 1")                             \
      .Attr("metrics: int >= 0 = 0")                              \
      .Input("predictions: parts * T")                            \
      .Input("targets: Targets")                                  \
      .Input("subset: Subset")                                    \
      .Input("class_weight: A")                                   \
      .Input("row_weight: A")                                     \
      .Output("loss: A")                                          \
      .Output("gradients: parts * T")                             \
      .Output("residuals: metrics * A")

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
