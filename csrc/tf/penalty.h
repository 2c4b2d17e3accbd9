// The penalty on weights as a part of ops. From a loss's Reduced op, which returns loss and
// gradients, Penalized* make the ReducedPenalized op: it has coefficients and variables after the
// loss's inputs, and penalty and dvariables after its outputs.
#ifndef FUSEDLOSS_TF_PENALTY_H_
#define FUSEDLOSS_TF_PENALTY_H_

#include "kernels/penalty.h"
#include "tf/op_glue.h"

// Of REGISTER_OP, where the attribute A is the type of penalty and dpenalty.
#define FUSEDLOSS_PENALTY_INPUTS                        \
  Attr("V: list({float, double, half, bfloat16}) >= 1") \
      .Input("coefficients: double")                    \
      .Input("variables: V")
#define FUSEDLOSS_PENALTY_OUTPUTS Output("penalty: A").Output("dvariables: V")

namespace fusedloss {

// The penalty's tensors by their places among an op's; −1 where it has none. All variables follow
// the coefficients, and all gradients the first.
struct PenaltyPlaces {
  int dpenalty, coefficients, penalty, dvariables;
};

// Adds coefficients and variables.
void AddPenaltyInputs(const Attributes& attributes, Shapes* shapes);
// Adds the gradients of the variables, which are the last inputs.
void AddVariableGradients(const Attributes& attributes, Shapes* shapes);
absl::Status RunPenalty(const OpCall& call, const PenaltyPlaces& at);

template <ShapesFn kShapes>
Shapes PenalizedShapes(const Attributes& attributes, const InputElements& elements) {
  Shapes shapes = kShapes(attributes, elements);
  AddPenaltyInputs(attributes, &shapes);
  shapes.outputs.push_back("");
  AddVariableGradients(attributes, &shapes);
  return shapes;
}

template <WorkspaceFn kWorkspace>
int64_t PenalizedWorkspace(const std::vector<Dims>& inputs) {
  return kWorkspace(inputs) + PenaltyWorkspace(inputs.size());  // no more variables than inputs
}

template <RunFn kRun>
absl::Status PenalizedRun(const OpCall& call) {
  TF_RETURN_IF_ERROR(kRun(call));
  const int variables = static_cast<int>(call.attributes.Int("V"));
  return RunPenalty(call, {/*dpenalty=*/-1, /*coefficients=*/call.inputs() - variables - 1,
                           /*penalty=*/call.outputs() - variables - 1,
                           /*dvariables=*/call.outputs() - variables});
}

}  // namespace fusedloss

#endif  // FUSEDLOSS_TF_PENALTY_H_
