#include "engine_folder.h"

#include <algorithm>
#include <vector>

#include "error.h"
#include "json.h"

namespace attnspan {

EngineFile find_engine(const Artefact& artefact, const std::string& version, const std::string& sm) {
  namespace fs = std::filesystem;
  const std::string build = "; build it with: attnspan build " + artefact.folder.string();
  std::vector<fs::path> files;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(artefact.folder / "engine", none))
    if (entry.path().extension() == ".engine") files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::string there;
  for (const fs::path& file : files) {
    const fs::path description = fs::path(file).replace_extension(".json");
    try {
      const nlohmann::json info = read_json(description);
      const std::string built_by = info.at("version"), flavour = info.at("flavour"), built_for = info.at("sm");
      // Engines are tied to major, minor and patch; the fourth number is of the build.
      const bool same = built_by == version || built_by.rfind(version + ".", 0) == 0;
      if (flavour != "tensorrt" || !same || built_for != sm) {
        there +=
            (there.empty() ? "" : ", ") + file.filename().string() + " (" + flavour + " " + built_by + ", sm_" + built_for + ")";
        continue;
      }
      if (const auto size = fs::file_size(file); size != info.at("bytes").get<uintmax_t>())
        throw UserError(file.string() + " has " + std::to_string(size) + " bytes, its description says " +
                        info.at("bytes").dump() + ": cut short or replaced" + build);
      return {file, !info.at("plugin").is_null(), info.value("weight_streaming", false)};
    } catch (const nlohmann::json::exception& error) {
      throw UserError(description.string() + " is damaged: " + error.what() + build);
    }
  }
  throw UserError(artefact.folder.string() + " has " + (there.empty() ? "no engine" : "engines " + there) + ": TensorRT " +
                  version + " on sm_" + sm + " needs one of its own" + build);
}

}  // namespace attnspan
