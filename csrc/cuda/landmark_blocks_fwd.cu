// Math: landmark attention, forward (lctx::landmark_fwd), blocks of any length: see
//       landmark_blocks.cuh.
// Tile map: attn_fwd_sm90.cuh with BlockScores. Head dimensions above 128 are two tiles of half of
//       the value columns, which both compute the scores.
// Pipeline: one thread block a batch makes the tables, three scans over the positions; then as
//       attn_fwd_launch.cuh. Nothing is read on the host.
// Memory: as flash_fwd.cu; tables of 8 bytes a position and 8 bytes a tile, see
//       landmark_blocks_ints.
// Limits: as flash_fwd.cu.
#include "attn_fwd_launch.cuh"
#include "landmark_blocks.cuh"
#include "landmark_kernels.h"

namespace lctx::cuda {
namespace {

constexpr int kTableThreads = 1024;

// Which positions are landmarks.
struct Landmarks {
  const bool* flags;  // (B, Tk), or nullptr: the last position of every block
  FastDivisor per_block;
  int Tk;

  __device__ __forceinline__ bool operator()(int batch, int position) const {
    if (flags != nullptr) return flags[batch * int64_t{Tk} + position];
    return per_block.modulo(position + 1) == 0;
  }
};

struct Max {
  __device__ int operator()(int a, int b) const { return max(a, b); }
};
struct Min {
  __device__ int operator()(int a, int b) const { return min(a, b); }
};
struct Sum {
  __device__ int operator()(int a, int b) const { return a + b; }
};

// x of all threads before this one, joined by `op`.
template <class Op>
__device__ int exclusive_scan(int x, int identity, Op op, int* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto scan_warp = [&](int y) {
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, y, step);
      if (lane >= step) y = op(y, other);
    }
    return y;
  };
  const int inclusive = scan_warp(x);
  if (lane == 31) shared[warp] = inclusive;
  __syncthreads();
  if (warp == 0) shared[lane] = scan_warp(shared[lane]);
  __syncthreads();
  const int before = warp > 0 ? shared[warp - 1] : identity;
  const int left = __shfl_up_sync(~0u, inclusive, 1);
  __syncthreads();
  return lane > 0 ? op(before, left) : before;
}

__device__ __forceinline__ int tiles_of(int length, bool has_landmark, int block_n) {
  return length - has_landmark > 0 ? (length + block_n - 1) / block_n : 0;
}

// The tables of one batch. A thread looks after `per_thread` positions; what it needs to know of
// the others are the last landmark and the tiles before them and the first landmark behind them.
__global__ void __launch_bounds__(kTableThreads)
    landmark_table_kernel(Landmarks landmarks, int block_n, int per_thread, int max_tiles,
                          LandmarkTile* tiles, LandmarkRow* rows) {
  __shared__ int shared[32], mirrored[kTableThreads];
  const int batch = blockIdx.x, thread = threadIdx.x, Tk = landmarks.Tk;
  const int start = min(thread * int64_t{per_thread}, int64_t{Tk});
  const int stop = min(start + int64_t{per_thread}, int64_t{Tk});
  tiles += batch * int64_t{max_tiles};
  rows += batch * int64_t{Tk};

  int first_landmark = Tk, last_landmark = -1;
  for (int i = start; i < stop; ++i) {
    if (!landmarks(batch, i)) continue;
    first_landmark = min(first_landmark, i);
    last_landmark = i;
  }
  int begin = exclusive_scan(last_landmark, -1, Max(), shared) + 1;
  mirrored[kTableThreads - 1 - thread] = first_landmark;
  __syncthreads();
  const int behind = exclusive_scan(mirrored[thread], Tk, Min(), shared);
  mirrored[thread] = behind;
  __syncthreads();
  const int next_landmark = mirrored[kTableThreads - 1 - thread];

  int closed = 0;
  for (int i = start, b = begin; i < stop; ++i) {
    if (!landmarks(batch, i)) continue;
    closed += tiles_of(i + 1 - b, true, block_n);
    b = i + 1;
  }
  int first = exclusive_scan(closed, 0, Sum(), shared);

  int landmark = -1;  // that closes the block of position i; Tk: none
  for (int i = start; i < stop; ++i) {
    if (landmark < i) {
      landmark = i;
      while (landmark < stop && !landmarks(batch, landmark)) ++landmark;
      if (landmark == stop) landmark = next_landmark;
    }
    const bool has_landmark = landmark < Tk;
    const int last = min(landmark, Tk - 1);
    const int count = tiles_of(last + 1 - begin, has_landmark, block_n);
    const int from_right = (last - i) / block_n;
    const int end = count > 0 ? first + count - from_right : first;
    rows[i] = {first, end};
    if (count > 0 && last - i == from_right * block_n) {
      tiles[end - 1] = {i - block_n + 1, 2 * begin + (has_landmark && i == last)};
    }
    if (i == landmark) {
      first += count;
      begin = i + 1;
    }
  }
}

