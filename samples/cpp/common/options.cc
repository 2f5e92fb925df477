#include "options.h"

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <sstream>

#include "error.h"

namespace attnspan {

namespace {

double parse_number(const std::string& option, const std::string& text) {
  try {
    size_t used = 0;
    const double value = std::stod(text, &used);
    if (used == text.size()) return value;
  } catch (const std::exception&) {
  }
  throw UserError(option + " is " + text + ": must be a number");
}

std::vector<int64_t> parse_ids(const std::string& option, const std::string& text) {
  std::vector<int64_t> ids;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) ids.push_back(parse_int(option, part));
  return ids;
}

std::string read(const std::string& file) {
  if (file == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw UserError("cannot read " + file + "; change --prompt-file");
  return {std::istreambuf_iterator<char>(stream), {}};
}

}  // namespace

int64_t parse_int(const std::string& option, const std::string& text) {
  try {
    size_t used = 0;
    const int64_t value = std::stoll(text, &used);
    if (used == text.size()) return value;
  } catch (const std::exception&) {
  }
  throw UserError(option + " is " + text + ": must be a whole number");
}

Options Options::parse(int argc, char** argv, const std::vector<std::string>& own) {
  Options options;
  options.sampling.seed = std::random_device{}();
  const std::vector<std::string> words(argv + 1, argv + argc);
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& option = words[i];
    if (option.rfind('-', 0) != 0) {
      if (!options.folder.empty())
        throw UserError("two folders are given, " + options.folder.string() + " and " + option + ": give one");
      options.folder = option;
      continue;
    }
    if (i + 1 == words.size()) throw UserError(option + " needs a value, or is unknown");
    const std::string& value = words[++i];
    if (option == "-p" || option == "--prompt")
      options.texts.push_back(value);
    else if (option == "--prompt-file")
      options.texts.push_back(read(value));
    else if (option == "--ids")
      options.ids.push_back(parse_ids(option, value));
    else if (option == "--max-new-tokens")
      options.max_new_tokens = std::max<int64_t>(parse_int(option, value), -1);
    else if (option == "--temperature")
      options.sampling.temperature = parse_number(option, value);
    else if (option == "--top-k")
      options.sampling.top_k = parse_int(option, value);
    else if (option == "--top-p")
      options.sampling.top_p = parse_number(option, value);
    else if (option == "--seed")
      options.sampling.seed = static_cast<uint64_t>(parse_int(option, value));
    else if (option == "--tokenizer-library")
      options.tokenizer_library = value;
    else if (std::count(own.begin(), own.end(), option) > 0)
      options.own[option] = value;
    else
      throw UserError("unknown option " + option);
    if (option == "--max-new-tokens" && options.max_new_tokens < 1)
      throw UserError("--max-new-tokens is " + value + ": must be 1 or more");
  }
  if (options.folder.empty()) throw UserError("no artefact folder is given");
  if (options.texts.empty() == options.ids.empty())
    throw UserError("give prompts either as text, -p TEXT or --prompt-file FILE, or as --ids 1,2,3");
  options.sampling.check();
  return options;
}

}  // namespace attnspan
