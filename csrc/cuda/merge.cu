// Math: the exact union of two partial attention results over disjoint key sets. Per row, with
//   L = logaddexp(lse_a, lse_b), w_a = exp(lse_a - L), w_b = exp(lse_b - L):
//   out = w_a out_a + w_b out_b,  lse = L
//   dout_a = w_a dout,  dlse_a = w_a (dlse + w_b s),  s = <dout, out_a - out_b>;  b with -s.
//   A side with lse = -inf has seen no key: its weight is 0 and its `out` does not matter,
//   whatever it holds.
// Tile map: rows in the order of memory (b, t, h), `lanes` threads to a row, 128 / lanes rows to a
//   block. A lane takes packs of 16 bytes, or single elements where a pointer, a stride or D does
//   not allow packs.
// Pipeline: none; the loads of a row do not depend on each other and are in flight together.
// Memory: forward 3, backward 5 row tensors, each read or written once, and 3 or 5 statistics per
//   row, with stride T. No shared memory. Under 1 FLOP per byte: the memory's speed is the floor.
//   H200, cold L2, D 64-256: 3.4-4.2 TB/s, 82-99 % of torch.add at the same size; D 80: 65-86 %.
// Limits: float32, float64, bfloat16, float16; any D; innermost stride 1, other strides free.
#include <algorithm>

#include "../common/dtype.cuh"
#include "../common/launch.h"
#include "../common/math.cuh"
#include "../common/online_softmax.cuh"
#include "cuda_backend.h"

namespace lctx::cuda {
namespace {

constexpr int kThreads = 128;  // 256 and 512 are 1-12 % slower; two rows per thread 25 % and more
constexpr int kPackBytes = 16;

// The row (b, t, h) of a thread.
struct Row {
  int64_t b, t, h, stat;
  bool exists;

  __device__ explicit Row(const MergeParams& p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int64_t bt = row / p.H;
    exists = row < p.B * p.T * p.H;
    h = row - bt * p.H;
    b = bt / p.T;
    t = bt - b * p.T;
    stat = (b * p.H + h) * p.T + t;
  }

  template <class T>
  __device__ T* in(const TensorView& x) const {
    return static_cast<T*>(x.data) + b * x.stride_b + t * x.stride_t + h * x.stride_h;
  }
};

template <class C>
__device__ __forceinline__ MergeWeights<C> load_weights(const MergeParams& p, int64_t stat) {
  return merge_weights(static_cast<const C*>(p.lse_a)[stat], static_cast<const C*>(p.lse_b)[stat]);
}

// weight * x, and 0 for weight 0 even where x is infinite or NaN.
template <class C, class T>
__device__ __forceinline__ C weighted(C weight, T x) {
  return weight == C(0) ? C(0) : weight * static_cast<C>(x);
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads)
    merge_fwd_kernel(const __grid_constant__ MergeParams p) {
  using C = Accum<T>;
  using P = Pack<T, kPack>;
  const Row row(p);
  if (!row.exists) return;
  const T *out_a = row.in<T>(p.out_a), *out_b = row.in<T>(p.out_b);
  T* out = row.in<T>(p.out);
  const MergeWeights<C> w = load_weights<C>(p, row.stat);
  if (threadIdx.x == 0) static_cast<C*>(p.lse)[row.stat] = w.lse;

  for (int64_t d = threadIdx.x * kPack; d < p.D; d += blockDim.x * kPack) {
    const P a = *reinterpret_cast<const P*>(out_a + d);
    const P b = *reinterpret_cast<const P*>(out_b + d);
    P result;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      result.x[i] = static_cast<T>(weighted(w.a, a.x[i]) + weighted(w.b, b.x[i]));
    }
    *reinterpret_cast<P*>(out + d) = result;
  }
}

// Lanes per row must be a power of two up to 32.
template <class T, int kPack>
__global__ void __launch_bounds__(kThreads)
    merge_bwd_kernel(const __grid_constant__ MergeParams p, const __grid_constant__ MergeGrads g) {
  using C = Accum<T>;
  using P = Pack<T, kPack>;
  const Row row(p);
  if (!row.exists) return;  // all lanes of a row together
  const T *out_a = row.in<T>(p.out_a), *out_b = row.in<T>(p.out_b);
  const T* dout = row.in<T>(g.dout);
  T *dout_a = row.in<T>(g.dout_a), *dout_b = row.in<T>(g.dout_b);
  const MergeWeights<C> w = load_weights<C>(p, row.stat);
  const bool both = w.a != C(0) && w.b != C(0);

  C s = 0;
  for (int64_t d = threadIdx.x * kPack; d < p.D; d += blockDim.x * kPack) {
    const P grad = *reinterpret_cast<const P*>(dout + d);
    const P a = *reinterpret_cast<const P*>(out_a + d);
    const P b = *reinterpret_cast<const P*>(out_b + d);
    P grad_a, grad_b;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const C difference = static_cast<C>(a.x[i]) - static_cast<C>(b.x[i]);
      if (both) s += static_cast<C>(grad.x[i]) * difference;
      grad_a.x[i] = static_cast<T>(weighted(w.a, grad.x[i]));
      grad_b.x[i] = static_cast<T>(weighted(w.b, grad.x[i]));
    }
    *reinterpret_cast<P*>(dout_a + d) = grad_a;
    *reinterpret_cast<P*>(dout_b + d) = grad_b;
  }
  s = sum_over_lanes(s, blockDim.x);
  if (threadIdx.x == 0) {
    const C dlse = g.dlse != nullptr ? static_cast<const C*>(g.dlse)[row.stat] : C(0);
    static_cast<C*>(g.dlse_a)[row.stat] = w.a * (dlse + w.b * s);
    static_cast<C*>(g.dlse_b)[row.stat] = w.b * (dlse - w.a * s);
  }
}

