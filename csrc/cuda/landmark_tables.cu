// Math: none; the tables of landmark_blocks.cuh, from the places of the landmarks, for
//       lctx::landmark_fwd and lctx::landmark_bwd.
// Tile map: one thread block a batch.
// Pipeline: scans over the positions of the sequence. Nothing is read on the host.
// Memory: landmarks twice, every table once.
// Limits: positions below 2^30.
#include <algorithm>

#include "../common/launch.h"
#include "landmark_tables.h"

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

// What the backward knows of its chunks of tiles, from the finished tables of a batch: the blocks
// of each are counted from its first, and their tiles are its bounds.
__device__ void split_into_chunks(const LandmarkTile* tiles, const LandmarkRow* rows, int* groups,
                                  int num_tiles, int chunk_tiles, int num_chunks, int2* bounds) {
  const int lane = threadIdx.x % 32;
  for (int chunk = threadIdx.x / 32; chunk < num_chunks; chunk += kTableThreads / 32) {
    const int first = min(chunk * chunk_tiles, num_tiles);
    const int end = min(first + chunk_tiles, num_tiles);
    int2 bound = make_int2(num_tiles, num_tiles);
    if (first < end) {
      const int base = groups[first];
      __syncwarp();
      for (int i = first + lane; i < end; i += 32) groups[i] -= base;
      const int last_block = tiles[end - 1].begin();
      bound = make_int2(rows[tiles[first].begin()].first, end);
      for (int high = num_tiles; bound.y < high;) {
        const int middle = (bound.y + high) / 2;
        if (tiles[middle].begin() == last_block) {
          bound.y = middle + 1;
        } else {
          high = middle;
        }
      }
    }
    if (lane == 0) bounds[chunk * gridDim.x + blockIdx.x] = bound;
  }
}

__device__ __forceinline__ int tiles_of(int length, bool has_landmark, int block_n) {
  return length - has_landmark > 0 ? (length + block_n - 1) / block_n : 0;
}

// The tables of one batch. A thread looks after `per_thread` positions; what it needs to know of
// the others are the last landmark and the tiles before them and the first landmark behind them.
__global__ void __launch_bounds__(kTableThreads)
    landmark_table_kernel(Landmarks landmarks, int block_n, int per_thread, int max_tiles,
                          LandmarkTile* tiles, LandmarkRow* rows, int* groups, int2* bounds,
                          int chunk_tiles, int num_chunks) {
  __shared__ int shared[32], mirrored[kTableThreads];
  const int batch = blockIdx.x, thread = threadIdx.x, Tk = landmarks.Tk;
  const int start = min(thread * int64_t{per_thread}, int64_t{Tk});
  const int stop = min(start + int64_t{per_thread}, int64_t{Tk});
  tiles += batch * int64_t{max_tiles};
  rows += batch * int64_t{Tk};
  if (groups != nullptr) groups += batch * int64_t{max_tiles};

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

  int closed = 0, closed_groups = 0;
  for (int i = start, b = begin; i < stop; ++i) {
    if (!landmarks(batch, i)) continue;
    const int count = tiles_of(i + 1 - b, true, block_n);
    closed += count;
    closed_groups += count > 0;
    b = i + 1;
  }
  int first = exclusive_scan(closed, 0, Sum(), shared);
  int group = exclusive_scan(closed_groups, 0, Sum(), shared);

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
      if (groups != nullptr) groups[end - 1] = group;
    }
    if (i == landmark) {
      first += count;
      group += count > 0;
      begin = i + 1;
    }
  }
  if (bounds == nullptr) return;
  __syncthreads();
  split_into_chunks(tiles, rows, groups, rows[Tk - 1].end, chunk_tiles, num_chunks, bounds);
}

}  // namespace

// A block of one ordinary key and its landmark has a tile; so does every block_n keys.
int64_t LandmarkTables::most_tiles(int64_t Tk, int block_n) { return Tk / 2 + Tk / block_n + 2; }

int64_t LandmarkTables::ints(const AttnShape& s, int block_n, bool with_groups) {
  const int64_t tiles = most_tiles(s.Tk, block_n);
  const int64_t of_groups = with_groups ? tiles + 2 * (tiles / kFewestTiles + 1) : 0;
  return s.B * (2 * s.Tk + 2 * tiles + of_groups);
}

LandmarkTables::LandmarkTables(int* scratch, const AttnShape& s, int block_n, bool with_groups,
                               int64_t tiles_of_batch, int64_t chunk)
    : max_tiles(static_cast<int>(tiles_of_batch > 0 ? tiles_of_batch : most_tiles(s.Tk, block_n))),
      chunk_tiles(chunk > 0 ? static_cast<int>(chunk) : max_tiles) {
  rows = reinterpret_cast<LandmarkRow*>(scratch);
  tiles = reinterpret_cast<LandmarkTile*>(rows + s.B * s.Tk);
  if (!with_groups) return;
  bounds = reinterpret_cast<int2*>(tiles + s.B * max_tiles);
  groups = reinterpret_cast<int*>(bounds + s.B * num_chunks());
}

void launch_landmark_tables(const LandmarkParams& params, int block_n, const LandmarkTables& tables,
                            Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tk == 0) return;
  Landmarks landmarks{params.is_landmark, {}, static_cast<int>(s.Tk)};
  if (landmarks.flags == nullptr) {
    // No position closes a block that is longer than the sequence.
    landmarks.per_block =
        FastDivisor(static_cast<int>(std::min<int64_t>(params.block_size, s.Tk + 1)));
  }
  const dim3 grid(static_cast<unsigned>(s.B)), block(kTableThreads);
  landmark_table_kernel<<<grid, block, 0, stream>>>(
      landmarks, block_n, static_cast<int>(ceil_div(s.Tk, kTableThreads)), tables.max_tiles,
      tables.tiles, tables.rows, tables.groups, tables.bounds, tables.chunk_tiles,
      tables.num_chunks());
  check_launch("landmark_table_kernel", grid, block, stream);
}

}  // namespace lctx::cuda
