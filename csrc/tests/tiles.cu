// Tiles in shared memory: what TMA, stmatrix and ldmatrix make of them, and sums in global memory.
#include "../common/ptx.cuh"
#include "device_tests.h"
#include "fragments.cuh"

namespace lctx::tests {
namespace {

constexpr int kThreads = 128;

// ---- one box: load, look, store ----

struct CopyParams {
  CUtensorMap load, store;
  int loads, stores;  // 0: the tile comes from `source`; nothing is stored
  int load_at[5], store_at[5];
  int tile_bytes, vector_bytes, rows;
  const uint4* source;   // the tile as it lies in shared memory
  const float* vector;   // rides on the tile's barrier
  uint4 *raw, *ordered;  // the tile as it lies in shared memory, and by swizzled_unit
  float* vector_out;
};

__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyParams p) {
  extern __shared__ char shared[];
  char* base = shared + (-ptx::smem_address(shared) & 1023);
  const uint32_t tile = ptx::smem_address(base), vector = tile + p.tile_bytes;
  const uint32_t barrier = vector + p.vector_bytes;
  auto* units = reinterpret_cast<uint4*>(base);
  const int num_units = p.tile_bytes / 16;
  // All ones first: what TMA must fill with zeros may not be zero by chance.
  for (int i = threadIdx.x; i < num_units + p.vector_bytes / 16; i += kThreads) {
    units[i] = p.source != nullptr && i < num_units ? p.source[i] : uint4{~0u, ~0u, ~0u, ~0u};
  }
  ptx::fence_async_proxy();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(barrier, (p.loads ? p.tile_bytes : 0) + p.vector_bytes);
    if (p.loads) {
      const int* c = p.load_at;
      ptx::prefetch_tensor_map(&p.load);
      ptx::tma_load_5d(tile, &p.load, barrier, c[0], c[1], c[2], c[3], c[4]);
    }
    if (p.vector_bytes > 0) ptx::bulk_load(vector, p.vector, barrier, p.vector_bytes);
  }
  ptx::mbarrier_wait(barrier, 0);
  const int per_row = num_units / p.rows;
  for (int i = threadIdx.x; i < num_units; i += kThreads) {
    p.raw[i] = units[i];
    p.ordered[i] = ptx::load_shared_16(tile + swizzled_unit(p.rows, i / per_row, i % per_row));
  }
  const auto* floats = reinterpret_cast<const float*>(base + p.tile_bytes);
  for (int i = threadIdx.x; i < p.vector_bytes / 4; i += kThreads) p.vector_out[i] = floats[i];
  if (!p.stores) return;
  if (threadIdx.x == 0) {
    const int* c = p.store_at;
    ptx::tma_store_5d(&p.store, tile, c[0], c[1], c[2], c[3], c[4]);
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_units; i += kThreads) units[i] = {};  // it has been read
  if (threadIdx.x == 0) ptx::tma_store_wait<0>();
}

// ---- fragments: registers -> stmatrix -> TMA store, and back by ldmatrix, transposed and not ----

