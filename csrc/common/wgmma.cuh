// Warpgroup matrix products on tiles in 128-byte-swizzled shared memory.
//
// wgmma_layout.h says how a tile is stored. "K-major": rows are M or N, columns are K. "MN-major":
// rows are K, columns are M or N.
#pragma once

#include "ptx.cuh"
#include "wgmma_layout.h"
#include "wgmma_shapes.cuh"

namespace lctx {

constexpr int kSwizzle128 = 1;  // layout field of the descriptor
constexpr int kMajorK = 0, kMajorMN = 1;

// Descriptor of the operand at `address`, `offset` bytes into a tile. `leading` is the distance
// between 64-column chunks (MN-major operands that span several); 8 rows are always 1024 bytes
// apart. The halves are put together here so that steps differ by one 32-bit constant.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, int offset, int leading) {
  constexpr uint32_t kHigh = (1024u >> 4) | static_cast<uint32_t>(kSwizzle128) << 30;
  const uint32_t low = (address >> 4) + ((offset >> 4) | (leading >> 4) << 16);
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "n"(kHigh));
  return descriptor;
}

// Operand of 16-deep step `t`.
template <int kMajor>
__device__ __forceinline__ uint64_t operand_step(uint32_t tile, int rows, int t) {
  return kMajor == kMajorK ? wgmma_descriptor(tile, t / 4 * chunk_bytes(rows) + t % 4 * 32, 0)
                           : wgmma_descriptor(tile, t * 16 * kChunkRowBytes, chunk_bytes(rows));
}

// Between the last ordinary access to accumulators or A registers and the first wgmma on them.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `kPending` committed groups of this warpgroup are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// D (64 x N) (+)= A B over `kDepth`, both tiles in shared memory. a_rows, b_rows: rows of the
// stored tiles, which set the distance between chunks.
template <class T, int N, int kDepth, int kMajorA, int kMajorB>
__device__ __forceinline__ void gemm_ss(float (&d)[N / 2], uint32_t a, int a_rows, uint32_t b,
                                        int b_rows, bool accumulate) {
#pragma unroll
  for (int t = 0; t < kDepth / 16; ++t) {
    ptx::Wgmma<T, N>::template ss<kMajorA, kMajorB>(d, operand_step<kMajorA>(a, a_rows, t),
                                                    operand_step<kMajorB>(b, b_rows, t),
                                                    accumulate || t != 0);
  }
}

// The same with A in registers, four per 16-deep step.
template <class T, int N, int kDepth, int kMajorB>
__device__ __forceinline__ void gemm_rs(float (&d)[N / 2], const uint32_t (&a)[kDepth / 16][4],
                                        uint32_t b, int b_rows, bool accumulate) {
#pragma unroll
  for (int t = 0; t < kDepth / 16; ++t) {
    ptx::Wgmma<T, N>::template rs<kMajorB>(d, a[t], operand_step<kMajorB>(b, b_rows, t),
                                           accumulate || t != 0);
  }
}

// D = A B^T, both stored with depth in their columns (scores: Q K^T).
template <class T, int N, int kDepth>
__device__ __forceinline__ void gemm_nt(float (&d)[N / 2], uint32_t a, int a_rows, uint32_t b,
                                        int b_rows, bool accumulate = false) {
  gemm_ss<T, N, kDepth, kMajorK, kMajorK>(d, a, a_rows, b, b_rows, accumulate);
}

// D (+)= A^T B, both stored with depth in their rows (dQ = dS K with dS^T stored; K^T V).
template <class T, int N, int kDepth>
__device__ __forceinline__ void gemm_tn(float (&d)[N / 2], uint32_t a, int a_rows, uint32_t b,
                                        int b_rows, bool accumulate) {
  gemm_ss<T, N, kDepth, kMajorMN, kMajorMN>(d, a, a_rows, b, b_rows, accumulate);
}

// D (+)= A B, A in registers, B stored with depth in its rows (P V).
template <class T, int N, int kDepth>
__device__ __forceinline__ void gemm_rn(float (&d)[N / 2], const uint32_t (&a)[kDepth / 16][4],
                                        uint32_t b, int b_rows, bool accumulate) {
  gemm_rs<T, N, kDepth, kMajorMN>(d, a, b, b_rows, accumulate);
}

