// The command line of the samples.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "sampling.h"

namespace attnspan {

struct Options {
  std::filesystem::path folder, tokenizer_library;
  std::vector<std::string> texts;         // prompts as text,
  std::vector<std::vector<int64_t>> ids;  // or as token ids; then ids are printed, too
  int64_t max_new_tokens = 0;             // 0: 256, or fewer where n_max ends
  Sampling sampling;
  std::map<std::string, std::string> own;  // options of one program, by name

  // UserError for anything that is not understood. own: names of the options that only this program has, each with a value.
  static Options parse(int argc, char** argv, const std::vector<std::string>& own);
};

// A whole number; UserError that names the option when it is none.
int64_t parse_int(const std::string& option, const std::string& text);

}  // namespace attnspan
