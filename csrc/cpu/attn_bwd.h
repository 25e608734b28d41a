// Attention backward on the CPU: five products per (panel, key block), nothing recomputed twice.
//
// Math:  P = exp(S - L), dP = V dO^T, dS = P o (dP - delta) (landmark form: landmark_scores.h),
// then
//        dV += P^T dO,  dK += scale dS^T Q,  dQ = scale dS K.    L and delta are given: they may
//        belong to more keys than these (ring steps, dilated branches), which is what makes the
//        same kernel serve them.
// Tiles: rows outside, keys inside. A task packs its problem's K and V once and walks its row
// tiles; dQ of a tile stays
//        in cache, dK and dV of the problem are accumulated in scratch, or per split when rows are
//        shared out.
// Order: fixed for a given number of splits, hence bitwise reproducible.
#pragma once

#include "attn_fwd.h"

namespace lctx::cpu::LCTX_ISA {

template <class C>
struct BwdScratch {
  C *K, *V, *dKV, *Qt, *dOt, *Q, *dO, *dQ, *S, *dS, *L, *delta;
  PanelRows<C>* panels;
  int64_t bytes;

  BwdScratch(const AttnLaunch& launch, int64_t num_splits, char* base) {
    constexpr int64_t W = kPanel<C>, lanes = kLanes<C>;
    const int64_t pitch_k = round_up(launch.Dk, lanes), pitch_v = round_up(launch.Dv, lanes);
    const int64_t block = max_key_block(launch);
    Arena arena{base};
    K = arena.take<C>(launch.max_keys * pitch_k);
    V = arena.take<C>(launch.max_keys * pitch_v);
    dKV = arena.take<C>(num_splits > 1 ? 0 : launch.max_keys * (pitch_k + pitch_v));
    Qt = arena.take<C>(kTilePanels * launch.Dk * W);
    dOt = arena.take<C>(kTilePanels * launch.Dv * W);
    Q = arena.take<C>(kTilePanels * W * pitch_k);
    dO = arena.take<C>(kTilePanels * W * pitch_v);
    dQ = arena.take<C>(kTilePanels * W * pitch_k);
    S = arena.take<C>(block * W);
    dS = arena.take<C>(block * W);
    L = arena.take<C>(kTilePanels * W);
    delta = arena.take<C>(kTilePanels * W);
    panels = arena.take<PanelRows<C>>(kTilePanels);
    bytes = arena.used;
  }
};

// Writes gradient rows [0, count): store in out_dtype, or add to the stat values that are there.
template <class C>
void write_grad_row(const AttnLaunch& launch, const Rows& dst, int64_t t, int64_t g, const C* src,
                    int64_t D, C factor) {
  char* out = row_at_mut(dst, t, g, dtype_size(launch.out_dtype));
  if (launch.write == Write::kAdd) {
    C* sum = reinterpret_cast<C*>(out);
    for (int64_t d = 0; d < D; ++d) sum[d] += src[d] * factor;
  } else {
    store_row(launch.out_dtype, src, D, factor, out);
  }
}

// Packs one panel of the backward: Q and dO both ways, L (+inf where the row sees nothing)
// and delta.
template <class C>
void load_bwd_panel(const AttnLaunch& launch, const Problem& p, const PanelRows<C>& panel,
                    int64_t i, const BwdScratch<C>& ws) {
  constexpr int64_t W = kPanel<C>;
  const int64_t pitch_k = round_up(launch.Dk, kLanes<C>), pitch_v = round_up(launch.Dv, kLanes<C>);
  load_panel(launch.dtype, p.q, p, panel, launch.Dk, static_cast<C>(launch.scale), C(1),
             ws.Q + i * W * pitch_k, ws.Qt + i * launch.Dk * W);
  load_panel(launch.dtype, p.dout, p, panel, launch.Dv, C(1), C(1), ws.dO + i * W * pitch_v,
             ws.dOt + i * launch.Dv * W, static_cast<const C*>(p.dout_factor));
  for (int64_t r = 0; r < panel.lanes; ++r) {
    const int64_t t = (panel.r0 + r) / p.G, g = (panel.r0 + r) % p.G;
    const C lse = r < panel.count ? *stat_at<C>(p.lse, t, g) : kNegInf<C>;
    ws.L[i * W + r] = lse == kNegInf<C> ? -kNegInf<C> : lse;
    ws.delta[i * W + r] = r < panel.count ? *stat_at<C>(p.delta, t, g) : C(0);
  }
  for (int64_t j = 0; j < panel.count * pitch_k; ++j) ws.dQ[i * W * pitch_k + j] = C(0);
}

// One (panel, key block): scores, weights, and the three accumulations.
template <class C, Scores kScores>
LCTX_INLINE void bwd_block(const AttnLaunch& launch, const Problem& p, const PanelRows<C>& panel,
                           int64_t i, int64_t n0, int64_t stop, const BwdScratch<C>& ws, C* dK,
                           C* dV) {
  constexpr int64_t W = kPanel<C>;
  const int64_t pitch_k = round_up(launch.Dk, kLanes<C>), pitch_v = round_up(launch.Dv, kLanes<C>);
  const int64_t keys = stop - n0;
  gemm<C, Layout::kRowMajor, Accumulate::kStore>(keys, panel.lanes, launch.Dk, ws.K + n0 * pitch_k,
                                                 pitch_k, ws.Qt + i * launch.Dk * W, W, ws.S, W);
  gemm<C, Layout::kRowMajor, Accumulate::kStore>(keys, panel.lanes, launch.Dv, ws.V + n0 * pitch_v,
                                                 pitch_v, ws.dOt + i * launch.Dv * W, W, ws.dS, W);
  if constexpr (kScores == Scores::kSoftmax) {
    softmax_backward(panel, n0, stop, ws.L + i * W, ws.delta + i * W, ws.S, ws.dS);
  } else {
    landmark_backward(p.groups, panel, n0, stop, ws.L + i * W, ws.delta + i * W, ws.S, ws.dS);
  }
  gemm<C, Layout::kRowMajor, Accumulate::kAdd>(keys, pitch_v, panel.count, ws.S, W,
                                               ws.dO + i * W * pitch_v, pitch_v, dV + n0 * pitch_v,
                                               pitch_v);
  gemm<C, Layout::kRowMajor, Accumulate::kAdd>(keys, pitch_k, panel.count, ws.dS, W,
                                               ws.Q + i * W * pitch_k, pitch_k, dK + n0 * pitch_k,
                                               pitch_k);
  gemm<C, Layout::kTransposed, Accumulate::kAdd>(panel.count, pitch_k, keys, ws.dS, W,
                                                 ws.K + n0 * pitch_k, pitch_k,
                                                 ws.dQ + i * W * pitch_k, pitch_k);
}

template <class C, Scores kScores>
void bwd_row_tile(const AttnLaunch& launch, const Problem& p, int64_t row0, const BwdScratch<C>& ws,
                  C* dK, C* dV) {
  constexpr int64_t W = kPanel<C>;
  const int64_t pitch_k = round_up(launch.Dk, kLanes<C>);
  const int64_t rows = static_cast<int64_t>(p.Tq) * p.G;
  const int64_t num_panels = min_of(kTilePanels, (rows - row0 + W - 1) / W);
  int64_t begin = p.Tk, end = 0;
  for (int64_t i = 0; i < num_panels; ++i) {
    ws.panels[i].init(launch, p, row0 + i * W);
    begin = min_of(begin, ws.panels[i].first_key);
    end = max_of(end, ws.panels[i].end_key);
    load_bwd_panel(launch, p, ws.panels[i], i, ws);
  }
  for (int64_t n0 = begin < end ? key_block_begin(launch, p, begin) : end, n1; n0 < end; n0 = n1) {
    n1 = key_block_end<C>(launch, p, n0);
    for (int64_t i = 0; i < num_panels; ++i) {
      const int64_t stop = min_of(n1, ws.panels[i].end_key);
      if (stop <= n0 || n1 <= ws.panels[i].first_key) continue;
      bwd_block<C, kScores>(launch, p, ws.panels[i], i, n0, stop, ws, dK, dV);
    }
  }
  for (int64_t r = 0; r < min_of(num_panels * W, rows - row0); ++r) {
    write_grad_row(launch, p.dq, (row0 + r) / p.G, (row0 + r) % p.G, ws.dQ + r * pitch_k, launch.Dk,
                   static_cast<C>(launch.scale));
  }
}

template <class C>
void bwd_split(const AttnLaunch& launch, const Problem& p, int64_t split, int64_t num_splits,
               void* partial, char* scratch) {
  const BwdScratch<C> ws(launch, num_splits, scratch);
  const int64_t pitch_k = round_up(launch.Dk, kLanes<C>), pitch_v = round_up(launch.Dv, kLanes<C>);
  C* dK = num_splits > 1 ? static_cast<C*>(partial) + split * launch.max_keys * (pitch_k + pitch_v)
                         : ws.dKV;
  C* dV = dK + launch.max_keys * pitch_k;
  for (int64_t j = 0; j < p.Tk * pitch_k; ++j) dK[j] = C(0);
  for (int64_t j = 0; j < p.Tk * pitch_v; ++j) dV[j] = C(0);
  load_keys(launch.dtype, p.k, 0, p.Tk, p.Tk, launch.Dk, ws.K);
  load_keys(launch.dtype, p.v, 0, p.Tk, p.Tk, launch.Dv, ws.V);

  const int64_t tile_rows = kTilePanels * kPanel<C>;
  const int64_t tiles = (static_cast<int64_t>(p.Tq) * p.G + tile_rows - 1) / tile_rows;
  for (int64_t tile = split; tile < tiles; tile += num_splits) {
    if (launch.scores == Scores::kSoftmax) {
      bwd_row_tile<C, Scores::kSoftmax>(launch, p, tile * tile_rows, ws, dK, dV);
    } else {
      bwd_row_tile<C, Scores::kLandmark>(launch, p, tile * tile_rows, ws, dK, dV);
    }
  }
  if (num_splits > 1) return;
  for (int64_t n = 0; n < p.Tk; ++n) {
    write_grad_row(launch, p.dk, n, 0, dK + n * pitch_k, launch.Dk, C(1));
    write_grad_row(launch, p.dv, n, 0, dV + n * pitch_v, launch.Dv, C(1));
  }
}

template <class C>
void bwd_reduce(const AttnLaunch& launch, const Problem& p, int64_t num_splits, void* partial) {
  const int64_t pitch_k = round_up(launch.Dk, kLanes<C>), pitch_v = round_up(launch.Dv, kLanes<C>);
  const int64_t piece = launch.max_keys * (pitch_k + pitch_v);
  C* sum = static_cast<C*>(partial);
  for (int64_t s = 1; s < num_splits; ++s) {
    const C* part = sum + s * piece;
    for (int64_t j = 0; j < p.Tk * pitch_k; ++j) sum[j] += part[j];
    for (int64_t j = launch.max_keys * pitch_k; j < launch.max_keys * pitch_k + p.Tk * pitch_v; ++j)
      sum[j] += part[j];
  }
  for (int64_t n = 0; n < p.Tk; ++n) {
    write_grad_row(launch, p.dk, n, 0, sum + n * pitch_k, launch.Dk, C(1));
    write_grad_row(launch, p.dv, n, 0, sum + launch.max_keys * pitch_k + n * pitch_v, launch.Dv,
                   C(1));
  }
}

template <class C>
void delta_rows(const AttnLaunch& launch, const Problem& p, const Rows& dlse, int64_t t0,
                int64_t t1) {
  const int64_t size = dtype_size(launch.dtype);
  for (int64_t t = t0; t < t1; ++t) {
    for (int64_t g = 0; g < p.G; ++g) {
      C sum = row_dot<C>(launch.dtype, row_at(p.dout, t, g, size), row_at(p.out, t, g, size),
                         launch.Dv);
      if (dlse.data != nullptr) sum -= *stat_at<C>(dlse, t, g);
      *stat_at<C>(p.delta, t, g) = sum;
    }
  }
}

template <class C>
void convert_rows(DType dtype, const Rows& src, const Rows& dst, int64_t t0, int64_t t1, int64_t G,
                  int64_t D) {
  for (int64_t t = t0; t < t1; ++t) {
    for (int64_t g = 0; g < G; ++g) {
      store_row(dtype, stat_at<C>(src, t, g), D, C(1), row_at_mut(dst, t, g, dtype_size(dtype)));
    }
  }
}

template <class C>
int64_t bwd_scratch(const AttnLaunch& launch, int64_t num_splits) {
  return BwdScratch<C>(launch, num_splits, nullptr).bytes;
}

template <class C>
int64_t bwd_partial(const AttnLaunch& launch) {
  return launch.max_keys * (round_up(launch.Dk, kLanes<C>) + round_up(launch.Dv, kLanes<C>));
}

}  // namespace lctx::cpu::LCTX_ISA
