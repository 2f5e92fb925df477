// What the C++ samples share, without a runtime: spans, chunks, folders and engines that are damaged, sampling, text in pieces,
// the loop over rows. samples_test FOLDER: an empty folder to write to.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "artefact.h"
#include "check.h"
#include "engine_folder.h"
#include "error.h"
#include "generation.h"
#include "options.h"
#include "sampling.h"
#include "stream_decoder.h"

using namespace attnspan;
namespace fs = std::filesystem;

namespace {

void write(const fs::path& file, const std::string& text) {
  fs::create_directories(file.parent_path());
  std::ofstream(file, std::ios::binary) << text;
}

// A model of two layers with two KV heads; `change` replaces a part of attnspan.json.
fs::path folder(const fs::path& base, const std::string& from = "", const std::string& to = "") {
  static int number = 0;
  const fs::path made = base / std::to_string(number++);
  const std::string plan =
      R"({"rules": [[{"alpha": 0, "beta": 1}, {"alpha": 100, "beta": 0.25}],
                    [{"alpha": -50, "beta": 0.5}, {"alpha": 0, "beta": 1}]],
          "windows": [null, 200]})";
  write(made / "plan.json", plan);
  write(made / "model.onnx", "12345");
  write(made / "config.json", R"({"eos_token_id": 7})");
  write(made / "generation_config.json", R"({"eos_token_id": [5, 6]})");
  std::string info =
      R"({"schema": 1, "target": "cpu", "n_max": 1000, "layers": 2, "kv_heads": 2, "head_dim": 16, "vocab_size": 10,
    "sink": 64, "dtype": "float32", "cache_dtype": "bfloat16", "op_library": "lib.so",
    "attention": [{"capacity": [1000, 384], "key": "key.0", "value": "value.0"},
                  {"capacity": [200], "kv": "kv.1", "state": "state.1", "state_bytes": 48},
                  {"capacity": [200, 200], "cache_shape": [2, 200, 16], "key": "key.1.1", "value": "value.1.1"}],
    "files": {"model.onnx": {"bytes": 5, "sha256": ""}, "plan.json": {"bytes": )" +
      std::to_string(plan.size()) + R"(, "sha256": ""}, "lib.so": {"bytes": 3, "sha256": ""}}})";
  if (!from.empty()) {
    expect(info.find(from) != std::string::npos, "what is to be changed is there");
    info.replace(info.find(from), from.size(), to);
  }
  write(made / "attnspan.json", info);
  return made;
}

void refused(const std::function<void()>& call, const std::string& words) {
  std::string message;
  try {
    call();
  } catch (const UserError& error) {
    message = error.what();
  }
  const bool good = message.find(words) != std::string::npos;
  expect(good, words.c_str());
  if (!good) std::printf("  got: %s\n", message.c_str());
}

void artefacts(const fs::path& base) {
  const Artefact artefact = Artefact::load(folder(base));
  expect(artefact.caches.size() == 6 && artefact.caches[3].name == "state.1" && artefact.caches[4].shape.size() == 3, "caches");
  expect(artefact.samples && artefact.stop_tokens == std::vector<int64_t>{5, 6}, "states and stop tokens");
  expect(artefact.cache_bytes(3) == 3 * (2 * 2 * 16 * (1384 + 200 + 400) + 48), "bytes of caches");
  // The formula of planner/rules.py at lengths below, at and above its edges; layer 1 slides.
  std::vector<int32_t> spans(8);
  artefact.plan.spans({100, 900}, spans.data());
  expect(spans == std::vector<int32_t>({128, 128, 960, 384, 128, 128, 200, 200}), "spans");
  artefact.plan.spans({0}, spans.data());
  expect(spans[0] == 128 && spans[3] == 128, "spans of a row that takes no part");

  refused([&] { Artefact::load(base / "none"); }, "is not an artefact");
  const std::vector<std::vector<std::string>> changes = {
      {"\"schema\": 1", "\"schema\": 2", "schema is 2"},
      {"\"bytes\": 5", "\"bytes\": 6", "has 5 bytes, attnspan.json says 6"},
      {"model.onnx", "other.onnx", "lacks other.onnx"},
      {"\"n_max\": 1000,", "", "damaged"},
      {"\"layers\": 2", "\"layers\": 3", "not one list a layer"},
      {"\"kv_heads\": 2", "\"kv_heads\": 1", "not one a KV head"},
      {"bfloat16", "float8", "cache_dtype is float8"},
      {"[200]", "[0]", "kv.1 is empty"},
      {"{\"schema\"", "[\"schema\"", "is not JSON"},
      {"{\"capacity\": [1000", "{\"capacity\": [\"x\"", "damaged"},
  };
  for (const auto& change : changes) refused([&] { Artefact::load(folder(base, change[0], change[1])); }, change[2]);
}

