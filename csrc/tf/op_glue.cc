#include "tf/op_glue.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "tensorflow/core/framework/node_def_util.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "tensorflow/core/platform/blocking_counter.h"
#ifdef FUSEDLOSS_CUDA
#include "xla/stream_executor/stream.h"
#endif

namespace fusedloss {
namespace {

using ::tensorflow::DataType;
using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

std::map<std::string, Op>& Ops() {
  static auto* ops = new std::map<std::string, Op>;
  return *ops;
}

constexpr int64_t kUnknown = -1;

// A shape as far as it is known. Of an unknown rank nothing is.
struct PartialDims {
  bool known_rank = true;
  Dims dims;  // kUnknown where unknown
};

std::string Describe(const PartialDims& shape) {
  if (!shape.known_rank) return "<unknown>";
  return absl::StrCat("[",
                      absl::StrJoin(shape.dims, ", ",
                                    [](std::string* out, int64_t size) {
                                      absl::StrAppend(out,
                                                      size == kUnknown ? "?" : absl::StrCat(size));
                                    }),
                      "]");
}

bool IsKnown(const PartialDims& shape) {
  return shape.known_rank &&
         std::find(shape.dims.begin(), shape.dims.end(), kUnknown) == shape.dims.end();
}

// What the words of a Shapes stand for so far.
class Bindings {
 public:
  // Matches one input. Where there are alternatives, a size that is left out, such as 0, says
  // nothing of the words, and neither does a shape that could yet turn out to be either.
  bool Match(absl::string_view words, const PartialDims& shape) {
    if (words == "*") return true;
    const std::vector<absl::string_view> forms = absl::StrSplit(words, " | ");
    if (forms.size() == 1) return MatchForm(words, shape);
    if (!IsKnown(shape)) return true;
    const Bindings before = *this;
    // The last form is the literal one.
    for (auto form = forms.rbegin(); form != forms.rend(); ++form) {
      if (MatchForm(*form, shape)) return true;
      *this = before;
    }
    return false;
  }

  PartialDims Resolve(const std::string& words) const {
    PartialDims shape;
    for (absl::string_view word : Words(words)) {
      if (IsRun(word)) {
        const auto run = runs_.find(word);
        if (run == runs_.end()) return {false, {}};
        shape.dims.insert(shape.dims.end(), run->second.begin(), run->second.end());
      } else {
        shape.dims.push_back(SizeOf(word));
      }
    }
    return shape;
  }

 private:
  static std::vector<absl::string_view> Words(absl::string_view words) {
    return absl::StrSplit(words, ' ', absl::SkipEmpty());
  }

  static bool IsRun(absl::string_view word) { return absl::StartsWith(word, "..."); }

  int64_t SizeOf(absl::string_view word) const {
    int64_t size;
    if (absl::SimpleAtoi(word, &size)) return size;
    for (const auto& [known, value] : sizes_) {
      if (known == word) return value;
    }
    return kUnknown;
  }

  static bool Merge(int64_t size, int64_t* into) {
    if (*into == kUnknown) *into = size;
    return size == kUnknown || size == *into;
  }

  bool MatchForm(absl::string_view form, const PartialDims& shape) {
    if (!shape.known_rank) return true;
    const std::vector<absl::string_view> words = Words(form);
    size_t at = 0;
    for (absl::string_view word : words) {
      if (IsRun(word)) {
        if (shape.dims.size() + 1 < words.size()) return false;
        const size_t length = shape.dims.size() + 1 - words.size();
        Dims& run = runs_.try_emplace(word, length, kUnknown).first->second;
        if (run.size() != length) return false;
        for (int64_t& size : run) {
          if (!Merge(shape.dims[at++], &size)) return false;
        }
        continue;
      }
      if (at == shape.dims.size()) return false;
      int64_t size = SizeOf(word);
      if (!Merge(shape.dims[at++], &size)) return false;
      int64_t literal;
      if (size != kUnknown && !absl::SimpleAtoi(word, &literal)) sizes_.emplace_back(word, size);
    }
    return at == shape.dims.size();
  }

