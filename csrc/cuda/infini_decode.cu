// Math: infini_decode: rows of new tokens i over the open segment, out = g A_mem + (1 - g) A_dot,
//       A_dot = softmax(q k^T) v over its earlier tokens and the new ones up to i, A_mem =
//       phi(q_mem) M / max(phi(q_mem) z, 1e-6), phi = elu + 1; infini_fwd.cu for a segment's last
//       rows.
// Tile map: a cluster of up to 8 thread blocks for the rows (up to 8 of tokens x heads) of a
//       key/value head; a thread block for a stretch of the segment's keys, and as many rows of M.
// Pipeline: one launch. Keys and values of a warp are on the way together (decode_rows.cuh); the
//       partial results of a cluster meet in shared memory. The new keys are read where they are,
//       and written to the open segment by one thread block.
// Memory: keys and values of the open segment and M once for 8 rows. What it reads does not grow
//       with the text.
// Limits: bf16, fp16; D a multiple of 8 up to 256; the scores of a cluster of 8 fit in its shared
//       memory: segments of up to 43,000 tokens for 8 rows, 370,000 for one.
#include "decode_rows.cuh"

namespace lctx::cuda {
namespace {

struct InfiniDecodeCall {
  InfiniDecodeParams p;
  int row_tiles, per_part;  // keys of a thread block
};

template <class T>
__device__ __forceinline__ const T* row_of(const TensorView& x, int64_t b, int64_t t, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.stride_b + t * x.stride_t + h * x.stride_h;
}

template <class T>
__device__ void append(const InfiniDecodeParams& p, const TensorView& x, void* open, int b,
                       int kv) {
  const int D = static_cast<int>(p.shape.Dk);
#pragma unroll 1
  for (int i = threadIdx.x; i < p.shape.Tq * D; i += kDecodeThreads) {
    const int64_t place = (b * p.shape.Hkv + kv) * p.segment_len + p.open_len + i / D;
    static_cast<T*>(open)[place * D + i % D] = row_of<T>(x, b, i / D, kv)[i % D];
  }
}

// This thread block's share of phi(q_mem) M for its rows, into block.at.held.
template <class Tile>
__device__ void retrieve(DecodeBlock<Tile>& block, const float* phi, const float* M, int first,
                         int end) {
  constexpr int kRows = Tile::kRows, kVectors = (Tile::kColumns + 127) / 128;
  const int D = block.D;
  float sums[kRows][kVectors][4] = {};
#pragma unroll 2
  for (int d = first + block.warp; d < end; d += kDecodeWarps) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int e = block.lane * 4 + j * 128;
      if (e >= D) continue;
      const float4 m = *reinterpret_cast<const float4*>(M + int64_t{d} * D + e);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float x = phi[row * Tile::kColumns + d];
        sums[row][j][0] += x * m.x;
        sums[row][j][1] += x * m.y;
        sums[row][j][2] += x * m.z;
        sums[row][j][3] += x * m.w;
      }
    }
  }
  float* parts = block.shared + block.at.sums;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int e = block.lane * 4 + j * 128;
      if (e >= Tile::kColumns) continue;
      *reinterpret_cast<float4*>(parts + (block.warp * kRows + row) * Tile::kColumns + e) =
          make_float4(sums[row][j][0], sums[row][j][1], sums[row][j][2], sums[row][j][3]);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * Tile::kColumns; i += kDecodeThreads) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) sum += parts[w * kRows * Tile::kColumns + i];
    block.shared[block.at.held + i] = sum;
  }
  __syncthreads();
}

