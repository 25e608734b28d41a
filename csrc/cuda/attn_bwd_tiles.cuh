// Math: none; which keys a tile of the key-stationary backward works on, and which queries see
// them. Tile map: a tile number stands for (key/value head, batch, block of keys):
//       DenseKeys    blocks of the whole sequence
//       ListedKeys   blocks of what a policy of attn_fwd_tiles.cuh lists: documents, segments.
//                    Queries and keys are rows of the same kind there.
//       Blocks of queries are counted from the first row of the tensor, wherever a document or
//       segment begins, so that a block of dQ is always the same rows.
// Pipeline: tiles are found again from their number, as in the forward.
// Memory: tensors are seen as (column, row, phase, head, batch), position = row * step + phase.
// Limits: 2^31 - 1 tiles and positions.
#pragma once

#include "attn_fwd_tiles.cuh"

namespace lctx::cuda {

// First blocks first: with a causal mask they are seen by the most queries.
struct KeyOrder : TileOrder {
  KeyOrder() = default;
  explicit KeyOrder(const TileOrder& order) : TileOrder(order) {}

#if defined(__CUDACC__)
  __device__ __forceinline__ Tile operator[](int index) const {
    Tile tile = TileOrder::operator[](index);
    tile.m_block = num_m_blocks - 1 - tile.m_block;
    return tile;
  }
#endif
};

struct BwdParams {
  // [1] is for phases that have one row less than phase 0.
  CUtensorMap q[2], dout[2], k[2], v[2];
  TensorView dk, dv;
  const float *lse2, *delta;  // (B, Hq, Tq), see bwd_rows.h
  float* dq_sum;              // see dq_sum.cuh
  int* counter;               // zero at launch
  KeyOrder order;
  int per_group;  // query heads per key/value head
  int Hq, Tq, Tk, D;
  int query_offset;    // position of query 0 minus that of key 0
  int row_shift;       // 0
  int causal, window;  // window 0: none
  float scale, scale_log2;
};

// Keys [key0, key_end) of the tensor, of which a tile takes the first; queries [query_begin,
// query_end) may see them; query row i sits `shift` behind key row i.
struct KeyWork {
  int key0, key_end, query_begin, query_end, shift;
  int head, batch;  // of the keys
  int phase = 0, map = 0;
};

// Blocks [begin, end) of queries see some of the keys, blocks [full_begin, full_end) all of them.
struct QueryRange {
  int begin = 0, end = 0, full_begin = 0, full_end = 0;

  __device__ __forceinline__ bool needs_mask(int m) const {
    return m < full_begin || m >= full_end;
  }
};

// The first and the last query row that see key row `key`.
template <bool kWindowed, class P>
__device__ __forceinline__ int2 queries_of(const P& p, const KeyWork& work, int key) {
  const int own = key - work.shift;
  int low = p.causal ? own : work.query_begin, high = work.query_end - 1;
  if (kWindowed && p.window > 0) {
    low = max(low, own - p.window + 1);
    high = min(high, own + p.window - 1);
  }
  if (key >= work.key_end) high = -1;
  return make_int2(max(low, work.query_begin), high);
}

// What keys first .. last are seen by, in blocks of kBlockM queries.
template <bool kWindowed, int kBlockM, class P>
__device__ __forceinline__ QueryRange query_range(const P& p, const KeyWork& work, int first,
                                                  int last) {
  QueryRange range;
  const int end = min(last, work.key_end - 1);
  const int low = queries_of<kWindowed>(p, work, first).x;
  const int high = queries_of<kWindowed>(p, work, end).y;
  if (end < first || high < low) return range;
  range.begin = low / kBlockM;
  range.end = high / kBlockM + 1;
  if (end < last) return range;
  range.full_begin = (queries_of<kWindowed>(p, work, last).x + kBlockM - 1) / kBlockM;
  range.full_end = max(queries_of<kWindowed>(p, work, first).y + 1, 0) / kBlockM;
  return range;
}

template <int kBlockN>
struct DenseKeys {
  struct Params {};
  static constexpr bool kStrided = false;

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    KeyWork work;
    work.head = tile.head;
    work.batch = tile.batch;
    work.key0 = tile.m_block * kBlockN;
    work.key_end = p.Tk;
    work.query_begin = 0;
    work.query_end = p.Tq;
    work.shift = p.query_offset;
    return work;
  }
};

template <class Tiles>
struct ListedKeys {
  using Params = typename Tiles::Params;
  static constexpr bool kStrided = Tiles::kStrided;

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    const Work rows = Tiles::find(p, index);
    KeyWork work;
    work.head = rows.head;
    work.batch = rows.batch;
    work.key0 = rows.row0;
    work.key_end = rows.row_end;
    work.query_begin = rows.row_begin;
    work.query_end = rows.row_end;
    work.shift = 0;
    work.phase = rows.phase;
    work.map = rows.map;
    return work;
  }
};

}  // namespace lctx::cuda
