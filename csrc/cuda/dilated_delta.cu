// Math: delta_i = dO_i . O_i - dlse_i of a branch of dilated attention (lctx::dilated_bwd;
//       lctx::dilated_fwd's rows), O its own result: what the gradient takes in place of the
//       union's where the mixing weights of the branches count as constants.
// Tile map: the forward, attn_fwd_sm90.cuh with SegmentTiles, whose rows are not stored but
//       multiplied with those of dO.
// Pipeline: as attn_fwd_sm90.cuh.
// Memory: q, k, v and dO of the branch's rows once; a float a row.
// Limits: those of attn_fwd_sm90.cuh.
#include "../common/feature_map.cuh"
#include "attn_fwd_launch.cuh"
#include "dilated_bwd.h"

namespace lctx::cuda {
namespace {

struct DeltaRows : StoreRows {
  struct Params {
    TensorView dout;
    const float* dlse;  // (B, Hq, dlse_pitch), or nullptr
    float* delta;       // (B, Hq, stat_pitch)
    int dlse_pitch, stat_pitch;
  };

  template <class P>
  static __device__ __forceinline__ bool exists(const P&, const Work&, int) {
    return false;  // lse is there already
  }

  template <class Kernel>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const Work& work, float (&o)[Kernel::kValueDim / 2],
                                                const float (&inverse)[2]) {
    using T = typename Kernel::T;
    const auto& p = kernel.p;
    const int thread = warpgroup_thread();
    const int64_t head = int64_t{work.batch} * p.Hq + work.head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = work.row0 + warpgroup * 64 + fragment_row(thread) + 8 * i;
      const bool inside = row < work.row_end;
      const int position = kernel.position(work, inside ? row : work.row_begin);
      const T* dout = static_cast<const T*>(p.dout.data) + work.batch * p.dout.stride_b +
                      position * p.dout.stride_t + work.head * p.dout.stride_h +
                      fragment_column(thread);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < Kernel::kValueDim / 8; ++j) {
        if (!inside || 8 * j >= p.D) break;
        const float2 x = unpack2<T>(*reinterpret_cast<const uint32_t*>(dout + 8 * j));
        sum += o[4 * j + 2 * i] * x.x + o[4 * j + 2 * i + 1] * x.y;
      }
      sum = quad_sum(sum) * inverse[i];
      if (!inside || thread % 4 != 0) continue;
      if (p.dlse != nullptr) sum -= p.dlse[head * p.dlse_pitch + position];
      p.delta[head * p.stat_pitch + position] = sum;
    }
  }
};

template <class Tile>
void launch_rows(const DilatedSpan& span, const Branch& branch, float* delta, int num_sms,
                 Stream stream) {
  using Traits =
      FwdTraits<Tile, SegmentTiles<Tile::kBlockM>, DenseScores<Tile::kBlockN, false>, DeltaRows>;
  AttnParams without_out = span.params;
  without_out.out = {};
  typename Traits::Params p{};
  set_attention(without_out, span.scratch.counter, p);
  set_maps<Tile>(without_out, p, branch.rate);
  set_branch_rows<Tile>("lctx::dilated", span.params, branch, p);
  p.dout = span.grads.dout;
  p.dlse = static_cast<const float*>(span.grads.dlse);
  p.delta = delta;
  p.dlse_pitch = span.T;
  p.stat_pitch = span.pitch;
  launch_fwd<Traits>(p, num_sms, stream);
}

}  // namespace

void launch_branch_delta(const DilatedSpan& span, size_t m, float* delta, int num_sms,
                         Stream stream) {
  cudaMemsetAsync(span.scratch.counter, 0, sizeof(int), stream);
  const auto run = [&](auto tile) {
    launch_rows<typename decltype(tile)::type>(span, span.branches[m], delta, num_sms, stream);
  };
  const auto with_type = [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t D = span.params.shape.Dk;
    if (D <= 64) {
      run(TypeTag<FwdTile<T, 64, 128, 3, true>>());
    } else if (D <= 128) {
      run(TypeTag<FwdTile<T, 128, 128, 2, true>>());
    } else {
      run(TypeTag<FwdTile<T, 256, 80, 2, false>>());
    }
  };
  if (span.params.shape.dtype == DType::kBFloat16) {
    with_type(TypeTag<__nv_bfloat16>());
  } else {
    with_type(TypeTag<__half>());
  }
}

}  // namespace lctx::cuda
