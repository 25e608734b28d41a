// Math: the backward of Infini-attention's local part, causal attention inside segments, with the
//       weight of A_dot in lse2 (infini_stats_bwd.cu). What the memory adds to dq, dk and dv, and
//       was written before, is added to the sums before they are rounded.
// Tile map: attn_bwd_sm90.cuh over the segments; deterministic: dK and dV by it, dQ by
//       attn_dq_sm90.cuh.
// Pipeline: as those of flash_bwd.cu; the memory's rows are brought to the L2 cache when a tile
//       begins.
// Memory: as flash_bwd.cu, and the memory's part of dk and dv once, in the inputs' type. That of dq
//       is what dq_sum starts with; above D = 128 it is in dq, in the inputs' type too.
// Limits: those of flash_bwd.cu; above D = 128 always deterministic.
#include "../common/feature_map.cuh"
#include "attn_bwd_launch.cuh"
#include "attn_dq_launch.cuh"
#include "infini_rows.cuh"

namespace lctx::cuda {
namespace {

// 32 columns of a row of d, from register `at` on, = factor * d + what lies at `from` for the four
// threads of the row, 16 bytes each, where it exists.
template <class T, int N>
__device__ __forceinline__ void add_columns(bool exists, const T* from, float factor, int at,
                                            float (&d)[N]) {
  const uint4 words = exists ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  uint32_t x[4] = {words.x, words.y, words.z, words.w};
  quad_transpose(x);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = unpack2<T>(x[j]);
    d[at + 4 * j] = factor * d[at + 4 * j] + pair.x;
    d[at + 4 * j + 1] = factor * d[at + 4 * j + 1] + pair.y;
  }
}

struct MemoryKeys : StoreKeys {
  struct Params {
    TensorView dk_add, dv_add;  // data nullptr: nothing
    const float* dz;  // (B, Hkv, S, D) of the states that segments leave; nullptr: is in dk_add
    int num_segments, Hkv;
    FastDivisor per_length;  // segment_len
  };

  static constexpr bool kPrefetches = true, kReadsKeys = true;

  // Lanes 0 to 15 see to a row of dK each, the others to those of dV.
  template <class Kernel>
  static __device__ __forceinline__ void prefetch(const Kernel& kernel, int warpgroup,
                                                  const KeyWork& work) {
    const auto& p = kernel.p;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const int key = work.key0 + kernel.first_key(warpgroup) + warp * 16 + lane % 16;
    const TensorView& view = lane < 16 ? p.dk_add : p.dv_add;
    if (view.data == nullptr || key >= work.key_end) return;
    const auto* row = static_cast<const typename Kernel::T*>(view.data) +
                      work.batch * view.stride_b + key * view.stride_t + work.head * view.stride_h;
    for (int column = 0; column < p.D; column += 64) ptx::prefetch_l2(row + column);
  }

