// How two partial softmax results over disjoint keys are combined. The only place on the device
// where this is done.
#pragma once

namespace lctx {

template <class C>
struct MergeWeights {
  C a, b;  // out = a * out_a + b * out_b
  C lse;
};

// w_a = exp(lse_a - L), w_b = exp(lse_b - L), L = logaddexp(lse_a, lse_b). Two empty sides (-inf)
// give weights 0.
template <class C>
__device__ __forceinline__ MergeWeights<C> merge_weights(C lse_a, C lse_b) {
  const bool b_leads = lse_a < lse_b;
  const C top = b_leads ? lse_b : lse_a;
  if (isinf(top) && top < C(0)) return {C(0), C(0), top};
  const C ratio = exp(b_leads ? lse_a - lse_b : lse_b - lse_a);  // of the weights, at most 1
  const C major = C(1) / (C(1) + ratio), minor = ratio * major;
  return {b_leads ? minor : major, b_leads ? major : minor, top + log1p(ratio)};
}

}  // namespace lctx
