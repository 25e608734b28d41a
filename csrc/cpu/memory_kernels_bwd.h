// Gradients of the compressive memory (memory_kernels.h) for one segment.
//
//   retrieval:  dn = g dA / c, dc = -rowsum(g dA o A) / c with c = max(P z, eps):
//               dP = dn M^T + dc z^T,  dM += P^T dn,  dz += P^T dc,  dgate += g (1 - g) sum dA o (A
//               - out_local)
//   update, from the gradient (dM, dz) of the state left behind:
//     linear:   dR = V dM^T + 1 dz^T,  dV += R dM
//     delta:    W = R M / e, U = V - W, dU = R dM:  dV += dU,
//               dR = U dM^T + 1 dz^T - (dU / e) M^T + de z^T,  de = rowsum(dU o W) / e,  dz of z
//               read += R^T de (the gradient of M read, -T dM, is taken in the scan)
//   phi' = min(phi, 1). Where a denominator was clamped, no gradient passes through it.
#pragma once

#include "memory_kernels.h"

namespace lctx::cpu::LCTX_ISA {

// Without memory: delta = rowsum(dout o out_local) times the weight of out_local; its derivative by
// the gate, if any.
template <class C>
void empty_retrieve_bwd(const MemoryLaunch& launch, const MemoryProblem& p) {
  const int64_t size = dtype_size(launch.dtype);
  for (int64_t g = 0; g < p.G; ++g) {
    const C gate = gate_of<C>(p, g);
    C dgate = C(0);
    for (int64_t t = 0; t < p.N; ++t) {
      const C local = row_dot<C>(launch.dtype, row_at(p.dout, t, g, size),
                                 row_at(p.out_local, t, g, size), launch.Dv);
      *stat_at<C>(p.delta, t, g) = launch.first_bypass ? local : (C(1) - gate) * local;
      if (!launch.first_bypass) dgate -= gate * (C(1) - gate) * local;
      if (!launch.add_dq) {
        char* dq = row_at_mut(p.dq_mem, t, g, size);
        for (int64_t i = 0; i < launch.Dk * size; ++i) dq[i] = 0;
      }
    }
    static_cast<C*>(p.dgate)[g] = dgate;
  }
  fill(static_cast<C*>(p.ret_M), launch.Dk * launch.Dv, C(0));
  fill(static_cast<C*>(p.ret_z), launch.Dk, C(0));
}

template <class C>
void memory_retrieve_bwd(const MemoryLaunch& launch, const MemoryProblem& p, char* scratch) {
  if (p.empty) return empty_retrieve_bwd<C>(launch, p);
  const MemoryScratch<C> ws(launch, scratch);
  const int64_t Dk = launch.Dk, Dv = launch.Dv, pk = ws.pk, pv = ws.pv;
  pad_matrix(p.M, Dk, Dv, pv, ws.M);
  pad_transposed(p.M, Dk, Dv, pk, ws.Mt);
  load_z(ws, p.z, Dk);
  C* ret_M = ws.M2;      // [Dk][pv]
  C* ret_z = ws.square;  // [pk]
  fill(ret_M, Dk * pv, C(0));
  fill(ret_z, pk, C(0));
  fill(static_cast<C*>(p.dgate), p.G, C(0));
  for (int64_t r0 = 0; r0 < p.N * p.G; r0 += kChunk) {
    const int64_t count = retrieve_chunk(launch, p, r0, ws);
    load_rows(launch.dtype, p.out_local, p.G, r0, count, Dv, pv, ws.b_v);
    load_rows(launch.dtype, p.dout, p.G, r0, count, Dv, pv, ws.c_v);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = (r0 + i) / p.G, g = (r0 + i) % p.G;
      const C gate = gate_of<C>(p, g), Pz = ws.scalar[i], c = max_of(Pz, kMemoryEps<C>);
      C* dn = ws.c_v + i * pv;
      const C dout_A = dot(dn, ws.a_v + i * pv, pv) / c, dout_local = dot(dn, ws.b_v + i * pv, pv);
      *stat_at<C>(p.delta, t, g) = (C(1) - gate) * dout_local;
      static_cast<C*>(p.dgate)[g] += gate * (C(1) - gate) * (dout_A - dout_local);
      for (int64_t d = 0; d < Dv; ++d) dn[d] *= gate / c;
      ws.scalar[i] = Pz >= kMemoryEps<C> ? -gate * dout_A / c : C(0);  // dc
    }
    add_weighted_rows(ws.scalar, ws.a_k, count, pk, ret_z);
    gemm<C, Layout::kTransposed, Accumulate::kAdd>(Dk, pv, count, ws.a_k, pk, ws.c_v, pv, ret_M,
                                                   pv);
    gemm<C, Layout::kRowMajor, Accumulate::kStore>(count, pk, Dv, ws.c_v, pv, ws.Mt, pk, ws.b_k,
                                                   pk);
    for (int64_t i = 0; i < count; ++i) {
      C* dP = ws.b_k + i * pk;
      axpy(ws.scalar[i], ws.row_k, pk, dP);
      times_phi_slope(ws.a_k + i * pk, pk, dP);
      write_memory_grad(launch.dtype, launch.add_dq, p.dq_mem, (r0 + i) / p.G, (r0 + i) % p.G, dP,
                        Dk);
    }
  }
  unpad_matrix(ret_M, Dk, Dv, pv, p.ret_M);
  unpad_matrix(ret_z, 1, Dk, pk, p.ret_z);
}

