// Triton's TensorRT backend opens the libraries that it is told of, and expects each to register its plugins by itself. This one registers those
// of libattnspan_trt.so, the library that the environment variable ATTNSPAN_TRT_PLUGIN names, with TensorRT.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

__attribute__((constructor)) void load_plugin() {
  const char* library = std::getenv("ATTNSPAN_TRT_PLUGIN");
  if (library == nullptr) {
    std::fputs("attnspan: ATTNSPAN_TRT_PLUGIN is not set: must be the path of libattnspan_trt.so\n", stderr);
    return;
  }
  // The backend has loaded TensorRT by the time that this runs: this finds the same.
  void* tensorrt = dlopen(("libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR)).c_str(), RTLD_NOW);
  void* symbol = tensorrt == nullptr ? nullptr : dlsym(tensorrt, "getPluginRegistry");
  auto* const get = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(symbol);
  if (get == nullptr || get()->loadLibrary(library) == nullptr) {
    std::fprintf(stderr, "attnspan: %s was not registered with TensorRT %d\n", library, NV_TENSORRT_MAJOR);
  }
}

}  // namespace