  // The words live in the Shapes that are being resolved.
  std::map<absl::string_view, Dims> runs_;
  std::vector<std::pair<absl::string_view, int64_t>> sizes_;
};

// What was got, up to and including input `last`.
std::string Got(const Shapes& shapes, const std::vector<PartialDims>& inputs, size_t last) {
  std::vector<std::string> got;
  for (size_t i = 0; i <= last; ++i) {
    std::pair<std::string, std::string> input = absl::StrSplit(shapes.inputs[i], ": ");
    got.push_back(absl::StrCat(input.first, " ", Describe(inputs[i])));
  }
  return absl::StrJoin(got, ", ");
}

absl::Status Resolve(const Op& op, const Shapes& shapes, const std::vector<PartialDims>& inputs,
                     std::vector<PartialDims>* outputs) {
  Bindings bindings;
  for (size_t i = 0; i < inputs.size(); ++i) {
    std::pair<absl::string_view, absl::string_view> input = absl::StrSplit(shapes.inputs[i], ": ");
    if (!bindings.Match(input.second, inputs[i])) {
      return absl::InvalidArgumentError(absl::StrCat(
          op.name, ": `", input.first, "` has shape ", Describe(inputs[i]), ", expected [",
          input.second, "], where equal words mean equal sizes; got ", Got(shapes, inputs, i)));
    }
  }
  for (const std::string& words : shapes.outputs) {
    size_t as_input;
    const bool copies = words[0] == '*' && absl::SimpleAtoi(words.substr(1), &as_input);
    outputs->push_back(copies ? inputs[as_input] : bindings.Resolve(words));
  }
  return absl::OkStatus();
}

int64_t Elements(const PartialDims& shape) {
  if (!shape.known_rank) return kUnknown;
  int64_t elements = 1;
  bool known = true;
  for (int64_t size : shape.dims) {
    if (size == 0) return 0;
    known = known && size != kUnknown;
    elements *= size;
  }
  return known ? elements : kUnknown;
}

constexpr int64_t kWorkspaceAlignment = 256;  // bytes

absl::Status RunOnCpu(const Op& op, const Attributes& attributes,
                      tensorflow::OpKernelContext* context, OpCall::Buffers inputs,
                      OpCall::Buffers outputs) {
  const auto* workers = context->device()->tensorflow_cpu_worker_threads();
  struct Threads {
    tensorflow::thread::ThreadPool* pool;
    int helpers;
  } threads{workers->workers, workers->num_threads - 1};
  Cpu cpu{[](void* context, int64_t blocks, void (*fn)(void*, int64_t), void* fn_context) {
            auto* threads = static_cast<Threads*>(context);
            RunBlocks([&](std::function<void()> task) { threads->pool->Schedule(std::move(task)); },
                      threads->helpers, blocks, fn, fn_context);
          },
          &threads};
  return RunOp(op, OpCall(cpu, attributes, std::move(inputs), std::move(outputs)));
}

#ifdef FUSEDLOSS_CUDA
absl::Status RunOnGpu(const Op& op, const Attributes& attributes, int64_t workspace_bytes,
                      tensorflow::OpKernelContext* context, OpCall::Buffers inputs,
                      OpCall::Buffers outputs) {
  // Given back when this returns, before the kernel has run: TensorFlow's allocator hands memory to
  // work that is enqueued later on the same stream.
  tensorflow::Tensor workspace;
  TF_RETURN_IF_ERROR(context->allocate_temp(
      tensorflow::DT_UINT8, tensorflow::TensorShape({workspace_bytes}), &workspace));
  void* stream = context->op_device_context()->stream()->platform_specific_handle().stream;
  return RunOpOnGpu(op, attributes, stream,
                    {workspace.data(), tensorflow::DT_UINT8, {workspace_bytes}}, std::move(inputs),
                    std::move(outputs));
}
#endif

}  // namespace

void Attributes::Add(absl::string_view name, int64_t boolean_or_integer_or_type) {
  values_.push_back({std::string(name), boolean_or_integer_or_type, "", 0});
}

void Attributes::Add(absl::string_view name, absl::string_view text) {
  double number = 0;
  if (!absl::SimpleAtod(text, &number)) number = NAN;  // a word, of which nobody asks the number
  values_.push_back({std::string(name), 0, std::string(text), number});
}

const Attributes::Value& Attributes::Find(absl::string_view name) const {
  for (const Value& value : values_) {
    if (value.name == name) return value;
  }
  LOG(FATAL) << "no attribute " << name;
}

Attributes DecodeAttributes(const std::string& op, const FindAttr& find) {
  const tensorflow::OpDef* registered;
  TF_CHECK_OK(tensorflow::OpRegistry::Global()->LookUpOpDef(op, &registered));
  Attributes attributes;
  for (const tensorflow::OpDef::AttrDef& attr : registered->attr()) {
    const tensorflow::AttrValue* found = find(attr.name());
    const tensorflow::AttrValue& value = found ? *found : attr.default_value();
    switch (value.value_case()) {
      case tensorflow::AttrValue::kS:
        attributes.Add(attr.name(), value.s());
        break;
      case tensorflow::AttrValue::kB:
        attributes.Add(attr.name(), int64_t{value.b()});
        break;
      case tensorflow::AttrValue::kType:
        attributes.Add(attr.name(), int64_t{value.type()});
        break;
      case tensorflow::AttrValue::kList:
        attributes.Add(attr.name(), int64_t{value.list().type_size()});
        break;
      default:
        attributes.Add(attr.name(), value.i());
    }
  }
  return attributes;
}

Attributes DecodeAttributes(const tensorflow::NodeDef& node) {
  tensorflow::AttrSlice attrs(node);
  return DecodeAttributes(node.op(), [&](absl::string_view name) { return attrs.Find(name); });
}

absl::Status GpuStatus(GpuError error) {
  if (!error) return absl::OkStatus();
  const bool no_memory = absl::string_view(error) == "out of memory";  // CUDA's words
  return absl::Status(
      no_memory ? absl::StatusCode::kResourceExhausted : absl::StatusCode::kInternal,
      absl::StrCat("the GPU kernel could not be launched: ", error));
}

int64_t OpCall::Elements(const Dims& dims) {
  int64_t elements = 1;
  for (int64_t size : dims) elements *= size;
  return elements;
}

const Op& RegisterOp(const Op& op) { return Ops().emplace(op.name, op).first->second; }

const Op& FindOp(const std::string& name) { return Ops().at(name); }

absl::Status InferShapes(const char* name, InferenceContext* context) {
  const Op& op = FindOp(name);
  std::vector<PartialDims> inputs;
  for (int i = 0; i < context->num_inputs(); ++i) {
    ShapeHandle shape = context->input(i);
    PartialDims dims{context->RankKnown(shape), {}};
    for (int d = 0; dims.known_rank && d < context->Rank(shape); ++d) {
      dims.dims.push_back(context->Value(context->Dim(shape, d)));
    }
    inputs.push_back(dims);
  }
  const Attributes attributes =
      DecodeAttributes(name, [&](absl::string_view attr) { return context->GetAttr(attr); });
  InputElements elements = [&](int i) { return Elements(inputs[i]); };
  std::vector<PartialDims> outputs;
  TF_RETURN_IF_ERROR(Resolve(op, op.shapes(attributes, elements), inputs, &outputs));
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].known_rank) {
      context->set_output(i, context->UnknownShape());
      continue;
    }
    std::vector<DimensionHandle> dims;
    for (int64_t size : outputs[i].dims) {
      dims.push_back(size == kUnknown ? context->UnknownDim() : context->MakeDim(size));
    }
    context->set_output(i, context->MakeShape(dims));
  }
  return absl::OkStatus();
}

