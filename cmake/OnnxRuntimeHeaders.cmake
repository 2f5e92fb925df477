# Finds ONNX Runtime's C++ headers, which the project never vendors, and sets ONNXRUNTIME_INCLUDE_DIR:
#   1. the cache variable or environment variable of that name (the folder that holds onnxruntime_cxx_api.h),
#   2. a system package (libonnxruntime-dev),
#   3. fetched at configure time: from the Debian archive on Debian, from onnxruntime's release archive elsewhere.
# The headers must offer API 18 (in-place caches) and at most 24: a library built with API N needs ONNX Runtime >= 1.N.
# Nothing is linked; a program brings its own onnxruntime.

set(ATTNSPAN_ORT_VERSION 1.23.2)  # of the release archive: API 23, the newest tested

include(${CMAKE_CURRENT_LIST_DIR}/DebianPackage.cmake)

if(NOT ONNXRUNTIME_INCLUDE_DIR AND DEFINED ENV{ONNXRUNTIME_INCLUDE_DIR})
  set(ONNXRUNTIME_INCLUDE_DIR $ENV{ONNXRUNTIME_INCLUDE_DIR})
endif()
if(NOT ONNXRUNTIME_INCLUDE_DIR)
  find_path(ATTNSPAN_ORT_SYSTEM onnxruntime_cxx_api.h PATH_SUFFIXES onnxruntime onnxruntime/core/session)
  if(ATTNSPAN_ORT_SYSTEM)
    set(ONNXRUNTIME_INCLUDE_DIR ${ATTNSPAN_ORT_SYSTEM})
  endif()
endif()
if(NOT ONNXRUNTIME_INCLUDE_DIR)
  attnspan_debian_package(unpacked libonnxruntime-dev sid trixie)
  if(unpacked)
    set(ONNXRUNTIME_INCLUDE_DIR ${unpacked}/usr/include/onnxruntime)
  endif()
endif()
if(NOT ONNXRUNTIME_INCLUDE_DIR)
  include(FetchContent)
  if(APPLE)
    set(name onnxruntime-osx-arm64-${ATTNSPAN_ORT_VERSION}.tgz)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    set(name onnxruntime-linux-aarch64-${ATTNSPAN_ORT_VERSION}.tgz)
  else()
    set(name onnxruntime-linux-x64-${ATTNSPAN_ORT_VERSION}.tgz)
  endif()
  FetchContent_Declare(onnxruntime_release
    URL https://github.com/microsoft/onnxruntime/releases/download/v${ATTNSPAN_ORT_VERSION}/${name})
  FetchContent_Populate(onnxruntime_release)
  set(ONNXRUNTIME_INCLUDE_DIR ${onnxruntime_release_SOURCE_DIR}/include)
endif()

if(NOT EXISTS ${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_cxx_api.h)
  message(FATAL_ERROR "ONNXRUNTIME_INCLUDE_DIR is '${ONNXRUNTIME_INCLUDE_DIR}', which holds no onnxruntime_cxx_api.h. "
    "Pass -DONNXRUNTIME_INCLUDE_DIR=DIR, the folder of ONNX Runtime's C++ headers (1.18 to 1.24).")
endif()
file(STRINGS ${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h api REGEX "^#define ORT_API_VERSION ")
string(REGEX REPLACE "[^0-9]" "" api "${api}")
if(api LESS 18 OR api GREATER 24)
  message(FATAL_ERROR "The ONNX Runtime headers in ${ONNXRUNTIME_INCLUDE_DIR} have API version ${api}; 18 to 24 are allowed. "
    "Pass -DONNXRUNTIME_INCLUDE_DIR=DIR with the headers of ONNX Runtime ${ATTNSPAN_ORT_VERSION}.")
endif()
set(ONNXRUNTIME_INCLUDE_DIR ${ONNXRUNTIME_INCLUDE_DIR} CACHE PATH "Folder of onnxruntime_cxx_api.h" FORCE)
message(STATUS "ONNX Runtime headers: API ${api}, ${ONNXRUNTIME_INCLUDE_DIR}")
