// Generates text with an artefact of target `cpu` or `portable` on CPUs, by ONNX Runtime.
#include "error.h"
#include "ort_model.h"
#include "program.h"

int main(int argc, char** argv) {
  using namespace attnspan;
  const auto make = [](const Artefact& artefact, const Options& options, int64_t batch) {
    const auto own = [&](const char* name) {
      const auto found = options.own.find(name);
      return found == options.own.end() ? std::string() : found->second;
    };
    const std::string threads = own("--threads");
    const int64_t count = threads.empty() ? 0 : parse_int("--threads", threads);
    if (!threads.empty() && count < 1) throw UserError("--threads is " + threads + ": must be 1 or more");
    return make_ort_model(artefact, batch, count, own("--library"));
  };
  return run_program(argc, argv,
                     "  --threads N           threads (default: one a core)\n"
                     "  --library FILE        libattnspan_ort.so (default: the one in DIR)\n",
                     {"--threads", "--library"}, make);
}
