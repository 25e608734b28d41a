// From torch's tensors to the kernels' views, with every check on the way. A failed check names the
// op and all tensors:
//   lctx::flash_fwd: k has shape (2, 8, 3, 64); expected (2, any, any, 32)
//   given: q (2, 8, 4, 32) float32 cpu, k (2, 8, 3, 64) float32 cpu, ...
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../params.h"

namespace lctx::api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

constexpr int64_t kAny = -1;  // in a wanted shape: any size

struct Arg {
  const char* name;
  const Tensor* tensor;  // nullptr: not given
  Arg(const char* n, const Tensor& t) : name(n), tensor(&t) {}
  Arg(const char* n, const OptTensor& t) : name(n), tensor(t ? &*t : nullptr) {}
};

#define LCTX_ARG(variable) (::lctx::api::Arg(#variable, variable))

// One call of one op: its tensors, checked against what its kernels take. The first tensor sets
// dtype and device.
class Call {
 public:
  Call(const char* op, std::initializer_list<Arg> args);

  DType dtype() const { return dtype_; }
  bool is_cuda() const { return first().is_cuda(); }
  const Tensor& first() const { return *args_.front().tensor; }

  // Throws std::invalid_argument, a ValueError in Python, unless `ok`.
  template <class... Parts>
  void check(bool ok, const Parts&... problem) const {
    if (!ok) fail(concat(problem...));
  }
  [[noreturn]] void fail(const std::string& problem) const;

  // A (B, T, H, D) tensor of the op's dtype with innermost stride 1.
  TensorView rows(const Arg& arg, const Shape& wanted) const;
  TensorView rows_or_null(const Arg& arg, const Shape& wanted) const;
  // A contiguous statistic or state: float64 for float64 inputs, else float32. nullptr where not
  // given.
  void* stat(const Arg& arg, const Shape& wanted) const;
  // The same as a (B, T, H, D) tensor or a (B, H, T) statistic whose outer strides are free.
  TensorView stat_rows(const Arg& arg, const Shape& wanted) const;
  void* stat_slice(const Arg& arg, const Shape& wanted) const;
  // A contiguous tensor of another type (lengths, flags). nullptr where not given.
  const void* plain(const Arg& arg, ScalarType type, const Shape& wanted) const;

  // 0 or 1: which of the two names `value` is.
  int choice(const char* name, const std::string& value, const char* zero, const char* one) const;
  void check_scale(double scale) const;

  // What TMA can address: data and every used stride at multiples of 16 bytes.
  struct Aligned {
    const char* name;
    TensorView view;
    int64_t B, T, H;
  };
  void check_aligned(std::initializer_list<Aligned> views) const;

  Tensor new_plain(ScalarType type, const Shape& shape) const;
  Tensor new_rows(const Shape& shape) const;
  Tensor new_stat(const Shape& shape) const;

 private:
  void check_tensor(const Arg& arg, ScalarType type, const Shape& wanted) const;
  TensorView rows_of_type(const Arg& arg, ScalarType type, const Shape& wanted) const;
  void check_innermost(const Arg& arg) const;

  const char* op_;
  std::vector<Arg> args_;
  DType dtype_;
  ScalarType scalar_type_;
  ScalarType stat_type_;
};

// The view of a contiguous (B, T, H, D) output.
TensorView view(const Tensor& x);

// Checks q, k, v and the scale, and fills what every attention family shares.
void set_attention(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                   double scale, AttnParams& params);
// Allocates what every forward writes: out (B, Tq, Hq, Dv) and lse (B, Hq, Tq).
std::tuple<Tensor, Tensor> set_outputs(const Call& call, AttnParams& params);
// Checks what every backward reads; `out` and `lse` are those of the forward.
void set_saved(const Call& call, const Arg& out, const Tensor& lse, AttnParams& params);
// Gradients that are wanted; the others are returned as empty tensors.
struct Wanted {
  bool q = true, k = true, v = true;
};
// Checks dout and dlse and allocates dq (like q), dk, dv: dk and dv if one of them is wanted.
std::tuple<Tensor, Tensor, Tensor> set_grads(const Call& call, const Tensor& dout,
                                             const OptTensor& dlse, const AttnParams& params,
                                             AttnGrads& grads, const Wanted& wanted = {});
// dq, dk and dv, those that nobody wants empty.
std::tuple<Tensor, Tensor, Tensor> only(const Call& call, const Wanted& wanted,
                                        const std::tuple<Tensor, Tensor, Tensor>& all);

}  // namespace lctx::api
