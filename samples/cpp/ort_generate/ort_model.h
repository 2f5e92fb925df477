// A model of target `cpu` or `portable` in ONNX Runtime.
#pragma once

#include <filesystem>
#include <memory>

#include "artefact.h"
#include "generation.h"

namespace attnspan {

// library: libattnspan_ort.so; empty: the one in the artefact. threads 0: ONNX Runtime's choice. UserError: another target, no
// library, a model or library that does not load.
std::unique_ptr<Model> make_ort_model(const Artefact& artefact, int64_t batch, int64_t threads,
                                      const std::filesystem::path& library);

}  // namespace attnspan