template <class Tile>
__global__ void __launch_bounds__(kDecodeThreads)
    infini_decode_kernel(const __grid_constant__ InfiniDecodeCall call) {
  extern __shared__ __align__(16) float memory[];
  __shared__ float norms[Tile::kRows];
  using T = typename Tile::T;
  const InfiniDecodeParams& p = call.p;
  const AttnShape& s = p.shape;
  const auto cluster = cooperative_groups::this_cluster();
  const int parts = static_cast<int>(cluster.num_blocks());
  const int part = static_cast<int>(cluster.block_rank());
  const int unit = blockIdx.x / parts, tile = unit % call.row_tiles;
  const int kv = unit / call.row_tiles % static_cast<int>(s.Hkv);
  const int b = unit / call.row_tiles / static_cast<int>(s.Hkv);
  const int D = static_cast<int>(s.Dk), G = static_cast<int>(s.Hq / s.Hkv);
  const int first = tile * Tile::kRows, Tq = static_cast<int>(s.Tq);
  const int rows = min(Tile::kRows, Tq * G - first);
  const auto token = [&](int row) { return (first + row) / G; };
  const auto head = [&](int row) { return kv * G + (first + row) % G; };
  DecodeBlock<Tile> block(memory,
                          DecodeLayout(Tile::kRows, Tile::kColumns, 2, 2, call.per_part + Tq), D);

  if (threadIdx.x == 0) {
    const int begin = min(part * call.per_part, static_cast<int>(p.open_len));
    const int64_t open = ((b * s.Hkv + kv) * p.segment_len + begin) * D;
    KeyRange r{};
    r.k = static_cast<const T*>(p.open_k) + open;
    r.v = static_cast<const T*>(p.open_v) + open;
    r.stride_k = r.stride_v = D;
    r.keys = r.values = r.visible = min(call.per_part, static_cast<int>(p.open_len) - begin);
    block.range(0) = r;
    r.k = row_of<T>(p.k, b, 0, kv);
    r.v = row_of<T>(p.v, b, 0, kv);
    r.stride_k = p.k.stride_t;
    r.stride_v = p.v.stride_t;
    r.keys = r.values = part == parts - 1 ? Tq : 0;
    r.visible = 1;
    r.slot = call.per_part;
    block.range(1) = r;
  }
  __syncthreads();
  const float factor = static_cast<float>(p.scale) * kLog2E;
  const int64_t state = b * s.Hkv + kv;
  const auto prepare = [&] {
    float* phi = block.query(1, 0);
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::kRows * Tile::kColumns; i += kDecodeThreads) {
      const int row = i / Tile::kColumns, d = i % Tile::kColumns;
      const bool exists = row < rows && d < D;
      const auto x = [&](const TensorView& q) {
        return static_cast<float>(row_of<T>(q, b, token(row), head(row))[d]);
      };
      block.query(0, row)[d] = exists ? factor * x(p.q) : 0.f;
      if (p.M != nullptr) phi[i] = exists ? elu_plus_one(x(p.q_mem)) : 0.f;
    }
    if (p.M == nullptr) return;
    __syncthreads();
    const int share = (D + parts - 1) / parts, from = min(part * share, D);
    const float* M = static_cast<const float*>(p.M) + state * D * D;
    const float* z = static_cast<const float*>(p.z) + state * D;
#pragma unroll 1
    for (int row = block.warp; row < rows; row += kDecodeWarps) {
      float sum = 0.f;
      for (int d = block.lane; d < D; d += 32) sum += phi[row * Tile::kColumns + d] * z[d];
      sum = warp_sum(sum);
      if (block.lane == 0) norms[row] = fmaxf(sum, 1e-6f);
    }
    retrieve(block, phi, M, from, min(from + share, D));
  };
  block.attend(rows, prepare, token);
  if (part == 0 && tile == 0) {
    append<T>(p, p.k, p.open_k, b, kv);
    append<T>(p, p.k_mem, p.open_k_mem, b, kv);
    append<T>(p, p.v, p.open_v, b, kv);
  }
  const auto finish = [&](int row, int d, float local) {
    const float* gate = static_cast<const float*>(p.gate);
    const float logit = gate == nullptr ? 0.f : gate[head(row)];
    const float g = __fdividef(1.f, 1.f + ptx::exp2_anywhere(-logit * kLog2E));
    float x = p.M == nullptr && p.bypass ? local : (1.f - g) * local;
    if (p.M != nullptr) {
      float held = 0.f;
#pragma unroll
      for (int i = 0; i < kDecodeClusterMost; ++i) {
        if (i >= parts) continue;
        held += cluster.map_shared_rank(block.shared + block.at.held, i)[row * Tile::kColumns + d];
      }
      x += g * __fdividef(held, norms[row]);
    }
    const_cast<T*>(row_of<T>(p.out, b, token(row), head(row)))[d] = static_cast<T>(x);
  };
  const auto finish_row = [&](int row, float lse) {
    static_cast<float*>(p.lse)[(b * s.Hq + head(row)) * s.Tq + token(row)] = lse * kLn2;
  };
  merge_cluster(block, rows, finish, finish_row);
}

}  // namespace

void launch_infini_decode(const InfiniDecodeParams& params, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  const int64_t count = s.Tq * (s.Hq / s.Hkv);
  InfiniDecodeCall call{params, 1, 0};
  for (int rows : {8, 4, 1}) {
    if ((rows == 8 && count <= 4) || (rows == 4 && count == 1)) continue;
    call.row_tiles = static_cast<int>(ceil_div(count, rows));
    const int64_t units = s.B * s.Hkv * call.row_tiles;
    for (int cluster = 1; cluster <= kDecodeClusterMost; cluster *= 2) {
      call.per_part = static_cast<int>(ceil_div(params.open_len, cluster));
      const DecodeLayout layout(rows, 8 * decode_lanes(s.Dk), 2, 2,
                                call.per_part + static_cast<int>(s.Tq));
      const bool more =
          cluster < kDecodeClusterMost && units * cluster < num_sms && call.per_part > 64;
      if (layout.bytes() > kDecodeSharedMost || more) continue;
      choose_decode_rows(s.dtype, s.Dk, rows, [&](auto tag) {
        launch_decode(infini_decode_kernel<typename decltype(tag)::type>, call,
                      "infini_decode_kernel", units, cluster, layout.bytes(), false, stream);
      });
      return;
    }
  }
  LCTX_CHECK(false, "lctx::infini_decode: an open segment of ", params.open_len,
             " tokens; expected fewer, whose scores fit in shared memory");
}

}  // namespace lctx::cuda
