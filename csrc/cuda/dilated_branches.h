// The branches of dilated attention in the order of their launches.
#pragma once

#include <algorithm>
#include <vector>

#include "../params.h"

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

}  // namespace lctx::cuda
