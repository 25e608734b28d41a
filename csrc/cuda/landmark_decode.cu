// Math: landmark_decode: rows of new tokens over the chosen blocks m, each with the weight of its
//       landmark, and over the ordinary keys of the open block; one softmax over landmarks and
//       open keys, inside of every block another: math as landmark_fwd.cu. Keys of a block are
//       rotated to their places in it, queries to p - s_m for the block that begins at s_m.
// Tile map: a cluster of up to 8 thread blocks for the rows that share their blocks: one row, the
//       tokens of a head, or the heads of a group; a thread block for every so many blocks of keys.
//       Warps share their keys by pieces of 4 loads of 512 bytes.
// Pipeline: launch 1 lets new keys join the open block and scores landmarks, 2 selects (3 where
//       rows choose together), the last attends. Each waits beside the one before. Keys and values
//       of a warp are on the way together; the partial results of a cluster meet in shared memory.
// Memory: chosen blocks once for every row that chose them, over NVLink or PCIe where they lie in
//       the pinned memory of the host: no copy, no wait of the host.
// Limits: those of landmark_select.cu; (top_k + always + 1) block_size keys of one row and its
//       queries fit in the shared memory of a cluster of 8.
#include "landmark_decode.cuh"

namespace lctx::cuda {
namespace {

// The rows of a cluster: i = 0 .. count - 1 of them.
struct RowsOfChoice {
  int b, t, h, count;
  bool tokens, heads;  // what counts on with i

