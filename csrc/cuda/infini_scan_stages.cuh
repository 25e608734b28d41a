// Math: what the two scans of the delta rule share (infini_delta_scan_fwd.cu,
//       infini_delta_scan_bwd.cu): the fragments of their matrices, and the loop over the stages of
//       the matrix that they multiply with.
// Tile map: warpgroup w has rows 64 w .. of kColumns columns, as the accumulator of a product.
// Pipeline: a stage is given back when the products of the one after it have been issued. All loads
//       of a matrix are under way before anything waits for one of them.
// Memory: the stages; pairs of neighbouring columns of an fp32 matrix.
// Limits: `kernel` has smem, pipe, state and Traits::kStageBytes.
#pragma once

#include "../common/pipeline.cuh"
#include "../common/wgmma.cuh"

namespace lctx::cuda {

// This thread's pairs of columns of a D x D matrix, from column0 on: registers 2 j, 2 j + 1.
template <int kColumns>
struct ScanFragment {
  static constexpr int kPairs = kColumns / 4;
  using Pairs = float2[kPairs];
  using Sums = float[2 * kPairs];

  int first, below;  // where its first pair lies, and how far behind it that of 8 rows below
  int columns[2];    // of the two rows, inside

  static __device__ __forceinline__ int row(int j) {
    return threadIdx.x / 128 * 64 + fragment_row(threadIdx.x % 128) + 8 * (j % 2);
  }
  static __device__ __forceinline__ int column(int j) {
    return j / 2 * 8 + fragment_column(threadIdx.x % 128);
  }

  __device__ __forceinline__ ScanFragment(int D, int column0)
      : first(row(0) * D + column0 + column(0)),
        below(8 * D),
        columns{row(0) < D ? D - column0 : 0, row(1) < D ? D - column0 : 0} {}

  // Calls use(place, j) for the pairs inside, else otherwise(j). D and column0 are multiples of 8.
  template <class Use, class Otherwise>
  __device__ __forceinline__ void for_pairs(Use&& use, Otherwise&& otherwise) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (j / 2 * 8 < columns[j % 2]) {
        use(first + j % 2 * below + j / 2 * 8, j);
      } else {
        otherwise(j);
      }
    }
  }
  template <class Use>
  __device__ __forceinline__ void for_pairs(Use&& use) const {
    for_pairs(use, [](int) {});
  }

  // Zero without a matrix, whose numbers are perhaps not aligned.
  __device__ __forceinline__ void load_first(const float* matrix, Sums& sums) const {
#pragma unroll
    for (float& sum : sums) sum = 0.f;
    if (matrix == nullptr) return;
    for_pairs([&](int at, int j) {
      sums[2 * j] = matrix[at];
      sums[2 * j + 1] = matrix[at + 1];
    });
  }

  __device__ __forceinline__ void load(const float* matrix, Pairs& pairs) const {
    const float* rows[2] = {matrix + first, matrix + first + below};
    for_pairs(
        [&](int, int j) { pairs[j] = *reinterpret_cast<const float2*>(rows[j % 2] + j / 2 * 8); },
        [&](int j) { pairs[j] = make_float2(0.f, 0.f); });
  }

  // The sum of `parts` matrices, of which matrix(i) is the i-th. The first is often the only one.
  template <class Matrix>
  __device__ __forceinline__ void load_parts(int parts, Matrix&& matrix, Pairs& pairs) const {
    load(matrix(0), pairs);
#pragma unroll 1
    for (int part = 1; part < parts; ++part) {
      Pairs more;
      load(matrix(part), more);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        pairs[j].x += more[j].x;
        pairs[j].y += more[j].y;
      }
    }
  }

  static __device__ __forceinline__ void add(const Pairs& pairs, Sums& sums) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      sums[2 * j] += pairs[j].x;
      sums[2 * j + 1] += pairs[j].y;
    }
  }

  __device__ __forceinline__ void store(float* matrix, const Sums& sums) const {
    float* rows[2] = {matrix + first, matrix + first + below};
    for_pairs([&](int, int j) {
      *reinterpret_cast<float2*>(rows[j % 2] + j / 2 * 8) =
          make_float2(sums[2 * j], sums[2 * j + 1]);
    });
  }
};

// issue(i, rows) starts the products of stage i, whose rows of this warpgroup are at `rows`.
template <class Kernel, int kCount, class Issue>
__device__ __forceinline__ void multiply_stages(Kernel& kernel, Issue&& issue) {
  auto last = kernel.state;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    kernel.pipe.wait(kernel.state);
    const uint32_t rows = kernel.smem + kernel.state.stage() * Kernel::Traits::kStageBytes +
                          threadIdx.x / 128 * chunk_bytes(64);
    wgmma_fence();
    issue(i, rows);
    wgmma_commit();
    if (i > 0) {
      wgmma_wait<1>();
      kernel.pipe.release(last);
    }
    last = kernel.state;
    kernel.state.advance();
  }
  wgmma_wait<0>();
  kernel.pipe.release(last);
}

}  // namespace lctx::cuda
