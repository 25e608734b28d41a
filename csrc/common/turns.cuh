// Warpgroups that go one after the other, in rounds. All of them have to take part in every round.
#pragma once

#include "ptx.cuh"

namespace lctx {

// Uses named barriers kBarrier .. kBarrier + kWarpgroups - 1, unless kOn is false.
template <bool kOn, int kWarpgroups, int kBarrier>
struct Turns {
  static_assert(kWarpgroups > 1 || !kOn);

  // Once each, before the first turn and after the last one.
  static __device__ __forceinline__ void begin(int warpgroup) {
    if (warpgroup == kWarpgroups - 1) pass(warpgroup);
  }
  static __device__ __forceinline__ void end(int warpgroup) {
    if (warpgroup == 0) take(warpgroup);
  }

  static __device__ __forceinline__ void take(int warpgroup) {
    if constexpr (kOn) ptx::named_barrier_sync(kBarrier + warpgroup, 256);
  }
  static __device__ __forceinline__ void pass(int warpgroup) {
    const int next = warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1;
    if constexpr (kOn) ptx::named_barrier_arrive(kBarrier + next, 256);
  }
};

}  // namespace lctx
