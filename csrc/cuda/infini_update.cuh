// Math: none; what the kernels that make gradients of keys and values work on.
// Tile map: a unit is a part of the rows of a segment, for one key/value head.
// Pipeline: none.
// Memory: none.
// Limits: used by infini_update_bwd.cu and, above D = 128, infini_wide_update_bwd.cu.
#pragma once

#include "infini_grads.h"

namespace lctx::cuda {

struct UpdateUnit {
  int head, batch, part, segment, row0, rows;

  UpdateUnit() = default;
  __device__ __forceinline__ UpdateUnit(const InfiniGradStates& x, int index) {
    head = index % x.Hkv;
    index /= x.Hkv;
    part = index % x.key_splits;
    index /= x.key_splits;
    segment = index % x.S;
    batch = index / x.S;
    const int begin = part * x.key_part_blocks * kGradRows;
    row0 = segment * x.segment_len + begin;
    rows = max(min(x.key_part_blocks * kGradRows, x.segment_rows(segment) - begin), 0);
  }
  __device__ __forceinline__ int state(const InfiniGradStates& x) const {
    return (batch * x.Hkv + head) * x.S + segment;
  }
};

}  // namespace lctx::cuda