  // dk = scale * dk + dz o min(sigma(k), 1), where there is a dz.
  template <class Kernel, int N>
  static __device__ __forceinline__ void read_keys(const Kernel& kernel, int warpgroup,
                                                   const KeyWork& work, float (&dk)[N]) {
    using T = typename Kernel::T;
    const auto& p = kernel.p;
    if (p.dz == nullptr) return;
    const int64_t chain = int64_t{work.batch} * p.Hkv + work.head;
    const int segment = p.per_length.divide(work.query_begin);
    const int first_column = kernel.first_column(warpgroup);
    const float* dz = p.dz + (chain * p.num_segments + segment) * p.D + first_column +
                      fragment_column(warpgroup_thread());
    const uint32_t keys = kernel.smem + Kernel::Traits::kK +
                          first_column / kChunkColumns * chunk_bytes(Kernel::kBlockN);
    const FragmentAddress<Kernel::kBlockN> address(keys, kernel.first_key(warpgroup),
                                                   warpgroup_thread());
#pragma unroll
    for (int t = 0; t < N / 8; ++t) {
      uint32_t x[4];
      ptx::ldmatrix_x4(address(t), x);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * t + 8 * half;
        const float2 g = first_column + column < p.D ? *reinterpret_cast<const float2*>(dz + column)
                                                     : float2{0.f, 0.f};
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float2 s = elu_plus_one2<T>(x[2 * half + row]);
          const int at = 8 * t + 4 * half + 2 * row;
          dk[at] = p.scale * dk[at] + g.x * fminf(s.x, 1.f);
          dk[at + 1] = p.scale * dk[at + 1] + g.y * fminf(s.y, 1.f);
        }
      }
    }
  }

  template <class Kernel, int N>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const KeyWork& work, float (&dk)[N],
                                                float (&dv)[N]) {
    const auto& p = kernel.p;
    add(kernel, warpgroup, work, p.dv_add, 1.f, dv);
    store(kernel, warpgroup, work, dv, 1.f, p.dv);
    add(kernel, warpgroup, work, p.dk_add, p.dz == nullptr ? p.scale : 1.f, dk);
    store(kernel, warpgroup, work, dk, 1.f, p.dk);
  }

  template <class Kernel, int N>
  static __device__ __forceinline__ void add(const Kernel& kernel, int warpgroup,
                                             const KeyWork& work, const TensorView& view,
                                             float factor, float (&d)[N]) {
    using T = typename Kernel::T;
    const int thread = warpgroup_thread();
    const int column0 = kernel.first_column(warpgroup) + 8 * (thread % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = work.key0 + kernel.first_key(warpgroup) + fragment_row(thread) + 8 * i;
      const int columns = view.data != nullptr && key < work.key_end ? kernel.p.D - column0 : 0;
      const T* row = static_cast<const T*>(view.data) + work.batch * view.stride_b +
                     key * view.stride_t + work.head * view.stride_h + column0;
#pragma unroll
      for (int a = 0; a < N / 16; ++a) {
        add_columns(32 * a < columns, row + 32 * a, factor, 16 * a + 2 * i, d);
      }
    }
  }
};

// dQ starts with the memory's part: in dq_sum, or in the inputs' type.
struct MemoryQueries : StoreRows {
  struct Params {
    const float* dq_sum;  // nullptr: nothing
    bool adds_to_dq;      // above D = 128: it is in dq
  };

