// Math: dense softmax attention, backward: dq, dk and dv from dout.
// Tile map: attn_bwd_sm90.cuh is the kernel; blocks of 128 keys. Tiles that would leave half of the
//       multiprocessors idle, or more, are shared out among all of them by their queries: without a
//       mask, where all take as long, those of the last round; with a causal one all, where they
//       are few (Shares). Above D = 64 queries come in blocks of 80 where there is no mask or dQ is
//       added in an order, else of 64, which are 1 to 7 % faster with a mask.
// Pipeline: row statistics (bwd_rows.cu), the main kernel; dK and dV of shared tiles and dQ get
//       their dtype (unpack_dq.cu).
// Memory: those of its parts; 8 D bytes a key of shared tiles, at most as many tiles as there are
//       multiprocessors.
// Limits: those of its parts.
#include "attn_bwd_launch.cuh"

namespace lctx::cuda {
namespace {

template <class Tile, bool kWindowed, bool kOrdered = false>
void launch_dense(const FlashParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                  int num_sms, Stream stream) {
  constexpr int kKeys = Tile::kBlockN;
  using Tiles = std::conditional_t<kOrdered, OrderedKeys<kKeys>, DenseKeys<kKeys>>;
  using Traits = BwdTraits<Tile, Tiles, StoreKeys, kWindowed>;
  typename Traits::Params p{};
  set_attention_bwd<Tile>(params, grads, scratch, p);
  set_dense_order<Tile, kWindowed, kOrdered>("lctx::flash_bwd", params, scratch, p);
  launch_bwd<Traits>(p, num_sms, stream);
}

// Whether every query sees every key.
bool sees_all(const FlashParams& params) {
  return !params.causal && params.window == 0 && params.cu_seqlens == nullptr;
}

constexpr int kSharedTileKeys = 128;

// `rest` tiles, the last, are shared out, in `parts` of `blocks` blocks of queries.
struct Shares {
  int rest = 0, parts = 1, blocks = 0;

