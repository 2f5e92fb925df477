#include "generation.h"

#include <algorithm>
#include <chrono>
#include <string>

#include "error.h"

namespace attnspan {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void check(const Artefact& artefact, const std::vector<std::vector<int64_t>>& prompts, int64_t max_new_tokens) {
  if (max_new_tokens < 1)
    throw UserError("max_new_tokens is " + std::to_string(max_new_tokens) + ": must be 1 or more; change --max-new-tokens");
  for (const auto& prompt : prompts) {
    if (prompt.empty()) throw UserError("a prompt has no tokens: give at least one");
    for (const int64_t id : prompt)
      if (id < 0 || id >= artefact.vocab_size)
        throw UserError("token id " + std::to_string(id) + " is not in the vocabulary: must be from 0 to " +
                        std::to_string(artefact.vocab_size - 1));
    const auto total = static_cast<int64_t>(prompt.size()) + max_new_tokens;
    if (total > artefact.n_max)
      throw UserError(std::to_string(prompt.size()) + " tokens in the prompt and " + std::to_string(max_new_tokens) +
                      " new ones make " + std::to_string(total) +
                      ": the artefact was built for n_max = " + std::to_string(artefact.n_max) +
                      "; lower --max-new-tokens, shorten the prompt, or export with a larger --n-max");
  }
}

}  // namespace

std::vector<Generation> generate(Model& model, const Artefact& artefact, const std::vector<std::vector<int64_t>>& prompts,
                                 int64_t max_new_tokens, const Sampling& sampling, const OnToken& on_token) {
  sampling.check();
  check(artefact, prompts, max_new_tokens);
  const size_t batch = prompts.size();
  const auto span_size = static_cast<size_t>(artefact.layers * artefact.kv_heads);
  std::vector<Sampler> samplers;
  for (size_t row = 0; row < batch; ++row) samplers.emplace_back(sampling, static_cast<int64_t>(row));
  std::vector<Generation> results(batch);
  std::vector<int32_t> lengths(batch), spans(batch * span_size), seen(batch);
  std::vector<int64_t> next(batch);
  std::vector<bool> active(batch, true);

  const auto accept = [&](size_t row, const float* logits) {
    const int64_t token = samplers[row].pick(logits, artefact.vocab_size);
    Generation& result = results[row];
    result.tokens.push_back(token);
    result.stopped = std::count(artefact.stop_tokens.begin(), artefact.stop_tokens.end(), token) > 0;
    active[row] = !result.stopped && static_cast<int64_t>(result.tokens.size()) < max_new_tokens;
    next[row] = token;
    on_token(static_cast<int64_t>(row), token);
  };

  const double start = now();
  for (size_t row = 0; row < batch; ++row) {
    const std::vector<int64_t>& prompt = prompts[row];
    const auto total = static_cast<int64_t>(prompt.size());
    artefact.plan.spans({static_cast<int32_t>(total)}, spans.data());
    const float* logits = nullptr;
    for (const auto& [begin, end] : artefact.chunks(0, total, model.max_chunk()))
      logits = model.chunk(static_cast<int64_t>(row), &prompt[static_cast<size_t>(begin)], end - begin,
                           static_cast<int32_t>(begin), spans.data());
    lengths[row] = static_cast<int32_t>(total);
    accept(row, logits);
    results[row].ttft = now() - start;
  }
  double before = now();
  while (std::count(active.begin(), active.end(), true) > 0) {
    const std::vector<bool> was_active = active;
    // A row that takes no part computes token 0, in the slot of its next token, and sees as little as can be.
    for (size_t row = 0; row < batch; ++row) {
      if (!active[row]) next[row] = 0;
      seen[row] = active[row] ? lengths[row] + 1 : 0;
    }
    artefact.plan.spans(seen, spans.data());
    const float* logits = model.step(next.data(), lengths.data(), spans.data());
    const double after = now();
    for (size_t row = 0; row < batch; ++row) {
      if (!was_active[row]) continue;
      ++lengths[row];
      results[row].seconds += after - before;
      accept(row, logits + static_cast<int64_t>(row) * artefact.vocab_size);
    }
    before = after;
  }
  return results;
}

}  // namespace attnspan