bool takes_packs(std::initializer_list<TensorView> views, int64_t D, int64_t element_size) {
  int64_t bits = D * element_size;
  for (const TensorView& x : views) {
    bits |= reinterpret_cast<intptr_t>(x.data);
    bits |= (x.stride_b | x.stride_t | x.stride_h) * element_size;
  }
  return bits % kPackBytes == 0;
}

// Calls launch(grid, block) for blocks with `lanes` threads per row.
template <class Launch>
void for_rows(const MergeParams& p, int lanes, const char* name, Stream stream,
              const Launch& launch) {
  const int64_t rows = p.B * p.T * p.H;
  if (rows == 0) return;
  const dim3 block(lanes, kThreads / lanes);
  const int64_t blocks = ceil_div(rows, block.y);
  LCTX_CHECK(blocks <= INT32_MAX, name, ": ", rows, " rows; expected at most ",
             int64_t{block.y} * INT32_MAX);
  const dim3 grid(static_cast<unsigned>(blocks));
  launch(grid, block);
  check_launch(name, grid, block, stream);
}

}  // namespace

void launch_merge_fwd(const MergeParams& params, Stream stream) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kPack = kPackBytes / sizeof(T);
    const bool packs = takes_packs({params.out_a, params.out_b, params.out}, params.D, sizeof(T));
    const int64_t lanes = ceil_div(params.D, packs ? kPack : 1);
    const auto kernel = packs ? merge_fwd_kernel<T, kPack> : merge_fwd_kernel<T, 1>;
    for_rows(params, static_cast<int>(std::clamp<int64_t>(lanes, 1, 32)), "merge_fwd_kernel",
             stream, [&](dim3 grid, dim3 block) { kernel<<<grid, block, 0, stream>>>(params); });
  });
}

void launch_merge_bwd(const MergeParams& params, const MergeGrads& grads, Stream stream) {
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kPack = kPackBytes / sizeof(T);
    const bool packs = takes_packs(
        {params.out_a, params.out_b, grads.dout, grads.dout_a, grads.dout_b}, params.D, sizeof(T));
    const int64_t lanes = ceil_div(params.D, packs ? kPack : 1);
    const auto kernel = packs ? merge_bwd_kernel<T, kPack> : merge_bwd_kernel<T, 1>;
    for_rows(params, std::min(next_power_of_two(lanes), 32), "merge_bwd_kernel", stream,
             [&](dim3 grid, dim3 block) { kernel<<<grid, block, 0, stream>>>(params, grads); });
  });
}

}  // namespace lctx::cuda
