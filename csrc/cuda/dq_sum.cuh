// Math: dQ = scale * (sum over the keys), summed in fp32 by the fused backward and rounded once.
// Tile map: per (batch, query head), blocks of dq_block_rows queries; a block is two parts of 64 x
//       64, one per warpgroup (halves of the columns, or for D <= 64 halves of the rows), each in
//       the order of its accumulator registers, so that all threads add to neighbouring 16 bytes:
//       [part][8 columns j][thread][4]. unpack_dq.cu puts it into (B, T, H, D).
// Pipeline: none.
// Memory: 4 bytes an element, D rounded up to 64 or 128, Tq to whole blocks.
// Limits: D <= 128.
#pragma once

#include "../common/math.cuh"
#include "../common/wgmma_layout.h"

namespace lctx::cuda {

constexpr int kDqPartFloats = 64 * 64;

LCTX_HOST_DEVICE constexpr int dq_block_rows(int head_dim) { return head_dim <= 64 ? 128 : 64; }
LCTX_HOST_DEVICE constexpr int dq_blocks(int64_t Tq, int head_dim) {
  return static_cast<int>((Tq + dq_block_rows(head_dim) - 1) / dq_block_rows(head_dim));
}
// Blocks of attn_bwd_tall.cuh, by warps: [warp][8 columns j][lane][4], in the
// order of its registers. At D 65 .. 128 they have 80 queries, transposed: a warp has 16 columns of
// all of them, and j counts 8 queries.
LCTX_HOST_DEVICE constexpr int tall_block_rows(int head_dim) { return head_dim <= 64 ? 128 : 80; }
LCTX_HOST_DEVICE constexpr int tall_warp_floats(int head_dim) {
  return tall_block_rows(head_dim) * (head_dim <= 64 ? 64 : 128) / 8;
}
constexpr int64_t dq_sum_floats(int64_t batches, int64_t heads, int64_t Tq, int head_dim) {
  return batches * heads * dq_blocks(Tq, head_dim) * 2 * kDqPartFloats;
}

// Where columns 2 place + {0, 1} (place 0 .. 3) of a row of a block lie, `row` counted from this
// block or an earlier one; those of the j-th eight columns dq_sum_columns(j) behind.
template <int kHeadDim>
LCTX_HOST_DEVICE constexpr int64_t dq_block_place(int64_t block, int row, int place) {
  const int part = kHeadDim == 64 ? row / 64 % 2 : 0;
  return (2 * block + part) * kDqPartFloats + (row % 64 / 16 * 32 + row % 8 * 4 + place) * 4 +
         row / 8 % 2 * 2;
}
// The same for row `row` of a (batch, query head).
template <int kHeadDim>
LCTX_HOST_DEVICE constexpr int64_t dq_sum_place(int64_t head, int Tq, int row, int place) {
  const int64_t block = head * dq_blocks(Tq, kHeadDim) + row / dq_block_rows(kHeadDim);
  return dq_block_place<kHeadDim>(block, row, place);
}
LCTX_HOST_DEVICE constexpr int dq_sum_columns(int j) { return j / 8 * kDqPartFloats + j % 8 * 512; }

}  // namespace lctx::cuda
