// The launch layer behind C functions, for ctypes. Attributes are text, "num_heads i 8;scale f 0.5;capacity i 192 130"; types
// "float16 int32"; shapes "1 2 64;1 2 64".
#include <sstream>

#include "operation.h"

using namespace attnspan;

namespace {

std::string error;

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::istringstream from(text);
  for (std::string part; std::getline(from, part, at);) parts.push_back(part);
  return parts;
}

struct Node {
  const schema::Op* op;
  Attributes attributes;
  std::vector<std::string> types;
  Sizes sizes;
  std::unique_ptr<Operation> operation;
};

std::vector<Given> given_of(const char* text) {
  std::vector<Given> all;
  for (const std::string& part : split(text, ';')) {
    std::istringstream from(part);
    Given given;
    std::string kind;
    from >> given.name >> kind;
    given.is_float = kind == "f";
    for (std::string word; from >> word;) given.values.push_back(std::stod(word));
    all.push_back(given);
  }
  return all;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* last_error() { return error.c_str(); }

EXPORT Node* node_make(int op, const char* attributes, const char* types, const char* shapes, int building) try {
  auto node = std::make_unique<Node>();
  node->op = schema::kOps[op];
  node->attributes = attributes_of(*node->op, given_of(attributes));
  node->types = split(types, ' ');
  types_of(*node->op, node->types);
  std::vector<Shape> all;
  for (const std::string& part : split(shapes, ';')) {
    all.emplace_back();
    std::istringstream from(part);
    for (int64_t size; from >> size;) all.back().push_back(size);
  }
  node->sizes = sizes_of(*node->op, node->attributes, all);
  node->operation = make_operation(*node->op, node->attributes, building);
  return node.release();
} catch (const std::exception& caught) {
  error = caught.what();
  return nullptr;
}

EXPORT void node_free(Node* node) { delete node; }

// Types of the outputs, the sizes of all symbols, and what describe() says.
EXPORT const char* node_text(const Node* node) {
  static std::string text;
  text.clear();
  for (const std::string& type : types_of(*node->op, node->types)) text += type + " ";
  text += ";";
  for (const auto& [symbol, size] : node->sizes) text += symbol + "=" + std::to_string(size) + " ";
  text += ";" + describe(*node->op, node->attributes);
  return text.c_str();
}

EXPORT size_t node_workspace(const Node* node, int64_t batch) {
  return node->operation->workspace(batch, node->sizes.at("dim"));
}

EXPORT int node_run(const Node* node, const void* const* inputs, void* const* outputs, int64_t batch, int64_t tokens,
                    void* workspace, void* stream) try {
  node->operation->prepare(node->types, node->sizes.at("dim"));
  node->operation->run(inputs, outputs, batch, tokens, workspace, static_cast<cudaStream_t>(stream));
  return 0;
} catch (const std::exception& caught) {
  error = caught.what();
  return 1;
}
