// lctx::build_info() -> str: what this library was built with and what this machine runs, as JSON.
#include "build_info.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "../cpu/cpu_backend.h"

namespace lctx::api {
namespace {

std::string quoted(const std::string& text) {
  std::string json = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') json += '\\';
    json += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return json + "\"";
}

// "a;b" -> ["a", "b"]
std::string list(const std::string& items) {
  std::string json = "[";
  for (size_t begin = 0; begin < items.size();) {
    const size_t end = std::min(items.find(';', begin), items.size());
    json += (begin ? ", " : "") + quoted(items.substr(begin, end - begin));
    begin = end + 1;
  }
  return json + "]";
}

std::string build_info() {
  const bool has_cuda = std::string(LCTX_CUDA_SKIPPED).empty();
  std::string json = "{";
  json += "\"version\": " + quoted(LCTX_VERSION);
  json += ", \"git\": " + quoted(LCTX_GIT_SHA);
  json += ", \"compiler\": " + quoted(LCTX_CXX_COMPILER);
  json += ", \"flags\": " + quoted(LCTX_CXX_FLAGS);
  json += ", \"torch_headers\": " + quoted(LCTX_TORCH_VERSION);
  json += ", \"torch_min\": " + quoted(LCTX_TORCH_MIN);
  json += ", \"cpu\": {\"isa\": " + list(LCTX_ISAS) +
          ", \"active_isa\": " + quoted(cpu::active_isa()) + "}";
  json += ", \"cuda\": {\"built\": " + std::string(has_cuda ? "true" : "false");
  json += ", \"skipped\": " + quoted(LCTX_CUDA_SKIPPED);
  json += ", \"archs\": " + list(has_cuda ? LCTX_CUDA_ARCHS : "");
  json += ", \"nvcc\": " + quoted(LCTX_NVCC_VERSION) + "}";
  const bool has_ring = std::string(LCTX_RING_SKIPPED).empty();
  json += ", \"ring\": {\"built\": " + std::string(has_ring ? "true" : "false");
  json += ", \"skipped\": " + quoted(LCTX_RING_SKIPPED);
  json += ", \"pybind11\": " + quoted(LCTX_PYBIND11_VERSION) + "}}";
  return json;
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&lctx::api::build_info));
}