  template <class Kernel>
  static __device__ __forceinline__ void finish(const Kernel& kernel, int warpgroup,
                                                const Work& work, float (&o)[Kernel::kValueDim / 2],
                                                const float (&factor)[2]) {
    const auto& p = kernel.p;
    if constexpr (Kernel::kHeadDim > 128) {
      add_and_store(kernel, warpgroup, work, o);
      return;
    } else if (p.dq_sum != nullptr) {
      const int thread = warpgroup_thread();
      const int64_t head = int64_t{work.batch} * p.Hq + work.head;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = work.row0 + warpgroup * 64 + fragment_row(thread) + 8 * i;
        if (row >= work.row_end) continue;
        const float* from = p.dq_sum + dq_sum_place<Kernel::kHeadDim>(head, p.Tq, row, thread % 4);
#pragma unroll
        for (int j = 0; j < Kernel::kValueDim / 8; ++j) {
          const float2 x = *reinterpret_cast<const float2*>(from + dq_sum_columns(j));
          o[4 * j + 2 * i] += x.x;
          o[4 * j + 2 * i + 1] += x.y;
        }
      }
    }
    StoreRows::finish(kernel, warpgroup, work, o, factor);
  }

  // dq = scale * o + dq, or without dq. 32 columns after the other: there are no registers for
  // more of what was there.
  template <class Kernel, int N>
  static __device__ __forceinline__ void add_and_store(const Kernel& kernel, int warpgroup,
                                                       const Work& work, float (&o)[N]) {
    using T = typename Kernel::T;
    const auto& p = kernel.p;
    const TensorView& view = p.out_view;
    const int thread = warpgroup_thread(), column0 = 8 * (thread % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at_row = work.row0 + warpgroup * 64 + fragment_row(thread) + 8 * i;
      const int columns = at_row < work.row_end ? p.D - column0 : 0;
      T* row = static_cast<T*>(view.data) + work.batch * view.stride_b + at_row * view.stride_t +
               work.head * view.stride_h + column0;
#pragma unroll
      for (int a = 0; a < N / 16; ++a) {
        const int at = 16 * a + 2 * i;
        T* to = row + 32 * a;
        add_columns(p.adds_to_dq && 32 * a < columns, to, p.scale, at, o);
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = pack2<T>(o[at + 4 * j], o[at + 4 * j + 1]);
        quad_transpose(x);
        if (32 * a < columns) {
          *reinterpret_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
    }
  }
};

template <class P>
void set_segments(const InfiniParams& params, int64_t heads, P& p) {
  p.segment_len = static_cast<int>(std::min(params.segment_len, params.shape.Tq));
  p.per_segment = FastDivisor(static_cast<int>(heads));
}

template <class Tile>
void launch_keys(const InfiniParams& params, const InfiniGrads& grads,
                 const InfiniBwdScratch& scratch, int num_sms, Stream stream) {
  using Traits = BwdTraits<Tile, ListedKeys<LocalTiles<Tile::kBlockN>>, MemoryKeys, false>;
  const AttnShape& s = params.shape;
  BwdScratch rows;
  rows.lse2 = scratch.lse2;
  rows.delta = scratch.delta;
  rows.dq_sum = scratch.dq_sum;
  rows.counter = scratch.counters;
  typename Traits::Params p{};
  set_attention_bwd<Tile>(params, grads, rows, p);
  set_segments(params, s.Hkv, p);
  p.dk_add = scratch.dk_add;
  p.dv_add = scratch.dv_add;
  const bool lacks_dz = params.update == InfiniUpdate::kDelta && params.k_mem.data == nullptr;
  p.dz = lacks_dz ? scratch.dz : nullptr;
  p.num_segments = static_cast<int>(ceil_div(s.Tq, params.segment_len));
  p.Hkv = static_cast<int>(s.Hkv);
  p.per_length = FastDivisor(p.segment_len);
  const int64_t segments = ceil_div(s.Tq, params.segment_len);
  p.order = KeyOrder(make_order("lctx::infini_bwd", ceil_div(p.segment_len, Tile::kBlockN),
                                s.Hkv * segments, s.B, bwd_section(s, p.segment_len)));
  launch_bwd<Traits>(p, num_sms, stream);
}

template <class Tile>
void launch_queries(const InfiniParams& params, const InfiniGrads& grads,
                    const InfiniBwdScratch& scratch, int num_sms, Stream stream) {
  using Traits =
      FwdTraits<Tile, LocalTiles<Tile::kBlockM>, DenseGrads<Tile::kBlockN, false>, MemoryQueries>;
  const AttnShape& s = params.shape;
  AttnParams to_dq = params;
  to_dq.out = grads.dq;
  typename Traits::Params p{};
  set_attention(to_dq, scratch.counters + 1, p);
  set_dq<Tile>("lctx::infini_bwd", to_dq, {grads.dout, scratch.lse2, scratch.delta}, p);
  set_segments(params, s.Hq, p);
  p.dq_sum = params.q_mem.data != nullptr ? nullptr : scratch.dq_sum;
  p.adds_to_dq = params.q_mem.data == nullptr;
  p.row_shift = row_shift<Tile>(p.segment_len);
  p.order = make_order("lctx::infini_bwd", ceil_div(p.segment_len, Tile::kBlockM),
                       s.Hq * ceil_div(s.Tq, params.segment_len), s.B,
                       heads_per_section(s, p.segment_len, 256));
  launch_dq<Traits>(p, num_sms, stream);
}

}  // namespace

void launch_infini_local_bwd(const InfiniParams& params, const InfiniGrads& grads,
                             const InfiniBwdScratch& scratch, bool deterministic, int num_sms,
                             Stream stream) {
  cudaMemsetAsync(scratch.counters, 0, 2 * sizeof(int), stream);
  const bool alone = deterministic || params.shape.Dk > 128;  // dq by a kernel of its own
  choose_bwd_tile<256>(params, !alone, [&](auto tile) {
    launch_keys<typename decltype(tile)::type>(params, grads, scratch, num_sms, stream);
  });
  if (alone) {
    choose_type_and_dim(params.shape, [&](auto type, auto dim) {
      using T = typename decltype(type)::type;
      launch_queries<typename DqTiles<T, dim.value>::type>(params, grads, scratch, num_sms, stream);
    });
  } else {
    launch_unpack_dq(params, grads, scratch.dq_sum, stream);
  }
}

}  // namespace lctx::cuda
