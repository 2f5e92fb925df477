// The engines of an artefact, as `attnspan build` wrote them: engine/NAME.engine, described by engine/NAME.json.
#pragma once

#include <filesystem>
#include <string>

#include "artefact.h"

namespace attnspan {

struct EngineFile {
  std::filesystem::path path;
  bool has_plugin = false;  // built with libattnspan_trt.so or its like
  bool streams_weights = false;
};

// The engine that TensorRT `version` ("11.4.0") can run on a GPU of compute capability `sm` ("90"). UserError, with what is there
// instead, when there is none or it is cut short. Other hashes are for the Python session to compare.
EngineFile find_engine(const Artefact& artefact, const std::string& version, const std::string& sm);

}  // namespace attnspan
