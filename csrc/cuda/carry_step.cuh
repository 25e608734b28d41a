// Math: none; what the kernels of one step of a ring's backward share.
// Tile map: that of attn_bwd_sm90.cuh, with positions of queries and keys that are `query_offset`
//       apart, and rows in front of the step's that take no part.
// Pipeline: that of attn_bwd_sm90.cuh.
// Memory: dk and dv are written or added to once, in fp32, or written as results.
// Limits: those of attn_bwd_sm90.cuh.
#pragma once

#include "attn_bwd_launch.cuh"

namespace lctx::cuda {

inline int query_offset(const CarryParams& params) {
  return static_cast<int>(params.query_start - params.key_start);
}

// Blocks of the keys. Rows in front of the step's fill its first block of queries and see nothing.
template <int kBlockN>
struct StepKeys : DenseKeys<kBlockN> {
  struct Params {
    int query_begin;
  };

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    KeyWork work = DenseKeys<kBlockN>::find(p, index);
    work.query_begin = p.query_begin;
    return work;
  }
};

// The same in the order of OrderedKeys. The sum of dQ has what earlier steps left.
template <int kBlockN>
struct OrderedStepKeys : OrderedKeys<kBlockN> {
  struct Params : OrderedKeys<kBlockN>::Params {
    int query_begin;
  };
  static constexpr bool kContinues = true;

  template <class P>
  static __device__ __forceinline__ KeyWork find(const P& p, int index) {
    KeyWork work = OrderedKeys<kBlockN>::find(p, index);
    work.query_begin = p.query_begin;
    return work;
  }
};

// Finished dK and dV in fp32: stored where nothing is there yet (kFirst), else added, in a fixed
// order: a tile is the only one of its launch that has its keys. What a tile ends with decides
// which registers its main loop has (docs/ring.md), and a sum that is read here is waited for.
template <bool kFirst>
struct SumKeys {
  struct Params {};
  static constexpr bool kPrefetches = false, kReadsKeys = false;

  template <class Kernel, int N>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const KeyWork& work, const float (&dk)[N],
                                                const float (&dv)[N]) {
    add(kernel, warpgroup, work, dv, 1.f, kernel.p.dv);
    add(kernel, warpgroup, work, dk, kernel.p.scale, kernel.p.dk);
  }

  template <class Kernel, int N>
  static __device__ __forceinline__ void add(const Kernel& kernel, int warpgroup,
                                             const KeyWork& work, const float (&d)[N], float factor,
                                             const TensorView& sum) {
    const int thread = warpgroup_thread(), column = kernel.first_column(warpgroup);
    const int key = work.key0 + kernel.first_key(warpgroup) + fragment_row(thread);
    float* row = static_cast<float*>(sum.data) + work.batch * sum.stride_b + key * sum.stride_t +
                 work.head * sum.stride_h + column + fragment_column(thread);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int columns = key + 8 * i < work.key_end ? kernel.p.D - column : 0;
#pragma unroll
      for (int j = 0; j < N / 4; ++j) {
        float* to = row + i * 8 * sum.stride_t + 8 * j;
        const float2 x = make_float2(d[4 * j + 2 * i] * factor, d[4 * j + 2 * i + 1] * factor);
        if (8 * j < columns) {
          if constexpr (kFirst) {
            *reinterpret_cast<float2*>(to) = x;
          } else {
            ptx::red_add_v2(to, x.x, x.y);
          }
        }
      }
    }
  }
};

template <class Tile, class Keys, bool kWindowed, bool kOrdered>
void launch_step_of(const CarryParams& params, const CarryGrads& grads, const BwdScratch& scratch,
                    int64_t heads, int64_t blocks, int num_sms, Stream stream) {
  constexpr int kKeys = Tile::kBlockN;
  using Tiles = std::conditional_t<kOrdered, OrderedStepKeys<kKeys>, StepKeys<kKeys>>;
  using Traits = BwdTraits<Tile, Tiles, Keys, kWindowed>;
  typename Traits::Params p{};
  set_attention_bwd<Tile>(params, grads, scratch, p);
  p.Hq = static_cast<int>(heads);
  p.blocks_per_head = static_cast<int>(blocks);
  p.query_offset = query_offset(params);
  p.query_begin = static_cast<int>(grads.rows_in_front);
  // Without a mask all tiles of a head begin with the same block, and wait for one another: fewer
  // where the tiles that begin are of many heads.
  constexpr int64_t kMostHeads = 16;
  set_dense_order<Tile, kWindowed, kOrdered>("lctx::flash_carry_bwd", params, scratch, p,
                                             kOrdered ? kMostHeads : 0);
  launch_bwd<Traits>(p, num_sms, stream);
}

template <class Tile, bool kWindowed, bool kOrdered = false>
void launch_step(const CarryParams& params, const CarryGrads& grads, const BwdScratch& scratch,
                 int64_t heads, int64_t blocks, int num_sms, Stream stream) {
  const auto run = grads.first ? launch_step_of<Tile, SumKeys<true>, kWindowed, kOrdered>
                               : launch_step_of<Tile, SumKeys<false>, kWindowed, kOrdered>;
  run(params, grads, scratch, heads, blocks, num_sms, stream);
}

}  // namespace lctx::cuda
