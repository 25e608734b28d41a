// Math: none; the host side of attn_dq_sm90.cuh, shared by all families.
// Tile map: rows x keys of a tile by head dimension, by measurement (docs/hopper_backward.md):
//       - D <= 64: 192 x 80, three warpgroups
//       - D <= 128: 128 x 96, two
//       - D <= 256: 128 x 32, two
//       dQ leaves from registers: its shared memory is worth more as a longer block of keys.
// Pipeline: as attn_fwd_launch.cuh.
// Memory: as attn_fwd_launch.cuh.
// Limits: those of attn_dq_sm90.cuh.
#pragma once

#include "attn_dq_sm90.cuh"
#include "attn_fwd_launch.cuh"

namespace lctx::cuda {

template <class T, int kHeadDim>
struct DqTiles {
  using type = DqTile<T, 256, 32, 2, 3, false>;
};
template <class T>
struct DqTiles<T, 64> {
  using type = DqTile<T, 64, 80, 3, 4, false>;
};
template <class T>
struct DqTiles<T, 128> {
  using type = DqTile<T, 128, 96, 2, 3, false>;
};

// Calls run(TypeTag<type>(), std::integral_constant<int, head dimension of a tile>()).
template <class Run>
void choose_type_and_dim(const AttnShape& s, Run&& run) {
  const auto with_type = [&](auto type) {
    const int64_t D = std::max(s.Dk, s.Dv);
    if (D <= 64) {
      run(type, std::integral_constant<int, 64>());
    } else if (D <= 128) {
      run(type, std::integral_constant<int, 128>());
    } else {
      run(type, std::integral_constant<int, 256>());
    }
  };
  if (s.dtype == DType::kBFloat16) {
    with_type(TypeTag<__nv_bfloat16>());
  } else {
    with_type(TypeTag<__half>());
  }
}

// What a gradient of the queries reads besides what the forward reads.
struct DqInputs {
  TensorView dout;
  const float *lse2, *delta;
};

// Maps and numbers of every family; the caller sets those of its policies before. `params.out` is
// where dq goes.
template <class Tile, class Params>
void set_dq(const char* op, const AttnParams& params, const DqInputs& inputs, Params& p) {
  const AttnShape& s = params.shape;
  set_maps<Tile>(params, p);
  p.dout[0] = make_rows_map(inputs.dout, s.dtype, s.B, std::max<int64_t>(s.Tq, 1), s.Hq, s.Dv, 64);
  p.lse2 = inputs.lse2;
  p.delta = inputs.delta;
  p.stat_pitch = static_cast<int>(bwd_pitch(s));
  p.scale = static_cast<float>(params.scale);
  p.row_shift = row_shift<Tile>(s.Tq);
  p.order =
      make_order(op, ceil_div(s.Tq, Tile::kBlockM), s.Hq, s.B, heads_per_section(s, s.Tk, 16));
}

template <class Traits>
void launch_dq(const typename Traits::Params& p, int num_sms, Stream stream) {
  launch_tiles<Traits>("attn_dq_sm90_kernel", attn_dq_sm90_kernel<Traits>, p, num_sms, stream,
                       /*overlap=*/false);
}

}  // namespace lctx::cuda