  __device__ RowsOfChoice(const LandmarkDecodeParams& p, int unit) {
    const AttnShape& s = p.shape;
    const int Hq = static_cast<int>(s.Hq), Tq = static_cast<int>(s.Tq);
    tokens = p.choice == BlockChoice::kHead;
    heads = p.choice == BlockChoice::kToken;
    const int G = static_cast<int>(s.Hq / s.Hkv);
    const int in_token = heads ? static_cast<int>(s.Hkv) : Hq, in_batch = tokens ? 1 : Tq;
    h = unit % in_token * (heads ? G : 1);
    t = unit / in_token % in_batch;
    b = unit / in_token / in_batch;
    count = tokens ? Tq : heads ? G : 1;
  }
  __device__ int token(int i) const { return tokens ? i : t; }
  __device__ int head(int i) const { return heads ? h + i : h; }
};

template <class Tile>
__global__ void __launch_bounds__(kDecodeThreads)
    landmark_attend_kernel(const __grid_constant__ LandmarkDecodeCall call) {
  extern __shared__ __align__(16) float memory[];
  using T = typename Tile::T;
  const LandmarkDecodeParams& p = call.p;
  const AttnShape& s = p.shape;
  const auto cluster = cooperative_groups::this_cluster();
  const int parts = static_cast<int>(cluster.num_blocks());
  const int part = static_cast<int>(cluster.block_rank());
  const int unit = blockIdx.x / parts, D = static_cast<int>(s.Dk);
  const int L = static_cast<int>(p.block_size);
  const RowsOfChoice all(p, unit / call.row_tiles);
  const int first = unit % call.row_tiles * Tile::kRows;
  const int rows = min(Tile::kRows, all.count - first);
  const int read = static_cast<int>(p.used + p.always), own = (read + parts - part) / parts;
  const int most = (read + parts) / parts;  // all of a cluster lay their memory out alike
  const int kv = all.h / static_cast<int>(s.Hq / s.Hkv);
  DecodeLayout layout(Tile::kRows, Tile::kColumns, most, most, most * L);
  layout.ranges = own;
  DecodeBlock<Tile> block(memory, layout, D);

  ptx::grid_dependency_wait();
  const int choice = (all.b * static_cast<int>(p.choice_tokens) + (all.tokens ? 0 : all.t)) *
                         static_cast<int>(p.choice_heads) +
                     (all.heads ? 0 : all.h);
  const int32_t* blocks = p.blocks + int64_t{choice} * p.used;
  const auto chosen = [&](int m) {
    return m < p.used ? blocks[m] : static_cast<int>(p.count + m - p.used);
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < own; i += kDecodeThreads) {
    const int m = part + i * parts;
    KeyRange& r = block.range(i);
    r.stride_k = r.stride_v = D;
    r.slot = i * L;
    r.query = i;
    r.values = L - 1;
    if (m < read) {
      const int64_t n = chosen(m);
      r.k = row_of<T>(p.blocks_k, all.b, n, kv);
      r.v = row_of<T>(p.blocks_v, all.b, n, kv);
      r.keys = r.visible = L;
    } else {
      const int64_t open = (all.b * s.Hkv + kv) * L * int64_t{D};
      r.k = static_cast<const T*>(p.open_k) + open;
      r.v = static_cast<const T*>(p.open_v) + open;
      r.keys = r.values = min(static_cast<int>(p.open_len + s.Tq), L - 1);
      r.visible = static_cast<int>(p.open_len) + 1;
    }
  }
  __syncthreads();
  const float factor = static_cast<float>(p.scale) * kLog2E;
  const auto position = [&](int row) { return all.token(first + row); };
  const auto prepare = [&] {
#pragma unroll 1
    for (int i = threadIdx.x; i < own * Tile::kRows * Tile::kColumns; i += kDecodeThreads) {
      const int d = i % Tile::kColumns, row = i / Tile::kColumns % Tile::kRows;
      const int n = i / (Tile::kColumns * Tile::kRows), m = part + n * parts;
      if (row >= rows) continue;
      const int t = position(row);
      const bool shifted = m < read && p.moved && chosen(m) >= p.count - p.used;
      const int start = m < read ? (m + shifted) * L : place_of_token(p, 0) - int(p.open_len);
      const T* q = row_of<T>(p.q, all.b, t, all.head(first + row));
      block.query(n, row)[d] =
          d < D ? factor * rotated(p, q, place_of_token(p, t) - start, d) : 0.f;
    }
  };
  block.attend(rows, prepare, position);
  const auto finish = [&](int row, int d, float x) {
    T* out = const_cast<T*>(row_of<T>(p.out, all.b, position(row), all.head(first + row)));
    out[d] = static_cast<T>(x);
  };
  const auto finish_row = [&](int row, float lse) {
    static_cast<float*>(p.lse)[(all.b * s.Hq + all.head(first + row)) * s.Tq + position(row)] =
        lse * kLn2;
  };
  merge_cluster(block, rows, finish, finish_row);
}

// How landmark_attend_kernel shares out its work.
struct AttendPlan {
  int rows = 0, row_tiles = 0, cluster = 1;
  int64_t units = 0, bytes = 0;
};

AttendPlan plan_attend(const LandmarkDecodeParams& p, int num_sms) {
  const AttnShape& s = p.shape;
  const bool heads = p.choice == BlockChoice::kToken, tokens = p.choice == BlockChoice::kHead;
  const int64_t count = tokens ? s.Tq : heads ? s.Hq / s.Hkv : 1;
  const int64_t ranges = p.used + p.always + 1;
  for (int most : {8, 4, 1}) {
    if ((most == 8 && count <= 4) || (most == 4 && count == 1)) continue;
    AttendPlan plan;
    plan.rows = most;
    plan.row_tiles = static_cast<int>(ceil_div(count, most));
    plan.units = s.B * (tokens ? 1 : s.Tq) * (heads ? s.Hkv : s.Hq) * plan.row_tiles;
    for (; plan.cluster <= kDecodeClusterMost; plan.cluster *= 2) {
      const int own = static_cast<int>(ceil_div(ranges, plan.cluster));
      plan.bytes =
          DecodeLayout(most, 8 * decode_lanes(s.Dk), own, own, own * static_cast<int>(p.block_size))
              .bytes();
      const bool more = plan.cluster < kDecodeClusterMost && plan.cluster < ranges &&
                        plan.units * plan.cluster < num_sms;
      if (plan.bytes <= kDecodeSharedMost && !more) return plan;
    }
  }
  return {};
}

TensorView on_device(const TensorView& x) {
  cudaPointerAttributes found{};
  const cudaError_t error = cudaPointerGetAttributes(&found, x.data);
  LCTX_CHECK(error == cudaSuccess && found.type == cudaMemoryTypeHost,
             "lctx::landmark_decode: the blocks are in the CPU's pageable memory; expected pinned "
             "memory, torch.empty(..., pin_memory=True), or the GPU's");
  TensorView view = x;
  view.data = found.devicePointer;
  return view;
}

void set_chunks(const LandmarkDecodeParams& p, LandmarkDecodeScratch& scratch) {
  if (!chooses(p)) return;
  scratch.far_chunks = static_cast<int>(ceil_div(p.count - p.used, kLandmarkChunk));
  scratch.chunks = scratch.far_chunks + static_cast<int>(ceil_div(p.used, kDecodeWarps));
}

}  // namespace

int64_t landmark_decode_scratch(const LandmarkDecodeParams& p) {
  if (!chooses(p)) return 0;
  LandmarkDecodeScratch scratch;
  set_chunks(p, scratch);
  const int64_t rows = p.shape.B * p.shape.Tq * p.shape.Hq;
  return 2 * rows * scratch.chunks + (rows + landmark_choices(p)) * p.count;
}

void launch_landmark_decode(const LandmarkDecodeParams& params, float* scratch, bool blocks_on_host,
                            int num_sms, Stream stream) {
  LandmarkDecodeCall call;
  call.p = params;
  const AttnShape& s = params.shape;
  if (blocks_on_host) {
    call.p.blocks_k = on_device(params.blocks_k);
    call.p.blocks_v = on_device(params.blocks_v);
  }
  const AttendPlan plan = plan_attend(params, num_sms);
  LCTX_CHECK(plan.rows > 0 && params.used <= 16384 && params.count <= INT32_MAX / 2,
             "lctx::landmark_decode: ", params.used, " of ", params.count, " blocks of ",
             params.block_size, " keys; expected fewer, which fit in shared memory");
  set_chunks(params, call.scratch);
  if (chooses(params)) {
    const bool together = landmark_choices(params) < s.B * s.Tq * s.Hq;
    const int64_t rows = s.B * s.Tq * s.Hq;
    call.scratch.stats = together ? reinterpret_cast<float2*>(scratch) : nullptr;
    call.scratch.scores = scratch + 2 * rows * call.scratch.chunks;
    call.scratch.combined = together ? call.scratch.scores + rows * params.count : nullptr;
  }
  call.row_tiles = plan.row_tiles;
  launch_landmark_select(call, stream);
  choose_decode_rows(s.dtype, s.Dk, plan.rows, [&](auto tag) {
    using Tile = typename decltype(tag)::type;
    launch_decode(landmark_attend_kernel<Tile>, call, "landmark_attend_kernel", plan.units,
                  plan.cluster, plan.bytes, true, stream);
  });
}

}  // namespace lctx::cuda
