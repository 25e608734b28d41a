// Where the tiles of keys of landmark_blocks.cuh lie, on the device.
#pragma once

#include <vector_types.h>

#include "../common/math.cuh"
#include "cuda_backend.h"

namespace lctx::cuda {

// A tile of keys: column c is position row0 + c, of which those from `begin` on are in the block.
struct alignas(8) LandmarkTile {
  int row0;
  int packed;  // 2 * begin + (the last column is the block's landmark)

#if defined(__CUDACC__)
  __device__ __forceinline__ int begin() const { return packed >> 1; }
  __device__ __forceinline__ bool has_landmark() const { return packed & 1; }
#endif
};

#if defined(__CUDACC__)
// Whether no batch has tiles in a chunk of these bounds.
__device__ __forceinline__ bool is_empty_chunk(const int2* bounds, int batches) {
  bool empty = true;
  for (int i = 0; i < batches; ++i) empty = empty && bounds[i].x >= bounds[i].y;
  return empty;
}
#endif

// What a position sees: tiles below `first`, of earlier blocks, by their landmarks, and tiles
// [first, end), of its own block.
struct alignas(8) LandmarkRow {
  int first, end;
};

// The backward may go through the tiles in chunks of chunk_tiles, and counts their blocks from the
// first that a chunk has tiles of.
struct LandmarkTables {
  LandmarkTile* tiles;     // (B, max_tiles)
  LandmarkRow* rows;       // (B, Tk)
  int2* bounds = nullptr;  // (chunks, B): all tiles of the blocks of a chunk
  int* groups = nullptr;   // (B, max_tiles): the block of a tile, counting those that have tiles
  int max_tiles, chunk_tiles;

  static constexpr int64_t kFewestTiles = 64;  // of a chunk, if there are others

  static int64_t most_tiles(int64_t Tk, int block_n);
  // 32-bit words of all tables.
  static int64_t ints(const AttnShape& s, int block_n, bool with_groups);

  // tiles_of_batch: room for so many, if not as many as there may be. chunk_tiles: 0 for all.
  LandmarkTables(int* scratch, const AttnShape& s, int block_n, bool with_groups = false,
                 int64_t tiles_of_batch = 0, int64_t chunk_tiles = 0);
  int num_chunks() const { return (max_tiles + chunk_tiles - 1) / chunk_tiles; }
};

void launch_landmark_tables(const LandmarkParams& params, int block_n, const LandmarkTables& tables,
                            Stream stream);

}  // namespace lctx::cuda
