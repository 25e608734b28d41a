// What the kernels of landmark_decode share: places of queries, and their rotation.
#pragma once

#include "decode_rows.cuh"

namespace lctx::cuda {

// Thread blocks of landmark_scores_kernel take so many landmarks each.
constexpr int kLandmarkChunk = 128;

// Scratch of landmark_decode, in floats.
struct LandmarkDecodeScratch {
  float* scores = nullptr;  // (B, Tq, Hq, count), log2
  float2* stats = nullptr;  // (B, Tq, Hq, chunks): largest score of a chunk, sum of 2^(s - largest)
  float* combined = nullptr;  // (choices, count), where several rows choose together
  int far_chunks = 0, chunks = 0;
};

struct LandmarkDecodeCall {
  LandmarkDecodeParams p;
  LandmarkDecodeScratch scratch;
  int row_tiles = 1;  // of landmark_attend_kernel
};

inline int64_t landmark_choices(const LandmarkDecodeParams& p) {
  return p.shape.B * p.choice_tokens * p.choice_heads;
}
// Whether there is anything to choose.
inline bool chooses(const LandmarkDecodeParams& p) { return p.used > 0 && p.count > p.used; }

#if defined(__CUDACC__)
__device__ __forceinline__ int place_of_token(const LandmarkDecodeParams& p, int t) {
  return static_cast<int>((p.used + p.moved + p.always) * p.block_size + p.open_len) + t;
}

template <class T>
__device__ __forceinline__ const T* row_of(const TensorView& x, int64_t b, int64_t t, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.stride_b + t * x.stride_t + h * x.stride_h;
}

// Element d of x rotated to `place`.
template <class T>
__device__ __forceinline__ float rotated(const LandmarkDecodeParams& p, const T* x, int place,
                                         int d) {
  const float own = static_cast<float>(x[d]);
  if (p.rope == nullptr) return own;
  const int D = static_cast<int>(p.shape.Dk), half = D / 2;
  const float other = d < half ? -static_cast<float>(x[d + half]) : static_cast<float>(x[d - half]);
  const float* cos = static_cast<const float*>(p.rope) + static_cast<int64_t>(place) * D + d;
  return own * cos[0] + other * cos[p.rope_len * D];
}
#endif

// landmark_select.cu: the new keys and values join the open block; p.blocks.
void launch_landmark_select(const LandmarkDecodeCall& call, Stream stream);

}  // namespace lctx::cuda
