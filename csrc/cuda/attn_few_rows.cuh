// Math: as attn_fwd_sm90.cuh, for at most 16 rows a key/value head, with the keys in the rows of
//       the products: S^T = K Q^T, O^T += V^T P^T, by the tensor cores of a warp (16 x 8 x 16).
//       Weights are relative to a maximum that is raised when a score passes it by 2^8 only.
// Tile map: SplitTiles; keys are dealt to the warps in pieces of 16 or 32, and every warp has a
//       softmax of its own. Thread blocks that share one unit and no other take its pieces in
//       turns, so that all read in the same place; else each takes its own range. At the end of a
//       tile the warps' rows are summed in shared memory, in the order of the warps.
// Pipeline: each warp loads its own pieces, kStages ahead, and asks for the next one when it is
//       through with one: nothing is waited for but keys. One more warp marks the scratch for the
//       merge (SplitRows::mark_slots).
// Memory: keys and values once. Shared: 64 KB of them, and fp32 rows of each warp.
// Limits: those of attn_fwd_sm90.cuh.
#pragma once

#include "attn_fwd_rows.cuh"
#include "attn_fwd_scores.cuh"

namespace lctx::cuda {

// kRowTiles_: of 8 rows.
template <class T_, int kHeadDim_, int kRowTiles_>
struct FewRowsTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kRowTiles = kRowTiles_, kRows = 8 * kRowTiles;
  static constexpr int kKeys = kHeadDim <= 64 ? 32 : 16;  // of a piece
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2, kStages = 2;
  static constexpr int kPerSm = 2;  // thread blocks on a multiprocessor: one reads as another ends
  static constexpr int kThreads = 32 * (kWarps + 1);
  static constexpr int kBlockM = 64, kBlockN = 64;                // what is dealt to thread blocks
  static constexpr int kPieces = kBlockN / kKeys;                 // of a block
  static constexpr int kHalfBytes = tile_bytes(kKeys, kHeadDim);  // keys or values of a piece
  static constexpr int kPitch = kHeadDim + 4;  // of a warp's rows, so that banks do not collide
  static constexpr int kSums = kWarps * kStages * 2 * kHalfBytes;
  static constexpr int kStats = kSums + kWarps * kRows * kPitch * 4;
  static constexpr int kBarriers = kStats + kWarps * kRows * 8;
  static constexpr int kSharedBytes = kBarriers + kWarps * kStages * 8 + 1024;  // and alignment
  using Tiles = SplitTiles<kBlockM>;
  using Scores = DenseScores<kKeys>;
  struct Params : FwdParams, Tiles::Params, SplitRows::Params {
    using Tiles = SplitTiles<kBlockM>;
    TensorView q_view;
    bool deals_pieces;  // in turns to the thread blocks of a unit, which are its own
  };
};

template <class Tile_>
struct FewRowsKernel {
  using Tile = Tile_;
  using T = typename Tile::T;
  using Tiles = typename Tile::Tiles;
  using Scores = typename Tile::Scores;
  static constexpr int kHeadDim = Tile::kHeadDim, kRowTiles = Tile::kRowTiles;
  static constexpr int kKeys = Tile::kKeys, kWarps = Tile::kWarps, kStages = Tile::kStages;
  static constexpr int kDepths = kHeadDim / 16, kKeyTiles = kKeys / 16;
  static constexpr float kSlack = 8.f;  // by which weights may pass 1, as a power of 2

  const typename Tile::Params& p;
  const uint32_t smem;
  const int warp, lane;

  // Fragments of a warp: queries as they are multiplied, O^T, and of each thread's two rows of a
  // tile of 8 the maximum of the raw scores and its share of the sum of weights.
  uint32_t q[kRowTiles][kDepths][2];
  float o[kRowTiles][kDepths][4];
  float top[kRowTiles][2], sum[kRowTiles][2];

  __device__ __forceinline__ FewRowsKernel(const typename Tile::Params& params, char* base)
      : p(params),
        smem(ptx::smem_address(base)),
        warp(__shfl_sync(~0u, threadIdx.x / 32, 0)),
        lane(threadIdx.x % 32) {}

