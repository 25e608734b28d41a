// Brings a family's parameters to a list of attention problems and runs such lists on the thread
// pool.
#pragma once

#include <vector>

#include "attn_problem.h"
#include "isa.h"
#include "scratch.h"

namespace lctx::cpu {

constexpr DType stat_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Rows (t, g) of tensor `x` at batch b, heads h, h + 1, ...
Rows rows_of(const TensorView& x, DType dtype, int64_t b, int64_t h);
// The same of a contiguous (B, H, T) statistic.
Rows stat_rows(const void* data, DType dtype, int64_t H, int64_t T, int64_t b, int64_t h);
// A contiguous (B, T, H, D) tensor.
TensorView contiguous_view(void* data, int64_t T, int64_t H, int64_t D);

AttnLaunch make_launch(const AttnParams& params);

// Query heads [h, h + G) of batch b and their key/value head, over the whole sequence. `out`
// (forward) or dq, dk, dv (backward) are of launch.out_dtype. `delta` as make_delta returns it;
// nullptr and grads == nullptr in the forward.
Problem make_problem(const AttnParams& params, const AttnLaunch& launch, int64_t b, int64_t h,
                     int64_t G, const AttnGrads* grads = nullptr, const void* delta = nullptr);
// The positions t0, t0 + step, ... (count of them) of a self-attention problem, as a problem of its
// own.
Problem slice_problem(Problem whole, const AttnLaunch& launch, int64_t t0, int64_t count,
                      int64_t step = 1);

// Tasks start longest first; every problem's result is independent of the order.
void run_forward(AttnLaunch launch, const std::vector<Problem>& problems, const ThreadPool& pool);
// Problems of one call must not share rows of dq, dk or dv.
void run_backward(AttnLaunch launch, const std::vector<Problem>& problems, const ThreadPool& pool);

// Writes rowsum(dout * out) - dlse, stat (B, Hq, Tq).
void write_delta(const AttnParams& params, const AttnGrads& grads, void* delta,
                 const ThreadPool& pool);
// rowsum(dout * out) - dlse as stat (B, Hq, Tq), the row constant of every softmax backward.
Buffer make_delta(const AttnParams& params, const AttnGrads& grads, const ThreadPool& pool);

// dst (dtype) = src (stat, contiguous (B, T, H, D)).
void convert_tensor(const AttnShape& shape, int64_t H, int64_t D, void* src, const TensorView& dst,
                    int64_t T, const ThreadPool& pool);

}  // namespace lctx::cpu
