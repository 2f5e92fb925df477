// What libattnspan_trt.so exports: the entry points that TensorRT's plugin registry looks for, and what it was built from.
#include <cstdio>
#include <mutex>

#include "plugin.h"

#define ATTNSPAN_EXPORT extern "C" __attribute__((visibility("default")))

namespace attnspan {
namespace {

std::mutex finder_mutex;
nvinfer1::ILoggerFinder* finder = nullptr;

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* given) {
  const std::lock_guard<std::mutex> lock(finder_mutex);
  finder = given;
}

void log(nvinfer1::ILogger::Severity severity, const std::string& message) noexcept {
  const std::lock_guard<std::mutex> lock(finder_mutex);
  nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) logger->log(severity, ("attnspan: " + message).c_str());
  else if (severity <= nvinfer1::ILogger::Severity::kERROR) std::fprintf(stderr, "attnspan: %s\n", message.c_str());
}

}  // namespace attnspan

ATTNSPAN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { attnspan::set_logger_finder(finder); }

ATTNSPAN_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  // Never destroyed: the registry may still ask for them when statics are.
  static auto& creators = *new std::vector<nvinfer1::IPluginCreatorInterface*>([] {
    std::vector<nvinfer1::IPluginCreatorInterface*> all;
    for (const attnspan::schema::Op* op : attnspan::schema::kOps) all.push_back(new attnspan::Creator(*op));
    return all;
  }());
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}

// "attnspan 1; schema 913c9f013171; kernels 0123456789abcdef; TensorRT headers 11.1".
ATTNSPAN_EXPORT const char* attnspan_trt_version() {
  using namespace attnspan;
  static const std::string& text = *new std::string(std::string("attnspan ") + schema::kVersion + "; schema " +
                                                    std::string(schema::kDigest, 12) + "; kernels " + kernels_digest() +
                                                    "; TensorRT headers " + std::to_string(NV_TENSORRT_MAJOR) + "." +
                                                    std::to_string(NV_TENSORRT_MINOR));
  return text.c_str();
}
