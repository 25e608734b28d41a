// lctx::landmark_decode: tensors -> LandmarkDecodeParams -> kernels.
#include "../cpu/cpu_backend.h"
#include "checks.h"
#include "cuda_call.h"
#include "thread_pool.h"

namespace lctx::api {
namespace {

// A store's (B, n, Hkv, block_size, D), of which only the batch has a free stride. On a GPU it may
// be in the memory of the CPU.
TensorView blocks(const Call& call, const char* name, const Tensor& x, const Tensor& q, int64_t n,
                  const AttnShape& s, int64_t block_size, int64_t D) {
  const Shape wanted = {s.B, n, s.Hkv, block_size, D};
  bool fits = x.dim() == 5 && x.scalar_type() == q.scalar_type() &&
              (x.is_cpu() || (x.is_cuda() && x.get_device_index() == q.get_device_index()));
  int64_t inner = 1;
  for (int64_t i = 4; fits && i >= 0; --i) {
    fits = x.size(i) == wanted[static_cast<size_t>(i)] &&
           (i == 0 || x.size(i) == 1 || x.stride(i) == inner);
    inner *= x.size(i);
  }
  call.check(fits, name, " does not fit; expected (", s.B, ", ", n, ", ", s.Hkv, ", ", block_size,
             ", ", D,
             ") in q's dtype, on its device or in the CPU's pinned memory, contiguous but "
             "for the batch");
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), s.Hkv * block_size * D,
          block_size * D};
}

void set_store(const Call& call, const Tensor& q, const Tensor& landmarks, const Tensor& blocks_k,
               const Tensor& blocks_v, const Tensor& open_k, const Tensor& open_v,
               const OptTensor& rope, LandmarkDecodeParams& p) {
  const AttnShape& s = p.shape;
  p.landmarks = call.rows(LCTX_ARG(landmarks), {s.B, kAny, s.Hkv, s.Dk});
  call.check(landmarks.size(1) >= p.always, "always = ", p.always, " with ", landmarks.size(1),
             " blocks; expected at most all of them");
  p.count = landmarks.size(1) - p.always;
  p.used = std::min(p.used, p.count);
  p.moved = p.count > p.used;
  p.block_size = open_k.dim() == 4 ? open_k.size(2) : 0;
  call.check(p.block_size >= 2, "open_k has blocks of ", p.block_size, "; expected at least 2");
  p.open_k = const_cast<void*>(call.rows(LCTX_ARG(open_k), {s.B, s.Hkv, p.block_size, s.Dk}).data);
  p.open_v = const_cast<void*>(call.rows(LCTX_ARG(open_v), {s.B, s.Hkv, p.block_size, s.Dv}).data);
  call.check(open_k.is_contiguous() && open_v.is_contiguous(),
             "open_k or open_v is not contiguous; expected contiguous tensors");
  call.check(p.open_len >= 0 && p.open_len + s.Tq <= p.block_size, "open_len = ", p.open_len,
             " and ", s.Tq, " new tokens; expected at most ", p.block_size, " together");
  const int64_t stored = p.count + p.always;
  p.blocks_k = blocks(call, "blocks_k", blocks_k, q, stored, s, p.block_size, s.Dk);
  p.blocks_v = blocks(call, "blocks_v", blocks_v, q, stored, s, p.block_size, s.Dv);
  call.check(stored == 0 || blocks_k.is_cpu() == blocks_v.is_cpu(),
             "blocks_k and blocks_v are on different devices; expected one");
  p.rope = call.stat(LCTX_ARG(rope), {2, kAny, s.Dk});
  if (p.rope == nullptr) return;
  p.rope_len = rope->size(1);
  const int64_t places = (p.used + p.moved + p.always) * p.block_size + p.open_len + s.Tq;
  call.check(p.rope_len >= places && s.Dk % 2 == 0, "rope has ", p.rope_len,
             " places of head size ", s.Dk, "; expected at least ", places, " and an even size");
}

BlockChoice choice(const Call& call, const std::string& select) {
  if (select == "token_and_head") return BlockChoice::kTokenAndHead;
  return call.choice("select", select, "head", "token") == 0 ? BlockChoice::kHead
                                                             : BlockChoice::kToken;
}

std::tuple<Tensor, Tensor, Tensor> landmark_decode(const Tensor& q, const Tensor& k,
                                                   const Tensor& v, const Tensor& landmarks,
                                                   const Tensor& blocks_k, const Tensor& blocks_v,
                                                   const Tensor& open_k, const Tensor& open_v,
                                                   const OptTensor& rope, int64_t open_len,
                                                   int64_t top_k, int64_t always,
                                                   std::string select, double scale) {
  const Call call("lctx::landmark_decode",
                  {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(landmarks), LCTX_ARG(blocks_k),
                   LCTX_ARG(blocks_v), LCTX_ARG(open_k), LCTX_ARG(open_v), LCTX_ARG(rope)});
  LandmarkDecodeParams p;
  set_attention(call, q, k, v, /*causal=*/true, scale, p);
  call.check(k.size(1) == q.size(1), "q has ", q.size(1), " new tokens, k and v have ", k.size(1));
  call.check(top_k >= 1 && always >= 0, "top_k = ", top_k, ", always = ", always,
             "; expected at least 1 and 0");
  p.choice = choice(call, select);
  p.choice_tokens = p.choice == BlockChoice::kHead ? 1 : p.shape.Tq;
  p.choice_heads = p.choice == BlockChoice::kToken ? 1 : p.shape.Hq;
  p.open_len = open_len;
  p.always = always;
  p.used = top_k;
  set_store(call, q, landmarks, blocks_k, blocks_v, open_k, open_v, rope, p);
  auto [out, lse] = set_outputs(call, p);
  Tensor chosen =
      call.new_plain(ScalarType::Int, {p.shape.B, p.choice_tokens, p.choice_heads, p.used});
  p.blocks = static_cast<int32_t*>(chosen.mutable_data_ptr());
  if (p.shape.B * p.shape.Tq == 0) return {out, lse, chosen};
#ifdef LCTX_WITH_CUDA
  if (call.is_cuda()) {
    check_tma(call, p);
    const CudaCall gpu(call);
    Tensor scratch = call.new_stat({cuda::landmark_decode_scratch(p)});
    cuda::launch_landmark_decode(p, static_cast<float*>(scratch.mutable_data_ptr()),
                                 blocks_k.is_cpu() && p.count + always > 0, gpu.num_sms(),
                                 gpu.stream());
    return {out, lse, chosen};
  }
#endif
  cpu::landmark_decode(p, thread_pool());
  return {out, lse, chosen};
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CPU, m) {
  m.impl("landmark_decode", TORCH_BOX(&lctx::api::landmark_decode));
}

#ifdef LCTX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("landmark_decode", TORCH_BOX(&lctx::api::landmark_decode));
}
#endif
