// Finished rows on their way out of the registers.
#pragma once

#include "online_softmax_sm90.cuh"
#include "wgmma.cuh"

namespace lctx {

// Writes row `i` (0 or 1) of this thread's fragment, times `factor`, to columns first_column .. of
// `row`, of which the tensor has `columns`. The four threads of a row exchange columns so that each
// holds 16 bytes; all of them call it, `exists` says whether there is such a row.
template <class T, int N>
__device__ __forceinline__ void write_fragment_row(const float (&d)[N / 2], int i, float factor,
                                                   T* row, int first_column, int columns,
                                                   bool exists) {
  const int place = warpgroup_thread() % 4;
#pragma unroll
  for (int a = 0; a < N / 32; ++a) {
    uint32_t x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = 4 * (4 * a + j) + 2 * i;
      x[j] = pack2<T>(d[at] * factor, d[at + 1] * factor);
    }
    quad_transpose(x);
    const int column = first_column + 32 * a + 8 * place;
    if (exists && column < columns) {
      *reinterpret_cast<uint4*>(row + column) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

// Sets row `row` (0 or 1) of this thread's scores to -inf in all columns but low .. high, counted
// from this thread's first one, so that the loop compares with constants.
template <int N>
__device__ __forceinline__ void mask_columns(float (&s)[N / 2], int row, int low, int high) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * j + i > high || 8 * j + i < low) s[4 * j + 2 * row + i] = -INFINITY;
    }
  }
}

}  // namespace lctx
