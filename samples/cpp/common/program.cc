#include "program.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <string>

#include "error.h"
#include "stream_decoder.h"
#include "tokenizer.h"

namespace attnspan {

namespace {

constexpr int64_t kNewTokens = 256;

constexpr const char* kUsage =
    "usage: %s DIR (-p TEXT | --prompt-file FILE | --ids 1,2,3)... [options]\n"
    "DIR is an artefact folder, as made by attnspan export. Every prompt is a row of the batch; they are given to the model as "
    "they\n"
    "are, without a chat template.\n"
    "  --max-new-tokens N    at most N new tokens (default 256, or fewer where the context ends)\n"
    "  --temperature T       0 (default) is greedy\n"
    "  --top-k K, --top-p P  the K likeliest tokens, the likeliest that make up P (defaults: all)\n"
    "  --seed S              makes sampling repeatable\n"
    "  --tokenizer-library FILE  libonnxruntime-genai.so; only text needs it\n";

int64_t new_tokens(const Artefact& artefact, const Options& options, const std::vector<std::vector<int64_t>>& prompts) {
  if (options.max_new_tokens > 0) return options.max_new_tokens;
  int64_t room = kNewTokens;
  for (const auto& prompt : prompts) room = std::min(room, artefact.n_max - static_cast<int64_t>(prompt.size()));
  return std::max<int64_t>(room, 1);
}

void print_ids(const std::vector<int64_t>& ids) {
  for (size_t i = 0; i < ids.size(); ++i) std::printf("%s%lld", i > 0 ? "," : "", static_cast<long long>(ids[i]));
  std::printf("\n");
}

void run(const Options& options, const MakeModel& make) {
  const Artefact artefact = Artefact::load(options.folder);
  std::unique_ptr<Tokenizer> tokenizer;
  std::vector<std::vector<int64_t>> prompts = options.ids;
  if (!options.texts.empty()) {
    tokenizer = std::make_unique<Tokenizer>(artefact.folder, options.tokenizer_library);
    for (const std::string& text : options.texts) prompts.push_back(tokenizer->encode(text));
  }
  const auto batch = static_cast<int64_t>(prompts.size());
  const std::unique_ptr<Model> model = make(artefact, options, batch);

  std::vector<StreamDecoder> decoders;
  std::vector<std::string> texts(prompts.size());
  for (size_t row = 0; tokenizer != nullptr && row < prompts.size(); ++row)
    decoders.emplace_back([&](const std::vector<int32_t>& ids) { return tokenizer->decode(ids); });
  const bool streams = tokenizer != nullptr && batch == 1;
  const auto give = [&](size_t row, const std::string& piece) {
    texts[row] += piece;
    if (streams) std::cout << piece << std::flush;
  };
  const auto on_token = [&](int64_t row, int64_t token) {
    const auto& stops = artefact.stop_tokens;
    if (tokenizer == nullptr || std::count(stops.begin(), stops.end(), token) > 0) return;
    give(static_cast<size_t>(row), decoders[static_cast<size_t>(row)].push(static_cast<int32_t>(token)));
  };
  const std::vector<Generation> results =
      generate(*model, artefact, prompts, new_tokens(artefact, options, prompts), options.sampling, on_token);

  size_t count = 0;
  double seconds = 0;
  for (size_t row = 0; row < results.size(); ++row) {
    if (tokenizer != nullptr) give(row, decoders[row].flush());
    if (tokenizer == nullptr)
      print_ids(results[row].tokens);
    else if (streams)
      std::cout << std::endl;
    else
      std::cout << "[" << row << "] " << texts[row] << std::endl;
    count += results[row].tokens.size() - 1;
    seconds = std::max(seconds, results[row].seconds);
  }
  std::fflush(stdout);
  std::fprintf(stderr, "[%lld rows, all prompts read after %.2f s, then %.1f tokens/s, KV %.1f MB]\n",
               static_cast<long long>(batch), results.back().ttft, seconds > 0 ? static_cast<double>(count) / seconds : 0,
               static_cast<double>(artefact.cache_bytes(batch)) / 1e6);
}

}  // namespace

int run_program(int argc, char** argv, const char* usage, const std::vector<std::string>& own, const MakeModel& make) {
  if (argc == 2 && (std::string(argv[1]) == "--help" || std::string(argv[1]) == "-h")) {
    std::printf(kUsage, argv[0]);
    std::printf("%s", usage);
    return 0;
  }
  try {
    run(Options::parse(argc, argv, own), make);
    return 0;
  } catch (const UserError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

}  // namespace attnspan
