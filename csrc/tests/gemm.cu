// Warpgroup products of wgmma.cuh: every shape, source and major order that the kernels use.
#include "../common/ptx.cuh"
#include "device_tests.h"
#include "fragments.cuh"

namespace lctx::tests {
namespace {

enum Source { kSharedK = 0, kSharedMN = 1, kRegisters = 2 };
constexpr int kRows = 128;          // two warpgroups of 64, so that the second starts in a tile
constexpr int kColumnsBefore = 64;  // of an MN-major B, so that a product may start in a tile

struct GemmParams {
  CUtensorMap a, b;
  float* d;            // (128, N): added to, or overwritten
  int depth, column0;  // column0: where in an MN-major B the product starts
  int accumulate;
  int a_rows, a_chunks, b_rows, b_chunks;  // of the stored tiles
};

// One warpgroup's 64 x N product; `a` and `b` are the tiles.
template <class T, int N, int kDepth, int kSource, int kMajorB>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint32_t a, uint32_t b,
                                         const GemmParams& p) {
  constexpr int kBRows = kMajorB == kMajorMN ? kDepth : N;
  const int warpgroup = threadIdx.x / 128;
  const bool accumulate = p.accumulate != 0;
  b += p.column0 / kChunkColumns * chunk_bytes(kBRows);
  if constexpr (kSource == kRegisters) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
    uint32_t fragments[kDepth / 16][4];
#pragma unroll
    for (int t = 0; t < kDepth / 16; ++t) {
      ptx::ldmatrix_x4(a + swizzled_unit(kRows, row, 2 * t + lane / 16), fragments[t]);
    }
    wgmma_fence();
    if constexpr (kMajorB == kMajorMN) {
      gemm_rn<T, N, kDepth>(d, fragments, b, kBRows, accumulate);
    } else {
      gemm_rs<T, N, kDepth, kMajorB>(d, fragments, b, kBRows, accumulate);
    }
  } else if constexpr (kSource == kSharedMN) {
    a += warpgroup * chunk_bytes(kDepth);
    wgmma_fence();
    if constexpr (kMajorB == kMajorMN) {
      gemm_tn<T, N, kDepth>(d, a, kDepth, b, kBRows, accumulate);
    } else {
      gemm_ss<T, N, kDepth, kMajorMN, kMajorB>(d, a, kDepth, b, kBRows, accumulate);
    }
  } else {
    a += warpgroup * 64 * kChunkRowBytes;
    wgmma_fence();
    if constexpr (kMajorB == kMajorK) {
      gemm_nt<T, N, kDepth>(d, a, kRows, b, kBRows, accumulate);
    } else {
      gemm_ss<T, N, kDepth, kMajorK, kMajorB>(d, a, kRows, b, kBRows, accumulate);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
}

__device__ __forceinline__ void load_tile(uint32_t tile, const CUtensorMap& map, uint32_t barrier,
                                          int rows, int chunks) {
#pragma unroll 1
  for (int c = 0; c < chunks; ++c) {
    ptx::tma_load_5d(tile + c * chunk_bytes(rows), &map, barrier, c * kChunkColumns, 0, 0, 0, 0);
  }
}

template <class T, int N, int kSource, int kMajorB>
__global__ void __launch_bounds__(256) gemm_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ char shared[];
  const uint32_t a = (ptx::smem_address(shared) + 1023) & ~1023u;
  const uint32_t b = a + p.a_chunks * chunk_bytes(p.a_rows);
  const uint32_t barrier = b + p.b_chunks * chunk_bytes(p.b_rows);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, barrier - a);
    load_tile(a, p.a, barrier, p.a_rows, p.a_chunks);
    load_tile(b, p.b, barrier, p.b_rows, p.b_chunks);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  float* rows = p.d + threadIdx.x / 128 * 64 * N;
  float d[N / 2];
  load_fragment<N>(d, rows, N);
  if (p.depth == 64) {
    multiply<T, N, 64, kSource, kMajorB>(d, a, b, p);
  } else if (p.depth == 128) {
    multiply<T, N, 128, kSource, kMajorB>(d, a, b, p);
  } else {
    multiply<T, N, 256, kSource, kMajorB>(d, a, b, p);
  }
  store_fragment<N>(d, rows, N);
}

