// Text of tokens that come one by one, in pieces that are whole characters.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace attnspan {

// The pieces joined are the decoding of all tokens. A token is decoded together with those before it that its spelling may depend
// on (leading spaces, merged bytes), so that the cost of a step does not grow.
class StreamDecoder {
 public:
  using Decode = std::function<std::string(const std::vector<int32_t>&)>;
  explicit StreamDecoder(Decode decode) : decode_(std::move(decode)) {}

  // Text that this token completes; empty when it ends inside a character.
  std::string push(int32_t token);
  // Text held back at the end: bytes that never became a character.
  std::string flush();

 private:
  Decode decode_;
  std::vector<int32_t> window_;
  size_t context_ = 0;  // tokens of the window whose text is out
  size_t out_ = 0;      // bytes of the window's text that are out
};

// Bytes of `text` up to a trailing U+FFFD, or the beginning of a character: what more tokens cannot change.
size_t settled_bytes(const std::string& text);

}  // namespace attnspan
