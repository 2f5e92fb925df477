#include "stream_decoder.h"

#include <algorithm>

namespace attnspan {

namespace {
constexpr char kBroken[] = "\xEF\xBF\xBD";  // U+FFFD, what decoders give for bytes that are not UTF-8 yet
}

size_t settled_bytes(const std::string& text) {
  size_t size = text.size();
  while (size >= 3 && text.compare(size - 3, 3, kBroken) == 0) size -= 3;
  // Decoders may also give the bytes as they are: a lead byte whose character is not whole.
  for (size_t back = 1; back <= std::min<size_t>(3, size); ++back) {
    const auto byte = static_cast<unsigned char>(text[size - back]);
    if ((byte & 0xC0) == 0x80) continue;
    const size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
    if (length > back) size -= back;
    break;
  }
  return size;
}

std::string StreamDecoder::push(int32_t token) {
  window_.push_back(token);
  const std::string text = decode_(window_);
  const size_t settled = settled_bytes(text);
  std::string piece = settled > out_ ? text.substr(out_, settled - out_) : "";
  out_ = std::max(out_, settled);
  if (settled == text.size() && !text.empty()) {
    // Keep the tokens of the last step as context for the next, drop those before.
    window_.erase(window_.begin(), window_.begin() + static_cast<std::ptrdiff_t>(context_));
    context_ = window_.size();
    out_ = decode_(window_).size();
  }
  return piece;
}

std::string StreamDecoder::flush() {
  const std::string text = window_.empty() ? "" : decode_(window_);
  window_.clear();
  const size_t out = std::min(out_, text.size());
  context_ = out_ = 0;
  return text.substr(out);
}

}  // namespace attnspan
