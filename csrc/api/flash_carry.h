// What a step of a ring and its backward check alike.
#pragma once

#include "checks.h"

namespace lctx::api {

CarryParams carry_params(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& lse, bool causal, double scale, int64_t window,
                         int64_t query_start, int64_t key_start);

}  // namespace lctx::api
