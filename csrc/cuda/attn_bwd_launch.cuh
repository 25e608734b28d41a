// Math: none; the host side of attn_bwd_sm90.cuh, shared by all families.
// Tile map: choose_bwd_tile: keys x queries 128 x 128 for D <= 64, 128 x 64 for D <= 128 (dense
//       without a mask: 128 x 80), 64 x 64 above.
// Pipeline: the tile counter must be zero at launch; one persistent block per multiprocessor.
// Memory: tiles go through the heads in sections whose queries fit the L2 cache.
// Limits: those of attn_bwd_sm90.cuh.
#pragma once

#include "attn_bwd_sm90.cuh"
#include "attn_fwd_launch.cuh"

namespace lctx::cuda {

// Key/value heads per section for queries of `queries` rows: Q, dO and dQ in fp32. Somewhat more
// than fits the L2 cache is best: fewer blocks then add to the same rows of dQ.
constexpr int64_t kBwdBudget = int64_t{72} << 20;
// For sections of dQ that is added in an order: additions that the L2 cache does not hold are late,
// and tiles wait for them. Of windows more tiles of a head would run at a time, and wait as well.
constexpr int64_t kOrderedBudget = int64_t{32} << 20;
inline int64_t bwd_section(const AttnShape& s, int64_t queries, int64_t budget = kBwdBudget) {
  const int64_t head_bytes =
      std::max<int64_t>(queries, 1) * (s.Hq / s.Hkv) * s.Dk * (2 * dtype_size(s.dtype) + 4);
  return std::clamp<int64_t>(budget / head_bytes, 1, 16);
}

// What every family sets the same way; the caller adds the order and its policies' parameters. With
// a step the maps are one for the phases with the most rows and one for the others.
template <class Tile>
void set_attention_bwd(const AttnParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                       BwdParams& p, int64_t step = 1) {
  const AttnShape& s = params.shape;
  for (int i = 0; i < (step == 1 ? 1 : 2); ++i) {
    const auto rows = [&](int64_t T) {
      return std::max<int64_t>(i == 0 ? ceil_div(T, step) : T / step, 1);
    };
    p.q[i] = make_rows_map(params.q, s.dtype, s.B, rows(s.Tq), s.Hq, s.Dk, Tile::kBlockM, step);
    p.dout[i] =
        make_rows_map(grads.dout, s.dtype, s.B, rows(s.Tq), s.Hq, s.Dv, Tile::kBlockM, step);
    p.k[i] = make_rows_map(params.k, s.dtype, s.B, rows(s.Tk), s.Hkv, s.Dk, Tile::kBlockN, step);
    p.v[i] = make_rows_map(params.v, s.dtype, s.B, rows(s.Tk), s.Hkv, s.Dv, Tile::kBlockN, step);
  }
  p.dk = grads.dk;
  p.dv = grads.dv;
  p.lse2 = scratch.lse2;
  p.delta = scratch.delta;
  p.dq_sum = scratch.dq_sum;
  p.counter = scratch.counter;
  p.per_group = static_cast<int>(s.Hq / s.Hkv);
  p.head_step = 1;
  p.blocks_per_head = static_cast<int>(ceil_div(s.Tq, Tile::kBlockM));
  p.Hq = static_cast<int>(s.Hq);
  p.Tq = static_cast<int>(s.Tq);
  p.Tk = static_cast<int>(s.Tk);
  p.D = static_cast<int>(s.Dv);
  p.query_offset = p.Tk - p.Tq;
  p.causal = params.causal;
  p.scale = static_cast<float>(params.scale);
  p.scale_log2 = static_cast<float>(params.scale * 1.4426950408889634);
}

// Window and order of the tiles of whole sequences, and where dQ is added in an order its turns.
template <class Tile, bool kWindowed, bool kOrdered, class P>
void set_dense_order(const char* op, const FlashParams& params, const BwdScratch& scratch, P& p,
                     int64_t unmasked_section = 0) {
  constexpr int64_t kBudget = kOrdered && !kWindowed ? kOrderedBudget : kBwdBudget;
  const AttnShape& s = params.shape;
  const bool given = unmasked_section > 0 && !params.causal && !kWindowed;
  const int64_t section = given ? unmasked_section : bwd_section(s, s.Tq, kBudget);
  p.window = static_cast<int>(std::min<int64_t>(params.window, INT32_MAX / 2));
  p.order = KeyOrder(make_order(op, ceil_div(s.Tk, Tile::kBlockN), s.Hkv, s.B, section));
  if constexpr (kOrdered) {
    p.turns = scratch.turns;
    p.down_from = p.order.last_section();
  }
}

template <class Traits>
void launch_bwd(const typename Traits::Params& p, int num_sms, Stream stream) {
  if (p.order.num_tiles == 0) return;
  const auto kernel = attn_bwd_sm90_kernel<Traits>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  const dim3 grid(std::min(num_sms, p.order.num_tiles));
  kernel<<<grid, Traits::kThreads, Traits::kSharedBytes, stream>>>(p);
  check_launch("attn_bwd_sm90_kernel", grid, dim3(Traits::kThreads), stream);
}

// Calls run(TypeTag<BwdTile>()) with the tile for `params`. kWidest: the largest D there is.
// kTallest: the largest D that attn_bwd_tall.cuh is taken for, above D = 64 where `tall`.
template <int kWidest = 128, int kTallest = 0, class Run>
void choose_bwd_tile(const AttnParams& params, bool fused, Run&& run, bool tall = false) {
  const auto with_type = [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t D = params.shape.Dk;
    if (D <= 64) {
      fused ? run(TypeTag<BwdTile<T, 64, true, false, (kTallest > 0)>>())
            : run(TypeTag<BwdTile<T, 64, false>>());
    } else if (D <= 128) {
      if constexpr (kTallest > 64) {
        if (fused && tall) return run(TypeTag<BwdTile<T, 128, true, false, true>>());
      }
      fused ? run(TypeTag<BwdTile<T, 128, true>>()) : run(TypeTag<BwdTile<T, 128, false>>());
    } else if constexpr (kWidest == 256) {
      run(TypeTag<BwdTile<T, 256, false>>());
    }
  };
  if (params.shape.dtype == DType::kBFloat16) {
    with_type(TypeTag<__nv_bfloat16>());
  } else {
    with_type(TypeTag<__half>());
  }
}

}  // namespace lctx::cuda
