// Text to tokens and back, by the tokenizer library of ONNX Runtime GenAI (its C API), opened when it is first needed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace attnspan {

class Tokenizer {
 public:
  // Reads tokenizer.json and tokenizer_config.json of a folder. library: libonnxruntime-genai.so; empty: the one that CMake
  // found, else the one the system finds. It needs an ONNX Runtime, which it looks for in this process, then beside itself as pip
  // installs it. UserError when there is none of these, or the tokenizer is not one that it knows.
  Tokenizer(const std::filesystem::path& folder, const std::filesystem::path& library);
  ~Tokenizer();

  std::vector<int64_t> encode(const std::string& text) const;
  std::string decode(const std::vector<int32_t>& tokens) const;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
  void* tokenizer_ = nullptr;
};

}  // namespace attnspan