// Delta rule on a chunk of keys: R in a_k, V in a_v, dU = R dM in b_v, W = R M / e in c_v, e in
// scalar. M and dM are padded in ws.M and ws.M2, z in ws.row_k.
template <class C>
int64_t delta_chunk(const MemoryLaunch& launch, const MemoryProblem& p, int64_t n0,
                    const MemoryScratch<C>& ws) {
  const int64_t count = load_R(launch, p, n0, ws);
  load_rows(launch.dtype, p.v, 1, n0, count, launch.Dv, ws.pv, ws.a_v);
  gemm<C, Layout::kRowMajor, Accumulate::kStore>(count, ws.pv, launch.Dk, ws.a_k, ws.pk, ws.M2,
                                                 ws.pv, ws.b_v, ws.pv);
  gemm<C, Layout::kRowMajor, Accumulate::kStore>(count, ws.pv, launch.Dk, ws.a_k, ws.pk, ws.M,
                                                 ws.pv, ws.c_v, ws.pv);
  for (int64_t i = 0; i < count; ++i) {
    ws.scalar[i] = dot(ws.a_k + i * ws.pk, ws.row_k, ws.pk);
    const C e = max_of(ws.scalar[i], kMemoryEps<C>);
    for (int64_t d = 0; d < ws.pv; ++d) ws.c_v[i * ws.pv + d] /= e;
  }
  return count;
}

template <class C>
C delta_de(const MemoryScratch<C>& ws, int64_t i) {
  if (!(ws.scalar[i] >= kMemoryEps<C>)) return C(0);
  return dot(ws.b_v + i * ws.pv, ws.c_v + i * ws.pv, ws.pv) / ws.scalar[i];
}

template <class C>
void memory_write_z_bwd(const MemoryLaunch& launch, const MemoryProblem& p, char* scratch) {
  const MemoryScratch<C> ws(launch, scratch);
  C* sum = ws.square;  // [pk]
  fill(sum, ws.pk, C(0));
  if (launch.delta && !p.empty) {
    pad_matrix(p.M, launch.Dk, launch.Dv, ws.pv, ws.M);
    pad_matrix(p.dM, launch.Dk, launch.Dv, ws.pv, ws.M2);
    load_z(ws, p.z, launch.Dk);
    for (int64_t n0 = 0; n0 < p.N; n0 += kChunk) {
      const int64_t count = delta_chunk(launch, p, n0, ws);
      for (int64_t i = 0; i < count; ++i) ws.scalar[i] = delta_de(ws, i);
      add_weighted_rows(ws.scalar, ws.a_k, count, ws.pk, sum);
    }
  }
  unpad_matrix(sum, 1, launch.Dk, ws.pk, p.write_z);
}

template <class C>
void memory_write_bwd(const MemoryLaunch& launch, const MemoryProblem& p, char* scratch) {
  const MemoryScratch<C> ws(launch, scratch);
  const int64_t Dk = launch.Dk, Dv = launch.Dv, pk = ws.pk, pv = ws.pv;
  const bool delta = launch.delta && !p.empty;
  pad_matrix(p.dM, Dk, Dv, pv, ws.M2);
  pad_transposed(p.dM, Dk, Dv, pk, ws.M2t);
  C* dz = ws.square;  // [pk]
  pad_matrix(p.dz, 1, Dk, pk, dz);
  if (delta) {
    pad_matrix(p.M, Dk, Dv, pv, ws.M);
    pad_transposed(p.M, Dk, Dv, pk, ws.Mt);
    load_z(ws, p.z, Dk);
  }
  for (int64_t n0 = 0; n0 < p.N; n0 += kChunk) {
    int64_t count;
    if (delta) {
      count = delta_chunk(launch, p, n0, ws);
      for (int64_t j = 0; j < count * pv; ++j) ws.a_v[j] -= ws.c_v[j];  // U
    } else {
      count = load_R(launch, p, n0, ws);
      load_rows(launch.dtype, p.v, 1, n0, count, Dv, pv, ws.a_v);
      gemm<C, Layout::kRowMajor, Accumulate::kStore>(count, pv, Dk, ws.a_k, pk, ws.M2, pv, ws.b_v,
                                                     pv);
    }
    gemm<C, Layout::kRowMajor, Accumulate::kStore>(count, pk, Dv, ws.a_v, pv, ws.M2t, pk, ws.b_k,
                                                   pk);
    if (delta) {  // c_k = (dU / e) M^T row by row scaled
      gemm<C, Layout::kRowMajor, Accumulate::kStore>(count, pk, Dv, ws.b_v, pv, ws.Mt, pk, ws.c_k,
                                                     pk);
    }
    for (int64_t i = 0; i < count; ++i) {
      C* dR = ws.b_k + i * pk;
      axpy(C(1), dz, pk, dR);
      if (delta) {
        axpy(C(-1) / max_of(ws.scalar[i], kMemoryEps<C>), ws.c_k + i * pk, pk, dR);
        axpy(delta_de(ws, i), ws.row_k, pk, dR);
      }
      times_phi_slope(ws.a_k + i * pk, pk, dR);
      write_memory_grad(launch.dtype, launch.add_dk, p.dk_mem, n0 + i, 0, dR, Dk);
      write_memory_grad(launch.dtype, true, p.dv, n0 + i, 0, ws.b_v + i * pv, Dv);
    }
  }
}

template <class C>
int64_t memory_scratch(const MemoryLaunch& launch) {
  return MemoryScratch<C>(launch, nullptr).bytes;
}

}  // namespace lctx::cpu::LCTX_ISA
