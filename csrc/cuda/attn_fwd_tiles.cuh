// Math: none; which rows and keys a tile of the forward works on.
// Tile map: a tile number stands for (query head, batch, rows). Ways to number them:
//       DenseTiles     row blocks of the whole sequence
//       PackedTiles    row blocks of the documents of cu_seqlens
//       SegmentTiles   row blocks of segments of w positions, of which every r-th is a row, from
//                      a phase that depends on the head (dilated attention; r = 1: local segments)
//       SplitTiles     few rows, many keys: the query heads of a group side by side in the rows,
//                      and the blocks of keys of all tiles dealt evenly to the thread blocks
// Pipeline: a tile is found again from its number wherever it is needed, which costs a few integer
//       instructions and saves registers.
// Memory: tensors are seen as (column, row, phase, head, batch), position = row * step + phase,
//       so that a dilated segment is a plain range of rows.
// Limits: 2^31 - 1 tiles and positions.
#pragma once

#include "../common/tile_schedule.cuh"
#include "../params.h"

namespace lctx::cuda {

struct FwdParams {
  // [1] is for phases that have one row less than phase 0 (SegmentTiles).
  CUtensorMap q[2], k[2], v[2], out[2];
  TensorView out_view;  // for rows that TMA would not clip
  float* lse;
  int* counter;  // zero at launch
  TileOrder order;
  FastDivisor per_group;  // query heads per key/value head
  int Hq, Tq, Tk, D;
  int query_offset;    // position of query 0 minus that of key 0 (DenseTiles)
  int row_shift;       // see row_shift(): the first tile starts so many rows early
  int causal, window;  // window 0: none
  float scale_log2;
};

// Where the tiles do not divide the rows, whole warpgroups that have nothing to do stand before the
// first row instead of after the last one: with a causal mask, in the shortest tile instead of the
// longest. A multiple of 64. Not worth its instructions with two warpgroups.
template <class Tile>
int row_shift(int64_t rows) {
  if (!Tile::kShifts) return 0;
  return static_cast<int>((ceil_div(rows, Tile::kBlockM) * Tile::kBlockM - rows) / 64 * 64);
}

// One query tile: rows [row0, row_end) of the tensor from row_begin on; row i sits at position0 + i
// - row0 among the num_keys keys that start at row key0.
struct Work {
  int row0, row_begin, row_end, position0, key0, num_keys;
  int head, batch;
  int phase = 0, map = 0;
  // SplitTiles: the first query head of the rows, the tile's share of the blocks of keys, and where
  // the partial result goes.
  int query_head = 0, block_begin = 0, block_end = 0, slot = 0;
  int column = 0;   // first value column of the tile
  int segment = 0;  // LocalTiles of infini_rows.cuh
};

// Tiles of the rows of one query head. Thread blocks take them from a counter.
struct OneHeadTiles {
  static constexpr bool kSplitsKeys = false;

  template <class P>
  static __device__ __forceinline__ int first(const P&) {
    return blockIdx.x;
  }
  template <class P>
  static __device__ __forceinline__ int next(const P& p, int) {
    return gridDim.x + atomicAdd(p.counter, 1);
  }
  template <class P>
  static __device__ __forceinline__ int end(const P& p) {
    return p.order.num_tiles;
  }
  // Row block `m_block` of the num_keys positions that start at row key0.
  template <int kBlockM, class P>
  static __device__ __forceinline__ void set_rows(const P& p, int m_block, Work& work) {
    work.position0 = m_block * kBlockM - p.row_shift;
    work.row0 = work.key0 + work.position0;
    work.row_begin = work.key0;
    work.row_end = work.key0 + work.num_keys;
  }
  // Position of row `row` of a tile, relative to row 0.
  template <class P>
  static __device__ __forceinline__ int position_of(const P&, int row) {
    return row;
  }
  // Coordinates 1 and 2 of row `row` of a tile in the map of the queries.
  template <class P>
  static __device__ __forceinline__ int2 query_at(const P&, const Work& work, int row) {
    return make_int2(work.row0 + row, work.phase);
  }
};

template <int kBlockM>
struct DenseTiles : OneHeadTiles {
  struct Params {};
  static constexpr bool kClipsRows = false;  // TMA clips tiles that end with the tensor
  static constexpr bool kStrided = false;    // position = row

  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    Work work;
    work.head = tile.head;
    work.batch = tile.batch;
    work.row0 = tile.m_block * kBlockM - p.row_shift;
    work.row_begin = 0;
    work.row_end = p.Tq;
    work.position0 = work.row0 + p.query_offset;
    work.key0 = 0;
    work.num_keys = p.Tk;
    return work;
  }
};

template <int kBlockM>
struct PackedTiles : OneHeadTiles {
  struct Params {
    const int32_t* cu_seqlens;  // (num_docs + 1) on the device
    int num_docs;
  };
  static constexpr bool kClipsRows = true;
  static constexpr bool kStrided = false;

  // Row blocks are slots: document d owns slots cu[d] / kBlockM + d and up, at least as many as it
  // needs, so that the number of slots is known without reading cu_seqlens.
  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    int low = 0, high = p.num_docs - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (p.cu_seqlens[middle] / kBlockM + middle <= tile.m_block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    // Clamped: wrong boundaries give wrong results, never a wrong address.
    const int begin = min(max(p.cu_seqlens[low], 0), p.Tq);
    Work work;
    work.head = tile.head;
    work.batch = tile.batch;
    work.position0 = (tile.m_block - begin / kBlockM - low) * kBlockM;
    work.row0 = begin + work.position0;
    work.row_begin = begin;
    work.row_end = min(p.cu_seqlens[low + 1], p.Tq);
    work.key0 = begin;
    work.num_keys = work.row_end - begin;
    return work;
  }
};

