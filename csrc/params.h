// Plain parameter structs: the only thing that csrc/api (which knows torch) and the kernels (which
// do not) share.
//
// Layout is always (B, T, H, D) with the innermost stride 1; the other three strides are free and
// counted in elements. "stat" is the type of every statistic and state (lse, M, z, gate and their
// gradients): double for float64 inputs, float for all others. Statistics are contiguous: lse (B,
// Hq, Tq), M (B, Hkv, Dk, Dv), z (B, Hkv, Dk).
#pragma once

#include <cstdint>

namespace lctx {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr int64_t dtype_size(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}

// A (B, T, H, D) tensor. data == nullptr means "not given" or "not wanted".
struct TensorView {
  void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_t = 0;
  int64_t stride_h = 0;
};

struct AttnShape {
  DType dtype = DType::kFloat32;
  int64_t B = 0, Tq = 0, Tk = 0;
  int64_t Hq = 0,
          Hkv = 0;  // Hq is a multiple of Hkv; query head h reads key/value head h / (Hq / Hkv)
  int64_t Dk = 0, Dv = 0;
};

// What every softmax attention takes; `out` and `lse` are outputs of the forward and inputs of the
// backward.
struct AttnParams {
  AttnShape shape;
  TensorView q, k, v;
  TensorView out;
  void* lse = nullptr;  // stat (B, Hq, Tq), natural logarithm, -inf where a row sees no key
  double scale = 1.0;
  bool causal = true;  // queries are the last Tq positions: row i sits at position i + Tk - Tq
};

// What every backward adds. Gradients are written, not accumulated.
struct AttnGrads {
  TensorView dout;
  const void* dlse = nullptr;  // stat (B, Hq, Tq) contiguous; nullptr: zero
  TensorView dq, dk, dv;
};

struct FlashParams : AttnParams {
  int64_t window = 0;                   // 0: none; else key j is visible only if |i - j| < window
  const int32_t* cu_seqlens = nullptr;  // (num_docs + 1); needs B == 1 and Tq == Tk
  int64_t num_docs = 0;
};

// One step of a ring: continues from (carry_out, lse) over other keys of the same queries.
struct CarryParams : FlashParams {
  int64_t query_start = 0, key_start = 0;  // positions of query 0 and of key 0
  // stat (B, Tq, Hq, Dv), read, and written but for rows that are done: those before `final_rows`
  // go to `out`. `lse` is read and written; -inf: nothing is carried for the row.
  TensorView carry_out;
  int64_t lse_stride_b = 0, lse_stride_h = 0;  // of lse (B, Hq, Tq), which may be a slice
  int64_t state_rows = 0;  // CUDA: rows of the tensors whose rows carry_out and lse are
  bool first = false;      // nothing is carried for any row; carry_out and lse are not read
  int64_t final_rows = 0;  // 0 or Tq on the CPU
};

// The first two steps of a ring in one: own keys, and other ones that rows from first_row on see
// all of.
struct CarryTwoParams : CarryParams {
  TensorView far_k, far_v;  // (B, far_rows, Hkv, Dk), (B, far_rows, Hkv, Dv)
  int64_t far_rows = 0, first_row = 0;
};

// The backward of one step, where lse and delta are those of all keys. dq, dk and dv are stat, and
// the step's gradients are added to what they hold; dlse is not used.
struct CarryGrads : AttnGrads {
  const void* delta = nullptr;  // stat, laid out like lse
  bool first = false;           // nothing is in dk and dv yet; they are not read
  int64_t rows_in_front = 0;    // of the queries, that are no part of the step
  bool results = false;         // dk and dv are in the dtype of k and have nothing else added
};

// What becomes of the sums of dk or dv of a rank's own keys.
struct KeySums {
  TensorView sum, home, out;  // fp32, fp32, 16 bits
  int64_t D = 0;
};

struct CarryKeysParams {
  DType dtype = DType::kBFloat16;
  int64_t B = 0, T = 0, H = 0;
  int64_t begin = 0, end = 0;  // rows that `home` has
  KeySums k, v;
};

struct LandmarkParams : AttnParams {
  int64_t block_size = 0;  // > 0: positions block_size - 1, 2 * block_size - 1, ... are landmarks
  const bool* is_landmark = nullptr;  // else (B, Tk) contiguous
};

// Whose choice of blocks it is: every row's own, one for all tokens of a head, one for all heads of
// a token.
enum class BlockChoice : int32_t { kTokenAndHead, kHead, kToken };

// New tokens over the best blocks of a store, its last ones, and the open block, which they join.
// q and k are not rotated yet; stored keys are, to places 0 .. block_size - 1 of their block.
struct LandmarkDecodeParams : AttnParams {
  BlockChoice choice = BlockChoice::kTokenAndHead;
  int64_t block_size = 0, open_len = 0;
  int64_t count = 0, always = 0, used = 0;  // blocks to choose from, read in any case, chosen
  TensorView landmarks;                     // (B, count + always, Hkv, Dk)
  TensorView blocks_k, blocks_v;  // (B, count + always, Hkv, block_size, D), stride_t of a block
  void *open_k = nullptr, *open_v = nullptr;  // (B, Hkv, block_size, D) contiguous
  const void* rope = nullptr;                 // stat (2, rope_len, Dk) cos and sin, or no rotation
  int64_t rope_len = 0;
  int32_t* blocks = nullptr;                    // (B, choice_tokens, choice_heads, used)
  int64_t choice_tokens = 0, choice_heads = 0;  // Tq, Hq, or 1 where they share a choice
  int64_t moved = 0;  // 1 where the last `used` blocks are not all: earlier ones share a place
};

// New tokens of a segment over its earlier ones, gated with what the memory holds for them.
struct InfiniDecodeParams : AttnParams {
  TensorView q_mem, k_mem;
  void *open_k = nullptr, *open_k_mem = nullptr, *open_v = nullptr;  // (B, Hkv, segment_len, D)
  int64_t segment_len = 0, open_len = 0;
  const void *M = nullptr, *z = nullptr;  // stat (B, Hkv, Dk, Dv), (B, Hkv, Dk); no memory yet
  const void* gate = nullptr;             // stat (Hq) logits; nullptr: zeros
  bool bypass = false;                    // without memory the gate is skipped
};

struct DilatedParams : AttnParams {
  const int64_t* segment_lengths = nullptr;
  const int64_t* dilation_rates = nullptr;
  int64_t num_branches = 0;
  bool head_offset_block = false;    // false: offset = h mod r; true: h / ceil(Hq / r)
  bool mix_detached = false;         // true: no gradient through the mixing weights (backward only)
  const int32_t* seqlens = nullptr;  // (B) true lengths of right-padded rows, or nullptr
};

enum class InfiniUpdate : int32_t { kLinear, kDelta };

struct InfiniParams : AttnParams {
  TensorView q_mem, k_mem;     // data == nullptr: q and k themselves
  const void* gate = nullptr;  // stat (Hq) logits; nullptr: zeros
  int64_t segment_len = 0;
  InfiniUpdate update = InfiniUpdate::kLinear;
  bool first_bypass = false;  // the first segment of a call without memory skips the gate
  int64_t detach_every = 0;
  bool has_mem = false;
  // Memory in: state 0 of `M_states`/`z_states` holds it on entry (zeros without memory).
  void* M_states = nullptr;  // stat (B, Hkv, S, Dk, Dv): the state each segment reads
  void* z_states = nullptr;  // stat (B, Hkv, S, Dk)
  void* M_out = nullptr;     // stat (B, Hkv, Dk, Dv): after the last segment
  void* z_out = nullptr;     // stat (B, Hkv, Dk)
  // CUDA, delta rule: (2, B, Hkv, S, Dk, Dk) bf16, -T of every segment is the sum of the two. Saved
  // for the backward; nullptr: not wanted.
  const void* decays = nullptr;
  TensorView out_local;  // softmax part before the gate, in the input dtype; saved for the backward
};

struct InfiniGrads : AttnGrads {
  TensorView dq_mem, dk_mem;  // data == nullptr: added into dq, dk
  const void* dM_out = nullptr;
  const void* dz_out = nullptr;
  void* dM_in = nullptr;  // stat (B, Hkv, Dk, Dv)
  void* dz_in = nullptr;
  void* dgate = nullptr;  // stat (Hq)
};

// Exact union of two partial attention results over disjoint key sets.
struct MergeParams {
  DType dtype = DType::kFloat32;
  int64_t B = 0, T = 0, H = 0, D = 0;
  TensorView out_a, out_b, out;
  const void* lse_a = nullptr;  // stat (B, H, T) contiguous
  const void* lse_b = nullptr;
  void* lse = nullptr;
};

struct MergeGrads {
  TensorView dout;
  const void* dlse = nullptr;  // nullptr: zero
  TensorView dout_a, dout_b;
  void* dlse_a = nullptr;
  void* dlse_b = nullptr;
};

}  // namespace lctx
