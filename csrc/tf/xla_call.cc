// The XLA lowering of every op: a typed-FFI custom call that finds the op by name and runs the same
// RunFn as outside XLA. The only file that sees tf2xla's headers.
#include <cctype>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tensorflow/compiler/tf2xla/type_util.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tf/op_glue.h"
#include "xla/ffi/api/ffi.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"

namespace xla::ffi {
// Declared in xla/ffi/ffi_api.h, whose own includes the wheel does not carry.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace fusedloss {
namespace {

namespace ffi = ::xla::ffi;
using ::tensorflow::DataType;

constexpr char kTarget[] = "fusedloss";

// What a custom call is, decoded once: when the program that holds it is made ready to run.
struct CallState {
  static ffi::TypeId id;
  const Op& op;
  Attributes attributes;
};
ffi::TypeId CallState::id = {};
constexpr ffi::TypeInfo kCallStateInfo = ffi::MakeTypeInfo<CallState>();
XLA_FFI_REGISTER_TYPE(ffi::GetXlaFfiApi(), "fusedloss_call", &CallState::id, &kCallStateInfo);

ffi::ErrorOr<std::unique_ptr<CallState>> Instantiate(ffi::Dictionary attrs) {
  Attributes attributes;
  for (auto attr = attrs.begin(); attr != attrs.end(); ++attr) {
    if (attrs.isa<std::string_view>(attr)) {
      attributes.Add(*attr, *attrs.get<std::string_view>(*attr));
    } else if (attrs.isa<bool>(attr)) {
      attributes.Add(*attr, int64_t{*attrs.get<bool>(*attr)});
    } else {
      attributes.Add(*attr, *attrs.get<int64_t>(*attr));
    }
  }
  const Op& op = FindOp(attributes.String("op"));
  return std::unique_ptr<CallState>(new CallState{op, std::move(attributes)});
}
XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate().Attrs<ffi::Dictionary>());

DataType DataTypeOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return tensorflow::DT_FLOAT;
    case ffi::DataType::F64:
      return tensorflow::DT_DOUBLE;
    case ffi::DataType::F16:
      return tensorflow::DT_HALF;
    case ffi::DataType::BF16:
      return tensorflow::DT_BFLOAT16;
    case ffi::DataType::PRED:
      return tensorflow::DT_BOOL;
    case ffi::DataType::S32:
      return tensorflow::DT_INT32;
    case ffi::DataType::S64:
      return tensorflow::DT_INT64;
    default:
      return tensorflow::DT_INVALID;
  }
}

OpCall::Buffer BufferOf(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), DataTypeOf(buffer.element_type()),
          Dims(buffer.dimensions().begin(), buffer.dimensions().end())};
}

OpCall::Buffers BuffersOf(const ffi::RemainingArgs& args) {
  OpCall::Buffers buffers;
  for (size_t i = 0; i < args.size(); ++i) {
    buffers.push_back(BufferOf(*args.get<ffi::AnyBuffer>(i)));
  }
  return buffers;
}

OpCall::Buffers BuffersOf(const ffi::RemainingRets& rets) {
  OpCall::Buffers buffers;
  for (size_t i = 0; i < rets.size(); ++i) {
    buffers.push_back(BufferOf(**rets.get<ffi::AnyBuffer>(i)));
  }
  return buffers;
}

ffi::Error ErrorOf(const absl::Status& status) {
  if (status.ok()) return ffi::Error::Success();
  return ffi::Error(static_cast<ffi::ErrorCode>(status.code()), std::string(status.message()));
}

ffi::Error RunOnHost(ffi::ThreadPool threads, CallState* state, ffi::RemainingArgs args,
                     ffi::RemainingRets rets) {
  Cpu cpu{[](void* context, int64_t blocks, void (*fn)(void*, int64_t), void* fn_context) {
            auto* threads = static_cast<ffi::ThreadPool*>(context);
            RunBlocks([&](std::function<void()> task) { threads->Schedule(std::move(task)); },
                      threads->num_threads() - 1, blocks, fn, fn_context);
          },
          &threads};
  return ErrorOf(
      RunOp(state->op, OpCall(cpu, state->attributes, BuffersOf(args), BuffersOf(rets))));
}

XLA_FFI_DEFINE_HANDLER(kRunOnHost, RunOnHost,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Ctx<ffi::State<CallState>>()
                           .RemainingArgs()
                           .RemainingRets());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kTarget, "Host",
                         XLA_FFI_Handler_Bundle{kInstantiate, nullptr, nullptr, kRunOnHost});

#ifdef FUSEDLOSS_CUDA
// The last result is the workspace. A scratch allocator would take its memory back when this
// returns, while a CUDA graph that recorded the call goes on using it.
ffi::Error RunOnCuda(void* stream, CallState* state, ffi::RemainingArgs args,
                     ffi::RemainingRets rets) {
  OpCall::Buffers outputs = BuffersOf(rets);
  const OpCall::Buffer workspace = outputs.back();
  outputs.pop_back();
  return ErrorOf(RunOpOnGpu(state->op, state->attributes, stream, workspace, BuffersOf(args),
                            std::move(outputs)));
}

