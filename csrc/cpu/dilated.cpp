// LongNet's dilated attention (Ding et al. 2023, arXiv 2307.02486, eqs. 4-11): every (branch,
// segment, phase) is a dense problem over strided rows; branches are merged by their log-sum-exp in
// stat precision, which is exactly one softmax over the union of their keys. Backward: every branch
// with the global lse, and the global delta ("exact") or the branch's own ("detached", no gradient
// through the mixing weights).
#include "attn_driver.h"
#include "stat_tensors.h"

namespace lctx::cpu {
namespace {

struct Branch {
  int64_t w, r;
};

Branch branch_of(const DilatedParams& params, int64_t m) {
  return {std::min(params.segment_lengths[m], params.shape.Tq), params.dilation_rates[m]};
}

int64_t phase_of(const DilatedParams& params, int64_t h, int64_t r) {
  return params.head_offset_block ? h / ((params.shape.Hq + r - 1) / r) : h % r;
}

// Problems of branch m that may run at once. Query heads of one group share K and V rows: with r ==
// 1 they form one problem; with r > 1 each is alone, and wave g holds the g-th head of every group
// so that no two add to the same rows.
std::vector<Problem> branch_problems(const DilatedParams& params, const AttnLaunch& launch,
                                     int64_t m, int64_t wave, const AttnGrads* grads,
                                     const void* delta) {
  const AttnShape& s = params.shape;
  const Branch branch = branch_of(params, m);
  const int64_t G = s.Hq / s.Hkv, heads = branch.r == 1 ? G : 1;
  std::vector<Problem> problems;
  for (int64_t b = 0; b < s.B; ++b) {
    const int64_t length = params.seqlens != nullptr ? params.seqlens[b] : s.Tq;
    for (int64_t h = wave; h < s.Hq; h += G) {
      const int64_t phase = phase_of(params, h, branch.r);
      const Problem whole = make_problem(params, launch, b, h, heads, grads, delta);
      for (int64_t t0 = 0; t0 < length; t0 += branch.w) {
        const int64_t span = std::min(branch.w, length - t0);
        if (span <= phase) continue;
        problems.push_back(slice_problem(whole, launch, t0 + phase,
                                         (span - phase + branch.r - 1) / branch.r, branch.r));
      }
    }
  }
  return problems;
}

int64_t num_waves(const DilatedParams& params, int64_t m) {
  return params.dilation_rates[m] == 1 ? 1 : params.shape.Hq / params.shape.Hkv;
}

void fill_lse(const AttnShape& s, void* lse) {
  const int64_t count = s.B * s.Hq * s.Tq;
  if (s.dtype == DType::kFloat64) {
    std::fill_n(static_cast<double*>(lse), count, -__builtin_inf());
  } else {
    std::fill_n(static_cast<float*>(lse), count, -__builtin_inff());
  }
}

// rowsum(dout * out_m) - dlse with branch m's own output, recomputed.
Buffer branch_delta(const DilatedParams& params, const AttnGrads& grads, int64_t m,
                    const ThreadPool& pool) {
  const AttnShape& s = params.shape;
  const int64_t bytes = s.B * s.Tq * s.Hq * s.Dv * dtype_size(s.dtype);
  const Buffer out(bytes), lse(s.B * s.Hq * s.Tq * dtype_size(stat_dtype(s.dtype)));
  parallel_zero(pool, out.get(), bytes);
  DilatedParams own = params;
  own.out = contiguous_view(out.get(), s.Tq, s.Hq, s.Dv);
  own.lse = lse.get();
  const AttnLaunch launch = make_launch(own);
  for (int64_t wave = 0; wave < num_waves(params, m); ++wave) {
    run_forward(launch, branch_problems(own, launch, m, wave, nullptr, nullptr), pool);
  }
  return make_delta(own, grads, pool);
}

}  // namespace

void dilated_fwd(const DilatedParams& params, const ThreadPool& pool) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  const Accumulator out(s, params.out, s.Tq, s.Hq, s.Dv, pool);
  fill_lse(s, params.lse);
  DilatedParams merged = params;
  merged.out = out.view();
  AttnLaunch launch = make_launch(params);
  launch.out_dtype = stat_dtype(s.dtype);
  launch.write = Write::kMerge;
  for (int64_t m = 0; m < params.num_branches; ++m) {
    for (int64_t wave = 0; wave < num_waves(params, m); ++wave) {
      run_forward(launch, branch_problems(merged, launch, m, wave, nullptr, nullptr), pool);
    }
  }
  out.finish(pool);
}

void dilated_bwd(const DilatedParams& params, const AttnGrads& grads, const ThreadPool& pool) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  const Accumulator dq(s, grads.dq, s.Tq, s.Hq, s.Dk, pool);
  const Accumulator dk(s, grads.dk, s.Tk, s.Hkv, s.Dk, pool);
  const Accumulator dv(s, grads.dv, s.Tk, s.Hkv, s.Dv, pool);
  AttnGrads sums = grads;
  sums.dq = dq.view();
  sums.dk = dk.view();
  sums.dv = dv.view();
  AttnLaunch launch = make_launch(params);
  launch.out_dtype = stat_dtype(s.dtype);
  launch.write = Write::kAdd;
  const Buffer delta = params.mix_detached ? Buffer() : make_delta(params, grads, pool);
  for (int64_t m = 0; m < params.num_branches; ++m) {
    const Buffer own_delta = params.mix_detached ? branch_delta(params, grads, m, pool) : Buffer();
    const void* use = params.mix_detached ? own_delta.get() : delta.get();
    for (int64_t wave = 0; wave < num_waves(params, m); ++wave) {
      run_backward(launch, branch_problems(params, launch, m, wave, &sums, use), pool);
    }
  }
  dq.finish(pool);
  dk.finish(pool);
  dv.finish(pool);
}

}  // namespace lctx::cpu