template <int kBlockM>
struct SegmentTiles : OneHeadTiles {
  struct Params {
    int segment_len, rate;
    int long_phases;          // phases below have one row more: Tq % rate
    bool offset_block;        // phase of head h: h % rate, or h / ceil(Hq / rate)
    FastDivisor per_segment;  // heads
    FastDivisor per_phase;    // rate
    FastDivisor per_offset;   // rate, or ceil(Hq / rate)
    const int32_t* seqlens;   // (B) true lengths, or nullptr
  };
  static constexpr bool kClipsRows = true;
  static constexpr bool kStrided = true;

  // The "heads" of the order are (segment, head), so that a segment's keys are used while they are
  // in the L2 cache.
  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    const int segment = p.per_segment.divide(tile.head);
    Work work;
    work.head = p.per_segment.modulo(tile.head);
    work.batch = tile.batch;
    // No branches here: predicated halves of wide products would stay alive through main loops.
    const int quotient = p.per_offset.divide(work.head);
    const int offset = p.offset_block ? quotient : work.head - quotient * p.per_offset.divisor;
    const int32_t* true_length = p.seqlens != nullptr ? p.seqlens + tile.batch : &p.Tq;
    const int length = min(max(*true_length, 0), p.Tq);
    const int begin = segment * p.segment_len;
    const int positions = min(p.segment_len, length - begin) - offset;
    work.key0 = p.per_phase.divide(begin + offset);
    work.phase = p.per_phase.modulo(begin + offset);
    work.map = work.phase < p.long_phases ? 0 : 1;
    work.num_keys = p.per_phase.divide(max(positions, 0) + p.rate - 1);
    set_rows<kBlockM>(p, tile.m_block, work);
    return work;
  }
};

// Row i of a unit (batch, key/value head, up to 64 query heads, kBlockM rows) is query head
// i % 2^head_bits of position i / 2^head_bits; rows of heads that the group does not have are
// padding. Every unit has blocks_per_unit blocks of keys. The units' blocks, one list, are dealt in
// contiguous ranges: of a span, which is a unit or all of them, thread block i gets `share` grains,
// one more if i < extra. Its tiles are the units that its range touches; tile c + unit of thread
// block c is a number of its own, as either grows by one from tile to tile.
template <int kBlockM>
struct SplitTiles {
  struct Params {
    int head_bits;                            // rows of one position: 2^head_bits heads
    int first_block, blocks_per_unit, grain;  // in blocks of keys
    int share, extra, span;                   // in grains
    FastDivisor per_span;                     // thread blocks
    FastDivisor per_unit;                     // blocks
    FastDivisor per_m;                        // row blocks per 64 query heads
    FastDivisor per_unit_group;               // row blocks per key/value head
    FastDivisor per_batch;                    // key/value heads
  };
  static constexpr bool kClipsRows = false;
  static constexpr bool kStrided = false;
  static constexpr bool kSplitsKeys = true;

  // The first block in the list of thread block `c`.
  template <class P>
  static __device__ __forceinline__ int range_begin(const P& p, int c) {
    const int span = p.per_span.divide(c), i = c - span * p.per_span.divisor;
    return (span * p.span + i * p.share + min(i, p.extra)) * p.grain;
  }
  template <class P>
  static __device__ __forceinline__ int first(const P& p) {
    return blockIdx.x + p.per_unit.divide(range_begin(p, blockIdx.x));
  }
  template <class P>
  static __device__ __forceinline__ int next(const P&, int index) {
    return index + 1;
  }
  template <class P>
  static __device__ __forceinline__ int end(const P& p) {
    return blockIdx.x + 1 + p.per_unit.divide(range_begin(p, blockIdx.x + 1) - 1);
  }
  template <class P>
  static __device__ __forceinline__ int position_of(const P& p, int row) {
    return row >> p.head_bits;
  }
  template <class P>
  static __device__ __forceinline__ int2 query_at(const P& p, const Work& work, int row) {
    return make_int2(work.query_head, (work.row0 + row) >> p.head_bits);
  }

  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    const int unit = index - blockIdx.x, unit_begin = unit * p.blocks_per_unit;
    const int group = p.per_unit_group.divide(unit), in_group = p.per_unit_group.modulo(unit);
    Work work;
    work.batch = p.per_batch.divide(group);
    work.head = p.per_batch.modulo(group);
    work.query_head = p.per_m.divide(in_group) * 64;
    work.row0 = p.per_m.modulo(in_group) * kBlockM;
    work.row_begin = 0;
    work.row_end = p.Tq << p.head_bits;
    work.position0 = (work.row0 >> p.head_bits) + p.query_offset;
    work.key0 = 0;
    work.num_keys = p.Tk;
    const int begin = max(range_begin(p, blockIdx.x) - unit_begin, 0);
    const int end = min(range_begin(p, blockIdx.x + 1) - unit_begin, p.blocks_per_unit);
    work.block_begin = p.first_block + begin;
    work.block_end = p.first_block + end;
    work.slot = index;
    return work;
  }
};

}  // namespace lctx::cuda
