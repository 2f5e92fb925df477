// Reading JSON files.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>

namespace attnspan {

// UserError when the file cannot be read or is no JSON object.
nlohmann::json read_json(const std::filesystem::path& file);

}  // namespace attnspan
