#include "tf/penalty.h"

#include "absl/strings/str_cat.h"

namespace fusedloss {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::shape_inference::InferenceContext;

constexpr PenaltyPlaces kForward{-1, 0, 0, -1}, kGrad{0, 1, -1, 0}, kReduced{-1, 0, 0, 1};

Shapes ForwardShapes(const Attributes& attributes, const InputElements&) {
  Shapes shapes{{}, {""}};
  AddPenaltyInputs(attributes, &shapes);
  return shapes;
}

Shapes GradShapes(const Attributes& attributes, const InputElements&) {
  Shapes shapes{{"dpenalty: "}, {}};
  AddPenaltyInputs(attributes, &shapes);
  AddVariableGradients(attributes, &shapes);
  return shapes;
}

Shapes ReducedShapes(const Attributes& attributes, const InputElements& elements) {
  Shapes shapes = ForwardShapes(attributes, elements);
  AddVariableGradients(attributes, &shapes);
  return shapes;
}

int64_t Workspace(const std::vector<Dims>& inputs) { return PenaltyWorkspace(inputs.size()); }

template <const PenaltyPlaces& at>
absl::Status Run(const OpCall& call) {
  return RunPenalty(call, at);
}

FloatType FloatTypeOf(DataType dtype) {
  switch (dtype) {
    case tensorflow::DT_FLOAT:
      return FloatType::kFloat;
    case tensorflow::DT_DOUBLE:
      return FloatType::kDouble;
    case tensorflow::DT_HALF:
      return FloatType::kHalf;
    default:
      return FloatType::kBFloat16;
  }
}

template <typename A>
absl::Status RunPenaltyOf(const OpCall& call, const PenaltyPlaces& at) {
  std::vector<PenaltyVariable> variables(call.attributes.Int("V"));
  for (int k = 0; k < static_cast<int>(variables.size()); ++k) {
    const OpCall::Buffer& values = call.input(at.coefficients + 1 + k);
    variables[k] = {FloatTypeOf(values.dtype), OpCall::Elements(values.dims), values.bytes,
                    at.dvariables < 0 ? nullptr : call.Output<void>(at.dvariables + k)};
  }
  PenaltyArgs<A> args{};
  args.variables = variables.data();
  args.count = variables.size();
  args.coefficients = call.Input<double>(at.coefficients);
  args.dpenalty = at.dpenalty < 0 ? nullptr : call.Input<A>(at.dpenalty);
  args.penalty = at.penalty < 0 ? nullptr : call.Output<A>(at.penalty);
  return call.Run([&](const auto& device) { return Penalty<A>(device, args); });
}

}  // namespace

void AddPenaltyInputs(const Attributes& attributes, Shapes* shapes) {
  const int64_t variables = attributes.Int("V");
  shapes->inputs.push_back(absl::StrCat("coefficients: ", variables, " 2"));
  for (int64_t k = 0; k < variables; ++k) {
    shapes->inputs.push_back(absl::StrCat("variables[", k, "]: *"));
  }
}

void AddVariableGradients(const Attributes& attributes, Shapes* shapes) {
  const int64_t inputs = shapes->inputs.size(), variables = attributes.Int("V");
  for (int64_t place = inputs - variables; place < inputs; ++place) {
    shapes->outputs.push_back(absl::StrCat("*", place));
  }
}

absl::Status RunPenalty(const OpCall& call, const PenaltyPlaces& at) {
  return call.attributes.Type("A") == kDataType<double> ? RunPenaltyOf<double>(call, at)
                                                        : RunPenaltyOf<float>(call, at);
}

REGISTER_OP("Fusedloss>Penalty")
    .Attr("A: {float, double}")
    .FUSEDLOSS_PENALTY_INPUTS.Output("penalty: A")
    .SetShapeFn([](InferenceContext* c) { return InferShapes("Fusedloss>Penalty", c); });
FUSEDLOSS_OP("Fusedloss>Penalty", ForwardShapes, Workspace, Run<kForward>);

REGISTER_OP("Fusedloss>PenaltyGrad")
    .Attr("A: {float, double}")
    .Input("dpenalty: A")
    .FUSEDLOSS_PENALTY_INPUTS.Output("dvariables: V")
    .SetShapeFn([](InferenceContext* c) { return InferShapes("Fusedloss>PenaltyGrad", c); });
FUSEDLOSS_OP("Fusedloss>PenaltyGrad", GradShapes, Workspace, Run<kGrad>);

REGISTER_OP("Fusedloss>PenaltyReduced")
    .Attr("A: {float, double}")
    .FUSEDLOSS_PENALTY_INPUTS.FUSEDLOSS_PENALTY_OUTPUTS.SetShapeFn([](InferenceContext* c) {
      return InferShapes("Fusedloss>PenaltyReduced", c);
    });
FUSEDLOSS_OP("Fusedloss>PenaltyReduced", ReducedShapes, Workspace, Run<kReduced>);

}  // namespace fusedloss
