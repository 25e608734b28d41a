// Gradients that several kernels add to: kept in stat precision, in the output itself where that
// has it already.
#pragma once

#include "attn_driver.h"

namespace lctx::cpu {

class Accumulator {
 public:
  // `out` is a contiguous (B, T, H, D) tensor of shape.dtype. Starts at zero.
  Accumulator(const AttnShape& shape, const TensorView& out, int64_t T, int64_t H, int64_t D,
              const ThreadPool& pool)
      : shape_(shape), out_(out), T_(T), H_(H), D_(D) {
    const DType stat = stat_dtype(shape.dtype);
    const int64_t bytes = shape.B * T * H * D * dtype_size(stat);
    if (stat != shape.dtype) buffer_ = Buffer(bytes);
    parallel_zero(pool, data(), bytes);
  }

  void* data() const { return buffer_.get() != nullptr ? buffer_.get() : out_.data; }
  TensorView view() const { return contiguous_view(data(), T_, H_, D_); }

  // Rounds to the output's type, once.
  void finish(const ThreadPool& pool) const {
    if (buffer_.get() != nullptr) convert_tensor(shape_, H_, D_, buffer_.get(), out_, T_, pool);
  }

 private:
  AttnShape shape_;
  TensorView out_;
  int64_t T_, H_, D_;
  Buffer buffer_;
};

}  // namespace lctx::cpu
