// Online softmax on fragments, the merge of two softmax results, and small arithmetic.
#include "../common/math.cuh"
#include "../common/online_softmax.cuh"
#include "../common/online_softmax_sm90.cuh"
#include "device_tests.h"
#include "fragments.cuh"

namespace lctx::tests {
namespace {

struct SoftmaxParams {
  const float* scores;  // (64, blocks N)
  int blocks;
  float scale_log2;
  float* weights;                // (64, blocks N), relative to the maximum up to their block
  float *alpha, *inverse, *lse;  // (blocks, 64, 4), (64, 4), (64, 4): by each thread of a quad
};

template <int N>
__global__ void __launch_bounds__(128) softmax_kernel(const __grid_constant__ SoftmaxParams p) {
  const int row = fragment_row(threadIdx.x), part = threadIdx.x % 4, pitch = p.blocks * N;
  RowState state;
  float pair[2], lse[2];
  for (int block = 0; block < p.blocks; ++block) {
    float s[N / 2];
    load_fragment<N>(s, p.scores + block * N, pitch);
    state.template update<N>(s, p.scale_log2, pair);
    store_fragment<N>(s, p.weights + block * N, pitch);
    for (int i = 0; i < 2; ++i) p.alpha[(block * 64 + row + 8 * i) * 4 + part] = pair[i];
  }
  state.finish(p.scale_log2, pair, lse);
  for (int i = 0; i < 2; ++i) {
    p.inverse[(row + 8 * i) * 4 + part] = pair[i];
    p.lse[(row + 8 * i) * 4 + part] = lse[i];
  }
}

template <class C>
__global__ void merge_weights_kernel(const C* lse_a, const C* lse_b, C* result, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const MergeWeights<C> w = merge_weights(lse_a[i], lse_b[i]);
  result[3 * i] = w.a;
  result[3 * i + 1] = w.b;
  result[3 * i + 2] = w.lse;
}

__global__ void exp2_kernel(const float* x, float* y, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) y[i] = ptx::exp2_approx(x[i]);
}

// Quotients of every number, and of the last multiple of the divisor up to it and its neighbours.
// counts: divisions made, and wrong ones.
__global__ void divide_kernel(const FastDivisor* divisors, const int* numbers, int count,
                              unsigned long long* counts) {
  const FastDivisor fast = divisors[blockIdx.x];
  int made = 0, wrong = 0;
  const auto check = [&](int n) {
    if (n < 0) return;
    ++made;
    wrong += fast.divide(n) != n / fast.divisor || fast.modulo(n) != n % fast.divisor;
  };
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int n = numbers[i], multiple = n - n % fast.divisor;
    check(n);
    check(multiple);
    check(multiple - 1);
    if (multiple < INT32_MAX) check(multiple + 1);
  }
  atomicAdd(counts, static_cast<unsigned long long>(made));
  atomicAdd(counts + 1, static_cast<unsigned long long>(wrong));
}

__global__ void lane_sum_kernel(const float* x, float* sums, int lanes) {
  const int i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  sums[i] = sum_over_lanes(x[i], lanes);
}

}  // namespace

LCTX_TEST lctx_test_softmax(int N, int blocks, float scale_log2, const float* scores,
                            float* weights, float* alpha, float* inverse, float* lse,
                            cudaStream_t stream) {
  return guarded([&] {
    const SoftmaxParams p{scores, blocks, scale_log2, weights, alpha, inverse, lse};
    with_value<32, 64, 80, 96, 128, 176>("N", N, [&](auto n) {
      launch("softmax_kernel", softmax_kernel<n()>, 1, 128, 0, stream, p);
    });
  });
}

LCTX_TEST lctx_test_merge_weights(int is_double, const void* lse_a, const void* lse_b, void* result,
                                  int count, cudaStream_t stream) {
  return guarded([&] {
    const auto run = [&](auto zero) {
      using C = decltype(zero);
      launch("merge_weights_kernel", merge_weights_kernel<C>, (count + 127) / 128, 128, 0, stream,
             static_cast<const C*>(lse_a), static_cast<const C*>(lse_b), static_cast<C*>(result),
             count);
    };
    is_double ? run(0.0) : run(0.f);
  });
}

LCTX_TEST lctx_test_exp2(const float* x, float* y, int count, cudaStream_t stream) {
  return guarded([&] {
    launch("exp2_kernel", exp2_kernel, (count + 127) / 128, 128, 0, stream, x, y, count);
  });
}

// On the host: `result` holds count triples of divisor, multiplier, shift.
LCTX_TEST lctx_test_make_divisors(const int* divisors, int count, FastDivisor* result) {
  return guarded([&] {
    static_assert(sizeof(FastDivisor) == 12, "Python reads triples");
    for (int i = 0; i < count; ++i) result[i] = FastDivisor(divisors[i]);
  });
}

LCTX_TEST lctx_test_divide(const FastDivisor* divisors, int num_divisors, const int* numbers,
                           int count, unsigned long long* counts, cudaStream_t stream) {
  return guarded([&] {
    launch("divide_kernel", divide_kernel, num_divisors, 128, 0, stream, divisors, numbers, count,
           counts);
  });
}

LCTX_TEST lctx_test_lane_sum(const float* x, float* sums, int lanes, int width, int height,
                             int depth, cudaStream_t stream) {
  return guarded([&] {
    launch("lane_sum_kernel", lane_sum_kernel, 1, dim3(width, height, depth), 0, stream, x, sums,
           lanes);
  });
}

}  // namespace lctx::tests