  // ---- keys ----

  // The warp's pieces of a tile: every step-th of those that its rows see.
  struct Share {
    int begin, step;
    KeyRange keys;
  };
  __device__ __forceinline__ Share share_of(const Work& work) const {
    const int rows = min(Tile::kRows, work.row_end - work.row0);
    Share share{
        0, kWarps,
        Scores::range(p, work, work.position0, work.position0 + Tiles::position_of(p, rows - 1))};
    if (p.deals_pieces) {
      share.begin = share.keys.begin + p.per_span.modulo(blockIdx.x) * kWarps + warp;
      share.step = p.per_span.divisor * kWarps;
    } else {
      share.begin = max(share.keys.begin, work.block_begin * Tile::kPieces) + warp;
      share.keys.end = min(share.keys.end, work.block_end * Tile::kPieces);
    }
    return share;
  }

  // Where the warp's loads are: some pieces ahead of its products, tiles after this one included.
  struct Loader {
    int index, last;  // tiles
    int piece = 0, end = 0, step = 0, head = 0, batch = 0;
    PipelineState<kStages> state;
  };

  __device__ __forceinline__ uint32_t full(const PipelineState<kStages>& state) const {
    return smem + Tile::kBarriers + (warp * kStages + state.stage()) * 8;
  }
  __device__ __forceinline__ uint32_t stage(const PipelineState<kStages>& state) const {
    return smem + (warp * kStages + state.stage()) * 2 * Tile::kHalfBytes;
  }

  __device__ __forceinline__ void load_next(Loader& l) const {
    while (l.piece >= l.end) {
      if (l.index >= l.last) return;
      const Work work = Tiles::find(p, l.index++);
      const Share share = share_of(work);
      l.piece = share.begin;
      l.end = share.keys.end;
      l.step = share.step;
      l.head = work.head;
      l.batch = work.batch;
    }
    if (lane == 0) {
      const uint32_t barrier = full(l.state), dst = stage(l.state);
      ptx::mbarrier_arrive_expect(barrier, 2 * Tile::kHalfBytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const CUtensorMap* map = i == 0 ? &p.k[0] : &p.v[0];
#pragma unroll
        for (int c = 0; c < kHeadDim / kChunkColumns; ++c) {
          ptx::tma_load_5d(dst + i * Tile::kHalfBytes + c * chunk_bytes(kKeys), map, barrier,
                           c * kChunkColumns, l.piece * kKeys, 0, l.head, l.batch);
        }
      }
    }
    l.piece += l.step;
    l.state.advance();
  }

  // Address for ldmatrix of row `row` of a piece, 16-byte unit 2 t + half.
  __device__ __forceinline__ uint32_t unit_at(uint32_t tile, int row, int half, int t) const {
    const int offset = t / 4 * chunk_bytes(kKeys) + row * kChunkRowBytes;
    return tile + offset + (((t % 4 * 2 + half) ^ row % 8) << 4);
  }

  // ---- rows ----

