// The rules of plan.json: how many tokens each KV head sees at a length.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

namespace attnspan {

class Plan {
 public:
  // UserError when the file is no plan of so many layers and KV heads.
  static Plan load(const std::filesystem::path& file, int64_t layers, int64_t kv_heads);

  // Spans in force when rows have that many tokens: [layers, rows, kv_heads]. The spans of a prompt are those of the length that
  // its row has afterwards, those of a step at length n are of n + 1. A length of 0 stands for a row that takes no part.
  void spans(const std::vector<int32_t>& lengths, int32_t* out) const;

  int64_t layers() const { return static_cast<int64_t>(rules_.size()); }

 private:
  struct Rule {
    double alpha, beta;
  };
  std::vector<std::vector<Rule>> rules_;  // [layers][kv_heads]
  std::vector<int64_t> windows_;          // of a layer that slides, in tokens; 0: it does not
};

}  // namespace attnspan
