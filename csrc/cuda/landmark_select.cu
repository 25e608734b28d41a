// Math: the blocks that landmark_decode reads. Row (t, h) scores landmark n by R(p_t - s_n) q .
// k_n,
//       s_n = 0 for all but the last `used` blocks, which have places of their own; the choice is
//       the largest `used` scores of a row, or of max over rows of (score - lse of the row), where
//       tokens or heads choose together. Of equal scores the later block wins.
// Tile map: scores: a thread block for 128 landmarks of a key/value head and 8 rows; then 8 near
//       landmarks with places of their own. The first one of a head also lets the new keys,
//       rotated, and values join the open block. Combination: 256 blocks of a choice. Selection: a
//       thread block a choice, by radix select over (score, n), 11 bits at a time.
// Pipeline: two or three launches, each resident and waiting when the one before ends.
// Memory: every landmark once; scores written and read a few times, in L2.
// Limits: bf16, fp16; D a multiple of 8 up to 256; 2^31 - 1 landmarks; 16384 chosen blocks.
#include "landmark_decode.cuh"

namespace lctx::cuda {
namespace {

constexpr int kRows = 8;
constexpr int kSelectThreads = 512, kBins = 2048;

// Writes the scores of `n` landmarks from `first` on, and what a softmax over them needs.
__device__ void write_scores(const LandmarkDecodeCall& call, const float* scores, int b, int kv,
                             int first_row, int rows, int64_t first, int n, int chunk) {
  const AttnShape& s = call.p.shape;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= rows) return;
  const int G = static_cast<int>(s.Hq / s.Hkv), row = first_row + warp;
  const int64_t at = (b * s.Tq + row / G) * s.Hq + kv * G + row % G;
  float* to = call.scratch.scores + at * call.p.count + first;
  float top = -INFINITY, sum = 0.f;
#pragma unroll 1
  for (int i = lane; i < n; i += 32) {
    const float score = scores[warp * kLandmarkChunk + i];
    to[i] = score;
    top = fmaxf(top, score);
  }
  if (call.scratch.stats == nullptr) return;
  top = warp_max(top);
#pragma unroll 1
  for (int i = lane; i < n; i += 32)
    sum += ptx::exp2_anywhere(scores[warp * kLandmarkChunk + i] - top);
  sum = warp_sum(sum);
  if (lane == 0) call.scratch.stats[at * call.scratch.chunks + chunk] = make_float2(top, sum);
}

template <class T>
__device__ void join_open_block(const LandmarkDecodeParams& p, int b, int kv) {
  const AttnShape& s = p.shape;
  const int D = static_cast<int>(s.Dk);
#pragma unroll 1
  for (int i = threadIdx.x; i < s.Tq * D; i += kDecodeThreads) {
    const int t = i / D, d = i % D;
    const int64_t to = ((b * s.Hkv + kv) * p.block_size + p.open_len + t) * D + d;
    const int place = static_cast<int>(p.open_len) + t;
    static_cast<T*>(p.open_k)[to] = static_cast<T>(rotated(p, row_of<T>(p.k, b, t, kv), place, d));
    static_cast<T*>(p.open_v)[to] = row_of<T>(p.v, b, t, kv)[d];
  }
}

// grid (chunks, Hkv row tiles, B)
template <class Tile>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    landmark_scores_kernel(const __grid_constant__ LandmarkDecodeCall call) {
  using T = typename Tile::T;
  using Block = DecodeBlock<Tile>;
  __shared__ __align__(16) float queries[kRows * Tile::kColumns];
  __shared__ float scores[kRows * kLandmarkChunk];
  ptx::grid_dependents_launch();
  const LandmarkDecodeParams& p = call.p;
  const AttnShape& s = p.shape;
  const int D = static_cast<int>(s.Dk), G = static_cast<int>(s.Hq / s.Hkv);
  const int tiles = gridDim.y / static_cast<int>(s.Hkv);
  const int b = blockIdx.z, kv = blockIdx.y / tiles, first_row = blockIdx.y % tiles * kRows;
  const int rows = min(kRows, static_cast<int>(s.Tq) * G - first_row);
  const int chunk = blockIdx.x;
  const bool joins = blockIdx.x == gridDim.x - 1 && first_row == 0;
  if (joins) join_open_block<T>(p, b, kv);
  if (chunk >= call.scratch.chunks) return;

  const bool near = chunk >= call.scratch.far_chunks;
  const float factor = static_cast<float>(p.scale) * kLog2E;
  const int64_t far = p.count - p.used;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = lane % Tile::kLanes * 8, sub = lane / Tile::kLanes;
  const int own = static_cast<int>(far) + (chunk - call.scratch.far_chunks) * kDecodeWarps + warp;
  const int64_t first = near ? own - warp : int64_t{chunk} * kLandmarkChunk;
  const int n = static_cast<int>(
      min(near ? int64_t{kDecodeWarps} : int64_t{kLandmarkChunk}, (near ? p.count : far) - first));
  const T* landmarks = row_of<T>(p.landmarks, b, first, kv) + column;
  const auto query = [&](int row, int start, int d) {  // of a block that begins at `start`
    const int t = (first_row + row) / G, h = kv * G + (first_row + row) % G;
    return factor * rotated(p, row_of<T>(p.q, b, t, h), place_of_token(p, t) - start, d);
  };

  if (near) {  // a landmark a warp
    if (warp < n) {
      const int start = static_cast<int>((own - far + 1) * p.block_size);
      const uint4 key =
          column < D ? *reinterpret_cast<const uint4*>(landmarks + warp * p.landmarks.stride_t)
                     : make_uint4(0, 0, 0, 0);
      float* mine = queries + warp * Tile::kColumns;
#pragma unroll 1
      for (int row = 0; row < rows; ++row) {
        __syncwarp();
        for (int d = lane; d < Tile::kColumns; d += 32)
          mine[d] = d < D ? query(row, start, d) : 0.f;
        __syncwarp();
        const float sum = Block::dot(mine + column, key);
        if (lane == 0) scores[row * kLandmarkChunk + warp] = sum;
      }
    }
  } else {
    uint4 x[kDecodeLoads];
    const auto load = [&](int piece) {
#pragma unroll
      for (int l = 0; l < kDecodeLoads; ++l) {
        const int i = min(piece * Tile::kPiece + l * Tile::kSub + sub, n - 1);
        x[l] = column < D ? *reinterpret_cast<const uint4*>(landmarks + i * p.landmarks.stride_t)
                          : make_uint4(0, 0, 0, 0);
      }
    };
    load(warp);  // while the queries are made
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * Tile::kColumns; i += kDecodeThreads) {
      const int d = i % Tile::kColumns;
      queries[i] = d < D ? query(i / Tile::kColumns, 0, d) : 0.f;
    }
    __syncthreads();
#pragma unroll 1
    for (int piece = warp; piece * Tile::kPiece < n; piece += kDecodeWarps) {
      if (piece != warp) load(piece);
      for (int row = 0; row < rows; ++row) {
#pragma unroll
        for (int l = 0; l < kDecodeLoads; ++l) {
          const float sum = Block::dot(queries + row * Tile::kColumns + column, x[l]);
          const int i = piece * Tile::kPiece + l * Tile::kSub + sub;
          if (column == 0 && i < n) scores[row * kLandmarkChunk + i] = sum;
        }
      }
    }
  }
  __syncthreads();
  write_scores(call, scores, b, kv, first_row, rows, first, n, chunk);
}

