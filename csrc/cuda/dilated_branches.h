// The branches of dilated attention in the order of their launches, and which rows they select.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/check.h"
#include "../common/math.cuh"
#include "../params.h"
#include "attn_fwd_launch.cuh"

namespace lctx::cuda {

struct Branch {
  int64_t length, rate;
};

// Largest rate first, so that the last branch covers the most rows.
inline std::vector<Branch> ordered_branches(const DilatedParams& params) {
  std::vector<Branch> branches;
  for (int64_t m = 0; m < params.num_branches; ++m) {
    const int64_t length = std::min(params.segment_lengths[m], params.shape.Tq);
    branches.push_back({length, params.dilation_rates[m]});
  }
  std::stable_sort(branches.begin(), branches.end(),
                   [](const Branch& a, const Branch& b) { return a.rate > b.rate; });
  return branches;
}

// Whether the last branch has every row of every head.
inline bool last_covers_all(const DilatedParams& params, const std::vector<Branch>& branches) {
  return branches.back().rate == 1 && params.seqlens == nullptr;
}

// What the tiles of a branch's rows (SegmentTiles) want.
template <class Tile, class P>
void set_branch_rows(const char* op, const DilatedParams& params, const Branch& branch, P& p) {
  const AttnShape& s = params.shape;
  p.segment_len = static_cast<int>(branch.length);
  p.rate = static_cast<int>(branch.rate);
  p.long_phases = branch.rate == 1 ? 1 : static_cast<int>(s.Tq % branch.rate);
  p.offset_block = params.head_offset_block;
  p.per_segment = FastDivisor(static_cast<int>(s.Hq));
  p.per_phase = FastDivisor(p.rate);
  p.per_offset =
      p.offset_block ? FastDivisor(static_cast<int>(ceil_div(s.Hq, branch.rate))) : p.per_phase;
  p.seqlens = params.seqlens;
  const int64_t rows = ceil_div(branch.length, branch.rate);
  p.row_shift = row_shift<Tile>(rows);
  p.order = make_order(op, ceil_div(rows, Tile::kBlockM), s.Hq * ceil_div(s.Tq, branch.length), s.B,
                       heads_per_section(s, rows, 256));
}

constexpr int kMaxBranches = 16;  // that a pass over rows looks through

// The rows that a branch selects.
struct BranchRows {
  int segment_len, rate, heads_per_offset;  // ceil(Hq / rate)
  bool offset_block;
  FastDivisor per_segment, per_rate, per_heads;  // of these three

  BranchRows() = default;
  BranchRows(const DilatedParams& params, const Branch& branch)
      : segment_len(static_cast<int>(branch.length)),
        rate(static_cast<int>(branch.rate)),
        heads_per_offset(static_cast<int>((params.shape.Hq + branch.rate - 1) / branch.rate)),
        offset_block(params.head_offset_block),
        per_segment(segment_len),
        per_rate(rate),
        per_heads(heads_per_offset) {}

#if defined(__CUDACC__)
  // Where a head's rows begin in a segment.
  __device__ __forceinline__ int offset_of(int head) const {
    return offset_block ? per_heads.divide(head) : per_rate.modulo(head);
  }
  // The number of position t in its segment among the rows of `head`, -1: none of them.
  __device__ __forceinline__ int row_of(int t, int head, int segment) const {
    const int from = t - segment * segment_len - offset_of(head);
    if (from < 0) return -1;
    const int row = per_rate.divide(from);
    return row * rate == from ? row : -1;
  }
  // Whether position t is a row of some of `heads` heads from `first` on.
  __device__ __forceinline__ bool selects(int t, int first, int heads) const {
    const int phase = per_rate.modulo(per_segment.modulo(t));
    if (offset_block) {
      const int begin = phase * heads_per_offset;
      return max(begin, first) < min(begin + heads_per_offset, first + heads);
    }
    const int distance = phase - per_rate.modulo(first);
    return (distance < 0 ? distance + rate : distance) < heads;
  }
#endif
};

// Some branches.
struct BranchSet {
  BranchRows branches[kMaxBranches];
  int count = 0;

  BranchSet() = default;
  // The first `n` of them.
  BranchSet(const DilatedParams& params, const std::vector<Branch>& all, size_t n) {
    LCTX_CHECK(n <= kMaxBranches, "lctx::dilated_bwd: ", n, " branches; expected at most ",
               kMaxBranches);
    for (size_t m = 0; m < n; ++m) branches[count++] = BranchRows(params, all[m]);
  }

#if defined(__CUDACC__)
  __device__ __forceinline__ bool select(int t, int first, int heads) const {
    bool found = false;
    for (int m = 0; m < count && !found; ++m) found = branches[m].selects(t, first, heads);
    return found;
  }
#endif
};

}  // namespace lctx::cuda
