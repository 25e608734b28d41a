// What the kernels of landmark attention's backward share. The kernel of the queries writes fp32
// vectors of a group of keys (a block) and a query row, that of the keys reads them.
#pragma once

#include "cuda_backend.h"
#include "landmark_tables.h"

namespace lctx::cuda {

// Element (batch * Hq + head, group, row) of each is at ((batch * Hq + head) * num_groups + group)
// * pitch + row; pitch is Tq rounded up to 64. For every ordinary key of the group P = exp2(scale
// log2 e s - lam) and dS = P (dP - dsum); for its landmark P = 0 and dS = w. Written where 64 rows
// from a multiple of 64 hold one that sees the group; there rows before the group are as rows of
// its own (lse2, delta, 0), to be masked, and lam is +inf past Tq and in rows without keys.
struct LandmarkVectors {
  float *lam = nullptr, *dsum = nullptr, *w = nullptr;
  int64_t to_w = 0;  // elements from dsum to w
  int num_groups = 0, pitch = 0;
};

// Vectors of a chunk of heads or of tiles, as far as it goes.
constexpr int64_t kVectorBytes = int64_t{1} << 30;

// Work of both kernels. `out` of the parameters is where dq goes.
struct LandmarkDqParams : LandmarkParams {
  TensorView dout;
  const float *lse2 = nullptr, *delta = nullptr;  // as launch_flash_dq
  LandmarkVectors vectors;
  float* dq_sum = nullptr;  // fused: where dq is added to (dq_sum.cuh), else nullptr
  // Fused: tables for both kernels, and the chunk of tiles to work on.
  const LandmarkTables* tables = nullptr;
  int chunk = 0;
  int* scratch = nullptr;  // landmark_bwd_ints on the device
};

// landmark_d64_dq.cu, landmark_d128_dq.cu: uniform blocks of at most widest_dq_group(kHeadDim)
// keys. The first of scratch is zero.
template <int kHeadDim>
void launch_landmark_groups_dq(const LandmarkDqParams& params, int num_sms, Stream stream);
constexpr int64_t widest_dq_group(int64_t head_dim) { return head_dim <= 128 ? 64 : 0; }

// landmark_d64_bwd.cu, landmark_d128_bwd.cu: the same blocks; dk and dv, and dq added to
// scratch.dq_sum. scratch.counter is zero.
template <int kHeadDim>
void launch_landmark_fused(const LandmarkParams& params, const AttnGrads& grads,
                           const BwdScratch& scratch, int num_sms, Stream stream);

// landmark_blocks_dq.cu: any blocks. The first two of scratch are zero. With dq_sum the vectors
// alone.
void launch_landmark_blocks_dq(const LandmarkDqParams& params, int num_sms, Stream stream);
int64_t landmark_blocks_dq_ints(const AttnShape& s);

// landmark_dkv.cu: dk and dv from the vectors.
void launch_landmark_dkv(const LandmarkDqParams& params, const AttnGrads& grads, int num_sms,
                         Stream stream);
int64_t landmark_dkv_ints(const AttnShape& s);
// Their tables, at scratch + 2: filled by fill_piece_tables. chunk_tiles: even, 0 for all.
LandmarkTables piece_tables(const LandmarkParams& params, int* scratch, int64_t chunk_tiles);
void fill_piece_tables(const LandmarkParams& params, const LandmarkTables& tables, Stream stream);

}  // namespace lctx::cuda