  __device__ __forceinline__ void load_queries(const Work& work) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int row = work.row0 + 8 * r + lane / 4;
      const int head = work.head * p.heads_of_group + SplitRows::head_in_group(p, work, row);
      const T* x = static_cast<const T*>(p.q_view.data) + work.batch * p.q_view.stride_b +
                   int64_t{row >> p.head_bits} * p.q_view.stride_t + head * p.q_view.stride_h;
      const bool exists = SplitRows::exists(p, work, row);
#pragma unroll
      for (int t = 0; t < kDepths; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 16 * t + 8 * i + lane % 4 * 2;
          q[r][t][i] = exists && column < p.D ? *reinterpret_cast<const uint32_t*>(x + column) : 0;
        }
      }
    }
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4 * kDepths; ++i) o[r][i / 4][i % 4] = 0.f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        top[r][i] = kEmptyRowMax;
        sum[r][i] = 0.f;
      }
    }
  }

  // Maximum over the 8 threads that share rows.
  static __device__ __forceinline__ float rows_max(float x) {
    for (int step = 4; step <= 16; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
  }

  using ScoreTile = float[kKeyTiles][kRowTiles][4];

  __device__ __forceinline__ void mask(const Work& work, int piece, ScoreTile& s) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = work.position0 + Tiles::position_of(p, 8 * r + lane % 4 * 2 + i % 2);
        int high = p.causal ? min(position, work.num_keys - 1) : work.num_keys - 1, low = 0;
        if (p.window > 0) {
          high = min(high, position + p.window - 1);
          low = max(low, position - p.window + 1);
        }
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          const int key = piece * kKeys + 16 * n + lane / 4 + i / 2 * 8;
          if (key > high || key < low) s[n][r][i] = -INFINITY;
        }
      }
    }
  }

  // Scores -> weights.
  __device__ __forceinline__ void weigh(ScoreTile& s) {
    bool passed = false;
    const float slack = kSlack / p.scale_log2;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) passed = passed || s[n][r][i] > top[r][i % 2] + slack;
      }
    }
    if (__any_sync(~0u, passed)) raise(s);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const float base[2] = {top[r][0] * p.scale_log2, top[r][1] * p.scale_log2};
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = s[n][r][i];
          x = ptx::exp2_anywhere(x * p.scale_log2 - base[i % 2]);
          sum[r][i % 2] += x;
        }
      }
    }
  }

  __device__ __forceinline__ void raise(const ScoreTile& s) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float to = top[r][i];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) to = fmaxf(to, fmaxf(s[n][r][i], s[n][r][i + 2]));
        to = rows_max(to);
        const float alpha = ptx::exp2_anywhere((top[r][i] - to) * p.scale_log2);
        top[r][i] = to;
        sum[r][i] *= alpha;
#pragma unroll
        for (int t = 0; t < kDepths; ++t) {
          o[r][t][i] *= alpha;
          o[r][t][i + 2] *= alpha;
        }
      }
    }
  }

  __device__ __forceinline__ void add_piece(const Work& work, const KeyRange& keys, int piece,
                                            uint32_t tile) {
    ScoreTile s = {};
#pragma unroll
    for (int t = 0; t < kDepths; ++t) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        uint32_t k[4];
        ptx::ldmatrix_x4(unit_at(tile, 16 * n + lane % 16, lane / 16, t), k);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) warp_mma<T>(s[n][r], k, q[r][t][0], q[r][t][1]);
      }
    }
    if (keys.needs_mask(piece)) mask(work, piece, s);
    weigh(s);
    uint32_t weights[kKeyTiles][kRowTiles][2];
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          weights[n][r][i] = ptx::transpose_matrix(pack2<T>(s[n][r][2 * i], s[n][r][2 * i + 1]));
        }
      }
    }
    const int row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
#pragma unroll
    for (int t = 0; t < kDepths; ++t) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(unit_at(tile + Tile::kHalfBytes, 16 * n + row, half, t), v);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          warp_mma<T>(o[r][t], v, weights[n][r][0], weights[n][r][1]);
        }
      }
    }
  }

  // ---- the end of a tile ----

  __device__ __forceinline__ uint32_t sum_at(int w, int row) const {
    return smem + Tile::kSums + (w * Tile::kRows + row) * Tile::kPitch * 4;
  }
  __device__ __forceinline__ uint32_t stat_at(int w, int row) const {
    return smem + Tile::kStats + (w * Tile::kRows + row) * 8;
  }

  __device__ __forceinline__ void publish(int rows) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x = sum[r][i];
        for (int step = 4; step <= 16; step *= 2) x += __shfl_xor_sync(~0u, x, step);
        const int row = 8 * r + lane % 4 * 2 + i;
        if (row >= rows) continue;
        if (lane < 4) ptx::store_shared_float2(stat_at(warp, row), make_float2(top[r][i], x));
        const uint32_t to = sum_at(warp, row) + lane / 4 * 4;
