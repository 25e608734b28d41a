// Infini-attention's compressive memory (Munkhdalai et al. 2024, arXiv 2404.07143, eqs. 3-5, 8-10)
// for one segment.
//
// With phi = elu + 1, P = phi(q_mem), R = phi(k_mem), e = max(R z, eps):
//   retrieve:  A = P M / max(P z, eps);  out = g A + (1 - g) out_local,  g = sigmoid(gate)
//   linear:    M' = M + R^T V                      delta:  M' = M + R^T (V - R M / e) = M - T M +
//   R^T V both:      z' = z + column sums of R                   T = R^T diag(1/e) R, so segments
//   only meet in a scan
// Rows are taken kChunk at a time; every product runs in micro_gemm.h on padded scratch.
#pragma once

#include "attn_rows.h"
#include "memory_problem.h"

namespace lctx::cpu::LCTX_ISA {

constexpr int64_t kChunk = 64;
template <class C>
constexpr C kMemoryEps = C(1e-6);

template <class C>
struct MemoryScratch {
  int64_t pk, pv;
  C *M, *Mt, *M2, *M2t, *square;         // [Dk][pv], [Dv][pk], again for dM, [Dk][pk]
  C *a_k, *b_k, *c_k, *a_v, *b_v, *c_v;  // [kChunk][pk], [kChunk][pv]
  C *row_k, *scalar;                     // [pk], [kChunk]
  int64_t bytes;

  MemoryScratch(const MemoryLaunch& launch, char* base) {
    pk = round_up(launch.Dk, kLanes<C>);
    pv = round_up(launch.Dv, kLanes<C>);
    Arena arena{base};
    M = arena.take<C>(launch.Dk * pv);
    Mt = arena.take<C>(launch.Dv * pk);
    M2 = arena.take<C>(launch.Dk * pv);
    M2t = arena.take<C>(launch.Dv * pk);
    square = arena.take<C>(launch.Dk * pk);
    a_k = arena.take<C>(kChunk * pk);
    b_k = arena.take<C>(kChunk * pk);
    c_k = arena.take<C>(kChunk * pk);
    a_v = arena.take<C>(kChunk * pv);
    b_v = arena.take<C>(kChunk * pv);
    c_v = arena.take<C>(kChunk * pv);
    row_k = arena.take<C>(pk);
    scalar = arena.take<C>(kChunk);
    bytes = arena.used;
  }
};

template <class C>
void fill(C* x, int64_t n, C value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

template <class C>
void pad_matrix(const void* src, int64_t rows, int64_t cols, int64_t pitch, C* dst) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < pitch; ++j)
      dst[i * pitch + j] = j < cols ? static_cast<const C*>(src)[i * cols + j] : C(0);
  }
}

template <class C>
void pad_transposed(const void* src, int64_t rows, int64_t cols, int64_t pitch, C* dst) {
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = 0; i < pitch; ++i)
      dst[j * pitch + i] = i < rows ? static_cast<const C*>(src)[i * cols + j] : C(0);
  }
}

template <class C>
void unpad_matrix(const C* src, int64_t rows, int64_t cols, int64_t pitch, void* dst) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) static_cast<C*>(dst)[i * cols + j] = src[i * pitch + j];
  }
}

// Rows [r0, r0 + count) of (t, g), r = t * G + g, zero-padded.
template <class C>
void load_rows(DType dtype, const Rows& src, int64_t G, int64_t r0, int64_t count, int64_t D,
               int64_t pitch, C* dst) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = r0 + i;
    load_row(dtype, row_at(src, r / G, r % G, dtype_size(dtype)), D, pitch, C(1), dst + i * pitch);
  }
}

// phi(x) = elu(x) + 1 of whole padded rows; the padding becomes 0 again.
template <class C>
void phi_rows(C* x, int64_t count, int64_t D, int64_t pitch) {
  for (int64_t i = 0; i < count * pitch; i += kLanes<C>) {
    const Vec<C> v = load(x + i);
    store(x + i, v > C(0) ? v + C(1) : expv(v));
  }
  for (int64_t i = 0; i < count; ++i) fill(x + i * pitch + D, pitch - D, C(0));
}

