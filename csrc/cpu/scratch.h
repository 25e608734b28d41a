// Host-side memory and task distribution of the CPU backend.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "cpu_backend.h"

namespace lctx::cpu {

// 64-byte aligned, uninitialised memory that frees itself. Throws std::bad_alloc, so allocate
// outside parallel regions.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) {
    if (bytes <= 0) return;
    data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }
  char* get() const { return data_; }

 private:
  char* data_ = nullptr;
};

// Runs body(i, scratch) once for every i in [0, count). Tasks start in order, each on whichever
// thread is free; a task owns `scratch_bytes` of scratch while it runs. Results must not depend on
// the thread, so they are reproducible.
template <class Body>
void parallel_tasks(const ThreadPool& pool, int64_t count, int64_t scratch_bytes,
                    const Body& body) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t count, stride;
    char* scratch;
    const Body* body;
  };
  const int64_t workers = std::min<int64_t>(std::max(pool.num_threads, 1), count);
  if (workers <= 0) return;
  const int64_t stride = (scratch_bytes + 63) / 64 * 64;
  const Buffer scratch(workers * stride);
  Context context;
  context.count = count;
  context.stride = stride;
  context.scratch = scratch.get();
  context.body = &body;
  pool.run(
      workers,
      [](void* opaque, int64_t worker) {
        Context& c = *static_cast<Context*>(opaque);
        for (int64_t i = c.next.fetch_add(1); i < c.count; i = c.next.fetch_add(1)) {
          (*c.body)(i, c.scratch + worker * c.stride);
        }
      },
      &context);
}

// Zero-fills on all threads.
inline void parallel_zero(const ThreadPool& pool, void* data, int64_t bytes) {
  constexpr int64_t kChunk = 1 << 20;
  parallel_tasks(pool, (bytes + kChunk - 1) / kChunk, 0, [&](int64_t i, char*) {
    std::memset(static_cast<char*>(data) + i * kChunk, 0,
                static_cast<size_t>(std::min(kChunk, bytes - i * kChunk)));
  });
}

}  // namespace lctx::cpu
