// Panels of rows: packing, visibility, and the scratch they live in. Shared by forward and
// backward.
#pragma once

#include "attn_problem.h"
#include "micro_gemm.h"

namespace lctx::cpu::LCTX_ISA {

// A panel is kPanel rows side by side in the lanes of kMicroVecs..4 vectors: scores are kept as
// [key][row], so that the row maximum and sum are plain vector operations. A tile is kTilePanels
// panels that share one pass over the keys.
template <class C>
constexpr int64_t kPanel = 4 * kLanes<C>;
constexpr int64_t kTilePanels = 4;
constexpr int64_t kBlockN = 64;  // keys per block

// Hands out consecutive aligned pieces of one allocation; with base == nullptr it only counts.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

inline const char* row_at(const Rows& rows, int64_t t, int64_t g, int64_t element_size) {
  return static_cast<const char*>(rows.data) +
         (t * rows.stride_t + g * rows.stride_g) * element_size;
}
inline char* row_at_mut(const Rows& rows, int64_t t, int64_t g, int64_t element_size) {
  return static_cast<char*>(rows.data) + (t * rows.stride_t + g * rows.stride_g) * element_size;
}

// The rows of one panel: row r0 + i stands in lane i and sees keys lo[i] .. hi[i] (inclusive; hi <
// lo: none).
template <class C>
struct PanelRows {
  using Int = typename VecTraits<C>::Int;
  alignas(64) Int lo[kPanel<C>];
  alignas(64) Int hi[kPanel<C>];
  int64_t r0 = 0;
  int64_t count = 0;                   // rows in use
  int64_t lanes = 0;                   // count rounded up to whole vectors
  int64_t first_key = 0, end_key = 0;  // some row sees a key in [first_key, end_key)
  int64_t full_lo = 0, full_hi = 0;    // every row sees keys full_lo .. full_hi

  // Returns false if no row sees any key. Unused lanes do not count: their results are dropped.
  bool init(const AttnLaunch& launch, const Problem& p, int64_t first_row) {
    r0 = first_row;
    count = min_of<int64_t>(kPanel<C>, static_cast<int64_t>(p.Tq) * p.G - r0);
    lanes = round_up(count, kLanes<C>);
    first_key = p.Tk;
    end_key = 0;
    full_lo = 0;
    full_hi = p.Tk - 1;
    for (int64_t i = 0; i < lanes; ++i) {
      if (i >= count) {
        lo[i] = 0;
        hi[i] = -1;
        continue;
      }
      const int64_t position = (r0 + i) / p.G + p.query_offset;
      int64_t low = 0, high = p.Tk - 1;
      if (launch.causal) high = min_of(high, position);
      if (launch.window > 0) {
        low = max_of(low, position - launch.window + 1);
        high = min_of(high, position + launch.window - 1);
      }
      lo[i] = static_cast<Int>(min_of<int64_t>(low, p.Tk));
      hi[i] = static_cast<Int>(max_of<int64_t>(high, -1));
      if (high >= low) {
        first_key = min_of(first_key, low);
        end_key = max_of(end_key, high + 1);
      }
      full_lo = max_of(full_lo, low);
      full_hi = min_of(full_hi, high);
    }
    return end_key > first_key;
  }

  bool sees_all(int64_t n0, int64_t n1) const { return n0 >= full_lo && n1 - 1 <= full_hi; }
};

// Loads a panel's rows into `rows` [kPanel][padded], times row_factor (and g_factor[g]), and those
// times column_factor, transposed, into `columns` [D][kPanel].
template <class C>
void load_panel(DType dtype, const Rows& src, const Problem& p, const PanelRows<C>& panel,
                int64_t D, C row_factor, C column_factor, C* rows, C* columns,
                const C* g_factor = nullptr) {
  constexpr int64_t W = kPanel<C>;
  const int64_t padded = round_up(D, kLanes<C>);
  for (int64_t i = 0; i < panel.count; ++i) {
    const int64_t t = (panel.r0 + i) / p.G, g = (panel.r0 + i) % p.G;
    const C factor = g_factor != nullptr ? row_factor * g_factor[g] : row_factor;
    load_row(dtype, row_at(src, t, g, dtype_size(dtype)), D, padded, factor, rows + i * padded);
  }
  // 8 x W pieces: the strided side stays in the L1 cache.
  for (int64_t d0 = 0; d0 < D; d0 += 8) {
    const int64_t d1 = min_of(d0 + 8, D);
    for (int64_t i = 0; i < panel.count; ++i) {
      for (int64_t d = d0; d < d1; ++d) columns[d * W + i] = rows[i * padded + d] * column_factor;
    }
    for (int64_t d = d0; d < d1; ++d) {
      for (int64_t i = panel.count; i < panel.lanes; ++i) columns[d * W + i] = C(0);
    }
  }
}

// Keys [n0, n1) into contiguous rows. The next block is fetched ahead: its rows are a stride apart
// that no hardware prefetcher follows.
template <class C>
void load_keys(DType dtype, const Rows& src, int64_t n0, int64_t n1, int64_t num_keys, int64_t D,
               C* dst) {
  const int64_t padded = round_up(D, kLanes<C>), size = dtype_size(dtype);
  for (int64_t n = n0; n < n1; ++n) {
    const int64_t ahead = n + (n1 - n0);
    for (int64_t byte = 0; ahead < num_keys && byte < D * size; byte += 64) {
      __builtin_prefetch(row_at(src, ahead, 0, size) + byte);
    }
    load_row(dtype, row_at(src, n, 0, size), D, padded, C(1), dst + (n - n0) * padded);
  }
}

template <class C>
LCTX_INLINE C* stat_at(const Rows& rows, int64_t t, int64_t g) {
  return static_cast<C*>(rows.data) + t * rows.stride_t + g * rows.stride_g;
}

// Where the next block of keys ends: kBlockN keys, or whole landmark groups (at least one).
template <class C>
int64_t key_block_end(const AttnLaunch& launch, const Problem& p, int64_t n0) {
  if (launch.scores == Scores::kSoftmax) return min_of<int64_t>(n0 + kBlockN, p.Tk);
  int64_t group = p.groups.of_key[n0];
  int64_t end = p.groups.end[group];
  while (group + 1 < p.groups.count && p.groups.end[group + 1] - n0 <= kBlockN)
    end = p.groups.end[++group];
  return end;
}

inline int64_t key_block_begin(const AttnLaunch& launch, const Problem& p, int64_t n) {
  if (launch.scores == Scores::kSoftmax) return n / kBlockN * kBlockN;
  const int64_t group = p.groups.of_key[n];
  return group == 0 ? 0 : p.groups.end[group - 1];
}

inline int64_t max_key_block(const AttnLaunch& launch) {
  return min_of(max_of<int64_t>(kBlockN, launch.max_group), max_of<int64_t>(launch.max_keys, 1));
}

}  // namespace lctx::cpu::LCTX_ISA