template <class C>
C dot(const C* a, const C* b, int64_t pitch) {
  Vec<C> sum{};
  for (int64_t d = 0; d < pitch; d += kLanes<C>) sum += load(a + d) * load(b + d);
  C lanes[kLanes<C>];
  for (int i = 0; i < kLanes<C>; ++i) lanes[i] = sum[i];
  for (int width = kLanes<C> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <class C>
void axpy(C factor, const C* x, int64_t pitch, C* y) {
  const Vec<C> f = splat(factor);
  for (int64_t d = 0; d < pitch; d += kLanes<C>) store(y + d, load(y + d) + f * load(x + d));
}

// total += sum_i weights[i] rows[i] (weights == nullptr: ones). Four running sums per chunk, so
// that rounding does not grow with the number of rows.
template <class C>
void add_weighted_rows(const C* weights, const C* rows, int64_t count, int64_t pitch, C* total) {
  for (int64_t d = 0; d < pitch; d += kLanes<C>) {
    Vec<C> sums[4] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Vec<C> row = load(rows + i * pitch + d);
      sums[i & 3] += weights != nullptr ? row * weights[i] : row;
    }
    store(total + d, load(total + d) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
}

template <class C>
C gate_of(const MemoryProblem& p, int64_t g) {
  const C logit = p.gate != nullptr ? static_cast<const C*>(p.gate)[g] : C(0);
  return C(1) / (C(1) + static_cast<C>(__builtin_exp(-logit)));
}

template <class C>
void load_z(const MemoryScratch<C>& ws, const void* z, int64_t Dk) {
  pad_matrix(z, 1, Dk, ws.pk, ws.row_k);
}

// R of a chunk of keys into a_k.
template <class C>
int64_t load_R(const MemoryLaunch& launch, const MemoryProblem& p, int64_t n0,
               const MemoryScratch<C>& ws) {
  const int64_t count = min_of(kChunk, p.N - n0);
  load_rows(launch.dtype, p.k_mem, 1, n0, count, launch.Dk, ws.pk, ws.a_k);
  phi_rows(ws.a_k, count, launch.Dk, ws.pk);
  return count;
}

template <class C>
void memory_gain(const MemoryLaunch& launch, const MemoryProblem& p, char* scratch) {
  const MemoryScratch<C> ws(launch, scratch);
  fill(ws.M, launch.Dk * ws.pv, C(0));
  fill(ws.row_k, ws.pk, C(0));
  for (int64_t n0 = 0; n0 < p.N; n0 += kChunk) {
    const int64_t count = load_R(launch, p, n0, ws);
    load_rows(launch.dtype, p.v, 1, n0, count, launch.Dv, ws.pv, ws.a_v);
    gemm<C, Layout::kTransposed, Accumulate::kAdd>(launch.Dk, ws.pv, count, ws.a_k, ws.pk, ws.a_v,
                                                   ws.pv, ws.M, ws.pv);
    add_weighted_rows<C>(nullptr, ws.a_k, count, ws.pk, ws.row_k);
  }
  unpad_matrix(ws.M, launch.Dk, launch.Dv, ws.pv, p.gain_M);
  unpad_matrix(ws.row_k, 1, launch.Dk, ws.pk, p.gain_z);
}

template <class C>
void memory_decay(const MemoryLaunch& launch, const MemoryProblem& p, char* scratch) {
  const MemoryScratch<C> ws(launch, scratch);
  fill(ws.square, launch.Dk * ws.pk, C(0));
  load_z(ws, p.z, launch.Dk);
  for (int64_t n0 = 0; n0 < p.N && !p.empty; n0 += kChunk) {
    const int64_t count = load_R(launch, p, n0, ws);
    fill(ws.b_k, count * ws.pk, C(0));
    for (int64_t i = 0; i < count; ++i) {
      const C e = max_of(dot(ws.a_k + i * ws.pk, ws.row_k, ws.pk), kMemoryEps<C>);
      axpy(C(1) / e, ws.a_k + i * ws.pk, ws.pk, ws.b_k + i * ws.pk);
    }
    gemm<C, Layout::kTransposed, Accumulate::kAdd>(launch.Dk, ws.pk, count, ws.b_k, ws.pk, ws.a_k,
                                                   ws.pk, ws.square, ws.pk);
  }
  unpad_matrix(ws.square, launch.Dk, launch.Dk, ws.pk, p.decay);
}

template <class C>
void memory_step(const MemoryLaunch& launch, const void* state, const void* T, const void* gain,
                 void* next, int64_t c0, int64_t c1, char* scratch) {
  const MemoryScratch<C> ws(launch, scratch);
  const int64_t Dk = launch.Dk, Dv = launch.Dv, width = c1 - c0, pitch = round_up(width, kLanes<C>);
  const C* in = static_cast<const C*>(state) + c0;
  if (T != nullptr) {
    for (int64_t i = 0; i < Dk; ++i) {
      for (int64_t j = 0; j < pitch; ++j) ws.M[i * pitch + j] = j < width ? in[i * Dv + j] : C(0);
    }
    gemm<C, Layout::kRowMajor, Accumulate::kStore>(Dk, pitch, Dk, static_cast<const C*>(T), Dk,
                                                   ws.M, pitch, ws.M2, pitch);
  }
  for (int64_t i = 0; i < Dk; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t at = i * Dv + c0 + j;
      C x = in[i * Dv + j] + static_cast<const C*>(gain)[at];
      if (T != nullptr) x -= ws.M2[i * pitch + j];
      static_cast<C*>(next)[at] = x;
    }
  }
}

// P of a chunk of query rows into a_k, P M into a_v, P z into scalar.
template <class C>
int64_t retrieve_chunk(const MemoryLaunch& launch, const MemoryProblem& p, int64_t r0,
                       const MemoryScratch<C>& ws) {
  const int64_t count = min_of(kChunk, p.N * p.G - r0);
  load_rows(launch.dtype, p.q_mem, p.G, r0, count, launch.Dk, ws.pk, ws.a_k);
  phi_rows(ws.a_k, count, launch.Dk, ws.pk);
  gemm<C, Layout::kRowMajor, Accumulate::kStore>(count, ws.pv, launch.Dk, ws.a_k, ws.pk, ws.M,
                                                 ws.pv, ws.a_v, ws.pv);
  for (int64_t i = 0; i < count; ++i) ws.scalar[i] = dot(ws.a_k + i * ws.pk, ws.row_k, ws.pk);
  return count;
}

template <class C>
void memory_retrieve(const MemoryLaunch& launch, const MemoryProblem& p, char* scratch) {
  const MemoryScratch<C> ws(launch, scratch);
  if (!p.empty) {
    pad_matrix(p.M, launch.Dk, launch.Dv, ws.pv, ws.M);
    load_z(ws, p.z, launch.Dk);
  }
  for (int64_t r0 = 0; r0 < p.N * p.G; r0 += kChunk) {
    const int64_t count =
        p.empty ? min_of(kChunk, p.N * p.G - r0) : retrieve_chunk(launch, p, r0, ws);
    load_rows(launch.dtype, p.out_local, p.G, r0, count, launch.Dv, ws.pv, ws.b_v);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = (r0 + i) / p.G, g = (r0 + i) % p.G;
      const C gate = gate_of<C>(p, g);
      C* local = ws.b_v + i * ws.pv;
      C local_weight = C(1) - gate;
      if (p.empty) {
        if (launch.first_bypass) local_weight = C(1);
      } else {
        // local <- local * (1 - g) + A g, written as one scaling at the end when there is no
        // memory.
        for (int64_t d = 0; d < launch.Dv; ++d) local[d] *= local_weight;
        axpy(gate / max_of(ws.scalar[i], kMemoryEps<C>), ws.a_v + i * ws.pv, ws.pv, local);
        local_weight = C(1);
      }
      store_row(launch.dtype, local, launch.Dv, local_weight,
                row_at_mut(p.out, t, g, dtype_size(launch.dtype)));
    }
  }
}

template <class C>
void write_memory_grad(DType dtype, bool add, const Rows& dst, int64_t t, int64_t g, const C* src,
                       int64_t D) {
  if (add) {
    C* sum = stat_at<C>(dst, t, g);
    for (int64_t d = 0; d < D; ++d) sum[d] += src[d];
  } else {
    store_row(dtype, src, D, C(1), row_at_mut(dst, t, g, dtype_size(dtype)));
  }
}

// x <- x o phi'(.), with phi' = min(phi, 1).
template <class C>
void times_phi_slope(const C* phi, int64_t pitch, C* x) {
  for (int64_t d = 0; d < pitch; d += kLanes<C>) {
    const Vec<C> f = load(phi + d);
    store(x + d, load(x + d) * (f < C(1) ? f : splat(C(1))));
  }
}

}  // namespace lctx::cpu::LCTX_ISA
