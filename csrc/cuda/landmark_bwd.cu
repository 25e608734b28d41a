// Math: landmark attention, backward (lctx::landmark_bwd; Mohtashami & Jaggi 2023, arXiv
//       2305.16300, section 3.1): dq, then dk and dv, with fp32 vectors in between
//       (landmark_bwd.h).
// Tile map: short uniform blocks: landmark_grads.cuh, compiled in landmark_d64_dq.cu and
//       landmark_d128_dq.cu by head dimension. All others: landmark_block_grads.cuh, in
//       landmark_blocks_dq.cu. Keys and values: landmark_dkv.cu.
//       Fused: short uniform blocks: landmark_fused.cuh, in landmark_d64_bwd.cu and
//       landmark_d128_bwd.cu, everything in one kernel.
// Pipeline: chunks of heads one after the other, in each of them the two kernels. Fused: the first
//       writes vectors alone, seven products instead of nine; chunks of blocks too.
// Memory: vectors of 12 bytes a group and row, for as many heads or blocks as kVectorBytes allow.
//       Short blocks fused: none.
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

// The backward goes through `batches` whole batches, or `heads` key/value heads of one, at a time,
// as many as have vectors of kVectorBytes. Fused it may go through the blocks as well, since tiles
// of keys add their part to dq: then it takes the heads together, or places that are not known
// here would leave most of the vectors unused.
struct Chunks {
  int64_t batches, heads;
  int64_t groups;     // that have vectors at a time
  int64_t tiles = 0;  // of landmark_tables.h at a time; 0: all

  Chunks(const LandmarkParams& params, bool fused) : groups(landmark_groups(params)) {
    const AttnShape& s = params.shape;
    const int64_t rows = s.Hq / s.Hkv * std::max<int64_t>(vector_pitch(s), 64);
    const int64_t all_heads = std::max<int64_t>(s.B, 1) * s.Hkv;
    // Pairs of a key/value head and a group.
    const int64_t fit = std::max<int64_t>(kVectorBytes / (3 * sizeof(float) * rows), 1);
    const bool regular = params.block_size > 0;
    const int64_t per_block = regular ? ceil_div(params.block_size, 64) : 1;
    int64_t fit_heads = std::max<int64_t>(fit / std::max<int64_t>(groups, 1), 1);
    if (fused && groups * (regular ? 1 : all_heads) > fit) {
      const int64_t fewest = LandmarkTables::kFewestTiles / per_block + 2;
      fit_heads = std::clamp<int64_t>(fit / fewest, 1, all_heads);
      const int64_t fit_groups = std::max(fit / fit_heads, fewest);
      tiles = std::max((fit_groups - (regular ? 1 : 0)) * per_block / 2 * 2,
                       LandmarkTables::kFewestTiles);
      groups = std::min(groups, fit_groups);
    }
    batches = std::clamp<int64_t>(fit_heads / s.Hkv, 1, std::max<int64_t>(s.B, 1));
    heads = ceil_div(s.Hkv, ceil_div(s.Hkv, fit_heads));
  }

  // Elements of each of the three vectors.
  int64_t elements(const LandmarkParams& params) const {
    const AttnShape& s = params.shape;
    return batches * heads * (s.Hq / s.Hkv) * groups * vector_pitch(s);
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

// Vectors and gradients of one chunk of tiles after the other. The tables are those of a batch, and
// filled once.
void launch_fused(Part& part, const Chunks& chunks, bool fill, int num_sms, Stream stream) {
  LandmarkDqParams& params = part.params;
  if (params.shape.Tk == 0) return;
  const LandmarkTables tables = piece_tables(params, params.scratch, chunks.tiles);
  if (fill) fill_piece_tables(params, tables, stream);
  params.tables = &tables;
  for (params.chunk = 0; params.chunk < tables.num_chunks(); ++params.chunk) {
    if (params.shape.Tq > 0) launch_dq(params, num_sms, stream);
    launch_landmark_dkv(params, part.grads, num_sms, stream);
  }
}

// Short blocks: everything at once, without vectors.
void launch_in_one(const LandmarkParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                   int num_sms, Stream stream) {
  if (head_dim(params.shape) <= 64) {
    launch_landmark_fused<64>(params, grads, scratch, num_sms, stream);
  } else {
    launch_landmark_fused<128>(params, grads, scratch, num_sms, stream);
  }
  launch_unpack_dq(params, grads, scratch.dq_sum, stream);
}

}  // namespace

int64_t landmark_vector_floats(const LandmarkParams& params, bool fused) {
  return fused && in_groups(params) ? 0 : 3 * Chunks(params, fused).elements(params);
}

int64_t landmark_bwd_ints(const LandmarkParams& params) {
  return std::max(dq_ints(params), landmark_dkv_ints(params.shape));
}

// Above D = 128 there are no registers for dQ.
bool landmark_fuses(const LandmarkParams& params) { return head_dim(params.shape) <= 128; }

void launch_landmark_bwd(const LandmarkParams& params, const AttnGrads& grads,
                         const BwdScratch& scratch, float* vectors, int* ints, int num_sms,
                         Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B == 0 || s.Hq == 0) return;
  if (scratch.dq_sum != nullptr && in_groups(params)) {
    return launch_in_one(params, grads, scratch, num_sms, stream);
  }
  LandmarkDqParams all;
  static_cast<LandmarkParams&>(all) = params;
  all.out = grads.dq;
  all.dout = grads.dout;
  all.lse2 = scratch.lse2;
  all.delta = scratch.delta;
  all.dq_sum = scratch.dq_sum;
  all.scratch = ints;
  const bool fused = all.dq_sum != nullptr;
  const Chunks chunks(params, fused);
  const int64_t elements = chunks.elements(params);
  all.vectors = {vectors,
                 vectors + elements,
                 vectors + 2 * elements,
                 elements,
                 static_cast<int>(chunks.groups),
                 static_cast<int>(vector_pitch(s))};
  if (params.is_landmark != nullptr) {
    // Landmarks without ordinary keys are in no block.
    for (const TensorView* x : {&grads.dk, &grads.dv}) {
      cudaMemsetAsync(x->data, 0, s.B * s.Tk * s.Hkv * s.Dk * dtype_size(s.dtype), stream);
    }
  }
  for (int64_t batch = 0; batch < s.B; batch += chunks.batches) {
    for (int64_t head = 0; head < s.Hkv; head += chunks.heads) {
      Part part(all, grads, chunks, batch, head);
      if (fused) {
        launch_fused(part, chunks, /*fill=*/head == 0, num_sms, stream);
        continue;
      }
      if (s.Tq > 0) launch_dq(part.params, num_sms, stream);
      if (s.Tk > 0) launch_landmark_dkv(part.params, part.grads, num_sms, stream);
    }
  }
  if (fused) launch_unpack_dq(params, grads, all.dq_sum, stream);
}

}  // namespace lctx::cuda
