// Math: none; on which keys a tile of the key-stationary backward works, which queries see them.
// Tile map: a tile number stands for (key/value head, batch, block of keys):
//       DenseKeys    blocks of the whole sequence
//       OrderedKeys  the same, in an order in which dQ can be added in a fixed one
//       SharedKeys   the same, but the last tiles, which would leave multiprocessors idle, are
//                    shared out, by their queries
//       PackedKeys   blocks of the documents of cu_seqlens
//       SegmentKeys  blocks of segments of w positions, of which every r-th is a row, from a phase
//                    that depends on the query head (dilated attention; r = 1: local segments). A
//                    tile has the query heads of a group that share a phase, so that it alone has
//                    its keys.
//       Blocks of queries are counted from row `origin`: 0, or the first of the segment, so that a
//       block of dQ is always the same rows.
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
  const float *lse2, *delta;  // in blocks, as dq_sum
  float* dq_sum;              // see dq_sum.cuh
  int blocks_per_head;        // of these three
  int* counter;               // zero at launch
  KeyOrder order;
  int per_group;  // query heads per key/value head
  int head_step;  // from one query head of a tile to the next
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
  int head, batch;           // of the keys
  int first_head, end_head;  // query heads, head_step apart
  int phase = 0, map = 0;
  int origin = 0;     // first row of block 0 of queries
  int block0 = 0;     // that block in dq_sum, in its head
  int piece = 0;      // LandmarkKeys: the first of two pieces of 64 keys
  bool down = false;  // OrderedKeys: queries are walked from the last block to the first
  int shared = 0;     // SharedKeys: 1 + the number of the tile among those that are shared out
};

// Blocks [begin, end) of queries, from the origin, see some of the keys, blocks [full_begin,
// full_end) all of them.
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
  range.begin = (low - work.origin) / kBlockM;
  range.end = (high - work.origin) / kBlockM + 1;
  if (end < last) return range;
  range.full_begin = (queries_of<kWindowed>(p, work, last).x - work.origin + kBlockM - 1) / kBlockM;
  range.full_end = max(queries_of<kWindowed>(p, work, first).y - work.origin + 1, 0) / kBlockM;
  return range;
}

// All query heads of the group.
template <class P>
__device__ __forceinline__ void set_heads(const P& p, KeyWork& work) {
  work.first_head = work.head * p.per_group;
  work.end_head = work.first_head + p.per_group;
}

template <int kBlockN>
struct DenseKeys {
  struct Params {};
  static constexpr bool kStrided = false, kPadded = false;

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    KeyWork work;
    work.head = tile.head;
    work.batch = tile.batch;
    set_heads(p, work);
    work.key0 = tile.m_block * kBlockN;
    work.key_end = p.Tk;
    work.query_begin = 0;
    work.query_end = p.Tq;
    work.shift = p.query_offset;
    return work;
  }
};

// Blocks of a head in an order in which a later one reaches each block of queries later, where all
// run at the same rate: last blocks first, whose queries are walked from the first that sees them;
// in the last section (`down_from`), where the longest tiles have to come first, first blocks
// first, and their queries from the last. `turns`: per block of dq_sum, how many tiles there were
// to that which has added to it last.
template <int kBlockN>
struct OrderedKeys {
  struct Params {
    int* turns;
    int down_from;
  };
  static constexpr bool kStrided = false, kPadded = false;
  // Whether dq_sum has what other launches added; else what the first tile finds there is nothing.
  static constexpr bool kContinues = false;

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    KeyWork work = DenseKeys<kBlockN>::find(p, index);
    work.down = index >= p.down_from;
    if (!work.down) work.key0 = (p.order.num_m_blocks - 1) * kBlockN - work.key0;
    return work;
  }
  // Tiles of the head before this one.
  template <class P>
  static __device__ __forceinline__ int place(const P& p, const KeyWork& work) {
    const int block = work.key0 / kBlockN;
    return work.down ? block : p.order.num_m_blocks - 1 - block;
  }
};

