// Torch's own thread pool, as the CPU kernels see it.
#pragma once

#include "../cpu/cpu_backend.h"

namespace lctx::api {

// A pool of as many threads as torch.get_num_threads() says.
cpu::ThreadPool thread_pool();

}  // namespace lctx::api
