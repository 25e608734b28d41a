// Landmark attention's grouped softmax (Mohtashami & Jaggi 2023, arXiv 2305.16300, section 3.1)
// over blocks of scores.
//
// Every group b of keys (ordinary tokens, then its landmark) has an inner softmax; a row weighs
// whole groups by an outer softmax over A_b:  A_b = lse of the group for the row's own group (=
// plain softmax), the landmark's score for earlier groups. With e_j = exp(s_j - m_b), l_b = sum_j
// e_j:   w_j = c_b e_j,
//   own:      c_b = exp(m_b - M),        contributes l_b c_b to the outer sum
//   earlier:  c_b = exp(a_b - M) / l_b,  contributes exp(a_b - M)
// so no logarithm is taken. A landmark has weight 0; the own landmark and empty groups are left
// out.
#pragma once

#include "scores.h"

namespace lctx::cpu::LCTX_ISA {

// Elements of scratch for a key block of n keys: two rows of kPanel per group, at most one group a
// key.
template <class C>
int64_t landmark_scratch(int64_t n) {
  return 2 * n * kPanel<C>;
}

// One group's part [begin, end) of the block starting at n0; `landmark` is its landmark's key, or
// -1.
struct GroupSpan {
  int64_t begin, end, landmark, index;
};

inline GroupSpan group_span(const Groups& groups, int64_t n, int64_t stop) {
  GroupSpan span;
  span.index = groups.of_key[n];
  const int64_t end = groups.end[span.index];
  const bool complete = span.index + 1 < groups.count || groups.last_is_complete;
  span.begin = n;
  span.landmark = complete && end <= stop ? end - 1 : -1;
  span.end = complete ? min_of(end - 1, stop) : min_of(end, stop);
  return span;
}

// Group of each row's position, read through the row's last visible key (its own position). Rows in
// unused lanes get -1.
template <class C>
LCTX_INLINE IVec<C> own_group(const Groups& groups, const PanelRows<C>& panel, int64_t lane) {
  IVec<C> own;
  for (int64_t i = 0; i < kLanes<C>; ++i) {
    const int64_t position = static_cast<int64_t>(panel.hi[lane + i]);
    own[i] = position < 0 ? -1 : groups.of_key[position];
  }
  return own;
}

// Inner softmax of one group for one vector of rows: S becomes e, returns m_b and l_b (0 where
// nothing is visible).
template <class C>
LCTX_INLINE void group_softmax(const PanelRows<C>& panel, const GroupSpan& span, int64_t n0,
                               int64_t lane, bool all_visible, C* S, Vec<C>& m, Vec<C>& l) {
  constexpr int64_t W = kPanel<C>;
  m = splat(kNegInf<C>);
  for (int64_t n = span.begin; n < span.end; ++n) {
    C* s = S + (n - n0) * W + lane;
    if (!all_visible) store(s, key_in_range(n, panel, lane) ? load(s) : splat(kNegInf<C>));
    m = vmax<C>(load(s), m);
  }
  const Vec<C> base = finite_or_zero<C>(m);
  l = splat(C(0));
  for (int64_t n = span.begin; n < span.end; ++n) {
    C* s = S + (n - n0) * W + lane;
    const Vec<C> e = expv(load(s) - base);
    l += e;
    store(s, e);
  }
}

template <class C>
void landmark_forward(const Groups& groups, const PanelRows<C>& panel, int64_t n0, int64_t stop,
                      C* S, RowState<C>& state, C* scratch) {
  constexpr int64_t W = kPanel<C>;
  const bool full = panel.sees_all(n0, stop);
  for (int64_t lane = 0; lane < panel.lanes; lane += kLanes<C>) {
    const IVec<C> own = own_group(groups, panel, lane);
    const Vec<C> M_old = load(state.m + lane);
    Vec<C> M = M_old;
    // Pass 1: inner softmax of every group; A_b (own: m_b) and l_b (own: 1 / l_b) are kept for
    // pass 2.
    int64_t count = 0;
    for (int64_t n = n0; n < stop; n = groups.end[groups.of_key[n]], ++count) {
      const GroupSpan span = group_span(groups, n, stop);
      Vec<C> m, l;
      group_softmax(panel, span, n0, lane, full, S, m, l);
      const IVec<C> is_own = own == static_cast<typename VecTraits<C>::Int>(span.index);
      Vec<C> A = m;
      if (span.landmark >= 0) {
        C* landmark = S + (span.landmark - n0) * W + lane;
        A = is_own ? m : (l > C(0) ? load(landmark) : splat(kNegInf<C>));
        store(landmark, splat(C(0)));
      }
      M = vmax<C>(A, M);
      store(scratch + 2 * count * W + lane, A);
      store(scratch + (2 * count + 1) * W + lane, l);
    }
    const Vec<C> base = finite_or_zero<C>(M);
    const Vec<C> alpha = expv(M_old - base);
    Vec<C> sum = load(state.l + lane) * alpha;
    // Pass 2: weights relative to the common maximum.
    count = 0;
    for (int64_t n = n0; n < stop; n = groups.end[groups.of_key[n]], ++count) {
      const GroupSpan span = group_span(groups, n, stop);
      const IVec<C> is_own = own == static_cast<typename VecTraits<C>::Int>(span.index);
      const Vec<C> weight = expv(load(scratch + 2 * count * W + lane) - base);
      const Vec<C> l = load(scratch + (2 * count + 1) * W + lane);
      const Vec<C> c = is_own ? weight : (l > C(0) ? weight / l : splat(C(0)));
      sum += is_own ? weight * l : weight;
      for (int64_t k = span.begin; k < span.end; ++k) {
        C* p = S + (k - n0) * W + lane;
        store(p, load(p) * c);
      }
    }
    store(state.m + lane, M);
    store(state.l + lane, sum);
    store(state.alpha + lane, alpha);
  }
}

// dS of an ordinary key: w (dP - D), with D = delta in the own group and D_b = sum_j t_j dP_j (t =
// e / l_b) in an earlier one; of an earlier group's landmark: exp(a_b - L) (D_b - delta). L and
// delta as in softmax_backward.
template <class C>
void landmark_backward(const Groups& groups, const PanelRows<C>& panel, int64_t n0, int64_t stop,
                       const C* L, const C* delta, C* S, C* dP) {
  constexpr int64_t W = kPanel<C>;
  const bool full = panel.sees_all(n0, stop);
  const Vec<C> zero = splat(C(0));
  for (int64_t lane = 0; lane < panel.lanes; lane += kLanes<C>) {
    const IVec<C> own = own_group(groups, panel, lane);
    const Vec<C> lse = load(L + lane), d = load(delta + lane);
    for (int64_t n = n0; n < stop; n = groups.end[groups.of_key[n]]) {
      const GroupSpan span = group_span(groups, n, stop);
      const IVec<C> is_own = own == static_cast<typename VecTraits<C>::Int>(span.index);
      Vec<C> m, l;
      group_softmax(panel, span, n0, lane, full, S, m, l);
      const IVec<C> empty = l <= zero;
      const Vec<C> inv_l = empty ? zero : C(1) / l;
      Vec<C> D = zero;
      for (int64_t k = span.begin; k < span.end; ++k) {
        D += load(S + (k - n0) * W + lane) * load(dP + (k - n0) * W + lane);
      }
      D = is_own ? d : D * inv_l;
      Vec<C> c = expv(m - lse);  // 0 where nothing is visible
      if (span.landmark >= 0) {
        const int64_t at = (span.landmark - n0) * W + lane;
        const Vec<C> G = empty ? zero : expv(load(S + at) - lse);
        store(dP + at, is_own ? zero : G * (D - d));
        store(S + at, zero);
        c = is_own ? c : G * inv_l;
      }
      for (int64_t k = span.begin; k < span.end; ++k) {
        const int64_t at = (k - n0) * W + lane;
        const Vec<C> w = load(S + at) * c;
        store(S + at, w);
        store(dP + at, w * (load(dP + at) - D));
      }
    }
  }
}

}  // namespace lctx::cpu::LCTX_ISA
