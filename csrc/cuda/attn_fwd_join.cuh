// Math: out = w_a out_a + w_b out_b, w = exp(lse - L), L = logaddexp(lse_a, lse_b): finished rows,
//       and the earlier partial result that they continue from, both in fp32. Of rows that carry
//       nothing only lse is read.
// Tile map: that of CarryRows.
// Pipeline: what is carried is read under the tile's last product or, where the next tile's first
//       scores are under way then, after it. A launch that overlaps with the one before waits for
//       it at the end of its first tiles, not at their beginning: dilated attention takes 6 to 13 %
//       less than with CarryRows. Without overlap CarryRows is 1 to 2 % faster.
// Memory: that of CarryRows.
// Limits: that of CarryRows.
#pragma once

#include "../common/online_softmax.cuh"
#include "attn_fwd_rows.cuh"

namespace lctx::cuda {

struct JoinRows : CarryRows {
  template <class Kernel>
  struct Carried : StoreRows::Carried<Kernel> {
    static constexpr int kValueDim = Kernel::kValueDim;
    // Where the next tile's scores are under way there are no registers before.
    static constexpr bool kReadsEarly = Kernel::Traits::kQStages == 1 && kValueDim <= 128;
    static constexpr int kColumns = kReadsEarly ? kValueDim : 64;  // at once
    // Cleared, o is not taken for alive in tiles without keys, which need the registers.
    static constexpr bool kStarts = kValueDim > 128;
    float carried_lse[2], weight[2], x[kColumns / 2];

    __device__ __forceinline__ void start(const Kernel&, int, int, float (&o)[kValueDim / 2],
                                          RowState&) const {
      if constexpr (kStarts) {
#pragma unroll
        for (float& x : o) x = 0.f;
      }
    }

    __device__ __forceinline__ void ask(const Kernel& kernel, int warpgroup, int index) {
      const auto& p = kernel.p;
      const Work work = kernel.find_work_again(index);
      ptx::grid_dependency_wait();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = work.row0 + warpgroup * 64 + fragment_row(warpgroup_thread()) + 8 * i;
        const bool inside = Kernel::Rows::carries(p, work) && row < work.row_end;
        carried_lse[i] = inside ? p.carry_lse[lse_offset(kernel, work, row)] : -INFINITY;
      }
    }

    // Columns from `column` on.
    __device__ __forceinline__ void read(const Kernel& kernel, int warpgroup, const Work& work,
                                         int column) {
      const auto& p = kernel.p;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = work.row0 + warpgroup * 64 + fragment_row(warpgroup_thread()) + 8 * i;
        const bool carried = carried_lse[i] > -INFINITY;  // not NaN either
        const float* from = p.carry_out + (carried ? element(kernel, work, row) : 0) + column +
                            fragment_column(warpgroup_thread());
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          const float2 y = carried && column + 8 * j < p.D
                               ? *reinterpret_cast<const float2*>(from + 8 * j)
                               : make_float2(0.f, 0.f);
          x[4 * j + 2 * i] = y.x;
          x[4 * j + 2 * i + 1] = y.y;
        }
      }
    }

    // `factor` is that on the new rows and `sum` their log-sum-exp: both become those of the union.
    __device__ __forceinline__ void join(const Kernel& kernel, int warpgroup, const Work& work,
                                         float (&factor)[2], float (&sum)[2]) {
      if constexpr (kReadsEarly) read(kernel, warpgroup, work, 0);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool carried = carried_lse[i] > -INFINITY;
        const auto weights = merge_weights(sum[i], carried ? carried_lse[i] : -INFINITY);
        factor[i] *= weights.a;
        weight[i] = weights.b;
        sum[i] = weights.lse;
      }
    }

    // `factor` is 1 then.
    __device__ __forceinline__ void add(const Kernel& kernel, int warpgroup, int index,
                                        float (&o)[kValueDim / 2], float (&factor)[2]) {
      const Work work = kernel.find_work_again(index);
#pragma unroll
      for (int c = 0; c < kValueDim; c += kColumns) {
        if (c > 0) __syncwarp();  // no reads for later columns before
        if (!kReadsEarly || c > 0) read(kernel, warpgroup, work, c);
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) {
          o[c / 2 + i] = o[c / 2 + i] * factor[i / 2 % 2] + x[i] * weight[i / 2 % 2];
        }
      }
      factor[0] = factor[1] = 1.f;
    }
  };
};

}  // namespace lctx::cuda
