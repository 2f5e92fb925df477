// An artefact folder, as `attnspan export` wrote it (docs/artefact.md).
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "plan.h"

namespace attnspan {

// A cache of an attention op, or the state of one that samples: the tensors past_{name} and present_{name}.
struct Cache {
  std::string name, dtype;
  std::vector<int64_t> shape;  // of one row

  int64_t row_bytes() const;
};

struct Artefact {
  std::filesystem::path folder;
  std::string target, op_library;
  int64_t n_max = 0, layers = 0, kv_heads = 0, vocab_size = 0, sink = 0;
  int64_t chunk = 0;  // target portable: callers cut texts so that no call crosses the end of a ring; 0: any call is fine
  bool samples = false;
  std::vector<Cache> caches;  // in the order of the model's inputs
  std::vector<int64_t> stop_tokens;
  Plan plan;

  // UserError when it is no artefact, or a file of it is missing or has another size than when it was written. Hashes are not
  // compared here.
  static Artefact load(const std::filesystem::path& folder);

  int64_t cache_bytes(int64_t batch) const;

  // Where the chunks of `total` tokens begin and end, for a row that holds `length`: at most `most` tokens each.
  std::vector<std::pair<int64_t, int64_t>> chunks(int64_t length, int64_t total, int64_t most) const;
};

// Bytes of an element, by the name of its type in attnspan.json. UserError for an unknown one.
int64_t bytes_of(const std::string& dtype);

}  // namespace attnspan
