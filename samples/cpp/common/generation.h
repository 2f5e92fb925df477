// Rows of tokens: prompts row by row in chunks, then steps of all rows together, over any model.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "artefact.h"
#include "sampling.h"

namespace attnspan {

// What computes. Caches hold `batch` rows and stay between calls.
class Model {
 public:
  virtual ~Model() = default;
  // Most tokens of a chunk.
  virtual int64_t max_chunk() const = 0;
  // Appends a chunk to a row that holds `length` tokens. span [layers, 1, kv_heads]. Logits of its last token, [vocab], until the
  // next call.
  virtual const float* chunk(int64_t row, const int64_t* tokens, int64_t count, int32_t length, const int32_t* span) = 0;
  // Appends one token to each row. lengths [batch]; span [layers, batch, kv_heads]. Logits [batch, vocab], until the next call.
  virtual const float* step(const int64_t* tokens, const int32_t* lengths, const int32_t* span) = 0;
};

struct Generation {
  std::vector<int64_t> tokens;  // a stop token included
  bool stopped = false;         // by a stop token; else by max_new_tokens
  double ttft = 0;              // seconds from the start to the first token
  double seconds = 0;           // of all tokens after the first
};

// Called for every token chosen.
using OnToken = std::function<void(int64_t row, int64_t token)>;

// Prompt r in row r; all rows start empty. UserError, before anything is computed, for a prompt that is empty, has ids outside of
// the vocabulary, or does not fit with max_new_tokens.
std::vector<Generation> generate(Model& model, const Artefact& artefact, const std::vector<std::vector<int64_t>>& prompts,
                                 int64_t max_new_tokens, const Sampling& sampling, const OnToken& on_token);

}  // namespace attnspan
