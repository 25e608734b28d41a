// Math: none; the host side of attn_fwd_sm90.cuh, shared by all families.
// Tile map: choose_tile picks rows x keys of a tile by head dimension, by measurement
//       (docs/hopper_forward.md):
//       - D <= 64: 192 x 128, three warpgroups
//       - D <= 128: 128 x 128, two; on long rows 128 x 176, O leaving from registers
//       - D <= 256: 128 x 80, two, O leaving from registers
// Pipeline: the tile counter must be zero at launch; one persistent block per multiprocessor. A
//       launch may overlap with the end of the one before (programmatic dependent launch).
// Memory: tiles go through the heads in sections, so that keys and values come from the L2 cache.
// Limits: those of attn_fwd_sm90.cuh.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/dtype.cuh"
#include "../common/launch_overlapping.h"
#include "../common/tensor_map.h"
#include "attn_fwd_run.cuh"
#include "cuda_backend.h"

namespace lctx::cuda {

// Keys from which on longer blocks pay; a causal mask wastes half of the last one.
constexpr int64_t kLongCausal = 8192, kLongFull = 4096;
constexpr int64_t kL2Budget = int64_t{24} << 20;  // for the keys and values of a section of heads

// What every family sets the same way; the caller adds maps, order and its policies' parameters.
inline void set_attention(const AttnParams& params, int* counter, FwdParams& p) {
  const AttnShape& s = params.shape;
  p.out_view = params.out;
  p.lse = static_cast<float*>(params.lse);
  p.counter = counter;
  p.per_group = FastDivisor(static_cast<int>(s.Hq / s.Hkv));
  p.Hq = static_cast<int>(s.Hq);
  p.Tq = static_cast<int>(s.Tq);
  p.Tk = static_cast<int>(s.Tk);
  p.D = static_cast<int>(s.Dv);
  p.query_offset = p.Tk - p.Tq;
  p.causal = params.causal;
  p.window = 0;
  p.scale_log2 = static_cast<float>(params.scale * 1.4426950408889634);
}

inline void set_flash(const FlashParams& params, int* counter, FwdParams& p) {
  set_attention(params, counter, p);
  p.window = static_cast<int>(std::min<int64_t>(params.window, INT32_MAX / 2));
}

// Maps of q, k, v and out; with a step one for the phases with the most rows and one for the
// others.
template <class Tile>
void set_maps(const AttnParams& params, FwdParams& p, int64_t step = 1) {
  const AttnShape& s = params.shape;
  // No keys: nothing is loaded, but a map needs a row.
  const TensorView k = s.Tk > 0 ? params.k : params.q, v = s.Tk > 0 ? params.v : params.q;
  for (int i = 0; i < (step == 1 ? 1 : 2); ++i) {
    const auto rows = [&](int64_t T) {
      return std::max<int64_t>(i == 0 ? ceil_div(T, step) : T / step, 1);
    };
    p.q[i] = make_rows_map(params.q, s.dtype, s.B, rows(s.Tq), s.Hq, s.Dk, 64, step);
    p.k[i] = make_rows_map(k, s.dtype, s.B, rows(s.Tk), s.Hkv, s.Dk, Tile::kBlockN, step);
    p.v[i] = make_rows_map(v, s.dtype, s.B, rows(s.Tk), s.Hkv, s.Dv, Tile::kBlockN, step);
    if (params.out.data == nullptr) continue;  // the rows go elsewhere
    p.out[i] = make_rows_map(params.out, s.dtype, s.B, rows(s.Tq), s.Hq, s.Dv, 64, step);
  }
}

// The parameters of a kernel but for its order and its policies' own.
template <class Traits, class OpParams>
typename Traits::Params fwd_params(const OpParams& params, int* counter) {
  typename Traits::Params p{};
  if constexpr (std::is_base_of_v<FlashParams, OpParams>) {
    set_flash(params, counter, p);
  } else {
    set_attention(params, counter, p);
  }
  set_maps<Traits>(params, p);
  return p;
}

// How many heads' keys and values of `keys` rows take `bytes`; 0: fewer than one's.
inline int64_t heads_in(const AttnShape& s, int64_t keys, int64_t bytes) {
  return bytes / (std::max<int64_t>(keys, 1) * (s.Dk + s.Dv) * dtype_size(s.dtype));
}

// Query heads per section for keys and values of `keys` rows.
inline int64_t heads_per_section(const AttnShape& s, int64_t keys, int64_t most) {
  return std::clamp<int64_t>(heads_in(s, keys, kL2Budget), 1, most) * (s.Hq / s.Hkv);
}

// The same for whole sequences, in equal sections. While tiles run in step, a key is read from
// memory once for all of them, however many heads there are; but on long sequences tiles drift
// apart, and only those of few heads still find each other's keys in the L2 cache
// (docs/hopper_forward.md). With a causal mask a section has some tiles for each multiprocessor:
// the longest of the last one would end the kernel.
inline int64_t dense_section(const FlashParams& params) {
  constexpr int64_t kRows = 512 * 128, kBytes = int64_t{32} << 20, kVeryLong = 128 * 1024;
  const AttnShape& s = params.shape;
  const int64_t heads = std::max<int64_t>(s.B * s.Hkv, 1), group = s.Hq / s.Hkv;
  const int64_t rows = std::max<int64_t>(s.Tq, 1);
  int64_t most = std::clamp<int64_t>(kRows / rows, 8, 16);
  if (params.window == 0 && params.cu_seqlens == nullptr) {
    const int64_t enough = params.causal ? ceil_div(kRows, rows * group) : 1;
    const int64_t least = std::max(rows, s.Tk) < kVeryLong ? 2 : 1;
    most = std::min(most, std::max({heads_in(s, s.Tk, kBytes), enough, least}));
  }
  return ceil_div(heads, ceil_div(heads, most)) * group;
}

// `m_blocks` row blocks for each of `heads` x `batches`.
inline TileOrder make_order(const char* op, int64_t m_blocks, int64_t heads, int64_t batches,
                            int64_t section) {
  LCTX_CHECK(m_blocks * heads * batches <= INT32_MAX, op, ": ", m_blocks * heads * batches,
             " tiles; expected at most 2^31 - 1");
  return TileOrder(static_cast<int>(m_blocks), static_cast<int>(heads), static_cast<int>(batches),
                   static_cast<int>(section));
}

// One block per multiprocessor of a kernel that is run_tiles<Kernel>. `overlap`: it may start while
// the one before it in the stream ends; it waits before it reads a carried result or writes.
template <class Traits, class Kernel>
void launch_tiles(const char* name, Kernel kernel, const typename Traits::Params& p, int num_sms,
                  Stream stream, bool overlap) {
  if (p.order.num_tiles == 0) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  launch_overlapping(name, kernel, p, dim3(std::min(num_sms * Traits::kPerSm, p.order.num_tiles)),
                     dim3(Traits::kThreads), stream, overlap, Traits::kSharedBytes);
}

template <class Traits>
void launch_fwd(const typename Traits::Params& p, int num_sms, Stream stream,
                bool overlap = false) {
  launch_tiles<Traits>("attn_fwd_sm90_kernel", attn_fwd_sm90_kernel<Traits>, p, num_sms, stream,
                       overlap);
}

// Calls run(TypeTag<FwdTile>()) with the tile for `params`.
template <class T, class Run>
void choose_tile(const AttnParams& params, int64_t keys, Run&& run) {
  const int64_t D = std::max(params.shape.Dk, params.shape.Dv);
  if (D <= 64) {
    run(TypeTag<FwdTile<T, 64, 128, 3, true>>());
  } else if (D <= 128 && keys < (params.causal ? kLongCausal : kLongFull)) {
    run(TypeTag<FwdTile<T, 128, 128, 2, true>>());
  } else if (D <= 128) {
    run(TypeTag<FwdTile<T, 128, 176, 2, false>>());
  } else {
    run(TypeTag<FwdTile<T, 256, 80, 2, false>>());
  }
}

// The same for the 16-bit type of `params`.
template <class Run>
void choose_type_and_tile(const AttnParams& params, int64_t keys, Run&& run) {
  if (params.shape.dtype == DType::kBFloat16) {
    choose_tile<__nv_bfloat16>(params, keys, run);
  } else {
    choose_tile<__half>(params, keys, run);
  }
}

}  // namespace lctx::cuda
