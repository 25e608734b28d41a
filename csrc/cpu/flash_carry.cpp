// One step of a ring on the CPU: as flash.cpp, with keys at any positions. flash_carry merges into
// what earlier steps left, flash_carry_bwd adds to the gradients of earlier steps.
#include <algorithm>
#include <cstring>
#include <limits>

#include "attn_driver.h"

namespace lctx::cpu {
namespace {

AttnLaunch carry_launch(const CarryParams& params, Write write, DType out_dtype) {
  AttnLaunch launch = make_launch(params);
  launch.window = params.window;
  launch.write = write;
  launch.out_dtype = out_dtype;
  return launch;
}

Rows stat_slice(const CarryParams& params, const void* data, int64_t b, int64_t h) {
  const int64_t size = dtype_size(stat_dtype(params.shape.dtype));
  char* base = static_cast<char*>(const_cast<void*>(data));
  return {base + (b * params.lse_stride_b + h * params.lse_stride_h) * size, 1,
          params.lse_stride_h};
}

// One problem per (batch, key/value head).
template <class Finish>
std::vector<Problem> carry_problems(const CarryParams& params, const AttnLaunch& launch,
                                    const CarryGrads* grads, const Finish& finish) {
  const AttnShape& s = params.shape;
  const int64_t G = s.Hq / s.Hkv;
  std::vector<Problem> problems;
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t h = 0; h < s.Hq; h += G) {
      Problem p = make_problem(params, launch, b, h, G, grads);
      p.query_offset = params.query_start - params.key_start;
      p.lse = stat_slice(params, params.lse, b, h);
      finish(p, b, h);
      problems.push_back(p);
    }
  }
  return problems;
}

// Rows of a (B, T, H, D) sum become 0.
void clear(const TensorView& x, int64_t B, int64_t T, int64_t H, int64_t bytes, int64_t size) {
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t h = 0; h < H; ++h) {
        const int64_t at = b * x.stride_b + t * x.stride_t + h * x.stride_h;
        std::memset(static_cast<char*>(x.data) + at * size, 0, bytes);
      }
    }
  }
}

// No row carries anything.
template <class T>
void clear_lse(const CarryParams& params) {
  const AttnShape& s = params.shape;
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t h = 0; h < s.Hq; ++h) {
      T* row = static_cast<T*>(params.lse) + b * params.lse_stride_b + h * params.lse_stride_h;
      std::fill(row, row + s.Tq, -std::numeric_limits<T>::infinity());
    }
  }
}

}  // namespace

void flash_carry(const CarryParams& params, const ThreadPool& pool) {
  const DType stat = stat_dtype(params.shape.dtype);
  if (params.first) {
    stat == DType::kFloat64 ? clear_lse<double>(params) : clear_lse<float>(params);
  }
  const bool last = params.out.data != nullptr;
  const AttnLaunch launch = carry_launch(params, Write::kMerge, last ? params.shape.dtype : stat);
  run_forward(launch,
              carry_problems(params, launch, nullptr,
                             [&](Problem& p, int64_t b, int64_t h) {
                               const Rows held = rows_of(params.carry_out, stat, b, h);
                               (last ? p.held : p.out) = held;
                             }),
              pool);
}

void flash_carry_bwd(const CarryParams& params, const CarryGrads& grads, const ThreadPool& pool) {
  const AttnLaunch launch = carry_launch(params, Write::kAdd, stat_dtype(params.shape.dtype));
  if (grads.first) {
    const AttnShape& s = params.shape;
    const int64_t size = dtype_size(stat_dtype(s.dtype));
    clear(grads.dk, s.B, s.Tk, s.Hkv, s.Dk * size, size);
    clear(grads.dv, s.B, s.Tk, s.Hkv, s.Dv * size, size);
  }
  run_backward(launch,
               carry_problems(params, launch, &grads,
                              [&](Problem& p, int64_t b, int64_t h) {
                                p.delta = stat_slice(params, grads.delta, b, h);
                              }),
               pool);
}

void attn_delta(const AttnParams& params, const AttnGrads& grads, void* delta,
                const ThreadPool& pool) {
  write_delta(params, grads, delta, pool);
}

}  // namespace lctx::cpu