struct FragmentParams {
  CUtensorMap out;              // (64, N)
  const float* in;              // (64, N)
  uint32_t *read, *read_trans;  // (N / 16, 128, 4): what ldmatrix_x4 gives each thread
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    fragment_kernel(const __grid_constant__ FragmentParams p) {
  extern __shared__ char shared[];
  const uint32_t tile = (ptx::smem_address(shared) + 1023) & ~1023u;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  float d[N / 2];
  uint32_t a[N / 16][4];
  load_fragment<N>(d, p.in, N);
  accumulator_to_a<T, N>(d, a);
#pragma unroll
  for (int t = 0; t < N / 16; ++t) {
    ptx::stmatrix_x4(tile + swizzled_unit(64, row, 2 * t + lane / 16), a[t][0], a[t][1], a[t][2],
                     a[t][3]);
  }
  ptx::fence_async_proxy();
  ptx::named_barrier_sync(1, kThreads);
  if (threadIdx.x == 0) {
    for (int c = 0; c < (N + kChunkColumns - 1) / kChunkColumns; ++c) {
      ptx::tma_store_5d(&p.out, tile + c * chunk_bytes(64), c * kChunkColumns, 0, 0, 0, 0);
    }
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }
  __syncthreads();
#pragma unroll 1
  for (int t = 0; t < N / 16; ++t) {
    const uint32_t at = tile + swizzled_unit(64, row, 2 * t + lane / 16);
    uint32_t plain[4], trans[4];
    ptx::ldmatrix_x4_trans(at, trans);
    __syncwarp();
    ptx::stmatrix_x4(at, 0, 0, 0, 0);
    __syncwarp();
    ptx::stmatrix_x4_trans(at, trans[0], trans[1], trans[2], trans[3]);
    __syncwarp();
    ptx::ldmatrix_x4(at, plain);  // as before
    for (int i = 0; i < 4; ++i) {
      p.read[(t * kThreads + threadIdx.x) * 4 + i] = plain[i];
      p.read_trans[(t * kThreads + threadIdx.x) * 4 + i] = trans[i];
    }
  }
  if (threadIdx.x == 0) ptx::tma_store_wait<0>();
}

// ---- sums: many blocks add to one tile of 64 x 32 floats ----

constexpr int kSumRows = 64, kSumUnits = 8;  // 16-byte units of a row

enum SumForm { kTensor = 0, kBulk = 1, kRegisterVector = 2 };

struct SumParams {
  CUtensorMap map;
  int at[5];
  const float4* source;  // (64, 32); block b adds source + b
  float* out;            // bulk and register forms: (64, 32)
  int form, swizzled, times;
};

__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumParams p) {
  __shared__ alignas(1024) char tile[kSumRows * kSumUnits * 16];
  const float b = static_cast<float>(blockIdx.x);
  ptx::prefetch_l2(p.source + threadIdx.x);
  for (int i = threadIdx.x; i < kSumRows * kSumUnits; i += kThreads) {
    const float4 x = p.source[i];
    const int at = p.swizzled ? swizzled_unit(kSumRows, i / kSumUnits, i % kSumUnits) : i * 16;
    *reinterpret_cast<float4*>(tile + at) = {x.x + b, x.y + b, x.z + b, x.w + b};
    for (int k = 0; p.form == kRegisterVector && k < p.times; ++k) {
      ptx::red_add_v4(p.out + 4 * i, x.x + b, x.y + b, x.z + b, x.w + b);
    }
  }
  ptx::fence_async_proxy();
  __syncthreads();
  if (threadIdx.x != 0 || p.form == kRegisterVector) return;
  const uint32_t src = ptx::smem_address(tile);
  for (int k = 0; k < p.times; ++k) {
    if (p.form == kTensor) {
      ptx::tma_reduce_add_5d(&p.map, src, p.at[0], p.at[1], p.at[2], p.at[3], p.at[4]);
    } else {
      ptx::bulk_reduce_add(p.out, src, sizeof(tile));
    }
    ptx::tma_store_commit();
  }
  ptx::tma_store_wait<0>();
}

}  // namespace

// As Python fills it in.
struct CopyArgs {
  MapArgs load, store;  // data null: none
  int32_t load_at[5], store_at[5];
  int32_t tile_bytes, vector_bytes, rows;
  void *source, *vector, *raw, *ordered, *vector_out;
};

LCTX_TEST lctx_test_copy(const CopyArgs* args, cudaStream_t stream) {
  return guarded([&] {
    CopyParams p{};
    p.loads = args->load.data != nullptr;
    p.stores = args->store.data != nullptr;
    if (p.loads) p.load = make_test_map(args->load);
    if (p.stores) p.store = make_test_map(args->store);
    for (int i = 0; i < 5; ++i) {
      p.load_at[i] = args->load_at[i];
      p.store_at[i] = args->store_at[i];
    }
    p.tile_bytes = args->tile_bytes;
    p.vector_bytes = args->vector_bytes;
    p.rows = args->rows;
    p.source = static_cast<const uint4*>(args->source);
    p.vector = static_cast<const float*>(args->vector);
    p.raw = static_cast<uint4*>(args->raw);
    p.ordered = static_cast<uint4*>(args->ordered);
    p.vector_out = static_cast<float*>(args->vector_out);
    launch("copy_kernel", copy_kernel, 1, kThreads, p.tile_bytes + p.vector_bytes + 16 + 1024,
           stream, p);
  });
}

LCTX_TEST lctx_test_fragments(int type, int N, const float* in, void* out, uint32_t* read,
                              uint32_t* read_trans, cudaStream_t stream) {
  return guarded([&] {
    const FragmentParams p{make_matrix_map(type, out, 64, N, 64), in, read, read_trans};
    with_type(type, [&](auto t) {
      with_value<64, 80, 128, 256>("N", N, [&](auto n) {
        launch("fragment_kernel", fragment_kernel<decltype(t), n()>, 1, kThreads,
               (N + 63) / 64 * chunk_bytes(64) + 1024, stream, p);
      });
    });
  });
}

LCTX_TEST lctx_test_sum(int form, const MapArgs* map, const int* at, const float* source,
                        float* out, int blocks, int times, cudaStream_t stream) {
  return guarded([&] {
    SumParams p{};
    if (form == kTensor) {
      p.map = make_test_map(*map);
      p.swizzled = map->swizzle == 128;
      for (int i = 0; i < 5; ++i) p.at[i] = at[i];
    }
    p.source = reinterpret_cast<const float4*>(source);
    p.out = out;
    p.form = form;
    p.times = times;
    launch("sum_kernel", sum_kernel, blocks, kThreads, 0, stream, p);
  });
}

}  // namespace lctx::tests