// A block of one ordinary key and its landmark has a tile; so does every kBlockN keys.
int64_t max_tiles(int64_t Tk) { return Tk / 2 + Tk / 64 + 2; }

template <class Tile>
void launch_blocks(const LandmarkParams& params, int* scratch, int num_sms, Stream stream) {
  constexpr int kParts = Tile::kHeadDim / Tile::kValueDim;
  using Tiles = ValuePartTiles<Tile::kBlockM, kParts, Tile::kValueDim>;
  using Traits = FwdTraits<Tile, Tiles, BlockScores<Tile::kBlockN>, StoreRows>;
  const AttnShape& s = params.shape;
  auto p = fwd_params<Traits>(params, scratch);
  auto* rows = reinterpret_cast<LandmarkRow*>(scratch + 2);
  auto* tiles = reinterpret_cast<LandmarkTile*>(rows + s.B * s.Tk);
  p.rows = rows;
  p.tiles = tiles;
  p.max_tiles = static_cast<int>(max_tiles(s.Tk));
  p.row_shift = row_shift<Tile>(s.Tq);
  p.order = make_order("lctx::landmark_fwd", ceil_div(s.Tq, Tile::kBlockM), s.Hq * kParts, s.B,
                       heads_per_section(s, s.Tk, 16) * kParts);
  if (s.Tk > 0) {
    Landmarks landmarks{params.is_landmark, {}, p.Tk};
    if (landmarks.flags == nullptr) {
      // No position closes a block that is longer than the sequence.
      landmarks.per_block =
          FastDivisor(static_cast<int>(std::min<int64_t>(params.block_size, s.Tk + 1)));
    }
    const dim3 grid(static_cast<unsigned>(s.B)), block(kTableThreads);
    landmark_table_kernel<<<grid, block, 0, stream>>>(
        landmarks, Tile::kBlockN, static_cast<int>(ceil_div(s.Tk, kTableThreads)), p.max_tiles,
        tiles, rows);
    check_launch("landmark_table_kernel", grid, block, stream);
  }
  launch_fwd<Traits>(p, num_sms, stream);
}

template <class T>
void choose_blocks(const LandmarkParams& params, int* scratch, int num_sms, Stream stream) {
  const int64_t D = std::max(params.shape.Dk, params.shape.Dv);
  if (D <= 64) {
    launch_blocks<FwdTile<T, 64, 64, 3, true, 2, 2, 64, true>>(params, scratch, num_sms, stream);
  } else if (D <= 128) {
    launch_blocks<FwdTile<T, 128, 128, 2, false, 2, 1, 128, true>>(params, scratch, num_sms,
                                                                   stream);
  } else {
    launch_blocks<FwdTile<T, 256, 64, 2, false, 2, 1, 128, true>>(params, scratch, num_sms, stream);
  }
}

}  // namespace

int64_t landmark_blocks_ints(const AttnShape& s) { return 2 + 2 * s.B * (s.Tk + max_tiles(s.Tk)); }

void launch_landmark_blocks(const LandmarkParams& params, int* scratch, int num_sms,
                            Stream stream) {
  if (params.shape.dtype == DType::kBFloat16) {
    choose_blocks<__nv_bfloat16>(params, scratch, num_sms, stream);
  } else {
    choose_blocks<__half>(params, scratch, num_sms, stream);
  }
}

}  // namespace lctx::cuda
