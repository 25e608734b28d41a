// Math: dense softmax attention over two sets of keys in one softmax: the rank's own ones, causal
//       or all of them, and those of another rank, all of which rows from first_row on see. What
//       the first two steps of a ring compute together, so that nothing is carried between them.
// Tile map: as flash_fwd.cu. The keys of a tile are one list of blocks: far ones first, then own
//       ones, which are walked first. The far keys end with a block, so that only their first one
//       may be partial.
// Pipeline: as flash_fwd.cu.
// Memory: as flash_fwd.cu; 4 bytes an element for rows that are not done.
// Limits: those of flash_carry.cu; no window.
#include "attn_fwd_launch.cuh"

namespace lctx::cuda {
namespace {

constexpr int64_t kFewestTiles = 1024;  // of a section

template <int kBlockM>
struct TwoKeysTiles : DenseTiles<kBlockM> {
  struct Params {
    int first_row, far_keys;  // far_keys: with the padding of their first block
  };

  template <class P>
  static __device__ __forceinline__ Work find(const P& p, int index) {
    Work work = DenseTiles<kBlockM>::find(p, index);
    work.num_keys += p.far_keys;
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

template <class Tile>
void launch_two(const CarryTwoParams& params, int* counter, int num_sms, Stream stream) {
  using Traits = FwdTraits<DenseTile<Tile>, TwoKeysTiles<Tile::kBlockM>,
                           TwoKeysScores<Tile::kBlockN>, FirstRows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, counter);
  const int64_t far_rows = params.far_rows;
  p.k[1] = make_rows_map(params.far_k, s.dtype, s.B, far_rows, s.Hkv, s.Dk, Tile::kBlockN, 1);
  p.v[1] = make_rows_map(params.far_v, s.dtype, s.B, far_rows, s.Hkv, s.Dv, Tile::kBlockN, 1);
  p.far_blocks = static_cast<int>(ceil_div(far_rows, Tile::kBlockN));
  p.far_keys = p.far_blocks * Tile::kBlockN;
  p.far_padding = static_cast<int>(p.far_keys - far_rows);
  p.first_row = static_cast<int>(params.first_row);
  p.query_offset = p.far_keys;
  p.state_rows = static_cast<int>(params.state_rows);
  p.final_rows = static_cast<int>(params.final_rows);
  p.partial_out = params.final_rows < s.Tq ? static_cast<float*>(params.carry_out.data) : nullptr;
  p.row_shift = row_shift<Tile>(s.Tq);
  const int64_t m_blocks = ceil_div(s.Tq, Tile::kBlockM);
  // Sections of fewer tiles would end with long ones.
  const int64_t group = s.Hq / s.Hkv, groups = s.B * s.Hkv;
  const int64_t most =
      std::max(heads_per_section(s, s.Tk + far_rows, 16), ceil_div(kFewestTiles, m_blocks));
  const int64_t sections = ceil_div(groups, ceil_div(most, group));
  p.order =
      make_order("lctx::flash_carry_two", m_blocks, s.Hq, s.B, ceil_div(groups, sections) * group);
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