// Tiles from `whole` on are shared out: each to `parts` blocks of threads, `part_rows` queries
// each.
template <int kBlockN>
struct SharedKeys {
  struct Params {
    int whole, part_rows;
    FastDivisor parts;
  };
  static constexpr bool kStrided = false, kPadded = false;

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    const int part = index - p.whole;
    if (part < 0) return DenseKeys<kBlockN>::find(p, index);
    const int tile = p.parts.divide(part);
    KeyWork work = DenseKeys<kBlockN>::find(p, p.whole + tile);
    work.query_begin = (part - tile * p.parts.divisor) * p.part_rows;
    work.query_end = min(work.query_begin + p.part_rows, p.Tq);
    work.shared = tile + 1;
    return work;
  }
};

// Blocks of what a policy of the forward lists: keys are the rows there, and their queries too.
template <class Tiles>
struct ListedKeys {
  using Params = typename Tiles::Params;
  static constexpr bool kStrided = false, kPadded = false;

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    const Work rows = Tiles::find(p, index);
    KeyWork work;
    work.head = rows.head;
    work.batch = rows.batch;
    set_heads(p, work);
    work.key0 = rows.row0;
    work.key_end = rows.row_end;
    work.query_begin = rows.row_begin;
    work.query_end = rows.row_end;
    work.shift = 0;
    return work;
  }
};
template <int kBlockN>
using PackedKeys = ListedKeys<PackedTiles<kBlockN>>;

template <int kBlockN>
struct SegmentKeys {
  struct Params {
    int segment_len, rate;
    int blocks_per_segment;   // of dq_sum
    bool offset_block;        // phase of query head h: h % rate, or h / heads_per_offset
    int heads_per_offset;     // ceil(Hq / rate)
    FastDivisor per_segment;  // slots of all key/value heads
    FastDivisor per_slot;     // slots of one: tiles for its query heads of different phases
    FastDivisor per_phase;    // rate
    FastDivisor per_offset;   // heads_per_offset
    int long_phases;          // phases below have one row more: T % rate
    const int32_t* seqlens;   // (B) true lengths, or nullptr
  };
  static constexpr bool kStrided = true, kPadded = false;

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    const int segment = p.per_segment.divide(tile.head);
    const int rest = p.per_segment.modulo(tile.head);
    KeyWork work;
    work.batch = tile.batch;
    work.head = p.per_slot.divide(rest);
    const int slot = p.per_slot.modulo(rest);
    const int group = work.head * p.per_group;
    work.end_head = group + p.per_group;
    int offset;
    if (p.offset_block) {
      offset = p.per_offset.divide(group) + slot;
      work.first_head = max(group, offset * p.heads_per_offset);
      work.end_head = min(work.end_head, (offset + 1) * p.heads_per_offset);
    } else {
      work.first_head = group + slot;
      offset = p.per_phase.modulo(work.first_head);
    }
    int length = p.Tq;
    if (p.seqlens != nullptr) length = min(max(p.seqlens[tile.batch], 0), p.Tq);
    const int begin = segment * p.segment_len;
    const int positions = min(p.segment_len, length - begin) - offset;
    work.query_begin = p.per_phase.divide(begin + offset);
    work.phase = p.per_phase.modulo(begin + offset);
    work.map = work.phase < p.long_phases ? 0 : 1;
    const bool exists = work.first_head < work.end_head;
    work.query_end =
        work.query_begin + (exists ? p.per_phase.divide(max(positions, 0) + p.rate - 1) : 0);
    work.key0 = work.query_begin + tile.m_block * kBlockN;
    work.key_end = work.query_end;
    work.shift = 0;
    work.origin = work.query_begin;
    work.block0 = segment * p.blocks_per_segment;
    return work;
  }
};

}  // namespace lctx::cuda
