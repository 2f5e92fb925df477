#include "tokenizer.h"

#include <dlfcn.h>
#include <unistd.h>

#include <fstream>
#include <vector>

#include "error.h"

#ifndef ATTNSPAN_GENAI_LIBRARY
#define ATTNSPAN_GENAI_LIBRARY "libonnxruntime-genai.so"
#endif

namespace attnspan {

namespace {

namespace fs = std::filesystem;

constexpr const char* kInstead =
    "; give --tokenizer-library FILE (pip install onnxruntime-genai has it), or token ids with --ids";

// A folder with links to the tokenizer's files and a genai_config.json, without which the library reads no tokenizer.
class TokenizerFolder {
 public:
  explicit TokenizerFolder(const fs::path& folder) {
    std::string name = (fs::temp_directory_path() / "attnspan-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw UserError("cannot make a folder in " + fs::temp_directory_path().string());
    path_ = name;
    for (const char* file : {"tokenizer.json", "tokenizer_config.json"})
      if (fs::exists(folder / file)) fs::create_symlink(fs::absolute(folder / file), path_ / file);
    // Sizes that are not used without the model.
    std::ofstream(path_ / "genai_config.json") << R"({"model":{"type":"llama","vocab_size":1,"context_length":1},"search":{}})";
  }
  ~TokenizerFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

// The library ends the process when it finds no ONNX Runtime: see to it that it does.
bool open_onnx_runtime(const fs::path& genai) {
  for (const char* name : {"libonnxruntime.so.1", "libonnxruntime.so"})
    if (dlopen(name, RTLD_NOW | RTLD_NOLOAD) != nullptr || dlopen(name, RTLD_NOW) != nullptr) return true;
  const fs::path site = genai.parent_path().parent_path();
  std::error_code none;
  for (const fs::path& folder : {genai.parent_path(), site / "onnxruntime" / "capi"})
    for (const auto& entry : fs::directory_iterator(folder, none))
      if (entry.path().filename().string().rfind("libonnxruntime.so", 0) == 0 &&
          dlopen(entry.path().c_str(), RTLD_NOW) != nullptr)
        return true;
  return false;
}

}  // namespace

// The functions of ort_genai_c.h that are used, with the types that they have there; results are null, or an error.
struct Tokenizer::Library {
  void* handle = nullptr;
  void* (*create)(const char* folder, void** tokenizer) = nullptr;
  void (*destroy)(void* tokenizer) = nullptr;
  void* (*encode)(const void* tokenizer, const char* text, void* sequences) = nullptr;
  void* (*decode)(const void* tokenizer, const int32_t* tokens, size_t count, const char** text) = nullptr;
  void* (*create_sequences)(void** sequences) = nullptr;
  void (*destroy_sequences)(void* sequences) = nullptr;
  size_t (*sequence_size)(const void* sequences, size_t index) = nullptr;
  const int32_t* (*sequence)(const void* sequences, size_t index) = nullptr;
  void (*destroy_string)(const char* text) = nullptr;
  const char* (*error)(const void* result) = nullptr;
  void (*destroy_result)(void* result) = nullptr;

  explicit Library(const fs::path& path) {
    fs::path found = path.empty() ? fs::path(ATTNSPAN_GENAI_LIBRARY) : path;
    if (!path.empty() && !fs::is_regular_file(path))
      throw UserError("the tokenizer library " + path.string() + " does not exist" + kInstead);
    if (!open_onnx_runtime(found))
      throw UserError("the tokenizer library needs libonnxruntime.so, which is not found; add its folder to LD_LIBRARY_PATH");
    handle = dlopen(found.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw UserError(std::string("no tokenizer library: ") + dlerror() + kInstead);
    get(create, "OgaCreateTokenizerFromPath"), get(destroy, "OgaDestroyTokenizer");
    get(encode, "OgaTokenizerEncode"), get(decode, "OgaTokenizerDecode");
    get(create_sequences, "OgaCreateSequences"), get(destroy_sequences, "OgaDestroySequences");
    get(sequence_size, "OgaSequencesGetSequenceCount"), get(sequence, "OgaSequencesGetSequenceData");
    get(destroy_string, "OgaDestroyString");
    get(error, "OgaResultGetError"), get(destroy_result, "OgaDestroyResult");
  }

  void check(void* result) const {
    if (result == nullptr) return;
    const std::string message = error(result);
    destroy_result(result);
    throw UserError("tokenizer: " + message + kInstead);
  }

 private:
  template <typename Function>
  void get(Function*& function, const char* name) {
    function = reinterpret_cast<Function*>(dlsym(handle, name));
    if (function == nullptr)
      throw UserError(std::string("the tokenizer library has no ") + name + ": must be 0.16 or newer" + kInstead);
  }
};

Tokenizer::Tokenizer(const fs::path& folder, const fs::path& library) {
  if (!fs::is_regular_file(folder / "tokenizer.json"))
    throw UserError(folder.string() + " has no tokenizer.json: give token ids with --ids, or export a model that has one");
  library_ = std::make_unique<Library>(library);
  const TokenizerFolder files(folder);
  library_->check(library_->create(files.path().c_str(), &tokenizer_));
}

Tokenizer::~Tokenizer() {
  if (tokenizer_ != nullptr) library_->destroy(tokenizer_);
}

std::vector<int64_t> Tokenizer::encode(const std::string& text) const {
  void* sequences = nullptr;
  library_->check(library_->create_sequences(&sequences));
  const auto free = [this](void* p) { library_->destroy_sequences(p); };
  const std::unique_ptr<void, decltype(free)> owner(sequences, free);
  library_->check(library_->encode(tokenizer_, text.c_str(), sequences));
  const int32_t* ids = library_->sequence(sequences, 0);
  return {ids, ids + library_->sequence_size(sequences, 0)};
}

std::string Tokenizer::decode(const std::vector<int32_t>& tokens) const {
  const char* text = nullptr;
  library_->check(library_->decode(tokenizer_, tokens.data(), tokens.size(), &text));
  const std::string copy = text;
  library_->destroy_string(text);
  return copy;
}

}  // namespace attnspan