XLA_FFI_DEFINE_HANDLER(kRunOnCuda, RunOnCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::State<CallState>>()
                           .RemainingArgs()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kTarget, "CUDA",
                         XLA_FFI_Handler_Bundle{kInstantiate, nullptr, nullptr, kRunOnCuda});
#endif

// The attributes of a node as an MLIR dictionary.
std::string CallConfig(const tensorflow::NodeDef& node) {
  std::vector<std::string> entries{absl::StrCat("op = \"", node.op(), "\"")};
  for (const auto& [name, value] : node.attr()) {
    if (name.empty() || name[0] == '_') continue;
    switch (value.value_case()) {
      case tensorflow::AttrValue::kB:
        entries.push_back(absl::StrCat(name, " = ", value.b() ? "true" : "false"));
        break;
      case tensorflow::AttrValue::kI:
        entries.push_back(absl::StrCat(name, " = ", value.i(), " : i64"));
        break;
      case tensorflow::AttrValue::kType:
        entries.push_back(absl::StrCat(name, " = ", static_cast<int>(value.type()), " : i64"));
        break;
      case tensorflow::AttrValue::kList:
        entries.push_back(absl::StrCat(name, " = ", value.list().type_size(), " : i64"));
        break;
      case tensorflow::AttrValue::kS:
        entries.push_back(absl::StrCat(name, " = \"", value.s(), "\""));
        break;
      default:
        break;
    }
  }
  return absl::StrCat("{", absl::StrJoin(entries, ", "), "}");
}

class CallKernel : public tensorflow::XlaOpKernel {
 public:
  explicit CallKernel(tensorflow::OpKernelConstruction* context)
      : XlaOpKernel(context),
        op_(FindOp(context->def().op())),
        on_gpu_(context->device_type().type_string() == tensorflow::DEVICE_GPU_XLA_JIT) {}

  void Compile(tensorflow::XlaOpKernelContext* context) override {
    std::vector<Dims> inputs, outputs;
    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> operand_shapes, result_shapes;
    for (int i = 0; i < context->num_inputs(); ++i) {
      absl::StatusOr<xla::Shape> shape = context->InputXlaShape(i);
      OP_REQUIRES_OK(context, shape.status());
      inputs.push_back(Dims(shape->dimensions().begin(), shape->dimensions().end()));
      operands.push_back(context->Input(i));
      operand_shapes.push_back(RowMajor(context, context->input_type(i), inputs.back()));
    }
    OP_REQUIRES_OK(context, ResolveShapes(op_, DecodeAttributes(def()), inputs, &outputs));
    for (size_t i = 0; i < outputs.size(); ++i) {
      result_shapes.push_back(RowMajor(context, context->expected_output_dtype(i), outputs[i]));
    }
    if (on_gpu_) {
      result_shapes.push_back(xla::ShapeUtil::MakeShape(xla::U8, {WorkspaceBytes(op_, inputs)}));
    }
    if (!context->status().ok()) return;
    xla::Shape result = result_shapes.size() == 1 ? result_shapes[0]
                                                  : xla::ShapeUtil::MakeTupleShape(result_shapes);
    xla::XlaOp call = xla::CustomCallWithLayout(
        context->builder(), kTarget, operands, result, operand_shapes, CallConfig(def()),
        /*has_side_effect=*/false, {}, nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
        xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (size_t i = 0; i < outputs.size(); ++i) {
      context->SetOutput(i, result_shapes.size() == 1 ? call : xla::GetTupleElement(call, i));
    }
  }

 private:
  static xla::Shape RowMajor(tensorflow::XlaOpKernelContext* context, DataType dtype,
                             const Dims& dims) {
    xla::PrimitiveType type = xla::PRIMITIVE_TYPE_INVALID;
    context->SetStatus(tensorflow::DataTypeToPrimitiveType(dtype, &type));
    return xla::ShapeUtil::MakeShapeWithDescendingLayout(type, dims);
  }

  const Op& op_;
  const bool on_gpu_;
};

}  // namespace

bool RegisterXlaCall(const Op& op) {
  auto create = [](tensorflow::OpKernelConstruction* context) -> tensorflow::OpKernel* {
    return new CallKernel(context);
  };
  new tensorflow::XlaOpRegistrar(tensorflow::XlaOpRegistrationBuilder::Name(op.name).Build(create));
  // XLA makes the kernels of its compilation devices once, when the first op of the process runs,
  // and forgets ops that are registered later: for them it is done here.
  const tensorflow::KernelList of_another = tensorflow::GetRegisteredKernelsForOp("AddV2");
  for (const tensorflow::KernelDef& kernel : of_another.kernel()) {
    if (!tensorflow::XlaOpRegistry::IsCompilationDevice(kernel.device_type())) continue;
    new tensorflow::kernel_factory::OpKernelRegistrar(
        tensorflow::KernelDefBuilder(op.name).Device(kernel.device_type().c_str()).Build(),
        "CallKernel", create);
  }
  return true;
}

}  // namespace fusedloss
