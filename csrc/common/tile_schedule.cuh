// The order in which a persistent grid takes its query tiles.
//
// Tiles are numbered longest first (last rows first: with a causal mask they see the most keys)
// inside sections of a few heads, whose keys and values then stay in the L2 cache. A block starts
// with tile blockIdx.x and takes further ones from a global counter, so blocks that finish early
// help out.
#pragma once

#include "math.cuh"
#include "pipeline.cuh"
#include "ptx_words.cuh"

namespace lctx {

struct TileOrder {
  int num_m_blocks = 0, num_heads = 0, section = 1, num_tiles = 0;
  FastDivisor per_section, per_row, per_last_row, per_batch;

  struct Tile {
    int m_block, head, batch;
  };

  TileOrder() = default;
  TileOrder(int m_blocks, int heads, int batches, int heads_per_section)
      : num_m_blocks(m_blocks), num_heads(heads * batches), num_tiles(m_blocks * num_heads) {
    section = heads_per_section < num_heads ? heads_per_section : num_heads;
    per_section = FastDivisor(section * num_m_blocks);
    per_row = FastDivisor(section);
    per_last_row = FastDivisor(num_heads % section != 0 ? num_heads % section : section);
    per_batch = FastDivisor(heads);
  }

  // The first tile of the last section.
  int last_section() const { return (num_heads - 1) / section * section * num_m_blocks; }

#if defined(__CUDACC__)
  __device__ __forceinline__ Tile operator[](int index) const {
    const int first = per_section.divide(index) * section;
    const int rest = per_section.modulo(index);
    const bool whole = first + section <= num_heads;
    const int row = whole ? per_row.divide(rest) : per_last_row.divide(rest);
    const int head = first + rest - row * (whole ? section : per_last_row.divisor);
    const int batch = per_batch.divide(head);
    return {num_m_blocks - 1 - row, head - batch * per_batch.divisor, batch};
  }
#endif
};

// Hands tile numbers from the producer thread, which asks the counter one tile ahead, to the
// consumers.
struct TileQueue {
  static constexpr int kSlots = 2;
  using Ring = Pipeline<kSlots>;
  static constexpr int kBytes = Ring::kBytes + kSlots * 4;
  Ring pipeline;
  uint32_t slots;  // address of kSlots ints
  PipelineState<kSlots> state;

  __device__ __forceinline__ explicit TileQueue(uint32_t base)
      : pipeline(base), slots(base + Ring::kBytes) {}

  __device__ __forceinline__ void publish(int tile) {
    ptx::mbarrier_wait(pipeline.empty + state.stage() * 8, state.phase() ^ 1);
    ptx::store_shared_4(slots + state.stage() * 4, tile);
    ptx::mbarrier_arrive(pipeline.full + state.stage() * 8);
    state.advance();
  }

  __device__ __forceinline__ int take() {
    pipeline.wait(state);
    const int tile = ptx::load_shared_4(slots + state.stage() * 4);
    __syncwarp();
    pipeline.release(state);
    state.advance();
    return tile;
  }
  // The same for the first thread of a warp without the others.
  __device__ __forceinline__ int take_alone() {
    pipeline.wait(state);
    const int tile = ptx::load_shared_4(slots + state.stage() * 4);
    pipeline.release(state);
    state.advance();
    return tile;
  }
};

}  // namespace lctx
