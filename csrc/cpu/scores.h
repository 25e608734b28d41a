// How scores become weights: the only part in which plain softmax and landmark attention differ.
//
// Scores arrive as S[key][row] (already times scale). Forward hooks turn a block
// of S into weights P relative to a running maximum; backward hooks turn S and dP = V dO^T into P
// and dS.
#pragma once

#include "attn_rows.h"

namespace lctx::cpu::LCTX_ISA {

// Running softmax state of a panel: maximum m, sum l, and alpha, the factor that the last
// block put on what was accumulated before it.
template <class C>
struct RowState {
  alignas(64) C m[kPanel<C>];
  alignas(64) C l[kPanel<C>];
  alignas(64) C alpha[kPanel<C>];

  void reset() {
    for (int64_t i = 0; i < kPanel<C>; ++i) {
      m[i] = kNegInf<C>;
      l[i] = C(0);
    }
  }
};

template <class C>
LCTX_INLINE IVec<C> key_in_range(int64_t n, const PanelRows<C>& panel, int64_t lane) {
  const IVec<C> key = static_cast<typename VecTraits<C>::Int>(n) - IVec<C>{};
  const IVec<C> lo = *reinterpret_cast<const IVec<C>*>(panel.lo + lane);
  const IVec<C> hi = *reinterpret_cast<const IVec<C>*>(panel.hi + lane);
  return (key >= lo) & (key <= hi);
}

// exp(x - m) must give 0, not NaN, while nothing was visible (m = -inf).
template <class C>
LCTX_INLINE Vec<C> finite_or_zero(Vec<C> m) {
  return m == splat(kNegInf<C>) ? splat(C(0)) : m;
}

// ---- plain softmax ----

template <class C>
void softmax_forward(const PanelRows<C>& panel, int64_t n0, int64_t n1, C* S, RowState<C>& state) {
  constexpr int64_t W = kPanel<C>, L = kLanes<C>;
  const bool full = panel.sees_all(n0, n1);
  for (int64_t lane = 0; lane < panel.lanes; lane += L) {
    const Vec<C> m_old = load(state.m + lane);
    Vec<C> m = m_old;
    if (full) {
      for (int64_t n = 0; n < n1 - n0; ++n) m = vmax<C>(load(S + n * W + lane), m);
    } else {
      for (int64_t n = 0; n < n1 - n0; ++n) {
        const Vec<C> s =
            key_in_range(n0 + n, panel, lane) ? load(S + n * W + lane) : splat(kNegInf<C>);
        store(S + n * W + lane, s);
        m = vmax<C>(s, m);
      }
    }
    const Vec<C> base = finite_or_zero<C>(m);
    Vec<C> sum{};
    for (int64_t n = 0; n < n1 - n0; ++n) {
      const Vec<C> p = expv(load(S + n * W + lane) - base);
      sum += p;
      store(S + n * W + lane, p);
    }
    const Vec<C> alpha = expv(m_old - base);
    store(state.m + lane, m);
    store(state.l + lane, load(state.l + lane) * alpha + sum);
    store(state.alpha + lane, alpha);
  }
}

// L: log-sum-exp of each row, +inf for rows that see nothing.
template <class C>
void softmax_backward(const PanelRows<C>& panel, int64_t n0, int64_t n1, const C* L, const C* delta,
                      C* S, C* dP) {
  constexpr int64_t W = kPanel<C>;
  const bool full = panel.sees_all(n0, n1);
  for (int64_t lane = 0; lane < panel.lanes; lane += kLanes<C>) {
    const Vec<C> lse = load(L + lane), d = load(delta + lane);
    for (int64_t n = 0; n < n1 - n0; ++n) {
      Vec<C> p = expv(load(S + n * W + lane) - lse);
      if (!full) p = key_in_range(n0 + n, panel, lane) ? p : splat(C(0));
      store(S + n * W + lane, p);
      store(dP + n * W + lane, p * (load(dP + n * W + lane) - d));
    }
  }
}

}  // namespace lctx::cpu::LCTX_ISA
