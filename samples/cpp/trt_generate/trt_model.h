// A model of target `tensorrt` in TensorRT.
#pragma once

#include <filesystem>
#include <memory>

#include "artefact.h"
#include "generation.h"

namespace attnspan {

// plugin: libattnspan_trt.so; empty: the one in the artefact. UserError: another target, no GPU, no engine for it, no plugin, a
// batch that the engine was not built for, no memory.
std::unique_ptr<Model> make_trt_model(const Artefact& artefact, int64_t batch, const std::filesystem::path& plugin);

}  // namespace attnspan
