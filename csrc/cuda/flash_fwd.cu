// Math: dense softmax attention, forward: out = softmax(scale q k^T) v over the keys a row sees,
// and
//       its log-sum-exp. Chooses the tile and launches attn_fwd_sm90.cuh, which says how it is
//       done.
// Tile map: rows x keys of a tile, chosen by measurement (docs/hopper_forward.md):
//       D <= 64   192 x 128, three warpgroups
//       D <= 128  128 x 128, two; from 8192 keys on 128 x 176, O leaving through Q's memory
//       D <= 256  128 x 80, two, O leaving through Q's memory
// Pipeline: one memset of the tile counter, one persistent launch of a block per multiprocessor.
// Memory: tiles go through the heads in sections whose keys and values fit the L2 cache.
// Limits: bf16, fp16; Dk = Dv, a multiple of 8 up to 256; strides and data at multiples of 16
// bytes;
//       scale > 0. csrc/api/flash.cpp refuses the rest.
#include <algorithm>

#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "attn_fwd_sm90.cuh"
#include "cuda_backend.h"

namespace lctx::cuda {
namespace {

constexpr int64_t kLongSequence = 8192;
constexpr int64_t kL2Budget = int64_t{24} << 20;  // for the keys and values of a section of heads

template <class Traits>
FwdParams make_params(const FlashParams& params, int* counter) {
  const AttnShape& s = params.shape;
  FwdParams p;
  p.q = make_rows_map(params.q, s.dtype, s.B, s.Tq, s.Hq, s.Dk, 64);
  // No keys: nothing is loaded, but a map needs a row.
  const TensorView k = s.Tk > 0 ? params.k : params.q, v = s.Tk > 0 ? params.v : params.q;
  const int64_t Tk = std::max<int64_t>(s.Tk, 1);
  p.k = make_rows_map(k, s.dtype, s.B, Tk, s.Hkv, s.Dk, Traits::kBlockN);
  p.v = make_rows_map(v, s.dtype, s.B, Tk, s.Hkv, s.Dv, Traits::kBlockN);
  p.out = make_rows_map(params.out, s.dtype, s.B, s.Tq, s.Hq, s.Dv, 64);
  p.out_view = params.out;
  p.lse = static_cast<float*>(params.lse);
  p.counter = counter;
  const int64_t head_bytes = Tk * (s.Dk + s.Dv) * dtype_size(s.dtype);
  const int64_t kv_heads = std::clamp<int64_t>(kL2Budget / head_bytes, 1, 16);
  // With cu_seqlens: slots, see find_document.
  const int64_t row_blocks = params.cu_seqlens != nullptr ? s.Tq / Traits::kBlockM + params.num_docs
                                                          : ceil_div(s.Tq, Traits::kBlockM);
  LCTX_CHECK(row_blocks * s.B * s.Hq <= INT32_MAX, "lctx::flash_fwd: ", row_blocks * s.B * s.Hq,
             " tiles; expected at most 2^31 - 1");
  p.order = TileOrder(static_cast<int>(row_blocks), static_cast<int>(s.Hq), static_cast<int>(s.B),
                      static_cast<int>(kv_heads * (s.Hq / s.Hkv)));
  p.per_group = FastDivisor(static_cast<int>(s.Hq / s.Hkv));
  p.Hq = static_cast<int>(s.Hq);
  p.Tq = static_cast<int>(s.Tq);
  p.Tk = static_cast<int>(s.Tk);
  p.D = static_cast<int>(s.Dv);
  p.causal = params.causal;
  p.window = static_cast<int>(std::min<int64_t>(params.window, INT32_MAX / 2));
  p.scale_log2 = static_cast<float>(params.scale * 1.4426950408889634);
  p.cu_seqlens = params.cu_seqlens;
  p.num_docs = static_cast<int>(params.num_docs);
  return p;
}

template <class Traits>
void launch(const FlashParams& params, int* counter, int num_sms, Stream stream) {
  const FwdParams p = make_params<Traits>(params, counter);
  const auto kernel = attn_fwd_sm90_kernel<Traits>;
  const dim3 grid(std::min(num_sms, p.order.num_tiles)), block(Traits::kThreads);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  cudaMemsetAsync(counter, 0, sizeof(int), stream);
  kernel<<<grid, block, Traits::kSharedBytes, stream>>>(p);
  check_launch("attn_fwd_sm90_kernel", grid, block, stream);
}

template <class T, bool kPacked>
void choose_tile(const FlashParams& params, int* counter, int num_sms, Stream stream) {
  const int64_t D = std::max(params.shape.Dk, params.shape.Dv);
  if (D <= 64) {
    launch<FwdTraits<T, 64, 128, 3, false, kPacked>>(params, counter, num_sms, stream);
  } else if (D <= 128 && params.shape.Tk < kLongSequence) {
    launch<FwdTraits<T, 128, 128, 2, false, kPacked>>(params, counter, num_sms, stream);
  } else if (D <= 128) {
    launch<FwdTraits<T, 128, 176, 2, true, kPacked>>(params, counter, num_sms, stream);
  } else {
    launch<FwdTraits<T, 256, 80, 2, true, kPacked>>(params, counter, num_sms, stream);
  }
}

template <class T>
void choose_packing(const FlashParams& params, int* counter, int num_sms, Stream stream) {
  if (params.cu_seqlens != nullptr) {
    choose_tile<T, true>(params, counter, num_sms, stream);
  } else {
    choose_tile<T, false>(params, counter, num_sms, stream);
  }
}

}  // namespace

int num_sms() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

void launch_flash_fwd(const FlashParams& params, int* counter, int num_sms, Stream stream) {
  const AttnShape& s = params.shape;
  if (s.B * s.Tq * s.Hq == 0) return;
  if (s.dtype == DType::kBFloat16) {
    choose_packing<__nv_bfloat16>(params, counter, num_sms, stream);
  } else {
    choose_packing<__half>(params, counter, num_sms, stream);
  }
}

}  // namespace lctx::cuda
