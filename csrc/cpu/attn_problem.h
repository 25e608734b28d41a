// What the host side hands to the attention kernels: a list of independent attention problems and
// their shared options.
//
// Every family is brought to this form. A problem is one (batch, key/value head) over one
// contiguous or strided set of positions: the whole sequence, one document of cu_seqlens, one
// segment of Infini, one (segment, phase) of a dilated branch. Its rows are the G query heads that
// share the keys, position by position: row r is position r / G of query head r % G, so GQA reads K
// and V once and sums dK and dV for free.
#pragma once

#include <cstdint>

#include "../params.h"

namespace lctx::cpu {

// A matrix of rows (t, g) or, for keys, of rows t; strides in elements.
struct Rows {
  void* data = nullptr;
  int64_t stride_t = 0;
  int64_t stride_g = 0;
};

// Landmark structure of one sequence of keys: group b is [end[b - 1], end[b]) and its last key is
// its landmark, but for an incomplete last group, which has none.
struct Groups {
  const int32_t* end = nullptr;
  const int32_t* of_key = nullptr;  // group of each key
  int32_t count = 0;
  bool last_is_complete = false;
};

struct Problem {
  int32_t Tq = 0, Tk = 0, G = 1;
  int64_t query_offset = 0;  // position of query 0 among the keys; negative: before them all
  Rows q, k, v, out;
  Rows held;  // stat, Write::kMerge: what the rows hold so far where that is not in `out`
  Rows lse;   // stat
  Groups groups;
  // Backward only.
  Rows dout, delta;  // delta (stat, laid out like lse) = rowsum(dout * out) - dlse
  const void* dout_factor =
      nullptr;  // stat (G): dout counts times dout_factor[g] (delta is given as it counts)
  Rows dq, dk, dv;
};

enum class Scores : int32_t { kSoftmax, kLandmark };

// kMerge: `out` and `lse` hold (stat) results over other keys; the union of both is written back.
// kAdd: gradients are added to what `dq`, `dk`, `dv` (stat) hold.
enum class Write : int32_t { kStore, kMerge, kAdd };

struct AttnLaunch {
  DType dtype = DType::kFloat32;      // of q, k, v, dout
  DType out_dtype = DType::kFloat32;  // of out (forward) or dq, dk, dv (backward)
  Write write = Write::kStore;
  Scores scores = Scores::kSoftmax;
  int64_t Dk = 0, Dv = 0;
  double scale = 1.0;
  bool causal = true;
  int64_t window = 0;     // 0: none
  int64_t max_keys = 0;   // largest Tk of any problem
  int64_t max_group = 0;  // Landmark: longest group; 0 otherwise
  const Problem* problems = nullptr;
};

// One instruction set's kernels for one accumulation type (float or double). A task's scratch comes
// from the caller.
struct AttnKernels {
  int64_t rows_per_tile;                             // forward: rows of one task
  int64_t (*fwd_scratch)(const AttnLaunch& launch);  // bytes
  void (*fwd_tile)(const AttnLaunch& launch, const Problem& problem, int64_t tile, char* scratch);
  int64_t (*bwd_scratch)(const AttnLaunch& launch, int64_t num_splits);
  int64_t (*bwd_partial)(const AttnLaunch& launch);  // elements of one split's partial dk, dv
  // Row tiles split, split + num_splits, ... of the problem. With more than one split, dk and dv go
  // to `partial` (stat, one piece a split) and bwd_reduce writes their sum.
  void (*bwd_split)(const AttnLaunch& launch, const Problem& problem, int64_t split,
                    int64_t num_splits, void* partial, char* scratch);
  void (*bwd_reduce)(const AttnLaunch& launch, const Problem& problem, int64_t num_splits,
                     void* partial);
  // Rows t in [t0, t1) of G heads: delta = rowsum(dout * out) - dlse (dlse.data may be nullptr).
  void (*delta_rows)(const AttnLaunch& launch, const Problem& problem, const Rows& dlse, int64_t t0,
                     int64_t t1);
  // dst (dtype) = src (stat), rows of D elements.
  void (*convert_rows)(DType dtype, const Rows& src, const Rows& dst, int64_t t0, int64_t t1,
                       int64_t G, int64_t D);
};

}  // namespace lctx::cpu