// ---- fragments: which element of a 64-row accumulator a thread holds ----

// Thread of the warpgroup. Opaque: what follows from it (addresses, rows) is computed where it is
// used instead of being kept in registers, or spilled, through a main loop.
__device__ __forceinline__ int warpgroup_thread() {
  return ptx::opaque(static_cast<int>(threadIdx.x % 128));
}

// Register 4 j + {0, 1} of thread `thread` (0..127): row fragment_row, columns 8 j +
// fragment_column + {0, 1}; register 4 j + {2, 3}: 8 rows below.
// Unsigned arithmetic takes fewer instructions.
__device__ __forceinline__ int fragment_row(int thread) {
  const uint32_t t = static_cast<uint32_t>(thread);
  return static_cast<int>(t / 32 * 16 + t % 32 / 4);
}
__device__ __forceinline__ int fragment_column(int thread) { return (thread & 3) * 2; }

// Scales the two rows of an accumulator of N columns.
template <int N>
__device__ __forceinline__ void scale_rows(float (&d)[N / 2], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] *= factor[i / 2 % 2];
}

// Addresses for stmatrix and ldmatrix: the 64 rows from `first_row` on of a tile of kRows rows, 16
// columns at a time.
template <int kRows>
struct FragmentAddress {
  uint32_t row, unit;

  __device__ __forceinline__ FragmentAddress(uint32_t tile, int first_row, int thread) {
    const uint32_t t = static_cast<uint32_t>(thread), r = t / 32 * 16 + t % 16;
    row = tile + (static_cast<uint32_t>(first_row) + r) * kChunkRowBytes;
    unit = (t / 16 % 2 ^ r % 8) << 4;  // first_row is a multiple of 8
  }
  // This lane's row of columns 16 t .. 16 t + 15.
  __device__ __forceinline__ uint32_t operator()(int t) const {
    return row + t / 4 * chunk_bytes(kRows) + (unit ^ t % 4 * 32);
  }
};

template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// Products of both elements of two packs.
template <class T>
__device__ __forceinline__ uint32_t multiply2(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t multiply2<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
__device__ __forceinline__ uint32_t multiply2<__half>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// The accumulator of N columns as A operand of N / 16 steps.
template <class T, int N>
__device__ __forceinline__ void accumulator_to_a(const float (&d)[N / 2],
                                                 uint32_t (&a)[N / 16][4]) {
#pragma unroll
  for (int t = 0; t < N / 16; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[t][i] = pack2<T>(d[8 * t + 2 * i], d[8 * t + 2 * i + 1]);
  }
}

// D (16 x 8) += A B by one warp alone, fragments as those of a warp's rows above: A of a 16-deep
// step, B (8 x 16, K-major) as ldmatrix reads its two halves.
template <class T>
__device__ __forceinline__ void warp_mma(float* d, const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1);
template <>
__device__ __forceinline__ void warp_mma<__nv_bfloat16>(float* d, const uint32_t (&a)[4],
                                                        uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void warp_mma<__half>(float* d, const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The 64 x 64 scores A B^T over `depth` columns that a warpgroup's product gives, of this warp's 16
// rows. a, b: tiles of kRowsA and kRowsB rows, stored with depth in their columns.
template <class T, int kDepth, int kRowsA, int kRowsB>
__device__ __forceinline__ void warp_scores(float (&d)[32], uint32_t a, uint32_t b) {
  const int thread = warpgroup_thread();
  const FragmentAddress<kRowsA> rows(a, 0, thread);
#pragma unroll
  for (int i = 0; i < 32; ++i) d[i] = 0.f;
#pragma unroll 1
  for (int t = 0; t < kDepth / 16; ++t) {
    uint32_t x[4], y[4];
    ptx::ldmatrix_x4(rows(t), x);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      ptx::ldmatrix_x4(FragmentAddress<kRowsB>(b, 16 * n, thread % 32)(t), y);
      warp_mma<T>(d + 8 * n, x, y[0], y[2]);
      warp_mma<T>(d + 8 * n + 4, x, y[1], y[3]);
    }
  }
}

}  // namespace lctx
