#include "attn_driver.h"

#include <numeric>

namespace lctx::cpu {
namespace {

Rows advance(const Rows& rows, DType dtype, int64_t t0, int64_t step) {
  Rows r = rows;
  if (r.data != nullptr) r.data = static_cast<char*>(r.data) + t0 * r.stride_t * dtype_size(dtype);
  r.stride_t *= step;
  return r;
}

int64_t num_rows(const Problem& p) { return static_cast<int64_t>(p.Tq) * p.G; }

void set_max_keys(AttnLaunch& launch, const std::vector<Problem>& problems) {
  launch.max_keys = 0;
  for (const Problem& p : problems) launch.max_keys = std::max<int64_t>(launch.max_keys, p.Tk);
}

// Indices of `cost`, most expensive first; ties keep their order.
std::vector<int64_t> longest_first(const std::vector<int64_t>& cost) {
  std::vector<int64_t> order(cost.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
  return order;
}

}  // namespace

Rows rows_of(const TensorView& x, DType dtype, int64_t b, int64_t h) {
  if (x.data == nullptr) return {};
  char* data = static_cast<char*>(x.data) + (b * x.stride_b + h * x.stride_h) * dtype_size(dtype);
  return {data, x.stride_t, x.stride_h};
}

Rows stat_rows(const void* data, DType dtype, int64_t H, int64_t T, int64_t b, int64_t h) {
  if (data == nullptr) return {};
  char* base = static_cast<char*>(const_cast<void*>(data));
  return {base + (b * H + h) * T * dtype_size(stat_dtype(dtype)), 1, T};
}

TensorView contiguous_view(void* data, int64_t T, int64_t H, int64_t D) {
  return {data, T * H * D, H * D, D};
}

AttnLaunch make_launch(const AttnParams& params) {
  AttnLaunch launch;
  launch.dtype = launch.out_dtype = params.shape.dtype;
  launch.Dk = params.shape.Dk;
  launch.Dv = params.shape.Dv;
  launch.scale = params.scale;
  launch.causal = params.causal;
  return launch;
}

Problem make_problem(const AttnParams& params, const AttnLaunch& launch, int64_t b, int64_t h,
                     int64_t G, const AttnGrads* grads, const void* delta) {
  const AttnShape& s = params.shape;
  const int64_t kv = h / (s.Hq / s.Hkv);
  Problem p;
  p.Tq = static_cast<int32_t>(s.Tq);
  p.Tk = static_cast<int32_t>(s.Tk);
  p.G = static_cast<int32_t>(G);
  p.query_offset = s.Tk - s.Tq;
  p.q = rows_of(params.q, s.dtype, b, h);
  p.k = rows_of(params.k, s.dtype, b, kv);
  p.v = rows_of(params.v, s.dtype, b, kv);
  p.out = rows_of(params.out, grads == nullptr ? launch.out_dtype : s.dtype, b, h);
  p.lse = stat_rows(params.lse, s.dtype, s.Hq, s.Tq, b, h);
  if (grads != nullptr) {
    p.dout = rows_of(grads->dout, s.dtype, b, h);
    p.delta = stat_rows(delta, s.dtype, s.Hq, s.Tq, b, h);
    p.dq = rows_of(grads->dq, launch.out_dtype, b, h);
    p.dk = rows_of(grads->dk, launch.out_dtype, b, kv);
    p.dv = rows_of(grads->dv, launch.out_dtype, b, kv);
  }
  return p;
}

Problem slice_problem(Problem p, const AttnLaunch& launch, int64_t t0, int64_t count,
                      int64_t step) {
  const DType stat = stat_dtype(launch.dtype);
  p.Tq = p.Tk = static_cast<int32_t>(count);
  p.query_offset = 0;
  for (Rows* rows : {&p.q, &p.k, &p.v, &p.dout}) *rows = advance(*rows, launch.dtype, t0, step);
  for (Rows* rows : {&p.out, &p.dq, &p.dk, &p.dv})
    *rows = advance(*rows, launch.out_dtype, t0, step);
  for (Rows* rows : {&p.lse, &p.delta}) *rows = advance(*rows, stat, t0, step);
  return p;
}

void run_forward(AttnLaunch launch, const std::vector<Problem>& problems, const ThreadPool& pool) {
  const AttnKernels& kernel = kernels(launch.dtype).attn;
  set_max_keys(launch, problems);
  launch.problems = problems.data();
  struct Task {
    int32_t problem, tile;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> cost;
  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem& p = problems[i];
    const int64_t rows = num_rows(p);
    for (int64_t tile = 0; tile * kernel.rows_per_tile < rows; ++tile) {
      const int64_t last_row = std::min(rows, (tile + 1) * kernel.rows_per_tile) - 1;
      const int64_t reach = launch.causal ? last_row / p.G + 1 + p.query_offset : p.Tk;
      tasks.push_back({static_cast<int32_t>(i), static_cast<int32_t>(tile)});
      cost.push_back(std::clamp<int64_t>(reach, 0, p.Tk) *
                     (last_row + 1 - tile * kernel.rows_per_tile));
    }
  }
  const std::vector<int64_t> order = longest_first(cost);
  parallel_tasks(pool, static_cast<int64_t>(tasks.size()), kernel.fwd_scratch(launch),
                 [&](int64_t i, char* scratch) {
                   const Task& task = tasks[order[i]];
                   kernel.fwd_tile(launch, problems[task.problem], task.tile, scratch);
                 });
}

void run_backward(AttnLaunch launch, const std::vector<Problem>& problems, const ThreadPool& pool) {
  const AttnKernels& kernel = kernels(launch.dtype).attn;
  set_max_keys(launch, problems);
  launch.problems = problems.data();
  const int64_t count = static_cast<int64_t>(problems.size());
  if (count == 0) return;
  // Enough problems for the threads: one task each. Otherwise their rows are shared out, and dk, dv
  // summed afterwards.
  const int64_t splits =
      count >= 2 * pool.num_threads ? 1 : (2 * pool.num_threads + count - 1) / count;
  std::vector<int64_t> cost;
  for (const Problem& p : problems) cost.push_back(num_rows(p) * p.Tk);
  const std::vector<int64_t> order = longest_first(cost);
  const int64_t partial_bytes =
      kernel.bwd_partial(launch) * dtype_size(stat_dtype(launch.dtype)) * splits;
  const Buffer partial(splits > 1 ? count * partial_bytes : 0);
  const auto partial_of = [&](int64_t i) {
    return splits > 1 ? partial.get() + i * partial_bytes : nullptr;
  };
  parallel_tasks(pool, count * splits, kernel.bwd_scratch(launch, splits),
                 [&](int64_t i, char* scratch) {
                   const int64_t problem = order[i / splits];
                   kernel.bwd_split(launch, problems[problem], i % splits, splits,
                                    partial_of(problem), scratch);
                 });
  if (splits == 1) return;
  parallel_tasks(pool, count, 0, [&](int64_t i, char*) {
    kernel.bwd_reduce(launch, problems[i], splits, partial_of(i));
  });
}

void write_delta(const AttnParams& params, const AttnGrads& grads, void* delta,
                 const ThreadPool& pool) {
  const AttnShape& s = params.shape;
  const AttnLaunch launch = make_launch(params);
  constexpr int64_t kChunk = 256;
  const int64_t chunks = (s.Tq + kChunk - 1) / kChunk;
  parallel_tasks(pool, s.B * chunks, 0, [&](int64_t i, char*) {
    const int64_t b = i / chunks, t0 = i % chunks * kChunk;
    Problem p = make_problem(params, launch, b, 0, s.Hq, &grads, delta);
    const Rows dlse = stat_rows(grads.dlse, s.dtype, s.Hq, s.Tq, b, 0);
    kernels(s.dtype).attn.delta_rows(launch, p, dlse, t0, std::min(t0 + kChunk, s.Tq));
  });
}

Buffer make_delta(const AttnParams& params, const AttnGrads& grads, const ThreadPool& pool) {
  const AttnShape& s = params.shape;
  Buffer delta(s.B * s.Hq * s.Tq * dtype_size(stat_dtype(s.dtype)));
  write_delta(params, grads, delta.get(), pool);
  return delta;
}

void convert_tensor(const AttnShape& shape, int64_t H, int64_t D, void* src, const TensorView& dst,
                    int64_t T, const ThreadPool& pool) {
  constexpr int64_t kChunk = 256;
  const int64_t chunks = (T + kChunk - 1) / kChunk;
  const TensorView from = contiguous_view(src, T, H, D);
  parallel_tasks(pool, shape.B * chunks, 0, [&](int64_t i, char*) {
    const int64_t b = i / chunks, t0 = i % chunks * kChunk;
    kernels(shape.dtype)
        .attn.convert_rows(shape.dtype, rows_of(from, stat_dtype(shape.dtype), b, 0),
                           rows_of(dst, shape.dtype, b, 0), t0, std::min(t0 + kChunk, T), H, D);
  });
}

}  // namespace lctx::cpu
