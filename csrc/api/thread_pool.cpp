#include "thread_pool.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace lctx::api {
namespace {

// Workers take the next index when they are free, so tasks of unequal cost (causal rows) balance
// themselves.
void run_on_torch_threads(int64_t count, void (*body)(void* context, int64_t i), void* context) {
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) body(context, i);
  });
}

}  // namespace

cpu::ThreadPool thread_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()), run_on_torch_threads};
}

}  // namespace lctx::api
