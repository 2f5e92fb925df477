// What ort_generate and trt_generate share: all but the model.
#pragma once

#include <functional>
#include <memory>

#include "artefact.h"
#include "generation.h"
#include "options.h"

namespace attnspan {

// A model over caches for so many rows. UserError for an artefact that it cannot run.
using MakeModel = std::function<std::unique_ptr<Model>(const Artefact&, const Options&, int64_t batch)>;

// Runs the program: the answer goes to standard output, piece by piece, figures to standard error. The exit status: 0, 1 (failed)
// or 2 (a user's mistake). usage: what follows the common options.
int run_program(int argc, char** argv, const char* usage, const std::vector<std::string>& own, const MakeModel& make);

}  // namespace attnspan