void chunks() {
  Artefact artefact;
  artefact.sink = 64;
  using Pairs = std::vector<std::pair<int64_t, int64_t>>;
  expect(artefact.chunks(5, 10, 4) == Pairs({{0, 4}, {4, 8}, {8, 10}}), "chunks");
  expect(artefact.chunks(0, 9, 4) == Pairs({{0, 4}, {4, 8}, {8, 9}}), "a last chunk of one token");
  artefact.samples = true;
  expect(artefact.chunks(0, 9, 4) == Pairs({{0, 4}, {4, 7}, {7, 9}}), "no last chunk of one token where heads sample");
  expect(artefact.chunks(0, 1, 4) == Pairs({{0, 1}}), "one token");
  artefact.samples = false, artefact.chunk = 32;
  for (const int64_t length : {0, 1, 63, 64, 65, 95, 96, 200})
    for (const auto& [total, most] : Pairs({{1, 20}, {31, 20}, {32, 512}, {33, 512}, {200, 20}, {200, 512}})) {
      int64_t done = 0;
      for (const auto& [start, end] : artefact.chunks(length, total, most)) {
        expect(start == done && end > start && end - start <= std::min<int64_t>(most, 32), "chunks follow each other");
        // Slots of the first and last token past the sinks are in the same turn of a ring of any number of chunks.
        if (length + start >= 64)
          expect((length + start - 64) / 32 == (length + end - 65) / 32, "no chunk crosses the end of a ring");
        done = end;
      }
      expect(done == total, "chunks cover the prompt");
    }
}

void engines(const fs::path& base) {
  const Artefact artefact = Artefact::load(folder(base));
  const auto engine = [&](const std::string& name, const std::string& text) {
    write(artefact.folder / "engine" / (name + ".engine"), "123");
    write(artefact.folder / "engine" / (name + ".json"), text);
  };
  const auto find = [&] { return find_engine(artefact, "11.4.0", "90"); };
  refused(find, "has no engine: TensorRT 11.4.0 on sm_90");
  const std::string rest = R"(, "plugin": "python", "bytes": 3})";
  engine("a", R"({"flavour": "tensorrt_rtx", "version": "11.4.0.1", "sm": "90")" + rest);
  engine("b", R"({"flavour": "tensorrt", "version": "11.4.01", "sm": "90")" + rest);
  engine("c", R"({"flavour": "tensorrt", "version": "11.4.0.106", "sm": "80")" + rest);
  refused(find,
          "a.engine (tensorrt_rtx 11.4.0.1, sm_90), b.engine (tensorrt 11.4.01, sm_90), c.engine (tensorrt 11.4.0.106, sm_80)");
  engine("d",
         R"({"flavour": "tensorrt", "version": "11.4.0.106", "sm": "90", "plugin": null, "bytes": 3, "weight_streaming": true})");
  expect(find().path.filename() == "d.engine" && !find().has_plugin && find().streams_weights,
         "the engine of this TensorRT and GPU");
  engine("d", R"({"flavour": "tensorrt", "version": "11.4.0.106", "sm": "90", "plugin": "x", "bytes": 4})");
  refused(find, "cut short");
  engine("d", R"({"flavour": "tensorrt"})");
  refused(find, "is damaged");
}

