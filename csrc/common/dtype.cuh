// Storage types on the device: what they are computed in, packs of them, and the switch from DType
// to a type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <initializer_list>
#include <utility>

#include "../params.h"

namespace lctx {

// The type that an element is computed in, which is also the type of its statistics.
template <class T>
struct AccumOf {
  using type = float;
};
template <>
struct AccumOf<double> {
  using type = double;
};
template <class T>
using Accum = typename AccumOf<T>::type;

// N elements that one instruction loads or stores.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T x[N];
};

template <class T>
struct TypeTag {
  using type = T;
};

// Calls run(TypeTag<T>()) with the T of `dtype`.
template <class Run>
void dispatch_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(TypeTag<float>());
    case DType::kFloat64:
      return run(TypeTag<double>());
    case DType::kBFloat16:
      return run(TypeTag<__nv_bfloat16>());
    case DType::kFloat16:
      return run(TypeTag<__half>());
  }
}

}  // namespace lctx
