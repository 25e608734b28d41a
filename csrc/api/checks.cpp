#include "checks.h"

#include <algorithm>

namespace lctx::api {
namespace {

std::string shape_text(const int64_t* sizes, size_t rank) {
  std::string text = "(";
  for (size_t i = 0; i < rank; ++i) {
    text += (i ? ", " : "") + (sizes[i] == kAny ? std::string("any") : std::to_string(sizes[i]));
  }
  return text + ")";
}

std::string shape_text(const Tensor& x) { return shape_text(x.sizes().data(), x.sizes().size()); }

const char* type_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

std::string device_text(const Tensor& x) {
  if (x.is_cpu()) return "cpu";
  return concat(x.is_cuda() ? "cuda:" : "device:", x.get_device_index());
}

void* data_of(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }

}  // namespace

Call::Call(const char* op, std::initializer_list<Arg> args) : op_(op), args_(args) {
  scalar_type_ = first().scalar_type();
  stat_type_ = ScalarType::Float;
  switch (scalar_type_) {
    case ScalarType::Float:
      dtype_ = DType::kFloat32;
      break;
    case ScalarType::BFloat16:
      dtype_ = DType::kBFloat16;
      break;
    case ScalarType::Half:
      dtype_ = DType::kFloat16;
      break;
    case ScalarType::Double:
      dtype_ = DType::kFloat64;
      stat_type_ = ScalarType::Double;
      break;
    default:
      fail(concat(args_.front().name, " is ", type_text(scalar_type_),
                  "; expected float32, float64, bfloat16 or float16"));
  }
}

void Call::fail(const std::string& problem) const {
  std::string text = concat(op_, ": ", problem, "\ngiven: ");
  const char* separator = "";
  for (const Arg& arg : args_) {
    if (arg.tensor == nullptr) continue;
    text += concat(separator, arg.name, " ", shape_text(*arg.tensor), " ",
                   type_text(arg.tensor->scalar_type()), " ", device_text(*arg.tensor));
    separator = ", ";
  }
  throw std::invalid_argument(text);
}

void Call::check_tensor(const Arg& arg, ScalarType type, const Shape& wanted) const {
  const Tensor& x = *arg.tensor;
  const auto sizes = x.sizes();
  bool same_shape = sizes.size() == wanted.size();
  for (size_t i = 0; same_shape && i < wanted.size(); ++i) {
    same_shape = wanted[i] == kAny || sizes[i] == wanted[i];
  }
  // The text of a refusal takes longer than all checks: it is made for a refusal alone.
  if (!same_shape) {
    fail(concat(arg.name, " has shape ", shape_text(x), "; expected ",
                shape_text(wanted.data(), wanted.size())));
  }
  check(x.scalar_type() == type, arg.name, " is ", type_text(x.scalar_type()), "; expected ",
        type_text(type));
  if (x.is_cuda() != first().is_cuda() || x.get_device_index() != first().get_device_index()) {
    fail(concat(arg.name, " is on ", device_text(x), "; expected ", device_text(first()), " like ",
                args_.front().name));
  }
}

void Call::check_innermost(const Arg& arg) const {
  const Tensor& x = *arg.tensor;
  const int64_t stride = x.stride(x.dim() - 1);
  check(x.numel() == 0 || x.size(x.dim() - 1) == 1 || stride == 1, arg.name, " has stride ", stride,
        " in its last dimension; expected 1: call .contiguous() on it");
}

TensorView Call::rows_of_type(const Arg& arg, ScalarType type, const Shape& wanted) const {
  check_tensor(arg, type, wanted);
  check_innermost(arg);
  const Tensor& x = *arg.tensor;
  for (const int64_t size : {x.size(0), x.size(1), x.size(2), x.size(3)}) {
    check(size <= std::numeric_limits<int32_t>::max(), arg.name, " has a dimension over 2^31 - 1");
  }
  return {data_of(x), x.stride(0), x.stride(1), x.stride(2)};
}

TensorView Call::rows(const Arg& arg, const Shape& wanted) const {
  return rows_of_type(arg, scalar_type_, wanted);
}

TensorView Call::stat_rows(const Arg& arg, const Shape& wanted) const {
  return rows_of_type(arg, stat_type_, wanted);
}

void* Call::stat_slice(const Arg& arg, const Shape& wanted) const {
  check_tensor(arg, stat_type_, wanted);
  check_innermost(arg);
  return data_of(*arg.tensor);
}

TensorView Call::rows_or_null(const Arg& arg, const Shape& wanted) const {
  return arg.tensor ? rows(arg, wanted) : TensorView{};
}

void* Call::stat(const Arg& arg, const Shape& wanted) const {
  return const_cast<void*>(plain(arg, stat_type_, wanted));
}

const void* Call::plain(const Arg& arg, ScalarType type, const Shape& wanted) const {
  if (arg.tensor == nullptr) return nullptr;
  check_tensor(arg, type, wanted);
  check(arg.tensor->is_contiguous(), arg.name, " is not contiguous; expected a contiguous tensor");
  return data_of(*arg.tensor);
}

int Call::choice(const char* name, const std::string& value, const char* zero,
                 const char* one) const {
  check(value == zero || value == one, name, " = \"", value, "\"; expected \"", zero, "\" or \"",
        one, "\"");
  return value == one;
}

void Call::check_scale(double scale) const {
  check(std::isfinite(scale), "scale = ", scale, "; expected a finite number");
}

void Call::check_aligned(std::initializer_list<Aligned> views) const {
  for (const Aligned& x : views) {
    if (x.B * x.T * x.H == 0) continue;
    const auto fits = [&](int64_t stride, int64_t size) {
      return size <= 1 || (stride > 0 && stride * dtype_size(dtype_) % 16 == 0);
    };
    check(
        reinterpret_cast<uintptr_t>(x.view.data) % 16 == 0 && fits(x.view.stride_b, x.B) &&
            fits(x.view.stride_t, x.T) && fits(x.view.stride_h, x.H),
        x.name, " has strides (", x.view.stride_b, ", ", x.view.stride_t, ", ", x.view.stride_h,
        ", 1) at ", x.view.data,
        "; expected data and strides at multiples of 16 bytes on a GPU: call .contiguous() on it");
  }
}

Tensor Call::new_plain(ScalarType type, const Shape& shape) const {
  // Straight to it: by the dispatcher, which looks names up, an allocation takes thrice as long.
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  }
  const Tensor& like = first();
  const int32_t device =
      like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), static_cast<int32_t>(type),
                                                  device, like.get_device_index(), &made));
  return Tensor(made);
}

