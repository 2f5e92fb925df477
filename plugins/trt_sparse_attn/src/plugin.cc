#include "plugin.h"

#include <algorithm>

namespace attnspan {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using Severity = nvinfer1::ILogger::Severity;

constexpr int64_t kDynamic = -1;

std::string name_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kFP8: return "float8_e4m3fn";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kBOOL: return "bool";
    case DataType::kUINT8: return "uint8";
    default: return "of TensorRT's type " + std::to_string(static_cast<int32_t>(type));
  }
}

DataType type_of(const std::string& name) {
  for (const DataType type : {DataType::kHALF, DataType::kBF16, DataType::kFP8, DataType::kINT32})
    if (name_of(type) == name) return type;
  return DataType::kFLOAT;
}

Shape shape_of(const Dims& dims) { return Shape(dims.d, dims.d + std::max(dims.nbDims, 0)); }

Shape shape_of(const nvinfer1::DimsExprs& dims) {
  Shape shape;
  for (int32_t i = 0; i < dims.nbDims; ++i) shape.push_back(dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : kDynamic);
  return shape;
}

template <class Tensor, class Get>
auto each_of(const Tensor* tensors, int32_t count, Get get) {
  std::vector<decltype(get(*tensors))> all;
  for (int32_t i = 0; i < count; ++i) all.push_back(get(tensors[i]));
  return all;
}

std::vector<std::string> types_of(const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t count) {
  return each_of(tensors, count, [](const auto& tensor) { return name_of(tensor.desc.type); });
}

Given given_of(const PluginField& field) {
  Given given{field.name, {}, false};
  const auto read = [&](auto zero) {
    const auto* values = static_cast<const decltype(zero)*>(field.data);
    for (int32_t i = 0; i < field.length; ++i) given.values.push_back(static_cast<double>(values[i]));
  };
  switch (field.type) {
    case PluginFieldType::kINT32: read(int32_t{}); break;
    case PluginFieldType::kINT64: read(int64_t{}); break;
    case PluginFieldType::kFLOAT32: read(float{}), given.is_float = true; break;
    case PluginFieldType::kFLOAT64: read(double{}), given.is_float = true; break;
    default:
      throw Error(std::string("attribute ") + field.name + " has plugin field type " +
                  std::to_string(static_cast<int32_t>(field.type)) + ": must be an integer or a float");
  }
  return given;
}

void refused(const std::string& layer, const std::exception& error) noexcept {
  log(Severity::kERROR, (layer.empty() ? "" : "node " + layer + ": ") + error.what());
}

PluginFieldType field_type(schema::Kind kind) {
  return kind == schema::Kind::kFloat ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
}

}  // namespace

template <class Result, class Body>
Result Plugin::guarded(Result failure, Body body) const noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    refused(layer_, error);
    return failure;
  }
}

Plugin::Plugin(const schema::Op& op, Attributes attributes, std::string layer, bool building)
    : op_(op),
      attributes_(std::move(attributes)),
      layer_(std::move(layer)),
      building_(building),
      timing_id_(describe(op, attributes_) + " kernels=" + kernels_digest()),
      operation_(make_operation(op, attributes_, building)) {
  for (int i = 0; i < op.num_attributes; ++i) {
    const Value& value = attributes_.at(op.attributes[i].name);
    const bool is_float = op.attributes[i].kind == schema::Kind::kFloat;
    fields_.emplace_back(op.attributes[i].name, is_float ? static_cast<const void*>(&value.number) : value.ints.data(),
                         field_type(op.attributes[i].kind), is_float ? 1 : static_cast<int32_t>(value.ints.size()));
  }
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>(nullptr, [&] { return new Plugin(op_, attributes_, layer_, building_); });
}