#pragma unroll
        for (int t = 0; t < kDepths; ++t) {
          ptx::store_shared_4(to + t * 64, __float_as_uint(o[r][t][i]));
          ptx::store_shared_4(to + t * 64 + 32, __float_as_uint(o[r][t][i + 2]));
        }
      }
    }
  }

  // The sum over the warps of columns column .. column + 3 of a row, and where it goes.
  __device__ __forceinline__ void finish(const Work& work, int row_in_tile, int column) const {
    float2 stat[kWarps];
    float high = kEmptyRowMax, total = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      stat[w] = ptx::load_shared_float2(stat_at(w, row_in_tile));
      high = fmaxf(high, stat[w].x);
    }
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = ptx::exp2_anywhere((stat[w].x - high) * p.scale_log2);
      const float4 y = ptx::load_shared_float4(sum_at(w, row_in_tile) + column * 4);
      total += weight * stat[w].y;
      x = make_float4(x.x + weight * y.x, x.y + weight * y.y, x.z + weight * y.z,
                      x.w + weight * y.w);
    }
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    x = make_float4(x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse);
    const int row = work.row0 + row_in_tile;
    if (column == 0) {
      *SplitRows::lse_at(p, work, row) =
          total == 0.f ? -INFINITY : (high * p.scale_log2 + log2f(total)) * 0.69314718055994530942f;
    }
    if (p.partial != nullptr) {
      float* to = p.partial + SplitRows::slot_row(p, work, row) * p.D + column;
      *reinterpret_cast<float4*>(to) = x;
      return;
    }
    const int head = work.head * p.heads_of_group + SplitRows::head_in_group(p, work, row);
    T* out = static_cast<T*>(p.out_view.data) + work.batch * p.out_view.stride_b +
             int64_t{row >> p.head_bits} * p.out_view.stride_t + head * p.out_view.stride_h;
    *reinterpret_cast<uint2*>(out + column) = make_uint2(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w));
  }

  // Barrier 1 is met by the warp that marks as well.
  static constexpr int kMarked = 1, kPublished = 2, kFinished = 3;

  __device__ __forceinline__ void combine(const Work& work, bool first, bool last) const {
    const int rows = min(Tile::kRows, work.row_end - work.row0);
    publish(rows);
    ptx::named_barrier_sync(first ? kMarked : kPublished, 32 * (kWarps + first));
    for (int i = threadIdx.x; i < rows * kHeadDim / 4; i += 32 * kWarps) {
      const int row = i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4;
      if (column < p.D && SplitRows::exists(p, work, work.row0 + row)) finish(work, row, column);
    }
    if (!last) ptx::named_barrier_sync(kFinished, 32 * kWarps);
  }

  __device__ __forceinline__ void run() {
    Loader loader{Tiles::first(p), Tiles::end(p)};
    if (lane == 0) {
      PipelineState<kStages> state;
      for (; state.step < kStages; state.advance()) ptx::mbarrier_init(full(state), 1);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
    const int first = loader.index, last = loader.last;
    for (int i = 0; i < kStages; ++i) load_next(loader);
    PipelineState<kStages> state;
    Work work = Tiles::find(p, first);
    load_queries(work);
    for (int index = first; index < last; ++index) {
      const Share share = share_of(work);
      start();
      for (int n = share.begin; n < share.keys.end; n += share.step) {
        ptx::mbarrier_wait(full(state), state.phase());
        add_piece(work, share.keys, n, stage(state));
        __syncwarp();
        load_next(loader);
        state.advance();
      }
      const Work done = work;
      if (index + 1 < last) {  // on their way while this tile ends
        work = Tiles::find(p, index + 1);
        load_queries(work);
      }
      combine(done, index == first, index + 1 == last);
    }
  }

  __device__ __forceinline__ void mark() const {
    if (p.marks) SplitRows::mark_slots<Tiles>(p);
    ptx::named_barrier_arrive(kMarked, 32 * (kWarps + 1));
    if (lane == 0) ptx::grid_dependents_launch();
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kPerSm)
    attn_few_rows_kernel(const __grid_constant__ typename Tile::Params p) {
  extern __shared__ char shared[];
  char* base = shared + ((1024 - (ptx::smem_address(shared) & 1023)) & 1023);
  FewRowsKernel<Tile> kernel(p, base);
  if (kernel.warp < Tile::kWarps) {
    kernel.run();
  } else {
    kernel.mark();
  }
}

}  // namespace lctx::cuda
