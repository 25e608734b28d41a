// Math: landmark attention, backward (math: Mohtashami & Jaggi 2023, arXiv 2305.16300,
// section 3.1),
//       the gradient of the queries, and what that of the keys needs (landmark_bwd.h).
// Tile map: short uniform blocks: landmark_grads.cuh, compiled in landmark_d64_dq.cu and
//       landmark_d128_dq.cu by head dimension. All others: landmark_block_grads.cuh, in
//       landmark_blocks_dq.cu.
// Pipeline: a memset of the tile counters and one or two persistent launches.
// Memory: as those.
// Limits: as flash_fwd.cu.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "../common/math.cuh"
#include "landmark_bwd.h"

namespace lctx::cuda {
namespace {

int64_t head_dim(const AttnShape& s) { return std::max(s.Dk, s.Dv); }

int64_t vector_pitch(const AttnShape& s) { return ceil_div(s.Tq, 64) * 64; }

bool in_groups(const LandmarkParams& params) {
  return params.block_size > 0 && params.block_size <= widest_dq_group(head_dim(params.shape));
}

}  // namespace

int64_t landmark_dq_ints(const LandmarkParams& params) {
  return in_groups(params) ? 1 : landmark_blocks_dq_ints(params.shape);
}

int64_t landmark_groups(const LandmarkParams& params) {
  const int64_t Tk = params.shape.Tk;
  return params.block_size > 0 ? ceil_div(Tk, params.block_size) : Tk / 2 + 1;
}

LandmarkChunks::LandmarkChunks(const LandmarkParams& params) {
  const AttnShape& s = params.shape;
  const int64_t row_bytes = 3 * sizeof(float) * std::max<int64_t>(landmark_groups(params), 1);
  const int64_t head_bytes = s.Hq / s.Hkv * std::max<int64_t>(vector_pitch(s), 64) * row_bytes;
  const int64_t fit = std::max<int64_t>(kVectorBytes / head_bytes, 1);
  const int64_t parts = ceil_div(s.Hkv, fit);
  batches = std::clamp<int64_t>(fit / s.Hkv, 1, s.B);
  heads = ceil_div(s.Hkv, parts);
}

int64_t LandmarkChunks::elements(const LandmarkParams& params) const {
  const AttnShape& s = params.shape;
  return batches * heads * (s.Hq / s.Hkv) * landmark_groups(params) * vector_pitch(s);
}

LandmarkPart::LandmarkPart(const LandmarkPart& all, const LandmarkChunks& chunks, int64_t batch,
                           int64_t head)
    : LandmarkPart(all) {
  AttnShape& s = params.shape;
  const int64_t per_group = s.Hq / s.Hkv;
  const int64_t rows = (batch * s.Hq + head * per_group) * s.Tq;
  lse2 += rows;
  delta += rows;
  if (params.is_landmark != nullptr) params.is_landmark += batch * s.Tk;
  const auto move = [&](TensorView& x, int64_t first) {
    if (x.data == nullptr) return;
    x.data = static_cast<char*>(x.data) +
             (batch * x.stride_b + first * x.stride_h) * dtype_size(s.dtype);
  };
  for (TensorView* x : {&params.q, &params.out, &grads.dout, &grads.dq}) move(*x, head * per_group);
  for (TensorView* x : {&params.k, &params.v, &grads.dk, &grads.dv}) move(*x, head);
  s.B = std::min(chunks.batches, s.B - batch);
  s.Hkv = std::min(chunks.heads, s.Hkv - head);
  s.Hq = s.Hkv * per_group;
}

void launch_landmark_dq(const LandmarkDqParams& params, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  cudaMemsetAsync(params.scratch, 0, (in_groups(params) ? 1 : 2) * sizeof(int), stream);
  if (!in_groups(params)) {
    launch_landmark_blocks_dq(params, num_sms, stream);
  } else if (head_dim(s) <= 64) {
    launch_landmark_groups_dq<64>(params, num_sms, stream);
  } else {
    launch_landmark_groups_dq<128>(params, num_sms, stream);
  }
}

}  // namespace lctx::cuda
