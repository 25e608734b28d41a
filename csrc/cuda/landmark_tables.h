// Where the tiles of keys of landmark_blocks.cuh lie, on the device.
#pragma once

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

// What a position sees: tiles below `first`, of earlier blocks, by their landmarks, and tiles
// [first, end), of its own block.
struct alignas(8) LandmarkRow {
  int first, end;
};

struct LandmarkTables {
  LandmarkTile* tiles;    // (B, max_tiles)
  LandmarkRow* rows;      // (B, Tk)
  int* groups = nullptr;  // (B, max_tiles): the block of a tile, counting those that have tiles
  int max_tiles;

  static int64_t most_tiles(int64_t Tk, int block_n);
  // 32-bit words of all tables.
  static int64_t ints(const AttnShape& s, int block_n, bool with_groups);

  // tiles_of_batch: room for so many, if not as many as there may be.
  LandmarkTables(int* scratch, const AttnShape& s, int block_n, bool with_groups = false,
                 int64_t tiles_of_batch = 0);
};

void launch_landmark_tables(const LandmarkParams& params, int block_n, const LandmarkTables& tables,
                            Stream stream);

}  // namespace lctx::cuda
