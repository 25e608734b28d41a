// The exact union of two partial attention results over disjoint key sets, forward and backward.
//
// Per row, with L = logaddexp(lse_a, lse_b), w_a = exp(lse_a - L), w_b = exp(lse_b - L):
//   out = w_a out_a + w_b out_b,  lse = L
//   dout_a = w_a dout,  dlse_a = w_a (dlse + w_b s),  s = <dout, out_a - out_b>;  the same for b
//   with -s.
// A side with lse = -inf has seen no key: its weight is 0 and its `out` is not read, whatever it
// holds.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_backend.h"

#define LCTX_ISA base
#include "simd.h"

namespace lctx::cpu {
namespace {

template <class C>
struct Weights {
  C a, b, lse;
};

template <class C>
Weights<C> weights(C lse_a, C lse_b) {
  const bool b_leads = lse_a < lse_b;
  const C top = b_leads ? lse_b : lse_a;
  if (top == -std::numeric_limits<C>::infinity()) return {C(0), C(0), top};
  const C ratio = std::exp(b_leads ? lse_a - lse_b : lse_b - lse_a);  // of the weights, at most 1
  const C major = C(1) / (C(1) + ratio), minor = ratio * major;
  return {b_leads ? minor : major, b_leads ? major : minor, top + std::log1p(ratio)};
}

// Elements of a row that are worked on at a time, in buffers on the stack.
constexpr int64_t kPiece = 256;

template <class C>
class Merge {
 public:
  explicit Merge(const MergeParams& params) : p_(params), size_(dtype_size(params.dtype)) {}

  void forward(int64_t b, int64_t t, int64_t h) const {
    const int64_t row = stat_index(b, t, h);
    const Weights<C> w = weights(stat(p_.lse_a)[row], stat(p_.lse_b)[row]);
    static_cast<C*>(p_.lse)[row] = w.lse;
    alignas(64) C x_a[kPiece], x_b[kPiece];
    for (int64_t d = 0; d < p_.D; d += kPiece) {
      const int64_t n = std::min(kPiece, p_.D - d);
      load(w.a, p_.out_a, b, t, h, d, n, x_a);
      load(w.b, p_.out_b, b, t, h, d, n, x_b);
      for (int64_t i = 0; i < n; ++i) x_a[i] = w.a * x_a[i] + w.b * x_b[i];
      base::store_row<C>(p_.dtype, x_a, n, C(1), at(p_.out, b, t, h, d));
    }
  }

  void backward(const MergeGrads& g, int64_t b, int64_t t, int64_t h) const {
    const int64_t row = stat_index(b, t, h);
    const Weights<C> w = weights(stat(p_.lse_a)[row], stat(p_.lse_b)[row]);
    alignas(64) C x_a[kPiece], x_b[kPiece], dout[kPiece];
    C s = 0;
    for (int64_t d = 0; d < p_.D; d += kPiece) {
      const int64_t n = std::min(kPiece, p_.D - d);
      load(w.a, p_.out_a, b, t, h, d, n, x_a);
      load(w.b, p_.out_b, b, t, h, d, n, x_b);
      base::load_row<C>(p_.dtype, at(g.dout, b, t, h, d), n, n, C(1), dout);
      for (int64_t i = 0; i < n; ++i) s += dout[i] * (x_a[i] - x_b[i]);
      for (int64_t i = 0; i < n; ++i) {
        x_a[i] = w.a == C(0) ? C(0) : w.a * dout[i];
        x_b[i] = w.b == C(0) ? C(0) : w.b * dout[i];
      }
      base::store_row<C>(p_.dtype, x_a, n, C(1), at(g.dout_a, b, t, h, d));
      base::store_row<C>(p_.dtype, x_b, n, C(1), at(g.dout_b, b, t, h, d));
    }
    if (w.a == C(0) || w.b == C(0)) s = C(0);
    const C dlse = g.dlse != nullptr ? stat(g.dlse)[row] : C(0);
    static_cast<C*>(g.dlse_a)[row] = w.a * (dlse + w.b * s);
    static_cast<C*>(g.dlse_b)[row] = w.b * (dlse - w.a * s);
  }

 private:
  int64_t stat_index(int64_t b, int64_t t, int64_t h) const { return (b * p_.H + h) * p_.T + t; }
  static const C* stat(const void* data) { return static_cast<const C*>(data); }
  char* at(const TensorView& x, int64_t b, int64_t t, int64_t h, int64_t d) const {
    return static_cast<char*>(x.data) +
           (b * x.stride_b + t * x.stride_t + h * x.stride_h + d) * size_;
  }
  void load(C weight, const TensorView& x, int64_t b, int64_t t, int64_t h, int64_t d, int64_t n,
            C* dst) const {
    if (weight == C(0)) {
      std::fill_n(dst, n, C(0));
    } else {
      base::load_row<C>(p_.dtype, at(x, b, t, h, d), n, n, C(1), dst);
    }
  }

  const MergeParams& p_;
  const int64_t size_;
};

// Calls body(b, t, h) for every row; a task is a run of positions with about 32 K elements.
template <class Body>
void for_each_row(const MergeParams& p, const ThreadPool& pool, const Body& body) {
  const int64_t positions = p.B * p.T;
  const int64_t step = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.H * p.D));
  const auto task = [&](int64_t i) {
    for (int64_t bt = i * step; bt < std::min(positions, (i + 1) * step); ++bt) {
      for (int64_t h = 0; h < p.H; ++h) body(bt / p.T, bt % p.T, h);
    }
  };
  pool.run((positions + step - 1) / step,
           [](void* f, int64_t i) { (*static_cast<decltype(task)*>(f))(i); },
           const_cast<void*>(static_cast<const void*>(&task)));
}

template <class C>
void run_forward(const MergeParams& params, const ThreadPool& pool) {
  const Merge<C> merge(params);
  for_each_row(params, pool, [&](int64_t b, int64_t t, int64_t h) { merge.forward(b, t, h); });
}

template <class C>
void run_backward(const MergeParams& params, const MergeGrads& grads, const ThreadPool& pool) {
  const Merge<C> merge(params);
  for_each_row(params, pool,
               [&](int64_t b, int64_t t, int64_t h) { merge.backward(grads, b, t, h); });
}

}  // namespace

void merge_fwd(const MergeParams& params, const ThreadPool& pool) {
  params.dtype == DType::kFloat64 ? run_forward<double>(params, pool)
                                  : run_forward<float>(params, pool);
}

void merge_bwd(const MergeParams& params, const MergeGrads& grads, const ThreadPool& pool) {
  params.dtype == DType::kFloat64 ? run_backward<double>(params, grads, pool)
                                  : run_backward<float>(params, grads, pool);
}

}  // namespace lctx::cpu
