#include "plan.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "json.h"

namespace attnspan {

Plan Plan::load(const std::filesystem::path& file, int64_t layers, int64_t kv_heads) {
  const nlohmann::json data = read_json(file);
  Plan plan;
  plan.windows_.assign(static_cast<size_t>(layers), 0);
  try {
    for (const auto& layer : data.at("rules")) {
      auto& rules = plan.rules_.emplace_back();
      for (const auto& rule : layer) rules.push_back({rule.at("alpha").get<double>(), rule.at("beta").get<double>()});
      if (static_cast<int64_t>(rules.size()) != kv_heads) throw UserError(file.string() + ": rules are not one a KV head");
    }
    if (plan.layers() != layers) throw UserError(file.string() + ": rules are not one list a layer");
    if (const auto windows = data.find("windows"); windows != data.end())
      for (size_t i = 0; i < windows->size(); ++i)
        if (!windows->at(i).is_null()) plan.windows_.at(i) = windows->at(i).get<int64_t>();
  } catch (const nlohmann::json::exception& error) {
    throw UserError(file.string() + " is no plan: " + error.what());
  } catch (const std::out_of_range&) {
    throw UserError(file.string() + ": windows are more than layers");
  }
  return plan;
}

void Plan::spans(const std::vector<int32_t>& lengths, int32_t* out) const {
  constexpr double kLeast = 128, kBlock = 64;
  for (size_t layer = 0; layer < rules_.size(); ++layer) {
    for (const int32_t length : lengths) {
      for (const Rule& rule : rules_[layer]) {
        const double n = length, wanted = std::min(rule.alpha + rule.beta * n, n);
        auto span = static_cast<int64_t>(std::max(kLeast, kBlock * std::ceil(wanted / kBlock)));
        if (windows_[layer] > 0) span = std::min(span, windows_[layer]);
        *out++ = static_cast<int32_t>(span);
      }
    }
  }
}

}  // namespace attnspan
