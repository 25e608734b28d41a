// Math: none; the size of a tile of the forward and its shared memory.
// Tile map: 64 query rows for each consumer warpgroup, blocks of kBlockN keys.
// Pipeline: kStages stages of keys and of values, kQStages of queries, the queue of tiles.
// Memory: Q | K | V | outer accumulators | O | barriers; 227 KB at most.
// Limits: registers: 40/232 (two consumers), 32/160 (three).
#pragma once

#include <type_traits>

#include "../common/wgmma_layout.h"
#include "attn_fwd_tiles.cuh"

namespace lctx::cuda {

// kValueDim: value columns of a tile, where they are not all of kHeadDim. kOuter: shared memory for
// a second set of accumulators.
template <class T_, int kHeadDim_, int kBlockN_, int kConsumers_, bool kStagesO_, int kStages_ = 2,
          int kQStages_ = kStagesO_ ? 2 : 1, int kValueDim_ = kHeadDim_, bool kOuter_ = false>
struct FwdTile {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kFirstN = kBlockN;  // keys of a tile's first block that may exist
  static constexpr int kConsumers = kConsumers_;
  // O has shared memory of its own and leaves by TMA; else it leaves from registers.
  static constexpr bool kStagesO = kStagesO_;
  static constexpr int kStages = kStages_;
  // A second Q, where there is room, lets the next tile's first scores run under this one's end.
  static constexpr int kQStages = kQStages_;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr bool kShifts = kConsumers > 2;  // see row_shift()
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr bool kTakesTurns = false, kWaitsEarly = false, kRescalesLate = false;
  static constexpr bool kPinsWait = false;
  static constexpr int kPerSm = 1;  // thread blocks on a multiprocessor
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr int kQBytes = tile_bytes(kBlockM, kHeadDim);
  static constexpr int kKBytes = tile_bytes(kBlockN, kHeadDim);
  static constexpr int kVBytes = tile_bytes(kBlockN, kValueDim);
  static constexpr int kK = kQStages * kQBytes;
  static constexpr int kV = kK + kStages * kKBytes;
  static constexpr int kOuter = kV + kStages * kVBytes;
  static constexpr int kO = kOuter + (kOuter_ ? kBlockM * kValueDim * 4 : 0);
  static constexpr int kBarriers = kO + (kStagesO ? tile_bytes(kBlockM, kValueDim) : 0);
  static constexpr int kBarrierBytes = 512;
  static constexpr int kSharedBytes = kBarriers + kBarrierBytes + 1024;  // and alignment
  static_assert(2 * Pipeline<kStages>::kBytes + Pipeline<kQStages>::kBytes + TileQueue::kBytes <=
                    kBarrierBytes,
                "no room for the barriers of so many stages");
};

// Warpgroups issue the products of a block in turns, so that those of one run under the softmax of
// the others. P V then ends soon after the scores: waited for early, it lets O be rescaled and the
// weights be packed between the exponentials.
template <class Tile>
struct TurnsTile : Tile {
  static constexpr bool kTakesTurns = true, kWaitsEarly = true;
  static constexpr bool kRescalesLate = Tile::kHeadDim > 64;
  // Eighths of the weights that the source has before the wait. ptxas moves it: with 6 behind a
  // quarter of them, with less further down.
  static constexpr int kWaitsAfter = Tile::kHeadDim > 64 ? 6 : 7;
};

// Turns gain 1 % at D256 at most.
template <class Tile>
using DenseTile = std::conditional_t<(Tile::kHeadDim > 128), Tile, TurnsTile<Tile>>;

// The same, where ptxas moves the wait above all weights: the keys are released with a weight of
// the first eighth in the address, and the wait stays behind that.
template <class Tile>
struct PinnedTile : DenseTile<Tile> {
  static constexpr bool kPinsWait = DenseTile<Tile>::kWaitsEarly;
  static constexpr int kWaitsAfter = 6;
};

// Where the blocks do not divide the keys and all tiles begin with the same short one.
template <class Tile>
struct ShortFirstTile : Tile {
  static constexpr int kFirstN = 64;
};

// A tile shape and the three policies, as one type that the kernel is compiled for.
template <class Tile, class Tiles_, class Scores_, class Rows_>
struct FwdTraits : Tile {
  using Tiles = Tiles_;
  using Scores = Scores_;
  using Rows = Rows_;
  struct Params : FwdParams, Tiles_::Params, Scores_::Params, Rows_::Params {
    using Tiles = Tiles_;
  };
};

}  // namespace lctx::cuda