// grid (blocks / 256, choices): the largest log2 of a share among the rows of a choice.
__global__ void __launch_bounds__(kDecodeThreads)
    landmark_combine_kernel(const __grid_constant__ LandmarkDecodeCall call) {
  extern __shared__ float lses[];
  ptx::grid_dependents_launch();
  ptx::grid_dependency_wait();
  const LandmarkDecodeParams& p = call.p;
  const AttnShape& s = p.shape;
  const bool of_head = p.choice == BlockChoice::kHead;
  const int choice = blockIdx.y, rows = static_cast<int>(of_head ? s.Tq : s.Hq);
  const int64_t first = of_head ? choice / s.Hq * s.Tq * s.Hq + choice % s.Hq : choice * s.Hq;
  const int64_t step = of_head ? s.Hq : 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = call.scratch.chunks;
#pragma unroll 1
  for (int row = warp; row < rows; row += kDecodeWarps) {
    const float2* stats = call.scratch.stats + (first + row * step) * chunks;
    float top = -INFINITY, sum = 0.f;
#pragma unroll 1
    for (int i = lane; i < chunks; i += 32) top = fmaxf(top, stats[i].x);
    top = warp_max(top);
#pragma unroll 1
    for (int i = lane; i < chunks; i += 32)
      sum += stats[i].y * ptx::exp2_anywhere(stats[i].x - top);
    sum = warp_sum(sum);
    if (lane == 0) lses[row] = top + __log2f(sum);
  }
  __syncthreads();
  const int64_t n = int64_t{blockIdx.x} * kDecodeThreads + threadIdx.x;
  if (n >= p.count) return;
  float best = -INFINITY;
#pragma unroll 8
  for (int row = 0; row < rows; ++row) {
    best = fmaxf(best, call.scratch.scores[(first + row * step) * p.count + n] - lses[row]);
  }
  call.scratch.combined[choice * p.count + n] = best;
}

// Larger for larger scores, and for larger n among equal ones.
__device__ __forceinline__ uint64_t sort_key(float score, int n) {
  const uint32_t x = __float_as_uint(score + 0.f);
  const uint32_t ordered = x ^ (static_cast<int32_t>(x) < 0 ? ~0u : 0x80000000u);
  return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(n);
}