struct ChainParams {
  CUtensorMap b;
  const float* s;  // (64, depth)
  float* d;        // (64, 64)
};

// An accumulator as the A operand of the next product: d = T(s) B, B stored (depth, 64).
template <class T, int kDepth>
__global__ void __launch_bounds__(128) chain_kernel(const __grid_constant__ ChainParams p) {
  extern __shared__ char shared[];
  const uint32_t b = (ptx::smem_address(shared) + 1023) & ~1023u;
  const uint32_t barrier = b + chunk_bytes(kDepth);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, chunk_bytes(kDepth));
    load_tile(b, p.b, barrier, kDepth, 1);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  float s[kDepth / 2], d[32];
  uint32_t a[kDepth / 16][4];
  load_fragment<kDepth>(s, p.s, kDepth);
  accumulator_to_a<T, kDepth>(s, a);
  wgmma_fence();
  gemm_rn<T, 64, kDepth>(d, a, b, kDepth, false);
  wgmma_commit();
  wgmma_wait<0>();
  store_fragment<64>(d, p.d, 64);
}

}  // namespace

// d (128, N) (+)= A B. A is stored (128, depth) or, source 1, (depth, 128); B (N, depth) or, major
// 1, (depth, 64 + N), of which columns column0 .. column0 + N count.
LCTX_TEST lctx_test_gemm(int type, int N, int depth, int source, int major_b, void* a, void* b,
                         float* d, int column0, int accumulate, cudaStream_t stream) {
  return guarded([&] {
    LCTX_CHECK(depth == 64 || depth == 128 || depth == 256, "depth = ", depth);
    const int a_columns = source == kSharedMN ? kRows : depth;
    const int b_columns = major_b == kMajorMN ? kColumnsBefore + N : depth;
    GemmParams p;
    p.d = d;
    p.depth = depth;
    p.column0 = column0;
    p.accumulate = accumulate;
    p.a_rows = source == kSharedMN ? depth : kRows;
    p.a_chunks = a_columns / kChunkColumns;
    p.b_rows = major_b == kMajorMN ? depth : N;
    p.b_chunks = (b_columns + kChunkColumns - 1) / kChunkColumns;
    p.a = make_matrix_map(type, a, p.a_rows, a_columns, p.a_rows);
    p.b = make_matrix_map(type, b, p.b_rows, b_columns, p.b_rows);
    const int bytes = p.a_chunks * chunk_bytes(p.a_rows) + p.b_chunks * chunk_bytes(p.b_rows);
    const auto run = [&](auto t, auto n, auto s, auto mb) {
      launch("gemm_kernel", gemm_kernel<decltype(t), n(), s(), mb()>, 1, 256, bytes + 16 + 1024,
             stream, p);
    };
    with_type(type, [&](auto t) {
      with_value<32, 48, 64, 80, 96, 128, 176, 256>("N", N, [&](auto n) {
        with_value<kSharedK, kSharedMN, kRegisters>("source", source, [&](auto s) {
          with_value<kMajorK, kMajorMN>("major_b", major_b, [&](auto mb) { run(t, n, s, mb); });
        });
      });
    });
  });
}

LCTX_TEST lctx_test_chain(int type, int depth, const float* s, void* b, float* d,
                          cudaStream_t stream) {
  return guarded([&] {
    const ChainParams p{make_matrix_map(type, b, depth, 64, depth), s, d};
    with_type(type, [&](auto t) {
      with_value<48, 64, 80, 128, 176>("depth", depth, [&](auto k) {
        launch("chain_kernel", chain_kernel<decltype(t), k()>, 1, 128,
               chunk_bytes(depth) + 16 + 1024, stream, p);
      });
    });
  });
}

}  // namespace lctx::tests
