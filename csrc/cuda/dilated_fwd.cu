// Math: dilated attention (LongNet, arXiv 2307.02486, section 2.2-2.3), forward: softmax over the
//       multiset union of the keys that the branches (w, r) select, out and its log-sum-exp. Each
//       branch is causal or full attention inside segments of w positions over every r-th of them,
//       from a phase that depends on the head; branches are merged by their log-sum-exps.
// Tile map: attn_fwd_sm90.cuh with SegmentTiles: a tile is (segment, head, batch) and a block of
//       the rows that the branch selects. Tensors are seen with stride r: no gather, no scatter.
// Pipeline: one launch a branch, largest rate first, each continuing from what the ones before it
//       left (JoinRows), so that no pass merges them. The last one, which covers all rows if its
//       rate is 1, writes out; else a pass over all rows does. Launches overlap at their ends.
// Memory: a branch reads the rows it selects once and its carried rows (fp32) once. Scratch: fp32
//       (B, T, H, D), of which only selected rows are touched.
// Limits: those of flash_fwd.cu; any w, r, T.
#include "attn_fwd_join.cuh"
#include "attn_fwd_launch.cuh"
#include "dilated_branches.h"

namespace lctx::cuda {
namespace {

struct Carry {
  const float* in;  // nullptr for the first branch
  float* out;       // nullptr where the branch writes the result
};

template <class Tile>
void launch_branch(const DilatedParams& params, const Branch& branch, const Carry& carry,
                   int* counter, int num_sms, Stream stream) {
  using Traits = FwdTraits<PinnedTile<Tile>, SegmentTiles<Tile::kBlockM>,
                           DenseScores<Tile::kBlockN, false>, JoinRows>;
  typename Traits::Params p{};
  set_attention(params, counter, p);
  set_maps<Tile>(params, p, branch.rate);
  set_branch_rows<Tile>("lctx::dilated_fwd", params, branch, p);
  p.carry_out = carry.in;
  p.carry_lse = p.lse;
  p.state_rows = p.Tq;
  p.partial_out = carry.out;
  launch_fwd<Traits>(p, num_sms, stream, /*overlap=*/carry.in != nullptr);
}

// out and lse of all rows from the union of the branches; a row that none covers gives 0 and -inf.
template <class T>
__global__ void dilated_finish_kernel(const float* partial, float* lse, T* out, int64_t rows,
                                      int T_len, int H, int D) {
  const int64_t units = rows * (D / 8);
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < units;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / (D / 8);  // (batch, position, head)
    const int64_t head = row % H, position = row / H % T_len, batch = row / H / T_len;
    const int64_t at = (batch * H + head) * T_len + position;
    const bool covered = lse[at] > -INFINITY;  // not NaN either
    uint32_t packed[4];
    for (int j = 0; j < 4; ++j) {
      const float2 x =
          covered ? reinterpret_cast<const float2*>(partial + i * 8)[j] : make_float2(0.f, 0.f);
      packed[j] = pack2<T>(x.x, x.y);
    }
    reinterpret_cast<uint4*>(out)[i] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// Its lse: NaN marks rows that no branch covers.
__global__ void dilated_finish_lse_kernel(float* lse, int64_t count) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < count && !(lse[i] > -INFINITY)) lse[i] = -INFINITY;
}

template <class T>
void finish(const DilatedParams& params, const float* partial, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  const dim3 block(256), grid(num_sms * 8);
  float* lse = static_cast<float*>(params.lse);
  const int64_t rows = s.B * s.Tq * s.Hq;
  dilated_finish_kernel<T><<<grid, block, 0, stream>>>(
      partial, lse, static_cast<T*>(params.out.data), rows, static_cast<int>(s.Tq),
      static_cast<int>(s.Hq), static_cast<int>(s.Dv));
  check_launch("dilated_finish_kernel", grid, block, stream);
  const dim3 lse_grid(static_cast<unsigned>(ceil_div(rows, 256)));
  dilated_finish_lse_kernel<<<lse_grid, block, 0, stream>>>(lse, rows);
  check_launch("dilated_finish_lse_kernel", lse_grid, block, stream);
}

}  // namespace

void launch_dilated_fwd(const DilatedParams& params, float* partial, int* counters, int num_sms,
                        Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  const std::vector<Branch> branches = ordered_branches(params);
  const bool last_covers = last_covers_all(params, branches);
  cudaMemsetAsync(counters, 0, branches.size() * sizeof(int), stream);
  // NaN: nothing is carried yet.
  cudaMemsetAsync(params.lse, 0xff, s.B * s.Hq * s.Tq * sizeof(float), stream);
  for (size_t m = 0; m < branches.size(); ++m) {
    const bool writes = last_covers && m + 1 == branches.size();
    const Carry carry{m == 0 ? nullptr : partial, writes ? nullptr : partial};
    const int64_t keys = ceil_div(branches[m].length, branches[m].rate);
    choose_type_and_tile(params, keys, [&](auto tag) {
      launch_branch<typename decltype(tag)::type>(params, branches[m], carry, counters + m, num_sms,
                                                  stream);
    });
  }
  if (last_covers) return;
  if (s.dtype == DType::kBFloat16) {
    finish<__nv_bfloat16>(params, partial, num_sms, stream);
  } else {
    finish<__half>(params, partial, num_sms, stream);
  }
}

}  // namespace lctx::cuda
