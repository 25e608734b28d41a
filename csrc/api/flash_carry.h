// What a step of a ring and its backward check alike.
#pragma once

#include "checks.h"

namespace lctx::api {

// Tensors and positions, without what is carried.
void set_carry(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
               double scale, int64_t window, int64_t query_start, int64_t key_start,
               CarryParams& params);

CarryParams carry_params(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& lse, bool causal, double scale, int64_t window,
                         int64_t query_start, int64_t key_start);

#ifdef LCTX_WITH_CUDA
// The CUDA kernels take rows [a, b) of contiguous tensors (B, rows, Hq, Dv) and (B, Hq, rows).
void set_state_rows(const Call& call, CarryParams& params);
#endif

}  // namespace lctx::api
