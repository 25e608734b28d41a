// Math: none; which keys a tile of landmark_fused.cuh works on, and where their gradients go.
// Tile map: UniformGroupKeys: 128 columns of keys, 128 / kWidth uniform blocks as in
//       landmark_scores.cuh: a block at the end of its group of kWidth columns, zeros in front.
//       StoreUniformGroups: dK and dV of the columns that are keys.
// Pipeline: as attn_bwd_tiles.cuh, attn_bwd_keys.cuh.
// Memory: K and V come through maps (column, key of the block, block, head, batch).
// Limits: as landmark_fused.cuh.
#pragma once

#include "attn_bwd_keys.cuh"

namespace lctx::cuda {

// Whole blocks, 128 / kWidth of them a tile; the keys of an incomplete last one are a tile of their
// own.
template <int kWidth>
struct UniformGroupKeys {
  struct Params {
    int block_size;
    int padding;       // kWidth - block_size
    int whole_blocks;  // blocks with a landmark
    int whole_tiles;   // tiles of whole blocks
  };
  static constexpr bool kStrided = false, kPadded = true;
  static constexpr int kGroups = 128 / kWidth;

  template <class P>
  static __device__ __forceinline__ int first_block(const P& p, const KeyWork& work) {
    return work.map == 0 ? work.piece * kGroups : p.whole_blocks;
  }

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    KeyWork work;
    work.head = tile.head;
    work.batch = tile.batch;
    set_heads(p, work);
    work.piece = tile.m_block;
    work.map = ptx::opaque(tile.m_block < p.whole_tiles ? 0 : 1);
    work.key0 = first_block(p, work) * p.block_size;
    work.key_end = p.Tk;
    work.query_begin = 0;
    work.query_end = p.Tq;
    work.shift = p.query_offset;
    return work;
  }

  // Coordinates of the tile in its map: of whole blocks (key of the block, block), else (key, 0).
  template <class P>
  static __device__ __forceinline__ int2 keys_at(const P& p, const KeyWork& work) {
    return work.map == 0 ? make_int2(-p.padding, work.piece * kGroups)
                         : make_int2(work.key0 - p.padding, 0);
  }
};

template <int kWidth>
struct StoreUniformGroups {
  struct Params {};
  static constexpr bool kPrefetches = false, kReadsKeys = false;

  template <class Kernel, int N>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const KeyWork& work, const float (&dk)[N],
                                                const float (&dv)[N]) {
    const auto& p = kernel.p;
    const int key_end = work.map == 0 ? p.whole_blocks * p.block_size : p.Tk;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warpgroup * 64 + fragment_row(warpgroup_thread()) + 8 * i;
      const int column = row % kWidth - p.padding;
      const int key = work.key0 + row / kWidth * p.block_size + column;
      const bool exists = column >= 0 && key < key_end;
      StoreKeys::store_row(kernel, work, key, exists, dv, i, 1.f, p.dv);
      StoreKeys::store_row(kernel, work, key, exists, dk, i, p.scale, p.dk);
    }
  }
};

}  // namespace lctx::cuda
