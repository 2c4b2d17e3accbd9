// Between TensorFlow and the kernels, written once. An op is three things: its REGISTER_OP, a
// ShapesFn that names the dimensions of its tensors, and a RunFn that hands pointers to a kernel.
// FUSEDLOSS_OP registers the CPU kernel and the XLA lowering from them.
#ifndef FUSEDLOSS_TF_OP_GLUE_H_
#define FUSEDLOSS_TF_OP_GLUE_H_

#include <functional>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace fusedloss {

// The attributes of an op, wherever it runs.
class Attributes {
 public:
  virtual ~Attributes() = default;
  virtual bool Bool(const char* name) const = 0;
  virtual int64_t Int(const char* name) const = 0;
  virtual std::string String(const char* name) const = 0;
  virtual tensorflow::DataType Type(const char* name) const = 0;
  // TensorFlow has no float64 attribute; a decimal string carries one exactly.
  double Number(const char* name) const;
};

// The sizes of a tensor's dimensions.
using Dims = std::vector<int64_t>;

// One call of an op: its tensors in memory, its attributes, its threads.
class OpCall {
 public:
  struct Buffer {
    void* bytes;
    tensorflow::DataType dtype;
    Dims dims;
  };

  OpCall(const Cpu& cpu, const Attributes& attributes, std::vector<Buffer> inputs,
         std::vector<Buffer> outputs)
      : cpu(cpu),
        attributes(attributes),
        inputs_(std::move(inputs)),
        outputs_(std::move(outputs)) {}

  const Cpu& cpu;
  const Attributes& attributes;

  const Buffer& input(int i) const { return inputs_[i]; }
  template <typename T>
  const T* Input(int i) const {
    return static_cast<const T*>(inputs_[i].bytes);
  }
  // Null where the tensor has no elements: how optional inputs are left out.
  template <typename T>
  const T* InputOrNull(int i) const {
    return Elements(inputs_[i].dims) == 0 ? nullptr : Input<T>(i);
  }
  template <typename T>
  T* Output(int i) const {
    return static_cast<T*>(outputs_[i].bytes);
  }
  static int64_t Elements(const Dims& dims);

 private:
  std::vector<Buffer> inputs_, outputs_;
};

// The dimensions of each input ("name: dimensions") and output. Dimensions are separated by spaces:
//   ...       any number of leading dimensions, the same wherever it stands
//   word      one dimension, the same wherever the word stands
//   7         one dimension of that size
// `a | 0` allows either: how an optional input is written. Errors quote name and words.
struct Shapes {
  std::vector<std::string> inputs, outputs;
};
// The number of elements of an input, −1 where unknown: forms of an op may depend on it.
using InputElements = std::function<int64_t(int input)>;
using ShapesFn = Shapes (*)(const Attributes&, const InputElements&);
using RunFn = absl::Status (*)(const OpCall&);

struct Op {
  const char* name;
  ShapesFn shapes;
  RunFn run;
};

// Registers an op's XLA lowering; returns a value to hang on to. Defined in xla_call.cc.
bool RegisterXlaCall(const Op& op);
const Op& RegisterOp(const Op& op);
const Op& FindOp(const std::string& name);

// The shape function of REGISTER_OP.
absl::Status InferShapes(const char* op, tensorflow::shape_inference::InferenceContext* context);
// Output shapes of known input shapes, or InvalidArgument that names the input and the rule.
absl::Status ResolveShapes(const Op& op, const Attributes& attributes,
                           const std::vector<Dims>& inputs, std::vector<Dims>* outputs);

// Runs the blocks on the caller and on up to `helpers` tasks given to schedule(task). All claim
// blocks from one counter, and the caller waits only for blocks that somebody has claimed: a task
// that the pool never gets to run holds nobody up. Waiting for scheduled tasks instead deadlocks as
// soon as every thread of the pool is such a caller.
void RunBlocks(const std::function<void(std::function<void()>)>& schedule, int64_t helpers,
               int64_t blocks, void (*fn)(void* context, int64_t block), void* context);

// The attributes of a node.
class NodeAttributes : public Attributes {
 public:
  explicit NodeAttributes(tensorflow::AttrSlice attrs) : attrs_(attrs) {}
  bool Bool(const char* name) const override;
  int64_t Int(const char* name) const override;
  std::string String(const char* name) const override;
  tensorflow::DataType Type(const char* name) const override;

 private:
  tensorflow::AttrSlice attrs_;
};

class CpuOpKernel : public tensorflow::OpKernel {
 public:
  explicit CpuOpKernel(tensorflow::OpKernelConstruction* context);
  void Compute(tensorflow::OpKernelContext* context) override;

 private:
  const Op& op_;
};

}  // namespace fusedloss

#define FUSEDLOSS_OP(name, shapes, run) FUSEDLOSS_OP_AT(name, shapes, run, __COUNTER__)
#define FUSEDLOSS_OP_AT(name, shapes, run, at) FUSEDLOSS_OP_UNIQUE(name, shapes, run, at)
#define FUSEDLOSS_OP_UNIQUE(name, shapes, run, at)                                \
  static const bool kRegistered##at =                                             \
      ::fusedloss::RegisterXlaCall(::fusedloss::RegisterOp({name, shapes, run})); \
  REGISTER_KERNEL_BUILDER(Name(name).Device(::tensorflow::DEVICE_CPU), ::fusedloss::CpuOpKernel)

#endif  // FUSEDLOSS_TF_OP_GLUE_H_
