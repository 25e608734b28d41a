// Checks on the host. A failed check throws std::invalid_argument, which arrives in Python as
// ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace lctx {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace lctx

// LCTX_CHECK(D >= 1, "lctx::merge_fwd: D = ", D, "; expected at least 1")
#define LCTX_CHECK(condition, ...)                              \
  do {                                                          \
    if (!(condition)) {                                         \
      throw std::invalid_argument(::lctx::concat(__VA_ARGS__)); \
    }                                                           \
  } while (false)