void sampling() {
  std::vector<float> weights{0.5f, 1, 0.25f, 0.5f, 0}, scratch;
  const auto kept = [&](int64_t top_k, double top_p) {
    std::vector<float> some = weights;
    keep_likely(some, top_k, top_p, scratch);
    std::string found;
    for (const float weight : some) found += weight > 0 ? '1' : '0';
    return found;
  };
  expect(kept(0, 1) == "11110" && kept(1, 1) == "01000" && kept(9, 1) == "11110", "top-k");
  expect(kept(2, 1) == "11010", "equal weights at the border stay");
  expect(kept(0, 0.4) == "01000" && kept(0, 0.5) == "11010" && kept(0, 0.95) == "11110", "top-p: what crosses it stays");

  std::vector<float> logits{1, 3, 3, -2};
  expect(Sampler({}, 0).pick(logits.data(), 4) == 1, "greedy: the first of the likeliest");
  Sampling how;
  how.temperature = 2, how.seed = 3;
  Sampler one(how, 0), same(how, 0), other(how, 1);
  std::map<int64_t, int> counts;
  int equal = 0, different = 0;
  for (int i = 0; i < 20000; ++i) {
    const int64_t token = one.pick(logits.data(), 4);
    ++counts[token];
    equal += token == same.pick(logits.data(), 4);
    different += token != other.pick(logits.data(), 4);
  }
  expect(equal == 20000 && different > 1000, "seeds repeat, rows differ");
  double total = 0;
  for (const float x : logits) total += std::exp(x / 2);
  for (int64_t i = 0; i < 4; ++i) {
    const double share = std::exp(logits[static_cast<size_t>(i)] / 2) / total;
    // Five standard deviations of a binomial count.
    expect(std::abs(counts[i] - 20000 * share) < 5 * std::sqrt(20000 * share * (1 - share)), "shares", counts[i], 20000 * share);
  }
  std::vector<float> one_best{1, 2, 4, -2};
  Sampling cold;
  cold.temperature = 1e-320;
  expect(Sampler(cold, 0).pick(one_best.data(), 4) == 2, "a temperature below those of floats");
  for (const float bad : {NAN, INFINITY}) {
    std::vector<float> broken{0, bad, 1};
    bool thrown = false;
    try {
      Sampler(how, 0).pick(broken.data(), 3);
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    expect(thrown, "logits that are no numbers");
  }
  refused([] { Sampling{-1}.check(); }, "--temperature");
  refused([] { Sampling{0, -1}.check(); }, "--top-k");
  refused([] { Sampling{0, 0, 0}.check(); }, "--top-p");
  refused([] { Sampling{NAN}.check(); }, "--temperature");
}

// Tokens are bytes. `broken`: as Python's tokenizers do, a character that is not whole decodes to U+FFFD; else to its bytes.
void streams() {
  const std::string text = "h\xC3\xA9 \xF0\x9F\x98\x80\xE2\x82\xACx";
  for (const bool broken : {false, true}) {
    const auto decode = [&](const std::vector<int32_t>& tokens) {
      std::string bytes;
      for (const int32_t token : tokens) bytes += static_cast<char>(token);
      return broken && settled_bytes(bytes) < bytes.size() ? bytes.substr(0, settled_bytes(bytes)) + "\xEF\xBF\xBD" : bytes;
    };
    StreamDecoder decoder(decode);
    std::string joined;
    for (const char byte : text) {
      const std::string piece = decoder.push(static_cast<unsigned char>(byte));
      expect(settled_bytes(piece) == piece.size(), "pieces are whole characters");
      joined += piece;
    }
    expect(joined == text && decoder.flush().empty(), "pieces joined are the text");
    StreamDecoder cut(decode);
    expect(cut.push('a') == "a" && cut.push(0xF0).empty() && cut.push(0x9F).empty(), "inside a character");
    expect(cut.flush() == (broken ? "\xEF\xBF\xBD" : "\xF0\x9F"), "what never became a character");
  }
}

void command_line() {
  const auto parse = [](std::vector<std::string> words) {
    words.insert(words.begin(), "program");
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    return Options::parse(static_cast<int>(argv.size()), argv.data(), {"--own"});
  };
  const Options options = parse({"DIR", "-p", "a", "-p", "b", "--top-k", "3", "--own", "x", "--max-new-tokens", "9"});
  expect(
      options.texts.size() == 2 && options.sampling.top_k == 3 && options.own.at("--own") == "x" && options.max_new_tokens == 9,
      "options");
  expect(parse({"DIR", "--ids", "1,22,3"}).ids[0] == std::vector<int64_t>({1, 22, 3}), "ids");
  refused([&] { parse({}); }, "no artefact folder");
  refused([&] { parse({"DIR"}); }, "give prompts");
  refused([&] { parse({"DIR", "-p", "a", "--ids", "1"}); }, "give prompts");
  refused([&] { parse({"DIR", "OTHER", "-p", "a"}); }, "two folders");
  refused([&] { parse({"DIR", "-p"}); }, "-p needs a value");
  refused([&] { parse({"DIR", "--wrong", "a"}); }, "unknown option --wrong");
  refused([&] { parse({"DIR", "--ids", "1,x"}); }, "--ids is x");
  refused([&] { parse({"DIR", "-p", "a", "--max-new-tokens", "0"}); }, "must be 1 or more");
  refused([&] { parse({"DIR", "-p", "a", "--top-p", "2"}); }, "--top-p");
  refused([&] { parse({"DIR", "--prompt-file", "/nonexistent/file"}); }, "--prompt-file");
}

// Counts: the next token is the number of tokens that a row holds, modulo 10. Notes what it is called with.
class Counter : public Model {
 public:
  explicit Counter(int64_t batch) : held(static_cast<size_t>(batch)), logits(static_cast<size_t>(batch) * 10) {}
  int64_t max_chunk() const override { return 4; }
  const float* chunk(int64_t row, const int64_t*, int64_t count, int32_t length, const int32_t* span) override {
    expect(held[static_cast<size_t>(row)] == length && count <= 4, "chunks go on where the row is");
    spans.push_back(span[0]);
    held[static_cast<size_t>(row)] += static_cast<int32_t>(count);
    return answer(0, held[static_cast<size_t>(row)]);
  }
  const float* step(const int64_t* tokens, const int32_t* lengths, const int32_t* span) override {
    for (size_t row = 0; row < held.size(); ++row) {
      steps.push_back({tokens[row], lengths[row], span[2 * row]});
      answer(row, lengths[row] + 1);
    }
    return logits.data();
  }
  std::vector<int32_t> held, spans;
  std::vector<std::vector<int64_t>> steps;

 private:
  const float* answer(size_t row, int32_t count) {
    for (size_t i = 0; i < 10; ++i) logits[10 * row + i] = i == static_cast<size_t>(count) % 10 ? 1 : 0;
    return logits.data();
  }
  std::vector<float> logits;
};

void loop(const fs::path& base) {
  Artefact artefact = Artefact::load(folder(base));
  artefact.samples = false;
  artefact.stop_tokens = {0};
  Counter model(2);
  std::string order;
  const auto results = generate(model, artefact, {{1, 2, 3, 4, 5, 6}, {9}}, 5, {},
                                [&](int64_t row, int64_t token) { order += std::to_string(row) + std::to_string(token) + " "; });
  expect(results[0].tokens == std::vector<int64_t>({6, 7, 8, 9, 0}) && results[0].stopped, "a stop token");
  expect(results[1].tokens == std::vector<int64_t>({1, 2, 3, 4, 5}) && !results[1].stopped, "most new tokens");
  expect(order == "06 11 07 12 08 13 09 14 00 15 ", "tokens are told as they come");
  expect(model.spans == std::vector<int32_t>({128, 128, 128}), "spans of prompts");
  expect(model.steps.size() == 8 && model.steps[0] == std::vector<int64_t>({6, 6, 128}) &&
             model.steps[1] == std::vector<int64_t>({1, 1, 128}),
         "steps");

  Counter idle(2);
  const auto ragged = generate(idle, artefact, {std::vector<int64_t>(7, 1), {9}}, 6, {}, [](int64_t, int64_t) {});
  expect(ragged[0].tokens.size() == 4 && ragged[1].tokens.size() == 6, "rows end on their own");
  // Row 0 ended with 10 tokens in its cache: then it computes token 0 at that length.
  expect(idle.steps[8] == std::vector<int64_t>({0, 10, 128}), "a row that takes no part");

  const auto none = [](int64_t, int64_t) {};
  refused([&] { generate(model, artefact, {{}}, 1, {}, none); }, "no tokens");
  refused([&] { generate(model, artefact, {{10}}, 1, {}, none); }, "token id 10 is not in the vocabulary: must be from 0 to 9");
  refused([&] { generate(model, artefact, {{1}}, 1000, {}, none); }, "make 1001");
  refused([&] { generate(model, artefact, {{1}}, 0, {}, none); }, "max_new_tokens is 0");
}

}  // namespace

int main(int, char** argv) {
  const fs::path base = argv[1];
  artefacts(base);
  chunks();
  engines(base);
  sampling();
  streams();
  command_line();
  loop(base);
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures > 0;
}
