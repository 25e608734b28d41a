// All op schemas on one screen. Kernels are attached in the file of their family, fake kernels and
// autograd in lctx_kernels/_ops.py. A backward is an op of its own; statistics (lse, M, z) are fp32
// (fp64 for fp64 inputs). needs_X: whether the gradient of X is wanted; else it is empty.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lctx, m) {
  m.def("build_info() -> str");

  m.def(
      "flash_fwd(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, bool causal, float scale, "
      "int window, bool deterministic) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "flash_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, Tensor? cu_seqlens, bool causal, float scale, int window, bool deterministic, bool "
      "needs_q=True, bool needs_k=True, bool needs_v=True) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");

  // One step of a ring: (carry_out, lse) in fp32 takes in attention over k, v, whose first position
  // is key_start; lse = -inf where nothing is carried yet. The first step takes nothing from
  // carry_out and lse. The last step gives the result in the dtype of q, to `out` or returned (else
  // an empty tensor), and leaves carry_out as it was; on a GPU rows [0, final_rows) may be the only
  // ones that are done.
  m.def(
      "flash_carry(Tensor q, Tensor k, Tensor v, Tensor(a!) carry_out, Tensor(b!) lse, bool "
      "causal, float scale, int window, int query_start, int key_start, bool last, "
      "bool first=False, Tensor(c!)? out=None, int final_rows=0) -> Tensor result");
  // The first two steps of a ring in one, on a GPU: own keys k, v, causal or all of them, and far
  // ones, all of which rows from first_row on see. Rows [0, final_rows) go to `out`, the others to
  // carry_out.
  m.def(
      "flash_carry_two(Tensor q, Tensor k, Tensor v, Tensor far_k, Tensor far_v, Tensor(a!) "
      "carry_out, Tensor(b!) lse, Tensor(c!) out, bool causal, float scale, int first_row, int "
      "final_rows) -> ()");
  // Its backward: lse and delta are those of all keys of the ring; the step's gradients are added
  // to dq, dk and dv, which are fp32 too; the first call for some keys takes nothing from dk and
  // dv. All of carry_out, lse, delta, dq, dk and dv may be slices of larger tensors.
  m.def(
      "flash_carry_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, bool causal, float scale, int window, "
      "int query_start, int key_start, bool deterministic, bool first=False) -> ()");
  // The same on a GPU, head sizes up to 128: `begin` makes the statistics of all rows and zeroes
  // their sum of dq, both in blocks of rows; every step adds to rows from first_row, at which a
  // block begins, and heads from first_head on, but for the rows_in_front of its queries; `end`
  // gives dq. With `deterministic`, the same in all three, a step adds in a fixed order. Where a
  // step is all that adds to some dk and dv they may be in the dtype of k, with `first`.
  m.def(
      "carry_bwd_begin(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
      "bool deterministic=False) -> (Tensor rows, Tensor dq_sum)");
  m.def(
      "carry_bwd_step(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor rows, Tensor(a!) dq_sum, "
      "Tensor(b!) dk, Tensor(c!) dv, bool causal, float scale, int window, int query_start, int "
      "key_start, int first_row, int first_head, bool first=False, int rows_in_front=0, "
      "bool deterministic=False) -> ()");
  m.def(
      "carry_bwd_end(Tensor dq_sum, Tensor q, float scale, bool deterministic=False) -> Tensor dq");
  // dk and dv of own keys from their fp32 sums; rows from `begin` on with what came home.
  m.def(
      "carry_bwd_keys(Tensor dk, Tensor dv, Tensor? home_k, Tensor? home_v, int begin, "
      "Tensor(a!) dk_out, Tensor(b!) dv_out) -> ()");
  // rowsum(dout * out) - dlse, (B, H, T).
  m.def("attn_delta(Tensor dout, Tensor? dlse, Tensor out) -> Tensor delta");
  // All steps of a ring: q, k, v are this rank's rows, those of all ranks with transport "sim".
  // Implemented in lctx_kernels/cp/ops.py, by the ops above and a transport.
  m.def(
      "ring_fwd(Tensor q, Tensor k, Tensor v, str plan, str group, str transport, bool causal, "
      "float scale, int window, float timeout, bool deterministic) -> (Tensor out, Tensor lse)");
  m.def(
      "ring_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "str plan, str group, str transport, bool causal, float scale, int window, float timeout, "
      "bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)");

  m.def(
      "landmark_fwd(Tensor q, Tensor k, Tensor v, Tensor? is_landmark, int block_size, float "
      "scale, bool deterministic) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "landmark_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, Tensor? is_landmark, int block_size, float scale, bool deterministic) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");

  // Decoding: new tokens, q and k not rotated, over the best top_k blocks of a store, its last
  // `always`, and the open block of open_len tokens, which they join. Stored keys are rotated
  // inside their block. On a GPU the blocks may be in pinned memory of the CPU.
  m.def(
      "landmark_decode(Tensor q, Tensor k, Tensor v, Tensor landmarks, Tensor blocks_k, Tensor "
      "blocks_v, Tensor(a!) open_k, Tensor(b!) open_v, Tensor? rope, int open_len, int top_k, int "
      "always, str select, float scale) -> (Tensor out, Tensor lse, Tensor blocks)");
  // The same for Infini: over the open segment, gated with what the memory retrieves.
  m.def(
      "infini_decode(Tensor q, Tensor k, Tensor v, Tensor q_mem, Tensor k_mem, Tensor(a!) open_k, "
      "Tensor(b!) open_k_mem, Tensor(c!) open_v, Tensor? M, Tensor? z, Tensor? gate, int open_len, "
      "bool bypass, float scale) -> (Tensor out, Tensor lse)");

  m.def(
      "dilated_fwd(Tensor q, Tensor k, Tensor v, Tensor? seqlens, int[] segment_lengths, int[] "
      "dilation_rates, bool causal, float scale, str head_offset, str mix_grad, bool "
      "deterministic) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "dilated_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, Tensor? seqlens, int[] segment_lengths, int[] dilation_rates, bool causal, float "
      "scale, str head_offset, str mix_grad, bool deterministic) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");

  // M_states, z_states: the memory that each of the S segments reads, kept for the backward, as is
  // out_local, the softmax part of out, which is empty without save_local. decays, on a GPU and by
  // the delta rule: what a segment multiplies the memory with, less the unit matrix, in two bf16
  // terms (2, B, Hkv, S, Dk, Dk); empty else and without save_local.
  // The backward returns empty dq_mem/dk_mem when q_mem/k_mem are not given (their gradient is in
  // dq, dk), an empty dgate without gate, and empty dM/dz without memory.
  m.def(
      "infini_fwd(Tensor q, Tensor k, Tensor v, Tensor? q_mem, Tensor? k_mem, Tensor? M, "
      "Tensor? z, Tensor? gate, int segment_len, str update, str first, int detach_every, float "
      "scale, bool save_local, bool deterministic) "
      "-> (Tensor out, Tensor out_local, Tensor lse, Tensor M_states, Tensor z_states, Tensor "
      "M_out, Tensor z_out, Tensor decays)");
  m.def(
      "infini_bwd(Tensor dout, Tensor? dM_out, Tensor? dz_out, Tensor q, Tensor k, Tensor v, "
      "Tensor? q_mem, Tensor? k_mem, Tensor? M, Tensor? z, Tensor? gate, Tensor out_local, "
      "Tensor lse, Tensor M_states, Tensor z_states, Tensor decays, int segment_len, str update, "
      "str first, int detach_every, float scale, bool deterministic) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_mem, Tensor dk_mem, Tensor dM, Tensor dz, "
      "Tensor dgate)");

  m.def(
      "merge_fwd(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "merge_bwd(Tensor dout, Tensor? dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor "
      "lse_b, Tensor out, Tensor lse) "
      "-> (Tensor dout_a, Tensor dlse_a, Tensor dout_b, Tensor dlse_b)");
}
