// Dense softmax attention: one problem per (batch, key/value head), or per document of cu_seqlens.
#include "attn_driver.h"

namespace lctx::cpu {
namespace {

AttnLaunch flash_launch(const FlashParams& params) {
  AttnLaunch launch = make_launch(params);
  launch.window = params.window;
  return launch;
}

std::vector<Problem> flash_problems(const FlashParams& params, const AttnLaunch& launch,
                                    const AttnGrads* grads, const void* delta) {
  const AttnShape& s = params.shape;
  const int64_t G = s.Hq / s.Hkv;
  std::vector<Problem> problems;
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t h = 0; h < s.Hq; h += G) {
      const Problem whole = make_problem(params, launch, b, h, G, grads, delta);
      if (params.cu_seqlens == nullptr) problems.push_back(whole);
      for (int64_t doc = 0; doc < params.num_docs; ++doc) {
        const int64_t begin = params.cu_seqlens[doc], end = params.cu_seqlens[doc + 1];
        if (end > begin) problems.push_back(slice_problem(whole, launch, begin, end - begin));
      }
    }
  }
  return problems;
}

}  // namespace

void flash_fwd(const FlashParams& params, const ThreadPool& pool) {
  const AttnLaunch launch = flash_launch(params);
  run_forward(launch, flash_problems(params, launch, nullptr, nullptr), pool);
}

void flash_bwd(const FlashParams& params, const AttnGrads& grads, const ThreadPool& pool) {
  const AttnLaunch launch = flash_launch(params);
  const Buffer delta = make_delta(params, grads, pool);
  run_backward(launch, flash_problems(params, launch, &grads, delta.get()), pool);
}

}  // namespace lctx::cpu