int32_t Plugin::getOutputDataTypes(DataType* output_types, int32_t num_outputs, const DataType* input_types,
                                   int32_t num_inputs) const noexcept {
  return guarded(-1, [&] {
    const auto types = attnspan::types_of(op_, each_of(input_types, num_inputs, name_of));
    for (int32_t i = 0; i < num_outputs; ++i) output_types[i] = type_of(types.at(size_t(i)));
    return 0;
  });
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs*, int32_t,
                                nvinfer1::DimsExprs* outputs, int32_t num_outputs, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(-1, [&] {
    const Sizes sizes = sizes_of(op_, attributes_, each_of(inputs, num_inputs, [](const auto& dims) { return shape_of(dims); }));
    // The size of an axis: a number where all its symbols are known, else the axis of an input that is the same.
    const auto size_of = [&](const std::vector<std::string>& axis) -> const nvinfer1::IDimensionExpr* {
      int64_t size = 1;
      const bool known = std::all_of(axis.begin(), axis.end(), [&](const std::string& symbol) {
        const auto found = sizes.find(symbol);
        if (found != sizes.end()) size *= found->second;
        return found != sizes.end();
      });
      if (known) return builder.constant(size);
      for (int32_t i = 0; i < num_inputs; ++i) {
        const auto axes = axes_of(op_.inputs[i]);
        const auto same = std::find(axes.begin(), axes.end(), axis);
        if (same != axes.end()) return inputs[i].d[same - axes.begin()];
      }
      throw Error(std::string(op_.name) + ": the size of " + axis.back() + " is not known: must be a constant of the network");
    };
    for (int32_t i = 0; i < num_outputs; ++i) {
      const auto axes = axes_of(op_.outputs[i]);
      outputs[i].nbDims = static_cast<int32_t>(axes.size());
      for (size_t axis = 0; axis < axes.size(); ++axis) outputs[i].d[axis] = size_of(axes[axis]);
    }
    return 0;
  });
}

bool Plugin::supportsFormatCombination(int32_t at, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t num_inputs,
                                       int32_t) noexcept {
  if (tensors[at].desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
  try {
    if (at < num_inputs) {
      check_input_type(op_, size_t(num_inputs), types_of(tensors, at + 1), size_t(at));
      return true;
    }
    return name_of(tensors[at].desc.type) == attnspan::types_of(op_, types_of(tensors, num_inputs)).at(size_t(at - num_inputs));
  } catch (const std::exception& refused) {
    // A question, not an error; what follows from a wrong type of the network was logged by getOutputDataTypes.
    log(Severity::kVERBOSE, refused.what());
    return false;
  }
}

int32_t Plugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept {
  return guarded(-1, [&] {
    attnspan::types_of(op_, types_of(inputs, num_inputs));
    sizes_of(op_, attributes_, each_of(inputs, num_inputs, [](const auto& tensor) { return shape_of(tensor.desc.dims); }));
    return 0;
  });
}

size_t Plugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
  return guarded(size_t{0}, [&] {
    const Sizes sizes =
        sizes_of(op_, attributes_, each_of(inputs, num_inputs, [](const auto& tensor) { return shape_of(tensor.max); }));
    return operation_->workspace(sizes.at("batch"), sizes.at("dim"));
  });
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
  return output >= 0 && output < op_.num_outputs ? op_.outputs[output].alias : -1;
}

const char* Plugin::getTimingCacheID() noexcept { return timing_id_.c_str(); }

int32_t Plugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs, const nvinfer1::PluginTensorDesc*,
                              int32_t) noexcept {
  return guarded(-1, [&] {
    const Sizes sizes =
        sizes_of(op_, attributes_, each_of(inputs, num_inputs, [](const auto& tensor) { return shape_of(tensor.dims); }));
    operation_->prepare(each_of(inputs, num_inputs, [](const auto& tensor) { return name_of(tensor.type); }), sizes.at("dim"));
    return 0;
  });
}

int32_t Plugin::enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*, const void* const* in,
                        void* const* out, void* workspace, cudaStream_t stream) noexcept {
  return guarded(-1, [&] {
    // Of all ops the first input is [batch, tokens, ...].
    operation_->run(in, out, inputs[0].dims.d[0], inputs[0].dims.d[1], workspace, stream);
    return 0;
  });
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept { return &collection_; }

Creator::Creator(const schema::Op& op) : op_(op) {
  for (int i = 0; i < op.num_attributes; ++i)
    fields_.emplace_back(op.attributes[i].name, nullptr, field_type(op.attributes[i].kind), 1);
  names_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginV3* Creator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* given,
                                           nvinfer1::TensorRTPhase phase) noexcept {
  const std::string layer = name == nullptr ? "" : name;
  try {
    Attributes attributes = attributes_of(op_, each_of(given->fields, given->nbFields, given_of));
    return new Plugin(op_, std::move(attributes), layer, phase == nvinfer1::TensorRTPhase::kBUILD);
  } catch (const std::exception& error) {
    refused(layer, error);
    return nullptr;
  }
}

}  // namespace attnspan
