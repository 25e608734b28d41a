// What the kernels of landmark attention's backward share. The kernel of the queries writes fp32
// vectors of a group of keys (a block) and a query row, that of the keys reads them.
#pragma once

#include "cuda_backend.h"

namespace lctx::cuda {

// Element (batch * Hq + head, group, row) of each is at ((batch * Hq + head) * num_groups + group)
// * pitch + row; pitch is Tq rounded up to 64. For every ordinary key of the group P = exp2(scale
// log2 e s - lam) and dS = P (dP - dsum); for its landmark P = 0 and dS = w. Written where 64 rows
// from a multiple of 64 hold one that sees the group; there rows before the group are as rows of
// its own (lse2, delta, 0), to be masked, and lam is +inf past Tq and in rows without keys.
struct LandmarkVectors {
  float *lam = nullptr, *dsum = nullptr, *w = nullptr;
  int64_t num_groups = 0, pitch = 0;
};

// Work of the queries' kernel. `out` of the parameters is where dq goes.
struct LandmarkDqParams : LandmarkParams {
  TensorView dout;
  const float *lse2 = nullptr, *delta = nullptr;  // as launch_flash_dq
  LandmarkVectors vectors;
  int* scratch = nullptr;  // landmark_dq_ints on the device
};

// landmark_dq.cu, which chooses. Groups: those that the vectors have room for.
void launch_landmark_dq(const LandmarkDqParams& params, int num_sms, Stream stream);
int64_t landmark_dq_ints(const LandmarkParams& params);
int64_t landmark_groups(const LandmarkParams& params);

// The backward goes through the heads in chunks whose vectors take kVectorBytes, or one key/value
// head where that takes more: `batches` whole batches, or `heads` key/value heads of one.
constexpr int64_t kVectorBytes = int64_t{2} << 30;
struct LandmarkChunks {
  int64_t batches, heads;

  explicit LandmarkChunks(const LandmarkParams& params);
  // Elements of each of the three vectors.
  int64_t elements(const LandmarkParams& params) const;
};

// The part of a backward over batches and key/value heads from (batch, head) on.
struct LandmarkPart {
  LandmarkParams params;
  AttnGrads grads;
  const float *lse2, *delta;

  LandmarkPart(const LandmarkPart& all, const LandmarkChunks& chunks, int64_t batch, int64_t head);
  LandmarkPart(const LandmarkParams& params, const AttnGrads& grads, const float* lse2,
               const float* delta)
      : params(params), grads(grads), lse2(lse2), delta(delta) {}
};

// landmark_d64_dq.cu, landmark_d128_dq.cu: uniform blocks of at most widest_dq_group(kHeadDim)
// keys.
template <int kHeadDim>
void launch_landmark_groups_dq(const LandmarkDqParams& params, int num_sms, Stream stream);
constexpr int64_t widest_dq_group(int64_t head_dim) { return head_dim <= 128 ? 64 : 0; }

// landmark_blocks_dq.cu: any blocks.
void launch_landmark_blocks_dq(const LandmarkDqParams& params, int num_sms, Stream stream);
int64_t landmark_blocks_dq_ints(const AttnShape& s);

}  // namespace lctx::cuda