  Shares(const FlashParams& params, bool fused, int num_sms) {
    const AttnShape& s = params.shape;
    if (!fused || params.window > 0 || params.cu_seqlens != nullptr) return;
    const int64_t tiles = ceil_div(s.Tk, kSharedTileKeys) * s.Hkv * s.B;
    const int rows = s.Dk <= 64 || sees_all(params) ? tall_block_rows(static_cast<int>(s.Dk))
                                                    : dq_block_rows(static_cast<int>(s.Dk));
    // With a causal mask the longest tile is twice the average.
    const int64_t shared = params.causal ? tiles : tiles % num_sms;
    const int64_t wanted = shared == 0 ? 0 : (params.causal ? 2 : 1) * num_sms / shared;
    const int64_t all = ceil_div(s.Tq, rows);
    const int64_t least = params.causal ? 512 / rows : 1;
    const int64_t most = std::min(wanted, all / least);
    if (most < 2) return;
    rest = static_cast<int>(shared);
    blocks = static_cast<int>(ceil_div(all, most));
    parts = static_cast<int>(ceil_div(all, blocks));
  }
};

struct KeySumsParams {
  float* sums;
  TensorView dk, dv;
  KeyOrder order;
  int whole, Tk, D;
  float scale;
};

// dK and dV of shared tiles: a block to either of a tile.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(256)
    store_key_sums_kernel(const __grid_constant__ KeySumsParams p) {
  constexpr int N = kHeadDim / 2;
  const int tile = blockIdx.x / 2, which = blockIdx.x % 2, thread = threadIdx.x;
  const float* from = StoreSharedKeys::key_sums_of<N>(p.sums, tile, which, thread);
  float d[N];
#pragma unroll
  for (int j = 0; j < N / 4; ++j) {
    const float4 x = *reinterpret_cast<const float4*>(from + j * 128);
    d[4 * j] = x.x, d[4 * j + 1] = x.y, d[4 * j + 2] = x.z, d[4 * j + 3] = x.w;
  }
  const TileOrder::Tile place = p.order[p.whole + tile];
  const TensorView& view = which == 0 ? p.dv : p.dk;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key =
        place.m_block * kSharedTileKeys + thread / 128 * 64 + fragment_row(thread % 128) + 8 * i;
    T* row = static_cast<T*>(view.data) + place.batch * view.stride_b + key * view.stride_t +
             place.head * view.stride_h;
    write_fragment_row<T, kHeadDim>(d, i, which == 0 ? 1.f : p.scale, row, 0, p.D, key < p.Tk);
  }
}

template <class Tile>
void launch_shared(const FlashParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                   const Shares& shares, int num_sms, Stream stream) {
  using Traits = BwdTraits<Tile, SharedKeys<Tile::kBlockN>, StoreSharedKeys, false>;
  static_assert(Tile::kBlockN == kSharedTileKeys);
  const AttnShape& s = params.shape;
  typename Traits::Params p{};
  set_attention_bwd<Tile>(params, grads, scratch, p);
  p.order = KeyOrder(make_order("lctx::flash_bwd", ceil_div(s.Tk, Tile::kBlockN), s.Hkv, s.B,
                                bwd_section(s, s.Tq)));
  p.whole = p.order.num_tiles - shares.rest;
  p.parts = FastDivisor(shares.parts);
  p.part_rows = shares.blocks * Tile::kBlockM;
  p.key_sums = scratch.key_sums;
  const KeySumsParams sums{scratch.key_sums, grads.dk, grads.dv, p.order,
                           p.whole,          p.Tk,     p.D,      p.scale};
  p.order.num_tiles = p.whole + shares.rest * shares.parts;
  launch_bwd<Traits>(p, num_sms, stream);
  const auto kernel = store_key_sums_kernel<typename Tile::T, Tile::kHeadDim>;
  kernel<<<shares.rest * 2, 256, 0, stream>>>(sums);
  check_launch("store_key_sums_kernel", dim3(shares.rest * 2), dim3(256), stream);
}

template <class Tile>
void launch_packed(const FlashParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                   int num_sms, Stream stream) {
  using Traits = BwdTraits<Tile, PackedKeys<Tile::kBlockN>, StoreKeys, true>;
  const AttnShape& s = params.shape;
  typename Traits::Params p{};
  set_attention_bwd<Tile>(params, grads, scratch, p);
  p.window = static_cast<int>(std::min<int64_t>(params.window, INT32_MAX / 2));
  p.cu_seqlens = params.cu_seqlens;
  p.num_docs = static_cast<int>(params.num_docs);
  p.order = KeyOrder(make_order("lctx::flash_bwd", s.Tk / Tile::kBlockN + params.num_docs, s.Hkv,
                                s.B, bwd_section(s, s.Tq)));
  launch_bwd<Traits>(p, num_sms, stream);
}

}  // namespace

int flash_block_rows(const FlashParams& params, bool fused, bool ordered) {
  const int64_t D = params.shape.Dk;
  if (!fused || D > 128 || (D > 64 && !ordered && !sees_all(params))) return 0;
  return tall_block_rows(static_cast<int>(D));
}

int64_t flash_key_sum_floats(const FlashParams& params, bool fused, int num_sms) {
  return Shares(params, fused, num_sms).rest * int64_t{2} * kSharedTileKeys *
         (params.shape.Dk <= 64 ? 64 : 128);
}

void launch_flash_bwd(const FlashParams& params, const AttnGrads& grads, const BwdScratch& scratch,
                      bool fused, int num_sms, Stream stream) {
  const auto launch = [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    const Shares shares(params, fused, num_sms);
    if constexpr (Tile::kTall) {
      if (scratch.turns != nullptr) {
        const auto run =
            params.window > 0 ? launch_dense<Tile, true, true> : launch_dense<Tile, false, true>;
        return run(params, grads, scratch, num_sms, stream);
      }
    }
    if constexpr (Tile::kFused) {
      if (shares.rest > 0) {
        return launch_shared<Tile>(params, grads, scratch, shares, num_sms, stream);
      }
    }
    if constexpr (!(Tile::kTall && Tile::kHeadDim > 64)) {
      if (params.cu_seqlens != nullptr) {
        return launch_packed<Tile>(params, grads, scratch, num_sms, stream);
      }
      if (params.window > 0) {
        return launch_dense<Tile, true>(params, grads, scratch, num_sms, stream);
      }
    }
    launch_dense<Tile, false>(params, grads, scratch, num_sms, stream);
  };
  choose_bwd_tile<256, 128>(params, fused, launch, sees_all(params) || scratch.turns != nullptr);
}

}  // namespace lctx::cuda
