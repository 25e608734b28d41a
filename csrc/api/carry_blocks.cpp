// lctx::carry_bwd_begin, carry_bwd_step, carry_bwd_end: the backward of a ring on a GPU with the
// statistics and the sum of dq of all rows in blocks, made once for all steps.
#include "cuda_call.h"
#include "flash_carry.h"

#ifdef LCTX_WITH_CUDA

namespace lctx::api {
namespace {

AttnShape whole_shape(const Call& call, const Tensor& x) {
  const int64_t T = x.size(1), D = x.size(3);
  return {call.dtype(), x.size(0), T, T, x.size(2), x.size(2), D, D};
}

// Rows of a block; 0: dq need not be reproducible, and blocks are dq_block_rows.
int ordered_rows(const AttnShape& shape, bool deterministic) {
  FlashParams params;
  params.shape = shape;
  return deterministic ? cuda::flash_block_rows(params, true, true) : 0;
}

// Statistics (2, B, H, pitch) and sums (B, H, floats) of a whole rank's rows.
cuda::BwdScratch scratch_of(const Tensor& rows, const Tensor& dq_sum) {
  cuda::BwdScratch scratch;
  scratch.lse2 = static_cast<float*>(rows.mutable_data_ptr());
  scratch.delta = scratch.lse2 + rows.numel() / 2;
  scratch.dq_sum = static_cast<float*>(dq_sum.mutable_data_ptr());
  return scratch;
}

std::tuple<Tensor, Tensor> begin(const Tensor& dout, const OptTensor& dlse, const Tensor& out,
                                 const Tensor& lse, bool deterministic) {
  const Call call("lctx::carry_bwd_begin",
                  {LCTX_ARG(dout), LCTX_ARG(dlse), LCTX_ARG(out), LCTX_ARG(lse)});
  AttnParams params;
  const AttnShape& s = params.shape = whole_shape(call, dout);
  AttnGrads grads;
  grads.dout = call.rows(LCTX_ARG(dout), {s.B, s.Tq, s.Hq, s.Dv});
  params.out = call.rows(LCTX_ARG(out), {s.B, s.Tq, s.Hq, s.Dv});
  params.lse = call.stat(LCTX_ARG(lse), {s.B, s.Hq, s.Tq});
  grads.dlse = call.stat(LCTX_ARG(dlse), {s.B, s.Hq, s.Tq});
  call.check(s.Dk <= 128 && s.Dk % 8 == 0, "the head size is ", s.Dk,
             "; expected a multiple of 8 up to 128");
  call.check_aligned({{"dout", grads.dout, s.B, s.Tq, s.Hq}, {"out", params.out, s.B, s.Tq, s.Hq}});
  const int block_rows = ordered_rows(s, deterministic);
  const int64_t heads = s.B * s.Hq, floats = cuda::flash_dq_sum_floats(s, block_rows);
  Tensor rows = call.new_stat({2, s.B, s.Hq, cuda::bwd_pitch(s, block_rows)});
  Tensor dq_sum = call.new_stat({s.B, s.Hq, heads == 0 ? 0 : floats / heads});
  Tensor counter = call.new_plain(ScalarType::Int, {1});
  cuda::BwdScratch scratch = scratch_of(rows, dq_sum);
  scratch.block_rows = block_rows;
  scratch.counter = static_cast<int*>(counter.mutable_data_ptr());
  if (s.B * s.Tq * s.Hq > 0) {
    cuda::launch_bwd_rows(params, grads, scratch, floats, CudaCall(call).stream());
  }
  return {rows, dq_sum};
}

void step(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rows,
          const Tensor& dq_sum, const Tensor& dk, const Tensor& dv, bool causal, double scale,
          int64_t window, int64_t query_start, int64_t key_start, int64_t first_row,
          int64_t first_head, bool first, int64_t rows_in_front, bool deterministic) {
  const Call call("lctx::carry_bwd_step",
                  {LCTX_ARG(q), LCTX_ARG(k), LCTX_ARG(v), LCTX_ARG(dout), LCTX_ARG(rows),
                   LCTX_ARG(dq_sum), LCTX_ARG(dk), LCTX_ARG(dv)});
  CarryParams params;
  set_carry(call, q, k, v, causal, scale, window, query_start, key_start, params);
  const AttnShape& s = params.shape;
  CarryGrads grads;
  grads.dout = call.rows(LCTX_ARG(dout), {s.B, s.Tq, s.Hq, s.Dv});
  grads.first = first;
  grads.results = dk.scalar_type() == k.scalar_type();
  if (grads.results) {
    call.check(first, "dk is in the dtype of k; expected first = True");
    grads.dk = call.rows(LCTX_ARG(dk), {s.B, s.Tk, s.Hkv, s.Dk});
    grads.dv = call.rows(LCTX_ARG(dv), {s.B, s.Tk, s.Hkv, s.Dv});
    call.check_aligned({{"dk", grads.dk, s.B, s.Tk, s.Hkv}, {"dv", grads.dv, s.B, s.Tk, s.Hkv}});
  } else {
    grads.dk = call.stat_rows(LCTX_ARG(dk), {s.B, s.Tk, s.Hkv, s.Dk});
    grads.dv = call.stat_rows(LCTX_ARG(dv), {s.B, s.Tk, s.Hkv, s.Dv});
  }
  grads.rows_in_front = rows_in_front;
  call.stat(LCTX_ARG(rows), {2, s.B, kAny, kAny});
  const int64_t heads = rows.size(2), pitch = rows.size(3);
  call.check(s.Dk <= 128, "the head size is ", s.Dk, "; expected at most 128");
  const int ordered = ordered_rows(s, deterministic);
  const int64_t block_rows = cuda::bwd_block_rows(s, ordered);
  const int64_t blocks = pitch / block_rows;
  call.stat(LCTX_ARG(dq_sum), {s.B, heads, kAny});
  call.check(pitch % block_rows == 0, "`rows` has ", pitch, " rows a head; expected blocks of ",
             block_rows, ", as carry_bwd_begin makes them with deterministic = ", deterministic);
  call.check(first_row >= 0 && first_row % block_rows == 0 && first_row + s.Tq <= pitch &&
                 first_head >= 0 && first_head + s.Hq <= heads,
             "rows from ", first_row, " of head ", first_head, " on; expected multiples of ",
             block_rows, " within the ", pitch, " rows and ", heads, " heads of `rows`");
  call.check(rows_in_front >= 0 && rows_in_front < block_rows, "rows_in_front = ", rows_in_front,
             "; expected fewer than a block of ", block_rows);
  if (s.B * s.Tq * s.Tk == 0) return;
  check_tma(call, params);
  call.check_aligned({{"dout", grads.dout, s.B, s.Tq, s.Hq}});
  const CudaCall gpu(call);
  cuda::BwdScratch scratch = scratch_of(rows, dq_sum);
  scratch.block_rows = ordered;
  Tensor counters =
      call.new_plain(ScalarType::Int, {cuda::carry_step_counters(params, scratch, heads, blocks)});
  const int64_t row = first_head * pitch + first_row;
  scratch.lse2 += row;
  scratch.delta += row;
  scratch.dq_sum += row / block_rows * (dq_sum.size(2) / blocks);
  scratch.counter = static_cast<int*>(counters.mutable_data_ptr());
  scratch.turns = scratch.counter + 1;
  cuda::launch_carry_bwd_step(params, grads, scratch, heads, blocks, gpu.num_sms(), gpu.stream());
}

Tensor end(const Tensor& dq_sum, const Tensor& q, double scale, bool deterministic) {
  const Call call("lctx::carry_bwd_end", {LCTX_ARG(q), LCTX_ARG(dq_sum)});
  AttnParams params;
  const AttnShape& s = params.shape = whole_shape(call, q);
  call.rows(LCTX_ARG(q), {kAny, kAny, kAny, kAny});
  call.stat(LCTX_ARG(dq_sum), {s.B, s.Hq, kAny});
  call.check(s.Dk <= 128, "the head size is ", s.Dk, "; expected at most 128");
  const int block_rows = ordered_rows(s, deterministic);
  call.check(dq_sum.numel() == cuda::flash_dq_sum_floats(s, block_rows), "dq_sum is not that of ",
             s.Tq, " rows");
  params.scale = scale;
  AttnGrads grads;
  Tensor dq = call.new_rows({s.B, s.Tq, s.Hq, s.Dk});
  grads.dq = view(dq);
  if (dq.numel() > 0) {
    cuda::launch_unpack_dq(params, grads, static_cast<const float*>(dq_sum.mutable_data_ptr()),
                           CudaCall(call).stream(), block_rows);
  }
  return dq;
}

}  // namespace
}  // namespace lctx::api

STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA, m) {
  m.impl("carry_bwd_begin", TORCH_BOX(&lctx::api::begin));
  m.impl("carry_bwd_step", TORCH_BOX(&lctx::api::step));
  m.impl("carry_bwd_end", TORCH_BOX(&lctx::api::end));
}
#endif