// The smallest of the `wanted` largest keys.
__device__ uint64_t threshold(const float* scores, int count, int wanted) {
  __shared__ int bins[kBins], warp_sums[kSelectThreads / 32], found_bin, found_above, found_size;
  constexpr int kShifts[] = {53, 42, 32, 21, 10, 0}, kWidths[] = {11, 11, 10, 11, 11, 10};
  constexpr int kOwn = kBins / kSelectThreads;
  const int thread = threadIdx.x, lane = thread % 32;
  uint64_t prefix = 0;
#pragma unroll 1
  for (int pass = 0;; ++pass) {
    const int shift = kShifts[pass], width = kWidths[pass];
#pragma unroll 1
    for (int i = thread; i < kBins; i += kSelectThreads) bins[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int n = thread; n < count; n += kSelectThreads) {
      const uint64_t key = sort_key(scores[n], n);
      if (pass == 0 || key >> (shift + width) == prefix) {
        atomicAdd(&bins[key >> shift & ((1 << width) - 1)], 1);
      }
    }
    __syncthreads();
    int own = 0;  // threads go down the bins
    for (int i = 0; i < kOwn; ++i) own += bins[kBins - 1 - thread * kOwn - i];
    int above = own;  // first inclusive
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, above, step);
      if (lane >= step) above += other;
    }
    if (lane == 31) warp_sums[thread / 32] = above;
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < thread / 32; ++w) above += warp_sums[w];
    above -= own;
    if (above < wanted && wanted <= above + own) {
      for (int i = 0; i < kOwn; ++i) {
        const int bin = kBins - 1 - thread * kOwn - i;
        if (wanted <= above + bins[bin]) {
          found_bin = bin;
          found_above = above;
          found_size = bins[bin];
          break;
        }
        above += bins[bin];
      }
    }
    __syncthreads();
    prefix = prefix << width | static_cast<uint64_t>(found_bin);
    wanted -= found_above;
    if (found_size == wanted) return prefix << shift;
    __syncthreads();
  }
}

// A thread block a choice.
__global__ void __launch_bounds__(kSelectThreads)
    landmark_select_kernel(const __grid_constant__ LandmarkDecodeCall call) {
  extern __shared__ int found[];
  __shared__ int size;
  ptx::grid_dependents_launch();
  ptx::grid_dependency_wait();
  const LandmarkDecodeParams& p = call.p;
  const int count = static_cast<int>(p.count), used = static_cast<int>(p.used);
  int32_t* blocks = p.blocks + int64_t{blockIdx.x} * used;
  if (count == used) {
#pragma unroll 1
    for (int i = threadIdx.x; i < used; i += kSelectThreads) blocks[i] = i;
    return;
  }
  const float* scores =
      call.scratch.combined != nullptr ? call.scratch.combined : call.scratch.scores;
  scores += int64_t{blockIdx.x} * count;
  if (threadIdx.x == 0) size = 0;
  const uint64_t least = threshold(scores, count, used);
#pragma unroll 4
  for (int n = threadIdx.x; n < count; n += kSelectThreads) {
    if (sort_key(scores[n], n) >= least) found[atomicAdd(&size, 1)] = n;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < used; i += kSelectThreads) {
    const int n = found[i];
    int rank = 0;
#pragma unroll 1
    for (int j = 0; j < used; ++j) rank += found[j] < n;
    blocks[rank] = n;
  }
}

template <class Kernel>
void launch(Kernel kernel, const LandmarkDecodeCall& call, const char* name, dim3 grid, int threads,
            int64_t shared_bytes, bool overlaps, Stream stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  if (shared_bytes > 32 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  }
  cudaLaunchKernelEx(&config, kernel, call);
  check_launch(name, config.gridDim, config.blockDim, stream);
}

}  // namespace

void launch_landmark_select(const LandmarkDecodeCall& call, Stream stream) {
  const LandmarkDecodeParams& p = call.p;
  const AttnShape& s = p.shape;
  const auto tiles = static_cast<unsigned>(s.Hkv * ceil_div(s.Tq * (s.Hq / s.Hkv), kRows));
  choose_decode_lanes<1>(s.dtype, s.Dk, [&](auto tag) {
    using Tile = typename decltype(tag)::type;
    launch(landmark_scores_kernel<Tile>, call, "landmark_scores_kernel",
           dim3(std::max(call.scratch.chunks, 1), tiles, static_cast<unsigned>(s.B)),
           kDecodeThreads, 0, false, stream);
  });
  if (p.used == 0) return;
  const auto choices = static_cast<unsigned>(landmark_choices(p));
  if (call.scratch.combined != nullptr) {
    const int64_t rows = p.choice == BlockChoice::kHead ? s.Tq : s.Hq;
    launch(landmark_combine_kernel, call, "landmark_combine_kernel",
           dim3(static_cast<unsigned>(ceil_div(p.count, kDecodeThreads)), choices), kDecodeThreads,
           4 * rows, true, stream);
  }
  launch(landmark_select_kernel, call, "landmark_select_kernel", dim3(choices), kSelectThreads,
         4 * p.used, true, stream);
}

}  // namespace lctx::cuda