Tensor Call::new_rows(const Shape& shape) const { return new_plain(scalar_type_, shape); }

Tensor Call::new_stat(const Shape& shape) const { return new_plain(stat_type_, shape); }

TensorView view(const Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

void set_attention(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                   double scale, AttnParams& params) {
  call.check_scale(scale);
  params.q = call.rows(LCTX_ARG(q), {kAny, kAny, kAny, kAny});
  params.k = call.rows(LCTX_ARG(k), {q.size(0), kAny, kAny, q.size(3)});
  params.v = call.rows(LCTX_ARG(v), {q.size(0), k.size(1), k.size(2), kAny});
  params.shape = {call.dtype(), q.size(0), q.size(1), k.size(1),
                  q.size(2),    k.size(2), q.size(3), v.size(3)};
  const AttnShape& s = params.shape;
  call.check(s.Hkv >= 1 && s.Hq >= 1 && s.Hq % s.Hkv == 0, "q has ", s.Hq, " heads, k and v have ",
             s.Hkv, "; expected a multiple");
  call.check(s.Dk >= 1 && s.Dv >= 1, "the head sizes are ", s.Dk, " and ", s.Dv,
             "; expected at least 1");
  params.scale = scale;
  params.causal = causal;
}

std::tuple<Tensor, Tensor> set_outputs(const Call& call, AttnParams& params) {
  const AttnShape& s = params.shape;
  Tensor out = call.new_rows({s.B, s.Tq, s.Hq, s.Dv});
  Tensor lse = call.new_stat({s.B, s.Hq, s.Tq});
  params.out = view(out);
  params.lse = lse.mutable_data_ptr();
  return {out, lse};
}

void set_saved(const Call& call, const Arg& out, const Tensor& lse, AttnParams& params) {
  const AttnShape& s = params.shape;
  params.out = call.rows_or_null(out, {s.B, s.Tq, s.Hq, s.Dv});
  params.lse = call.stat(LCTX_ARG(lse), {s.B, s.Hq, s.Tq});
}

std::tuple<Tensor, Tensor, Tensor> set_grads(const Call& call, const Tensor& dout,
                                             const OptTensor& dlse, const AttnParams& params,
                                             AttnGrads& grads, const Wanted& wanted) {
  const AttnShape& s = params.shape;
  grads.dout = call.rows(LCTX_ARG(dout), {s.B, s.Tq, s.Hq, s.Dv});
  grads.dlse = call.stat(LCTX_ARG(dlse), {s.B, s.Hq, s.Tq});
  const auto allocate = [&](bool any, Shape shape, TensorView& gradient) {
    Tensor tensor = call.new_rows(any ? std::move(shape) : Shape{0});
    if (any) gradient = view(tensor);
    return tensor;
  };
  const bool keys = wanted.k || wanted.v;
  Tensor dq = allocate(wanted.q, {s.B, s.Tq, s.Hq, s.Dk}, grads.dq);
  Tensor dk = allocate(keys, {s.B, s.Tk, s.Hkv, s.Dk}, grads.dk);
  Tensor dv = allocate(keys, {s.B, s.Tk, s.Hkv, s.Dv}, grads.dv);
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor, Tensor> only(const Call& call, const Wanted& wanted,
                                        const std::tuple<Tensor, Tensor, Tensor>& all) {
  const auto& [dq, dk, dv] = all;
  const auto or_empty = [&](bool any, const Tensor& x) { return any ? x : call.new_rows({0}); };
  return {or_empty(wanted.q, dq), or_empty(wanted.k, dk), or_empty(wanted.v, dv)};
}

}  // namespace lctx::api
