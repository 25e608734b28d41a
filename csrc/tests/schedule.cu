// The ring of stages, the tile queue and its order, and kernels that start before their input is
// written.
#include "../common/tile_schedule.cuh"
#include "device_tests.h"

namespace lctx::tests {
namespace {

// A different wait for every warp and step, so that warps overtake each other.
__device__ __forceinline__ void nap(int step) {
  const uint32_t hash = (step * 2654435761u) ^ (threadIdx.x / 32 * 40503u) ^ blockIdx.x * 97u;
  if (hash % 3 == 0) __nanosleep(hash >> 8 & 1023);
}

// ---- ring ----

constexpr int kPieceBytes = 512;  // a 16-byte unit for each lane

__device__ __forceinline__ bool equal(uint4 a, uint4 b) {
  return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w;
}

// Every consumer warp must find piece i of `source` in step i, and still after a while.
template <int kStages>
__global__ void ring_kernel(const uint4* source, int steps, int consumer_warps, int* errors,
                            int* pieces) {
  __shared__ alignas(128) char stages[kStages * kPieceBytes];
  __shared__ uint64_t barriers[Pipeline<kStages>::kBytes / 8];
  const Pipeline<kStages> pipeline(ptx::smem_address(barriers));
  const uint32_t stage0 = ptx::smem_address(stages);
  if (threadIdx.x == 0) {
    pipeline.init(consumer_warps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  PipelineState<kStages> state;
  if (threadIdx.x < 32) {
    for (int i = 0; threadIdx.x == 0 && i < steps; ++i) {
      const uint32_t full = pipeline.acquire(state, kPieceBytes);
      ptx::bulk_load(stage0 + i % kStages * kPieceBytes, source + i * 32, full, kPieceBytes);
      state.advance();
    }
    return;
  }
  const int lane = threadIdx.x % 32;
  int wrong = 0, found = 0;
  for (int i = 0; i < steps; ++i) {
    const uint32_t at = stage0 + i % kStages * kPieceBytes + lane * 16;
    const uint4 expected = source[i * 32 + lane];
    pipeline.wait(state);
    wrong += !equal(ptx::load_shared_16(at), expected);
    nap(i);
    wrong += !equal(ptx::load_shared_16(at), expected);
    ++found;
    __syncwarp();
    pipeline.release(state);
    state.advance();
  }
  atomicAdd(errors, wrong);
  atomicAdd(pieces, found);
}

// ---- tiles ----

struct QueueParams {
  TileOrder order;
  int* counter;        // zero
  int *times, *block;  // (consumer warps, tiles): how often a tile was taken, and by which block
};

__global__ void queue_kernel(const __grid_constant__ QueueParams p) {
  __shared__ uint64_t memory[(TileQueue::kBytes + 7) / 8];
  const int warp = threadIdx.x / 32, consumer_warps = blockDim.x / 32 - 1;
  TileQueue queue(ptx::smem_address(memory));
  if (threadIdx.x == 0) {
    queue.pipeline.init(consumer_warps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warp == 0) {
    for (int next = blockIdx.x; threadIdx.x == 0;) {
      const int index = next;
      queue.publish(index);
      if (index >= p.order.num_tiles) return;
      next = ptx::num_blocks() + atomicAdd(p.counter, 1);
    }
    return;
  }
  for (int step = 0;; ++step) {
    const int index = queue.take();
    if (index >= p.order.num_tiles) return;
    nap(step);
    if (threadIdx.x % 32 == 0) {
      const int64_t at = static_cast<int64_t>(warp - 1) * p.order.num_tiles + index;
      atomicAdd(p.times + at, 1);
      p.block[at] = blockIdx.x;
    }
  }
}

__global__ void order_kernel(const __grid_constant__ TileOrder order, int* tiles) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < order.num_tiles;
       i += gridDim.x * blockDim.x) {
    const TileOrder::Tile tile = order[i];
    tiles[3 * i] = tile.m_block;
    tiles[3 * i + 1] = tile.head;
    tiles[3 * i + 2] = tile.batch;
  }
}

// ---- dependent launch ----

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// Writes only once the next kernel runs, or after two seconds.
__global__ void first_kernel(volatile int* started, int* data, int* overlapped) {
  ptx::grid_dependents_launch();
  const uint64_t begin = nanoseconds();
  while (*started == 0 && nanoseconds() - begin < 2000000000ull) __nanosleep(1000);
  if (threadIdx.x == 0 && blockIdx.x == 0) *overlapped = *started != 0;
  __nanosleep(100000);  // a reader that does not wait for this kernel is early
  data[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

__global__ void second_kernel(volatile int* started, const volatile int* data, int* seen) {
  if (threadIdx.x == 0) *started = 1;
  ptx::grid_dependency_wait();
  seen[blockIdx.x * blockDim.x + threadIdx.x] = data[blockIdx.x * blockDim.x + threadIdx.x];
}

}  // namespace

LCTX_TEST lctx_test_ring(int stages, int consumer_warps, const void* source, int steps, int blocks,
                         int* errors, int* pieces, cudaStream_t stream) {
  return guarded([&] {
    with_value<1, 2, 3, 4, 5>("stages", stages, [&](auto s) {
      launch("ring_kernel", ring_kernel<s()>, blocks, 32 * (1 + consumer_warps), 0, stream,
             static_cast<const uint4*>(source), steps, consumer_warps, errors, pieces);
    });
  });
}

LCTX_TEST lctx_test_queue(int m_blocks, int heads, int batches, int heads_per_section, int blocks,
                          int consumer_warps, int* counter, int* times, int* block,
                          cudaStream_t stream) {
  return guarded([&] {
    const QueueParams p{TileOrder(m_blocks, heads, batches, heads_per_section), counter, times,
                        block};
    launch("queue_kernel", queue_kernel, blocks, 32 * (1 + consumer_warps), 0, stream, p);
  });
}

LCTX_TEST lctx_test_order(int m_blocks, int heads, int batches, int heads_per_section, int* tiles,
                          cudaStream_t stream) {
  return guarded([&] {
    launch("order_kernel", order_kernel, 64, 256, 0, stream,
           TileOrder(m_blocks, heads, batches, heads_per_section), tiles);
  });
}

// started: zero; data: zeros, blocks x 128; seen: the same size.
LCTX_TEST lctx_test_dependent_launch(int blocks, int* started, int* data, int* seen,
                                     int* overlapped, cudaStream_t stream) {
  return guarded([&] {
    // Loaded at its first use otherwise, which waits for running kernels.
    cudaFuncAttributes attributes;
    cudaFuncGetAttributes(&attributes, second_kernel);
    first_kernel<<<blocks, 128, 0, stream>>>(started, data, overlapped);
    check_launch("first_kernel", blocks, 128, stream);
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(128);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, second_kernel, static_cast<volatile int*>(started),
                       static_cast<const volatile int*>(data), seen);
    check_launch("second_kernel", blocks, 128, stream);
    const cudaError_t error = cudaStreamSynchronize(stream);
    LCTX_CHECK(error == cudaSuccess, "dependent launch failed: ", cudaGetErrorString(error));
  });
}

}  // namespace lctx::tests
