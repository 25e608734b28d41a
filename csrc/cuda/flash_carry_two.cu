// Math: dense softmax attention over two sets of keys in one softmax: the rank's own ones, causal
//       or all of them, and those of another rank, all of which rows from first_row on see. What
//       the first two steps of a ring compute together, so that nothing is carried between them.
//       Rows below own_row had their own keys in a launch before.
// Tile map: as flash_fwd.cu. The keys of a tile are one list of blocks: far ones first, then own
//       ones, which are walked first. The far keys end with a block, so that only their first one
//       may be partial. Rows from first_row to own_row continue over the far keys alone, in the
//       last tiles of the grid, which are short and fill its end.
// Pipeline: as flash_fwd.cu; tiles that continue read what is carried as flash_carry.cu.
// Memory: as flash_fwd.cu; 8 bytes an element more for rows that are not done, or are carried.
// Limits: those of flash_carry.cu; no window.
#include "attn_fwd_launch.cuh"

namespace lctx::cuda {
namespace {

constexpr int64_t kFewestTiles = 1024;  // of a section

template <int kBlockM>
struct TwoKeysTiles : OneHeadTiles {
  struct Params {
    int own_row, first_row, far_keys;  // far_keys: with the padding of their first block
    int num_tiles;
    FastDivisor per_carried_row, per_carried_batch;  // heads of all batches, of one
  };
  static constexpr bool kClipsRows = true;  // where rows that continue end, and at the last row
  static constexpr bool kStrided = false;

  template <class P>
  static __device__ __forceinline__ int end(const P& p) {
    return p.num_tiles;
  }
  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    const TileOrder::Tile tile = p.order[index];
    const int rest = index - p.order.num_tiles, row = p.per_carried_row.divide(rest);
    const int head = rest - row * p.per_carried_row.divisor;
    const int batch = p.per_carried_batch.divide(head);
    const bool carried = rest >= 0;
    Work work;
    work.head = carried ? head - batch * p.per_carried_batch.divisor : tile.head;
    work.batch = carried ? batch : tile.batch;
    work.row_begin = carried ? p.first_row : p.own_row;
    work.row_end = carried ? p.own_row : p.Tq;
    work.row0 =
        work.row_begin + (carried ? row : tile.m_block) * kBlockM - (carried ? 0 : p.row_shift);
    work.position0 = work.row0 + p.far_keys;
    work.key0 = 0;
    work.num_keys = p.far_keys + (carried ? 0 : p.Tk);
    return work;
  }
};

template <int kBlockN>
struct TwoKeysScores : DenseScores<kBlockN, false> {
  static constexpr bool kLeavesMany = true;  // far ones that only later rows see

  struct Params {
    int far_blocks, far_padding;
  };

  template <class P>
  static __device__ __forceinline__ KeyRange range(const P& p, const Work& work, int first,
                                                   int last) {
    const int far = p.far_blocks, sees_far = p.first_row + p.far_keys, end = work.num_keys;
    KeyRange keys;
    keys.begin = last >= sees_far ? 0 : far;
    keys.end = last < first ? 0 : ((p.causal ? min(last, end - 1) : end - 1) / kBlockN + 1);
    keys.full_begin = first >= sees_far ? (p.far_padding > 0 ? 1 : 0) : far;
    keys.full_end = (p.causal ? min(first + 1, end) : end) / kBlockN;
    return keys;
  }

  template <class P>
  static __device__ __forceinline__ KeyBlock block(const P& p, const Work&, int n) {
    const bool far = n < p.far_blocks;
    const int map = ptx::opaque(far ? 1 : 0);
    const int row = n * kBlockN - (far ? p.far_padding : p.far_keys);
    return {&p.k[map], &p.v[map], row, 0};
  }

  template <class P>
  static __device__ __forceinline__ void mask(const P& p, const Work& work, int position0, int n,
                                              float (&s)[kBlockN / 2], RowState&) {
    const int thread = warpgroup_thread();
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int position = position0 + fragment_row(thread) + 8 * row;
      int high = p.causal ? min(position, work.num_keys - 1) : work.num_keys - 1;
      int low = position >= p.first_row + p.far_keys ? p.far_padding : p.far_keys;
      high -= n * kBlockN + fragment_column(thread);
      low -= n * kBlockN + fragment_column(thread);
#pragma unroll
      for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (8 * j + i > high || 8 * j + i < low) s[4 * j + 2 * row + i] = -INFINITY;
        }
      }
    }
  }
};

struct TwoKeysRows : CarryRows {
  template <class P>
  static __device__ __forceinline__ bool carries(const P& p, const Work& work) {
    return work.num_keys == p.far_keys;
  }
};

template <class Tile>
void launch_two(const CarryTwoParams& params, int* counter, int num_sms, Stream stream) {
  using Traits = FwdTraits<DenseTile<Tile>, TwoKeysTiles<Tile::kBlockM>,
                           TwoKeysScores<Tile::kBlockN>, TwoKeysRows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, counter);
  const int64_t far_rows = params.far_rows;
  p.k[1] = make_rows_map(params.far_k, s.dtype, s.B, far_rows, s.Hkv, s.Dk, Tile::kBlockN, 1);
  p.v[1] = make_rows_map(params.far_v, s.dtype, s.B, far_rows, s.Hkv, s.Dv, Tile::kBlockN, 1);
  p.far_blocks = static_cast<int>(ceil_div(far_rows, Tile::kBlockN));
  p.far_keys = p.far_blocks * Tile::kBlockN;
  p.far_padding = static_cast<int>(p.far_keys - far_rows);
  p.first_row = static_cast<int>(params.first_row);
  p.carry_out = static_cast<const float*>(params.carry_out.data);
  p.carry_lse = p.lse;
  p.state_rows = static_cast<int>(params.state_rows);
  p.inverse_scale = static_cast<float>(1 / params.scale);
  p.final_rows = static_cast<int>(params.final_rows);
  p.partial_out = params.final_rows < s.Tq ? static_cast<float*>(params.carry_out.data) : nullptr;
  p.own_row = static_cast<int>(params.own_row);
  p.row_shift = row_shift<Tile>(s.Tq - params.own_row);
  const int64_t m_blocks = ceil_div(s.Tq - params.own_row, Tile::kBlockM);
  // Sections of fewer tiles would end with long ones.
  const int64_t group = s.Hq / s.Hkv, groups = s.B * s.Hkv;
  const int64_t most =
      std::max(heads_per_section(s, s.Tk + far_rows, 16), ceil_div(kFewestTiles, m_blocks));
  const int64_t sections = ceil_div(groups, ceil_div(most, group));
  p.order =
      make_order("lctx::flash_carry_two", m_blocks, s.Hq, s.B, ceil_div(groups, sections) * group);
  const int64_t carried = std::max<int64_t>(params.own_row - params.first_row, 0);
  p.num_tiles = static_cast<int>(p.order.num_tiles + ceil_div(carried, Tile::kBlockM) * s.Hq * s.B);
  p.per_carried_row = FastDivisor(static_cast<int>(s.Hq * s.B));
  p.per_carried_batch = FastDivisor(static_cast<int>(s.Hq));
  launch_fwd<Traits>(p, num_sms, stream);
}

}  // namespace

void launch_flash_carry_two(const CarryTwoParams& params, int* counter, int num_sms,
                            Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  cudaMemsetAsync(counter, 0, sizeof(int), stream);
  choose_type_and_tile(params, s.Tk + params.far_rows, [&](auto tag) {
    launch_two<typename decltype(tag)::type>(params, counter, num_sms, stream);
  });
}

}  // namespace lctx::cuda
