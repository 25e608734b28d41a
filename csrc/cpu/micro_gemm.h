// The one matrix product of the CPU backend: C(I x J) (+)= A(I x K) * B(K x J).
//
// B and C are row-major scratch whose rows are whole vectors; A is read one scalar at a time and
// broadcast, so it can be row-major (A[i * lda + k]) or transposed (A[k * lda + i]) at the same
// price. A kMicroRows x kMicroVecs tile of C stays in registers over at most kMostTerms of K, whose
// sum is then added to C: rounding grows with the root of how many terms one sum has, and B's panel
// (K x kMicroVecs vectors) is what the L1 cache has to hold.
#pragma once

#include "simd.h"

namespace lctx::cpu::LCTX_ISA {

enum class Layout { kRowMajor, kTransposed };  // of A
enum class Accumulate {
  kStore,     // C = A B
  kAdd,       // C += A B
  kScaleAdd,  // C = diag(row_scale) C + A B
};

template <class C, int kRows, int kVecs, Layout kLayout, Accumulate kAcc>
LCTX_INLINE void micro_tile(int64_t K, const C* A, int64_t lda, const C* B, int64_t ldb, C* out,
                            int64_t ldc, const C* row_scale) {
  constexpr int L = kLanes<C>;
  Vec<C> acc[kRows][kVecs] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vec<C> b[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) b[j] = load(B + k * ldb + j * L);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<C> a = splat(kLayout == Layout::kRowMajor ? A[i * lda + k] : A[k * lda + i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) acc[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      C* c = out + i * ldc + j * L;
      if constexpr (kAcc == Accumulate::kAdd) acc[i][j] += load(c);
      if constexpr (kAcc == Accumulate::kScaleAdd) acc[i][j] += load(c) * row_scale[i];
      store(c, acc[i][j]);
    }
  }
}

template <class C, int kVecs, Layout kLayout, Accumulate kAcc>
void gemm_columns(int64_t I, int64_t K, const C* A, int64_t lda, const C* B, int64_t ldb, C* out,
                  int64_t ldc, const C* row_scale) {
  const int64_t a_step = kLayout == Layout::kRowMajor ? lda : 1;
  int64_t i = 0;
  for (; i + kMicroRows <= I; i += kMicroRows) {
    micro_tile<C, kMicroRows, kVecs, kLayout, kAcc>(K, A + i * a_step, lda, B, ldb, out + i * ldc,
                                                    ldc, row_scale + i);
  }
  for (; i + 2 <= I; i += 2) {
    micro_tile<C, 2, kVecs, kLayout, kAcc>(K, A + i * a_step, lda, B, ldb, out + i * ldc, ldc,
                                           row_scale + i);
  }
  if (i < I) {
    micro_tile<C, 1, kVecs, kLayout, kAcc>(K, A + i * a_step, lda, B, ldb, out + i * ldc, ldc,
                                           row_scale + i);
  }
}

constexpr int64_t kMostTerms = 64;

// J counts elements and is a multiple of one vector. `row_scale` (I) is read by kScaleAdd only.
template <class C, Layout kLayout, Accumulate kAcc>
void gemm(int64_t I, int64_t J, int64_t K, const C* A, int64_t lda, const C* B, int64_t ldb, C* out,
          int64_t ldc, const C* row_scale = nullptr) {
  constexpr int L = kLanes<C>;
  const int64_t terms = min_of(K, kMostTerms);
  int64_t j = 0;
  for (; j + kMicroVecs * L <= J; j += kMicroVecs * L) {
    gemm_columns<C, kMicroVecs, kLayout, kAcc>(I, terms, A, lda, B + j, ldb, out + j, ldc,
                                               row_scale);
  }
  for (; j < J; j += L) {
    gemm_columns<C, 1, kLayout, kAcc>(I, terms, A, lda, B + j, ldb, out + j, ldc, row_scale);
  }
  if (K > terms) {
    const int64_t a_step = kLayout == Layout::kRowMajor ? 1 : lda;
    gemm<C, kLayout, Accumulate::kAdd>(I, J, K - terms, A + terms * a_step, lda, B + terms * ldb,
                                       ldb, out, ldc);
  }
}

}  // namespace lctx::cpu::LCTX_ISA
