// Generates text with the engine of an artefact of target `tensorrt`.
#include "program.h"
#include "trt_model.h"

int main(int argc, char** argv) {
  using namespace attnspan;
  const auto make = [](const Artefact& artefact, const Options& options, int64_t batch) {
    const auto plugin = options.own.find("--plugin");
    return make_trt_model(artefact, batch, plugin == options.own.end() ? "" : plugin->second);
  };
  return run_program(argc, argv, "  --plugin FILE         libattnspan_trt.so (default: the one in DIR)\n", {"--plugin"}, make);
}
