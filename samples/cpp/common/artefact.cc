#include "artefact.h"

#include <algorithm>
#include <fstream>
#include <map>

#include "error.h"
#include "json.h"

namespace attnspan {

namespace {

constexpr const char* kAgain = "; copy the folder again, or make it again with attnspan export --overwrite";

void check_files(const std::filesystem::path& folder, const nlohmann::json& info) {
  const std::string library = info.at("op_library").is_string() ? info.at("op_library") : "";
  for (const auto& [name, entry] : info.at("files").items()) {
    const auto file = folder / std::filesystem::path(name).filename();
    std::error_code missing;
    const auto size = std::filesystem::file_size(file, missing);
    if (missing && name == library) continue;  // another one may be given
    if (missing) throw UserError(folder.string() + " lacks " + name + ", which attnspan.json lists" + kAgain);
    if (const auto want = entry.at("bytes").get<uintmax_t>(); size != want)
      throw UserError(file.string() + " has " + std::to_string(size) + " bytes, attnspan.json says " + std::to_string(want) +
                      kAgain);
  }
}

std::vector<Cache> read_caches(const nlohmann::json& info) {
  std::vector<Cache> caches;
  const std::string dtype = info.at("cache_dtype");
  const int64_t dim = info.at("head_dim");
  for (const auto& op : info.at("attention")) {
    int64_t slots = 0;
    for (const int64_t capacity : op.at("capacity")) slots += capacity;
    const bool sampled = op.contains("state");
    std::vector<int64_t> shape{slots, sampled ? 2 * dim : dim};
    if (op.contains("cache_shape")) shape = op.at("cache_shape").get<std::vector<int64_t>>();
    for (const char* kind : {"key", "value", "kv"})
      if (op.contains(kind)) caches.push_back({op.at(kind), dtype, shape});
    if (sampled) caches.push_back({op.at("state"), "uint8", {op.at("state_bytes").get<int64_t>()}});
  }
  return caches;
}

std::vector<int64_t> read_stop_tokens(const std::filesystem::path& folder) {
  for (const char* name : {"generation_config.json", "config.json"}) {
    if (!std::filesystem::is_regular_file(folder / name)) continue;
    const nlohmann::json config = read_json(folder / name);
    const auto ids = config.find("eos_token_id");
    if (ids == config.end()) continue;
    if (ids->is_number_integer()) return {ids->get<int64_t>()};
    if (ids->is_array() && !ids->empty()) return ids->get<std::vector<int64_t>>();
  }
  return {};
}

}  // namespace

nlohmann::json read_json(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw UserError("cannot read " + file.string());
  try {
    nlohmann::json data = nlohmann::json::parse(stream);
    if (data.is_object()) return data;
  } catch (const nlohmann::json::exception& error) {
    throw UserError(file.string() + " is not JSON: " + error.what());
  }
  throw UserError(file.string() + " is no JSON object");
}

int64_t bytes_of(const std::string& dtype) {
  static const std::map<std::string, int64_t> bytes{{"float32", 4}, {"float16", 2},       {"bfloat16", 2},
                                                    {"int8", 1},    {"float8_e4m3fn", 1}, {"uint8", 1}};
  const auto found = bytes.find(dtype);
  if (found == bytes.end()) throw UserError("cache_dtype is " + dtype + ": this program does not know it");
  return found->second;
}

int64_t Cache::row_bytes() const {
  int64_t bytes = bytes_of(dtype);
  for (const int64_t size : shape) bytes *= size;
  return bytes;
}

Artefact Artefact::load(const std::filesystem::path& folder) {
  const auto file = folder / "attnspan.json";
  if (!std::filesystem::is_regular_file(file))
    throw UserError(folder.string() + " is not an artefact: it has no attnspan.json; make one with attnspan export");
  const nlohmann::json info = read_json(file);
  Artefact artefact;
  artefact.folder = folder;
  try {
    if (info.at("schema") != 1)
      throw UserError(file.string() + ": schema is " + info.at("schema").dump() + ", this program reads 1");
    artefact.target = info.at("target");
    artefact.n_max = info.at("n_max"), artefact.layers = info.at("layers"), artefact.kv_heads = info.at("kv_heads");
    artefact.vocab_size = info.at("vocab_size"), artefact.sink = info.at("sink"), artefact.chunk = info.value("chunk", 0);
    if (info.at("op_library").is_string()) artefact.op_library = info.at("op_library");
    check_files(folder, info);
    artefact.caches = read_caches(info);
    for (const Cache& cache : artefact.caches) {
      if (cache.row_bytes() <= 0) throw UserError(file.string() + ": " + cache.name + " is empty");
      artefact.samples |= cache.dtype == "uint8";
    }
    artefact.stop_tokens = read_stop_tokens(folder);
  } catch (const nlohmann::json::exception& error) {
    throw UserError(file.string() + " is damaged: " + error.what() + kAgain);
  }
  artefact.plan = Plan::load(folder / "plan.json", artefact.layers, artefact.kv_heads);
  return artefact;
}

int64_t Artefact::cache_bytes(int64_t batch) const {
  int64_t bytes = 0;
  for (const Cache& cache : caches) bytes += batch * cache.row_bytes();
  return bytes;
}

std::vector<std::pair<int64_t, int64_t>> Artefact::chunks(int64_t length, int64_t total, int64_t most) const {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (int64_t start = 0; start < total;) {
    int64_t end = std::min(total, start + most);
    if (chunk > 0) {  // a call may end where a ring ends, at the sinks and multiples of the chunk after them, but not cross it
      const int64_t past = length + start - sink;
      end = std::min(end, start + std::min(chunk, chunk - (past > 0 ? past % chunk : past)));
    }
    // A call of one token samples: the last chunk of a prompt takes two where heads sample.
    if (samples && total - end == 1 && most > 2) --end;
    found.emplace_back(start, end);
    start = end;
  }
  return found;
}

}  // namespace attnspan