absl::Status ResolveShapes(const Op& op, const Attributes& attributes,
                           const std::vector<Dims>& inputs, std::vector<Dims>* outputs) {
  std::vector<PartialDims> known, resolved;
  for (const Dims& dims : inputs) known.push_back({true, dims});
  InputElements elements = [&](int i) { return Elements(known[i]); };
  TF_RETURN_IF_ERROR(Resolve(op, op.shapes(attributes, elements), known, &resolved));
  for (const PartialDims& shape : resolved) outputs->push_back(shape.dims);
  return absl::OkStatus();
}

absl::Status RunOp(const Op& op, const OpCall& call) {
  absl::Status status = op.run(call);
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(op.name, ": ", status.message()));
}

absl::Status RunOpOnGpu(const Op& op, const Attributes& attributes, void* stream,
                        const OpCall::Buffer& workspace, OpCall::Buffers inputs,
                        OpCall::Buffers outputs) {
  struct Rest {
    uintptr_t begin, end;
  } rest{reinterpret_cast<uintptr_t>(workspace.bytes), 0};
  rest.end = rest.begin + OpCall::Elements(workspace.dims);
  Gpu gpu{stream,
          [](void* owner, int64_t bytes) -> void* {
            auto* rest = static_cast<Rest*>(owner);
            uintptr_t piece =
                (rest->begin + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
            if (piece + bytes > rest->end) return nullptr;
            rest->begin = piece + bytes;
            return reinterpret_cast<void*>(piece);
          },
          &rest};
  return RunOp(op, OpCall(gpu, attributes, std::move(inputs), std::move(outputs)));
}

int64_t WorkspaceBytes(const Op& op, const std::vector<Dims>& inputs) {
  int64_t bytes = op.workspace(inputs);
  // XLA aligns its buffers to fewer bytes than a kernel may count on.
  return bytes == 0 ? 0 : bytes + kWorkspaceAlignment - 1;
}

void RunBlocks(const std::function<void(std::function<void()>)>& schedule, int64_t helpers,
               int64_t blocks, void (*fn)(void* context, int64_t block), void* context) {
  helpers = std::min(helpers, blocks - 1);
  if (helpers <= 0) {
    for (int64_t block = 0; block < blocks; ++block) fn(context, block);
    return;
  }
  // A helper may start after the caller has left: it then finds no block, and touches only this.
  struct Claims {
    explicit Claims(int64_t blocks) : unfinished(static_cast<int>(blocks)) {}
    std::atomic<int64_t> next{0};
    tensorflow::BlockingCounter unfinished;
  };
  auto claims = std::make_shared<Claims>(blocks);
  auto work = [claims, blocks, fn, context] {
    for (int64_t block; (block = claims->next.fetch_add(1)) < blocks;) {
      fn(context, block);
      claims->unfinished.DecrementCount();
    }
  };
  for (int64_t i = 0; i < helpers; ++i) schedule(work);
  work();
  claims->unfinished.Wait();
}

FusedOpKernel::FusedOpKernel(tensorflow::OpKernelConstruction* context)
    : OpKernel(context),
      op_(FindOp(context->def().op())),
      attributes_(DecodeAttributes(context->def())),
      on_gpu_(context->device_type().type_string() == tensorflow::DEVICE_GPU) {}

void FusedOpKernel::Compute(tensorflow::OpKernelContext* context) {
  std::vector<Dims> shapes;
  OpCall::Buffers inputs, outputs;
  for (int i = 0; i < context->num_inputs(); ++i) {
    const tensorflow::Tensor& tensor = context->input(i);
    Dims dims(tensor.dims());
    for (int d = 0; d < tensor.dims(); ++d) dims[d] = tensor.dim_size(d);
    shapes.push_back(dims);
    inputs.push_back({tensor.data(), tensor.dtype(), dims});
  }
  std::vector<Dims> output_shapes;
  OP_REQUIRES_OK(context, ResolveShapes(op_, attributes_, shapes, &output_shapes));
  for (size_t i = 0; i < output_shapes.size(); ++i) {
    tensorflow::Tensor* tensor;
    OP_REQUIRES_OK(context,
                   context->allocate_output(i, tensorflow::TensorShape(output_shapes[i]), &tensor));
    outputs.push_back({tensor->data(), tensor->dtype(), output_shapes[i]});
  }
#ifdef FUSEDLOSS_CUDA
  if (on_gpu_) {
    OP_REQUIRES_OK(context, RunOnGpu(op_, attributes_, WorkspaceBytes(op_, shapes), context,
                                     std::move(inputs), std::move(outputs)));
    return;
  }
#endif
  OP_REQUIRES_OK(context,
                 RunOnCpu(op_, attributes_, context, std::move(inputs), std::move(outputs)));
}

}  // namespace fusedloss
