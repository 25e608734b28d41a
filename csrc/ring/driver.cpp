#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>

namespace lctx::ring {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

Driver open_driver() {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
  }
  Driver found{};
#define LCTX_TEXT(name) #name
#define LCTX_LOAD_AS(member, function, text) \
  found.member = reinterpret_cast<decltype(&function)>(symbol_of(library, kLibrary, text));
// cuda.h names the current version of a function by a macro, which is expanded here.
#define LCTX_LOAD(name) LCTX_LOAD_AS(name##_, ::name, LCTX_TEXT(name))
  LCTX_DRIVER_FUNCTIONS(LCTX_LOAD)
#undef LCTX_LOAD
#undef LCTX_LOAD_AS
#undef LCTX_TEXT
  return found;
}

}  // namespace

void* symbol_of(void* library, const std::string& library_name, const char* name) {
  void* address = dlsym(library, name);
  if (address == nullptr) throw std::runtime_error(library_name + " has no " + name);
  return address;
}

const Driver& driver() {
  static const Driver loaded = open_driver();
  return loaded;
}

std::string text_of(CUresult result, const char* what) {
  const char* text = nullptr;
  driver().cuGetErrorString_(result, &text);
  return std::string(what) + ": " + (text == nullptr ? "unknown error" : text);
}

void check(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS) throw std::runtime_error(text_of(result, what));
}

}  // namespace lctx::ring
