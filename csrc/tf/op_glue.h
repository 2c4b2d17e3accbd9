// Between TensorFlow and the kernels, written once. An op is its REGISTER_OP, a ShapesFn that names
// the dimensions of its tensors, a WorkspaceFn that bounds what it needs of a GPU's memory, and a
// RunFn that hands pointers to a kernel. FUSEDLOSS_OP registers the CPU kernel, in a build with
// CUDA the GPU kernel, and the XLA lowering for both from them.
#ifndef FUSEDLOSS_TF_OP_GLUE_H_
#define FUSEDLOSS_TF_OP_GLUE_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/strings/string_view.h"
#include "kernels/device.h"
#include "kernels/half.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace fusedloss {

#ifdef FUSEDLOSS_CUDA
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

// TensorFlow's name for a type that kernels are written for.
template <typename T>
inline constexpr tensorflow::DataType kDataType = tensorflow::DT_INVALID;
template <>
inline constexpr tensorflow::DataType kDataType<float> = tensorflow::DT_FLOAT;
template <>
inline constexpr tensorflow::DataType kDataType<double> = tensorflow::DT_DOUBLE;
template <>
inline constexpr tensorflow::DataType kDataType<Half> = tensorflow::DT_HALF;
template <>
inline constexpr tensorflow::DataType kDataType<BFloat16> = tensorflow::DT_BFLOAT16;

// The attributes of one node, decoded once: when its kernel is made, not when it is called. The
// type of a list of tensors is the integer of their number.
class Attributes {
 public:
  bool Bool(absl::string_view name) const { return Find(name).integer != 0; }
  int64_t Int(absl::string_view name) const { return Find(name).integer; }
  tensorflow::DataType Type(absl::string_view name) const {
    return static_cast<tensorflow::DataType>(Find(name).integer);
  }
  const std::string& String(absl::string_view name) const { return Find(name).text; }
  // TensorFlow has no float64 attribute; a decimal string carries one exactly.
  double Number(absl::string_view name) const { return Find(name).number; }

  void Add(absl::string_view name, int64_t boolean_or_integer_or_type);
  void Add(absl::string_view name, absl::string_view text);

 private:
  struct Value {
    std::string name;
    int64_t integer;
    std::string text;
    double number;
  };
  const Value& Find(absl::string_view name) const;

  std::vector<Value> values_;
};

// The sizes of a tensor's dimensions.
using Dims = absl::InlinedVector<int64_t, 6>;

// What a GPU kernel said, as ResourceExhausted or an InternalError.
absl::Status GpuStatus(GpuError error);

// One call of an op: its device, its attributes, its tensors in the memory of that device.
class OpCall {
 public:
  struct Buffer {
    void* bytes;
    tensorflow::DataType dtype;
    Dims dims;
  };
  using Buffers = absl::InlinedVector<Buffer, 8>;

  OpCall(const Cpu& cpu, const Attributes& attributes, Buffers inputs, Buffers outputs)
      : OpCall(&cpu, nullptr, attributes, std::move(inputs), std::move(outputs)) {}
  OpCall(const Gpu& gpu, const Attributes& attributes, Buffers inputs, Buffers outputs)
      : OpCall(nullptr, &gpu, attributes, std::move(inputs), std::move(outputs)) {}

  // One of the two is null.
  const Cpu* const cpu;
  const Gpu* const gpu;
  const Attributes& attributes;

  // Calls kernel(device), an overload for Cpu or one for Gpu.
  template <typename Kernel>
  absl::Status Run(const Kernel& kernel) const {
    if constexpr (kHasCuda) {
      if (gpu) return GpuStatus(kernel(*gpu));
    }
    kernel(*cpu);
    return absl::OkStatus();
  }
  // The same where the overload for Cpu returns something that check(result) makes a status of.
  template <typename Kernel, typename Check>
  absl::Status Run(const Kernel& kernel, const Check& check) const {
    if constexpr (kHasCuda) {
      if (gpu) return GpuStatus(kernel(*gpu));
    }
    return check(kernel(*cpu));
  }

  int inputs() const { return static_cast<int>(inputs_.size()); }
  int outputs() const { return static_cast<int>(outputs_.size()); }
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
  OpCall(const Cpu* cpu, const Gpu* gpu, const Attributes& attributes, Buffers inputs,
         Buffers outputs)
      : cpu(cpu),
        gpu(gpu),
        attributes(attributes),
        inputs_(std::move(inputs)),
        outputs_(std::move(outputs)) {}

  Buffers inputs_, outputs_;
};

