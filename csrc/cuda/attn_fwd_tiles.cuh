// Math: none; which rows and keys a tile of the forward works on.
// Tile map: a tile number stands for (query head, batch, rows). Three ways to number them:
//       DenseTiles     row blocks of the whole sequence
//       PackedTiles    row blocks of the documents of cu_seqlens
//       SegmentTiles   row blocks of segments of w positions, of which every r-th is a row, from
//                      a phase that depends on the head (dilated attention; r = 1: local segments)
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
  int causal, window;  // window 0: none
  float scale_log2;
};

// One query tile: rows [row0, row_end) of the tensor; row i sits at position0 + i - row0 among the
// num_keys keys that start at row key0.
struct Work {
  int row0, row_end, position0, key0, num_keys;
  int head, batch;
  int phase = 0, map = 0;
  int segment = 0;  // LocalTiles of infini_rows.cuh
};

template <int kBlockM>
struct DenseTiles {
  struct Params {};
  static constexpr bool kClipsRows = false;  // TMA clips tiles that end with the tensor
  static constexpr bool kStrided = false;    // position = row

  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    Work work;
    work.head = tile.head;
    work.batch = tile.batch;
    work.row0 = tile.m_block * kBlockM;
    work.row_end = p.Tq;
    work.position0 = work.row0 + p.query_offset;
    work.key0 = 0;
    work.num_keys = p.Tk;
    return work;
  }
};

template <int kBlockM>
struct PackedTiles {
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
    work.row_end = min(p.cu_seqlens[low + 1], p.Tq);
    work.key0 = begin;
    work.num_keys = work.row_end - begin;
    return work;
  }
};

template <int kBlockM>
struct SegmentTiles {
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
    work.position0 = tile.m_block * kBlockM;
    work.row0 = work.key0 + work.position0;
    work.row_end = work.key0 + work.num_keys;
    return work;
  }
};

}  // namespace lctx::cuda
