// What the files of dilated attention's backward share.
#pragma once

#include "dilated_branches.h"
#include "dq_sum.cuh"

namespace lctx::cuda {

inline int dq_head_dim(const AttnShape& s) { return s.Dk <= 64 ? 64 : 128; }

// Blocks of a segment's rows in dq_sum and in the statistics.
inline int64_t branch_blocks(const AttnShape& s, const Branch& branch) {
  return dq_blocks((branch.length + branch.rate - 1) / branch.rate, dq_head_dim(s));
}
// Floats of a branch's part of dq.
inline int64_t branch_floats(const AttnShape& s, const Branch& branch) {
  return s.B * s.Hq * ceil_div(s.Tq, branch.length) * branch_blocks(s, branch) * 2 * kDqPartFloats;
}

// The backward of some positions, with moved pointers: no segment of any branch ends outside.
struct DilatedSpan {
  DilatedParams params;
  AttnGrads grads;
  BwdScratch scratch;  // lse2 and delta by positions
  int pitch, T;        // rows of a head in lse2 and delta, and in dlse
  std::vector<Branch> branches;
};

// dilated_dq.cu: dq from the branches' parts in scratch.dq_sum, one after the other (dq_sum.cuh).
void launch_add_branches_dq(const DilatedSpan& span, Stream stream);
// The same without atomics, branch by branch: that of branches[m] is added to scratch.dq_sum, fp32
// (B, T, Hq, D), of which nothing need be zero, or with `last` dq is written.
void launch_branch_dq(const DilatedSpan& span, size_t m, const float* delta, bool last, int num_sms,
                      Stream stream);

// dilated_delta.cu: delta_i = dO_i . O_i - dlse_i with O of branches[m] alone, at the positions of
// its rows.
void launch_branch_delta(const DilatedSpan& span, size_t m, float* delta, int num_sms,
                         Stream stream);

}  // namespace lctx::cuda
