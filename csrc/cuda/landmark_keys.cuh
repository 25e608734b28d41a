// Math: none; which keys a tile of the key-stationary backward of landmark attention works on.
// Tile map: the tiles of landmark_tables.h of 64 keys, one a warpgroup (attn_bwd_wide.cuh: one for
//       both): its keys are in one group, whose statistics (landmark_bwd.h) take the place of the
//       rows'. A group's landmark is the last key of its last piece. A query sees a key if it is
//       not before it.
// Pipeline: as attn_bwd_sm90.cuh; statistics are loaded 16 bytes at a time.
// Memory: 12 bytes a group and row, once for each 64 keys (L2).
// Limits: as attn_bwd_sm90.cuh.
#pragma once

#include "attn_bwd_tiles.cuh"
#include "landmark_bwd.h"
#include "landmark_tables.h"

namespace lctx::cuda {

// kPieces: 64 keys each, of a tile.
template <int kPieces>
struct LandmarkKeys {
  struct Params {
    const LandmarkTile* tiles;  // (B, max_tiles), those not used beyond all keys
    const int* groups;          // (B, max_tiles)
    int max_tiles;              // even
    LandmarkVectors vectors;
  };
  static constexpr bool kStrided = false;

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    KeyWork work;
    work.head = tile.head;
    work.batch = tile.batch;
    set_heads(p, work);
    work.piece = tile.batch * p.max_tiles + tile.m_block * kPieces;
    const LandmarkTile first = p.tiles[work.piece];
    work.key0 = max(first.row0, first.begin());
    work.key_end = p.Tk;
    work.query_begin = 0;
    work.query_end = p.Tq;
    work.shift = p.query_offset;
    return work;
  }

  template <class P>
  static __device__ __forceinline__ int has_landmark(const P& p, const KeyWork& work,
                                                     int warpgroup) {
    return p.tiles[work.piece + warpgroup].has_landmark();
  }

  // What row `row` of the tile is seen by.
  template <class P>
  static __device__ __forceinline__ int2 queries_of_row(const P& p, const KeyWork& work, int row) {
    const LandmarkTile piece = p.tiles[work.piece + row / 64];
    const int key = piece.row0 + row % 64;
    if (key < piece.begin()) return make_int2(0, -1);
    return queries_of<false>(p, work, key);
  }

  // What a piece is seen by, in blocks of kBlockM queries. kOnlyOwn: keys before the piece's must
  // be masked, or dQ would have their part; dK and dV of them are not kept.
  template <int kBlockM, bool kOnlyOwn, class P>
  static __device__ __forceinline__ QueryRange queries_of_piece(const P& p, const KeyWork& work,
                                                                int warpgroup) {
    const LandmarkTile piece = p.tiles[work.piece + warpgroup];
    QueryRange range =
        query_range<false, kBlockM>(p, work, max(piece.row0, piece.begin()), piece.row0 + 63);
    if (kOnlyOwn && piece.row0 < piece.begin()) range.full_begin = range.full_end = 0;
    return range;
  }
};

}  // namespace lctx::cuda