// The dimensions of each input ("name: dimensions") and output; of a list, those of each element
// ("name[7]: dimensions"). Dimensions are separated by spaces:
//   ...       any number of dimensions, the same wherever it stands; at most once in a shape
//   ...word   the same under a name of its own
//   word      one dimension, the same wherever the word stands
//   7         one dimension of that size
// `a | 0` allows either: how an optional input is written. `*` is any shape, and for an output `*7`
// that of input 7. Errors quote name and words.
struct Shapes {
  std::vector<std::string> inputs, outputs;
};
// The number of elements of an input, −1 where unknown: forms of an op may depend on it.
using InputElements = std::function<int64_t(int input)>;
using ShapesFn = Shapes (*)(const Attributes&, const InputElements&);
// The bytes that a GPU kernel may ask of Gpu::allocate in one call, every piece rounded up to a
// multiple of 256. They are set aside before the kernel runs.
using WorkspaceFn = int64_t (*)(const std::vector<Dims>& inputs);
using RunFn = absl::Status (*)(const OpCall&);

struct Op {
  const char* name;
  ShapesFn shapes;
  WorkspaceFn workspace;
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

// Runs an op; errors name it.
absl::Status RunOp(const Op& op, const OpCall& call);
// The same on a GPU whose stream is `stream`. `workspace` is device memory of WorkspaceBytes().
absl::Status RunOpOnGpu(const Op& op, const Attributes& attributes, void* stream,
                        const OpCall::Buffer& workspace, OpCall::Buffers inputs,
                        OpCall::Buffers outputs);
int64_t WorkspaceBytes(const Op& op, const std::vector<Dims>& inputs);

// Runs the blocks on the caller and on up to `helpers` tasks given to schedule(task). All claim
// blocks from one counter, and the caller waits only for blocks that somebody has claimed: a task
// that the pool never gets to run holds nobody up. Waiting for scheduled tasks instead deadlocks as
// soon as every thread of the pool is such a caller.
void RunBlocks(const std::function<void(std::function<void()>)>& schedule, int64_t helpers,
               int64_t blocks, void (*fn)(void* context, int64_t block), void* context);

// The attributes that the op's registration lists; find(name) has their values.
using FindAttr = std::function<const tensorflow::AttrValue*(absl::string_view name)>;
Attributes DecodeAttributes(const std::string& op, const FindAttr& find);
Attributes DecodeAttributes(const tensorflow::NodeDef& node);

// The kernel of every op outside XLA. The same bits for any number of threads and every run on one
// model of GPU: op determinism asks for nothing more.
class FusedOpKernel : public tensorflow::OpKernel {
 public:
  explicit FusedOpKernel(tensorflow::OpKernelConstruction* context);
  void Compute(tensorflow::OpKernelContext* context) override;

 private:
  const Op& op_;
  const Attributes attributes_;
  const bool on_gpu_;
};

}  // namespace fusedloss

// A RunFn that calls Function<T> for the type of input `place`.
#define FUSEDLOSS_FOR_DTYPE(Function, place)            \
  [](const ::fusedloss::OpCall& call) -> absl::Status { \
    switch (call.input(place).dtype) {                  \
      case ::tensorflow::DT_FLOAT:                      \
        return Function<float>(call);                   \
      case ::tensorflow::DT_DOUBLE:                     \
        return Function<double>(call);                  \
      case ::tensorflow::DT_HALF:                       \
        return Function<::fusedloss::Half>(call);       \
      default:                                          \
        return Function<::fusedloss::BFloat16>(call);   \
    }                                                   \
  }

#ifdef FUSEDLOSS_CUDA
#define FUSEDLOSS_GPU_KERNEL(name) \
  REGISTER_KERNEL_BUILDER(Name(name).Device(::tensorflow::DEVICE_GPU), ::fusedloss::FusedOpKernel)
#else
#define FUSEDLOSS_GPU_KERNEL(name) static_assert(true)
#endif

#define FUSEDLOSS_OP(name, shapes, workspace, run) \
  FUSEDLOSS_OP_AT(name, shapes, workspace, run, __COUNTER__)
#define FUSEDLOSS_OP_AT(name, shapes, workspace, run, at) \
  FUSEDLOSS_OP_UNIQUE(name, shapes, workspace, run, at)
#define FUSEDLOSS_OP_UNIQUE(name, shapes, workspace, run, at)                                \
  static const bool kRegistered##at =                                                        \
      ::fusedloss::RegisterXlaCall(::fusedloss::RegisterOp({name, shapes, workspace, run})); \
  REGISTER_KERNEL_BUILDER(Name(name).Device(::tensorflow::DEVICE_CPU),                       \
                          ::fusedloss::FusedOpKernel);                                       \
  FUSEDLOSS_GPU_KERNEL(name)

#endif  // FUSEDLOSS_TF_OP_GLUE_H_
