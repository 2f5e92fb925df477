// The plugins and their creators, as TensorRT 10.3 to 11 knows them (IPluginV3).
#pragma once

// NVIDIA's headers warn under -Wextra in some versions; CMake includes them as system headers.
#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "operation.h"

namespace attnspan {

// Logs with TensorRT's logger where it has given one, else to stderr.
void set_logger_finder(nvinfer1::ILoggerFinder* finder);
void log(nvinfer1::ILogger::Severity severity, const std::string& message) noexcept;

// One node of any op of the table. What a method refuses goes to the logger; the method returns the failure it is asked for.
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // building: for an engine that is being built, not run; see make_operation.
  Plugin(const schema::Op& op, Attributes attributes, std::string layer, bool building);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return schema::kVersion; }
  const char* getPluginNamespace() const noexcept override { return schema::kNamespace; }

  int32_t getNbOutputs() const noexcept override { return op_.num_outputs; }
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs, const nvinfer1::DataType* input_types,
                             int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs* shape_inputs,
                          int32_t num_shape_inputs, nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t at, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t num_outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t num_outputs) const noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override;
  const char* getTimingCacheID() noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs, const nvinfer1::PluginTensorDesc* outputs,
                        int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs, const void* const* in,
                  void* const* out, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  // What `body` returns, or `failure` after logging what it threw.
  template <class Result, class Body>
  Result guarded(Result failure, Body body) const noexcept;

  const schema::Op& op_;
  const Attributes attributes_;
  const std::string layer_;  // the node's name, for messages; not serialised
  const bool building_;
  const std::string timing_id_;
  std::unique_ptr<Operation> operation_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// Creates the plugins of one op, from an ONNX node's attributes and from what an engine holds alike.
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(const schema::Op& op);

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return schema::kVersion; }
  const char* getPluginNamespace() const noexcept override { return schema::kNamespace; }

 private:
  const schema::Op& op_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection names_{};
};

}  // namespace attnspan
