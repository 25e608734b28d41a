// Attention forward on the CPU.
//
// Math:  O_i = sum_j w_ij v_j, where w_i is the softmax of row i (or its landmark form), kept
// online: per block of keys
//        O <- diag(alpha) O + P^T V, (m, l) as in scores.h; at the end O / l and lse = m + log l.
// Tiles: a task is kTilePanels panels of kPanel rows. K and V go to fp scratch block by block
// (kBlockN keys), once for
//        all panels of the task; S = K Q^T is [key][row], O is [row][d]. Nothing of size Tq x Tk
//        exists.
// Cost:  4 D flops per visible (row, key); each panel stops at the last key any of its rows sees.
#pragma once

#include "landmark_scores.h"

namespace lctx::cpu::LCTX_ISA {

template <class C>
struct FwdScratch {
  C *Qt, *O, *K, *V, *S, *row, *group;
  PanelRows<C>* panels;
  RowState<C>* states;
  int64_t bytes;

  FwdScratch(const AttnLaunch& launch, char* base) {
    constexpr int64_t W = kPanel<C>, L = kLanes<C>;
    const int64_t block = max_key_block(launch);
    Arena arena{base};
    Qt = arena.take<C>(kTilePanels * launch.Dk * W);
    O = arena.take<C>(kTilePanels * round_up(launch.Dv, L) * W);
    K = arena.take<C>(block * round_up(launch.Dk, L));
    V = arena.take<C>(block * round_up(launch.Dv, L));
    S = arena.take<C>(block * W);
    row = arena.take<C>(W * round_up(max_of(launch.Dk, launch.Dv), L));
    group = arena.take<C>(launch.scores == Scores::kLandmark ? landmark_scratch<C>(block) : 0);
    panels = arena.take<PanelRows<C>>(kTilePanels);
    states = arena.take<RowState<C>>(kTilePanels);
    bytes = arena.used;
  }
};

// Writes one finished row, or merges it into what the row already holds.
template <class C>
void write_out_row(const AttnLaunch& launch, const Problem& p, int64_t t, int64_t g, C* O, C m,
                   C l) {
  C* lse_slot = stat_at<C>(p.lse, t, g);
  C lse = l > C(0) ? m + static_cast<C>(__builtin_log(l)) : kNegInf<C>;
  if (l != l) lse = l;  // NaN in, NaN out
  C factor = l == C(0) ? C(0) : C(1) / l;
  char* out = row_at_mut(p.out, t, g, dtype_size(launch.out_dtype));
  if (launch.write == Write::kMerge) {
    const C old = *lse_slot;
    const C top = max_of(old, lse);
    if (top == kNegInf<C>) {
      for (int64_t d = 0; d < launch.Dv; ++d) O[d] = C(0);
      store_row(launch.out_dtype, O, launch.Dv, C(1), out);
      return;
    }
    const C w_old = static_cast<C>(__builtin_exp(old - top)),
            w_new = static_cast<C>(__builtin_exp(lse - top));
    lse = top + static_cast<C>(__builtin_log(w_old + w_new));
    factor *= w_new / (w_old + w_new);
    const C* held = p.held.data != nullptr ? stat_at<C>(p.held, t, g) : reinterpret_cast<C*>(out);
    const C held_factor = w_old / (w_old + w_new);
    for (int64_t d = 0; d < launch.Dv; ++d) {
      O[d] *= factor;
      if (old != kNegInf<C>) O[d] += held[d] * held_factor;  // else `held` may be anything
    }
    factor = C(1);
  }
  *lse_slot = lse;
  store_row(launch.out_dtype, O, launch.Dv, factor, out);
}

template <class C, Scores kScores>
void fwd_tile_impl(const AttnLaunch& launch, const Problem& p, int64_t tile, char* scratch) {
  constexpr int64_t W = kPanel<C>;
  const FwdScratch<C> ws(launch, scratch);
  const int64_t Dv = launch.Dv, pitch_k = round_up(launch.Dk, kLanes<C>),
                pitch_v = round_up(Dv, kLanes<C>);
  const int64_t rows = static_cast<int64_t>(p.Tq) * p.G;
  const int64_t row0 = tile * kTilePanels * W;
  const int64_t num_panels = min_of(kTilePanels, (rows - row0 + W - 1) / W);

  int64_t begin = p.Tk, end = 0;
  for (int64_t i = 0; i < num_panels; ++i) {
    PanelRows<C>& panel = ws.panels[i];
    ws.states[i].reset();
    if (!panel.init(launch, p, row0 + i * W)) continue;
    begin = min_of(begin, panel.first_key);
    end = max_of(end, panel.end_key);
    load_panel(launch.dtype, p.q, p, panel, launch.Dk, C(1), static_cast<C>(launch.scale), ws.row,
               ws.Qt + i * launch.Dk * W);
  }

  for (int64_t n0 = begin < end ? key_block_begin(launch, p, begin) : end, n1; n0 < end; n0 = n1) {
    n1 = key_block_end<C>(launch, p, n0);
    load_keys(launch.dtype, p.k, n0, n1, p.Tk, launch.Dk, ws.K);
    load_keys(launch.dtype, p.v, n0, n1, p.Tk, Dv, ws.V);
    for (int64_t i = 0; i < num_panels; ++i) {
      const PanelRows<C>& panel = ws.panels[i];
      const int64_t stop = min_of(n1, panel.end_key);
      if (stop <= n0 || n1 <= panel.first_key) continue;
      RowState<C>& state = ws.states[i];
      const bool first = n0 <= panel.first_key;
      gemm<C, Layout::kRowMajor, Accumulate::kStore>(
          stop - n0, panel.lanes, launch.Dk, ws.K, pitch_k, ws.Qt + i * launch.Dk * W, W, ws.S, W);
      if constexpr (kScores == Scores::kSoftmax) {
        softmax_forward(panel, n0, stop, ws.S, state);
      } else {
        landmark_forward(p.groups, panel, n0, stop, ws.S, state, ws.group);
      }
      C* O = ws.O + i * W * pitch_v;
      if (first) {
        gemm<C, Layout::kTransposed, Accumulate::kStore>(panel.count, pitch_v, stop - n0, ws.S, W,
                                                         ws.V, pitch_v, O, pitch_v);
      } else {
        gemm<C, Layout::kTransposed, Accumulate::kScaleAdd>(
            panel.count, pitch_v, stop - n0, ws.S, W, ws.V, pitch_v, O, pitch_v, state.alpha);
      }
    }
  }

  for (int64_t i = 0; i < num_panels; ++i) {
    const PanelRows<C>& panel = ws.panels[i];
    C* O = ws.O + i * W * pitch_v;
    if (panel.end_key <= panel.first_key) {
      for (int64_t j = 0; j < panel.count * pitch_v; ++j) O[j] = C(0);
    }
    for (int64_t r = 0; r < panel.count; ++r) {
      const C m = ws.states[i].m[r], l = ws.states[i].l[r];
      write_out_row(launch, p, (panel.r0 + r) / p.G, (panel.r0 + r) % p.G, O + r * pitch_v, m, l);
    }
  }
}

template <class C>
void fwd_tile(const AttnLaunch& launch, const Problem& problem, int64_t tile, char* scratch) {
  if (launch.scores == Scores::kSoftmax) {
    fwd_tile_impl<C, Scores::kSoftmax>(launch, problem, tile, scratch);
  } else {
    fwd_tile_impl<C, Scores::kLandmark>(launch, problem, tile, scratch);
  }
}

template <class C>
int64_t fwd_scratch(const AttnLaunch& launch) {
  return FwdScratch<C>(launch, nullptr).bytes;
}

}  // namespace lctx::cpu::LCTX_ISA
