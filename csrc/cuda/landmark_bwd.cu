// Math: landmark attention, backward (lctx::landmark_bwd; Mohtashami & Jaggi 2023, arXiv
//       2305.16300, section 3.1): dq, then dk and dv, with fp32 vectors in between
//       (landmark_bwd.h).
// Tile map: short uniform blocks: landmark_grads.cuh, compiled in landmark_d64_dq.cu and
//       landmark_d128_dq.cu by head dimension. All others: landmark_block_grads.cuh, in
//       landmark_blocks_dq.cu. Keys and values: landmark_dkv.cu.
// Pipeline: chunks of heads one after the other, in each of them the two kernels. Fused: the first
//       writes vectors alone, seven products instead of nine.
// Memory: vectors of 12 bytes a group and row, for as many heads as kVectorBytes allow.
// Limits: as flash_fwd.cu, lctx::landmark_fwd's.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "../common/math.cuh"
#include "dq_sum.cuh"
#include "landmark_bwd.h"

namespace lctx::cuda {
namespace {

int64_t head_dim(const AttnShape& s) { return std::max(s.Dk, s.Dv); }

int64_t vector_pitch(const AttnShape& s) { return ceil_div(s.Tq, 64) * 64; }

bool in_groups(const LandmarkParams& params) {
  return params.block_size > 0 && params.block_size <= widest_dq_group(head_dim(params.shape));
}

int64_t dq_ints(const LandmarkParams& params) {
  return in_groups(params) ? 1 : landmark_blocks_dq_ints(params.shape);
}

// Blocks of a batch that have ordinary keys, at most.
int64_t landmark_groups(const LandmarkParams& params) {
  const int64_t Tk = params.shape.Tk;
  return params.block_size > 0 ? ceil_div(Tk, params.block_size) : Tk / 2 + 1;
}

// The backward goes through the heads in chunks whose vectors take kVectorBytes, or one key/value
// head where that takes more: `batches` whole batches, or `heads` key/value heads of one.
struct Chunks {
  int64_t batches, heads;

  explicit Chunks(const LandmarkParams& params) {
    const AttnShape& s = params.shape;
    const int64_t row_bytes = 3 * sizeof(float) * std::max<int64_t>(landmark_groups(params), 1);
    const int64_t head_bytes = s.Hq / s.Hkv * std::max<int64_t>(vector_pitch(s), 64) * row_bytes;
    const int64_t fit = std::max<int64_t>(kVectorBytes / head_bytes, 1);
    batches = std::clamp<int64_t>(fit / s.Hkv, 1, std::max<int64_t>(s.B, 1));
    heads = ceil_div(s.Hkv, ceil_div(s.Hkv, fit));
  }

  // Elements of each of the three vectors.
  int64_t elements(const LandmarkParams& params) const {
    const AttnShape& s = params.shape;
    return batches * heads * (s.Hq / s.Hkv) * landmark_groups(params) * vector_pitch(s);
  }
};

// A backward over part of the batches and heads is one of its own, with moved pointers.
struct Part {
  LandmarkDqParams params;
  AttnGrads grads;

  Part(const LandmarkDqParams& all, const AttnGrads& all_grads, const Chunks& chunks, int64_t batch,
       int64_t head)
      : params(all), grads(all_grads) {
    AttnShape& s = params.shape;
    const int64_t per_group = s.Hq / s.Hkv;
    const int64_t rows = (batch * s.Hq + head * per_group) * bwd_pitch(s);
    params.lse2 += rows;
    params.delta += rows;
    if (params.dq_sum != nullptr) {
      params.dq_sum +=
          dq_sum_floats(1, batch * s.Hq + head * per_group, s.Tq, s.Dk <= 64 ? 64 : 128);
    }
    if (params.is_landmark != nullptr) params.is_landmark += batch * s.Tk;
    const auto move = [&](TensorView& x, int64_t first) {
      x.data = static_cast<char*>(x.data) +
               (batch * x.stride_b + first * x.stride_h) * dtype_size(s.dtype);
    };
    for (TensorView* x : {&params.q, &params.out, &params.dout, &grads.dout}) {
      move(*x, head * per_group);
    }
    for (TensorView* x : {&params.k, &params.v, &grads.dk, &grads.dv}) move(*x, head);
    s.B = std::min(chunks.batches, s.B - batch);
    s.Hkv = std::min(chunks.heads, s.Hkv - head);
    s.Hq = s.Hkv * per_group;
  }
};

void launch_dq(const LandmarkDqParams& params, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  cudaMemsetAsync(params.scratch, 0, (in_groups(params) ? 1 : 2) * sizeof(int), stream);
  if (!in_groups(params)) {
    launch_landmark_blocks_dq(params, num_sms, stream);
  } else if (head_dim(s) <= 64) {
    launch_landmark_groups_dq<64>(params, num_sms, stream);
  } else {
    launch_landmark_groups_dq<128>(params, num_sms, stream);
  }
}

}  // namespace

int64_t landmark_vector_floats(const LandmarkParams& params) {
  return 3 * Chunks(params).elements(params);
}

int64_t landmark_bwd_ints(const LandmarkParams& params) {
  return std::max(dq_ints(params), landmark_dkv_ints(params.shape));
}

// Pieces of irregular places and of other blocks have only been checked with a fixed order of sums.
// Above D = 128 there are no registers for dQ.
bool landmark_fuses(const LandmarkParams& params) {
  return head_dim(params.shape) <= 128 && !in_groups(params) && params.is_landmark == nullptr &&
         params.block_size % 64 == 0;
}

void launch_landmark_bwd(const LandmarkParams& params, const AttnGrads& grads,
                         const BwdScratch& scratch, float* vectors, int* ints, int num_sms,
                         Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B == 0 || s.Hq == 0) return;
  LandmarkDqParams all;
  static_cast<LandmarkParams&>(all) = params;
  all.out = grads.dq;
  all.dout = grads.dout;
  all.lse2 = scratch.lse2;
  all.delta = scratch.delta;
  all.dq_sum = scratch.dq_sum;
  all.scratch = ints;
  const Chunks chunks(params);
  const int64_t elements = chunks.elements(params);
  all.vectors = {vectors,
                 vectors + elements,
                 vectors + 2 * elements,
                 elements,
                 static_cast<int>(landmark_groups(params)),
                 static_cast<int>(vector_pitch(s))};
  if (params.is_landmark != nullptr) {
    // Landmarks without ordinary keys are in no block.
    for (const TensorView* x : {&grads.dk, &grads.dv}) {
      cudaMemsetAsync(x->data, 0, s.B * s.Tk * s.Hkv * s.Dk * dtype_size(s.dtype), stream);
    }
  }
  for (int64_t batch = 0; batch < s.B; batch += chunks.batches) {
    for (int64_t head = 0; head < s.Hkv; head += chunks.heads) {
      const Part part(all, grads, chunks, batch, head);
      if (s.Tq > 0) launch_dq(part.params, num_sms, stream);
      if (s.Tk > 0) launch_landmark_dkv(part.params, part.grads, num_sms, stream);
    }
  }
  if (all.dq_sum != nullptr) launch_unpack_dq(params, grads, all.dq_sum, stream);
}

}  // namespace lctx::cuda
