// Decoding, landmark_decode and infini_decode: a few new tokens over what a cache holds, row by
// row.
//
// Stored keys are rotated to their place j inside the block, and rotations add up, so that a query
// at p meets a key of the block that begins at s as R(p - s) q meets R(j) k: only queries turn.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu_backend.h"

#define LCTX_ISA base
#include "simd.h"

namespace lctx::cpu {
namespace {

template <class F>
void parallel(const ThreadPool& pool, int64_t count, const F& task) {
  pool.run(
      count, [](void* f, int64_t i) { (*static_cast<const F*>(f))(i); },
      const_cast<void*>(static_cast<const void*>(&task)));
}

const char* at(const TensorView& x, DType dtype, int64_t b, int64_t t, int64_t h) {
  return static_cast<const char*>(x.data) +
         (b * x.stride_b + t * x.stride_t + h * x.stride_h) * dtype_size(dtype);
}

// log(sum(exp(x))), -inf for none.
template <class C>
C log_sum_exp(const C* x, int64_t n) {
  C top = -std::numeric_limits<C>::infinity();
  for (int64_t i = 0; i < n; ++i) top = std::max(top, x[i]);
  if (std::isinf(top)) return top;
  C sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(x[i] - top);
  return top + std::log(sum);
}

// What both methods share: keys in rows one after the other, in the storage type.
template <class C>
class Rows {
 public:
  explicit Rows(const AttnParams& p) : p_(p), s_(p.shape), size_(dtype_size(p.shape.dtype)) {}

 protected:
  // Scores of n keys for a query that carries the scale.
  void score(const std::vector<C>& query, const void* keys, int64_t n, C* scores) const {
    std::vector<C> key(static_cast<size_t>(s_.Dk));
    for (int64_t j = 0; j < n; ++j) {
      base::load_row<C>(s_.dtype, offset(keys, j * s_.Dk), s_.Dk, s_.Dk, C(1), key.data());
      scores[j] = static_cast<C>(std::inner_product(key.begin(), key.end(), query.begin(), 0.0));
    }
  }
  // out += weight * softmax(scores) values over n keys, a sum of its own: fewer terms round less.
  void add(C weight, const C* scores, const void* values, int64_t n, std::vector<C>& out) const {
    const C lse = log_sum_exp(scores, n);
    std::vector<C> value(static_cast<size_t>(s_.Dv)), sum(value.size());
    for (int64_t j = 0; j < n; ++j) {
      const C share = weight * std::exp(scores[j] - lse);
      base::load_row<C>(s_.dtype, offset(values, j * s_.Dv), s_.Dv, s_.Dv, share, value.data());
      for (size_t d = 0; d < value.size(); ++d) sum[d] += value[d];
    }
    for (size_t d = 0; d < value.size(); ++d) out[d] += sum[d];
  }
  const char* offset(const void* data, int64_t elements) const {
    return static_cast<const char*>(data) + elements * size_;
  }
  char* open_row(void* open, int64_t b, int64_t h, int64_t room, int64_t j, int64_t D) const {
    return static_cast<char*>(open) + ((b * s_.Hkv + h) * room + j) * D * size_;
  }
  void append(const TensorView& x, void* open, int64_t room, int64_t open_len, int64_t D, int64_t b,
              int64_t h) const {
    for (int64_t t = 0; t < s_.Tq; ++t) {
      std::copy_n(at(x, s_.dtype, b, t, h), D * size_, open_row(open, b, h, room, open_len + t, D));
    }
  }

  const AttnParams& p_;
  const AttnShape& s_;
  const int64_t size_;
};

template <class C>
class LandmarkDecode : Rows<C> {
  using Rows<C>::s_, Rows<C>::size_;

 public:
  explicit LandmarkDecode(const LandmarkDecodeParams& p)
      : Rows<C>(p), d_(p), scores_(static_cast<size_t>(s_.B * s_.Tq * s_.Hq * p.count)) {}

  // Rotated keys and the values join the open block.
  void join(int64_t i) const {
    const int64_t b = i / s_.Hkv, h = i % s_.Hkv;
    for (int64_t t = 0; t < s_.Tq; ++t) {
      const std::vector<C> key = rotated(at(d_.k, s_.dtype, b, t, h), d_.open_len + t, C(1));
      base::store_row<C>(s_.dtype, key.data(), s_.Dk, C(1),
                         this->open_row(d_.open_k, b, h, d_.block_size, d_.open_len + t, s_.Dk));
    }
    this->append(d_.v, d_.open_v, d_.block_size, d_.open_len, s_.Dv, b, h);
  }

  // Scores of all landmarks that can be chosen, for row i of (B, Tq, Hq).
  void score_landmarks(int64_t i) {
    const int64_t b = i / (s_.Tq * s_.Hq), t = i / s_.Hq % s_.Tq, h = i % s_.Hq;
    int64_t slot = -1;
    std::vector<C> query;
    for (int64_t n = 0; n < d_.count; ++n) {
      const int64_t own = std::max<int64_t>(n - (d_.count - d_.used) + d_.moved, 0);
      if (own != slot) query = query_at(b, t, h, place(t) - d_.block_size * own);
      slot = own;
      this->score(query, at(d_.landmarks, s_.dtype, b, n, kv_head(h)), 1, row(b, t, h) + n);
    }
  }

  // The best blocks of choice i, in their order.
  void choose(int64_t i) {
    const int64_t heads = d_.choice_heads, tokens = d_.choice_tokens;
    const int64_t b = i / (heads * tokens), t = i / heads % tokens, h = i % heads;
    const auto count = static_cast<size_t>(d_.count);
    std::vector<C> best(count, -std::numeric_limits<C>::infinity());
    for (int64_t t2 = t; t2 < (tokens == 1 ? s_.Tq : t + 1); ++t2) {
      for (int64_t h2 = h; h2 < (heads == 1 ? s_.Hq : h + 1); ++h2) {
        const C* scores = row(b, t2, h2);
        const C lse =
            d_.choice == BlockChoice::kTokenAndHead ? C(0) : log_sum_exp(scores, d_.count);
        for (size_t n = 0; n < count; ++n) best[n] = std::max(best[n], scores[n] - lse);
      }
    }
    std::vector<int32_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    const auto better = [&](int32_t x, int32_t y) {
      const C a = best[static_cast<size_t>(x)], c = best[static_cast<size_t>(y)];
      return a > c || (a == c && x > y);
    };
    const auto end = order.begin() + d_.used;
    std::partial_sort(order.begin(), end, order.end(), better);
    std::sort(order.begin(), end);
    std::copy(order.begin(), end, d_.blocks + i * d_.used);
  }

  // Row i of (B, Tq, Hq).
  void attend(int64_t i) const {
    const int64_t b = i / (s_.Tq * s_.Hq), t = i / s_.Hq % s_.Tq, h = i % s_.Hq;
    const int64_t L = d_.block_size, read = d_.used + d_.always, kv = kv_head(h);
    std::vector<C> scores(static_cast<size_t>((read + 1) * L));
    std::vector<C> gates(static_cast<size_t>(read + 1));
    for (int64_t m = 0; m < read; ++m) {
      const int64_t block = chosen(b, t, h, m);
      const int64_t slot = m + (block >= d_.count - d_.used ? d_.moved : 0);
      const std::vector<C> query = query_at(b, t, h, place(t) - L * slot);
      C* own = &scores[static_cast<size_t>(m * L)];
      this->score(query, block_rows(d_.blocks_k, b, block, kv, s_.Dk), L, own);
      gates[static_cast<size_t>(m)] = own[L - 1];
    }
    const int64_t visible = std::min(d_.open_len + t + 1, L - 1);
    C* own = &scores[static_cast<size_t>(read * L)];
    this->score(query_at(b, t, h, d_.open_len + t), this->open_row(d_.open_k, b, kv, L, 0, s_.Dk),
                visible, own);
    gates.back() = log_sum_exp(own, visible);
    const C lse = log_sum_exp(gates.data(), read + 1);
    std::vector<C> out(static_cast<size_t>(s_.Dv));
    for (int64_t m = 0; m < read; ++m) {
      this->add(std::exp(gates[static_cast<size_t>(m)] - lse), &scores[static_cast<size_t>(m * L)],
                block_rows(d_.blocks_v, b, chosen(b, t, h, m), kv, s_.Dv), L - 1, out);
    }
    this->add(std::exp(gates.back() - lse), own, this->open_row(d_.open_v, b, kv, L, 0, s_.Dv),
              visible, out);
    base::store_row<C>(s_.dtype, out.data(), s_.Dv, C(1),
                       const_cast<char*>(at(d_.out, s_.dtype, b, t, h)));
    static_cast<C*>(d_.lse)[(b * s_.Hq + h) * s_.Tq + t] = lse;
  }

 private:
  int64_t kv_head(int64_t h) const { return h / (s_.Hq / s_.Hkv); }
  C* row(int64_t b, int64_t t, int64_t h) {
    return scores_.data() + ((b * s_.Tq + t) * s_.Hq + h) * d_.count;
  }
  int64_t place(int64_t t) const {
    return (d_.used + d_.moved + d_.always) * d_.block_size + d_.open_len + t;
  }
  int64_t chosen(int64_t b, int64_t t, int64_t h, int64_t m) const {
    if (m >= d_.used) return d_.count + m - d_.used;
    const int64_t token = d_.choice_tokens == 1 ? 0 : t, head = d_.choice_heads == 1 ? 0 : h;
    const int64_t i = (b * d_.choice_tokens + token) * d_.choice_heads + head;
    return d_.blocks[i * d_.used + m];
  }
  const char* block_rows(const TensorView& x, int64_t b, int64_t n, int64_t h, int64_t D) const {
    return static_cast<const char*>(x.data) +
           (b * x.stride_b + n * x.stride_t + h * d_.block_size * D) * size_;
  }
  std::vector<C> rotated(const void* x, int64_t place, C factor) const {
    const auto D = static_cast<size_t>(s_.Dk);
    std::vector<C> from(D), to(D);
    base::load_row<C>(s_.dtype, x, s_.Dk, s_.Dk, factor, from.data());
    if (d_.rope == nullptr) return from;
    const C* cos = static_cast<const C*>(d_.rope) + place * s_.Dk;
    const C* sin = cos + d_.rope_len * s_.Dk;
    for (size_t d = 0; d < D; ++d) {
      const C other = d < D / 2 ? -from[d + D / 2] : from[d - D / 2];
      to[d] = from[d] * cos[d] + other * sin[d];
    }
    return to;
  }
  std::vector<C> query_at(int64_t b, int64_t t, int64_t h, int64_t place) const {
    return rotated(at(d_.q, s_.dtype, b, t, h), place, static_cast<C>(d_.scale));
  }

  const LandmarkDecodeParams& d_;
  std::vector<C> scores_;  // (B, Tq, Hq, count)
};

template <class C>
class InfiniDecode : Rows<C> {
  using Rows<C>::s_, Rows<C>::size_;

 public:
  explicit InfiniDecode(const InfiniDecodeParams& p) : Rows<C>(p), d_(p) {}

  void join(int64_t i) const {
    const int64_t b = i / s_.Hkv, h = i % s_.Hkv;
    this->append(d_.k, d_.open_k, d_.segment_len, d_.open_len, s_.Dk, b, h);
    this->append(d_.k_mem, d_.open_k_mem, d_.segment_len, d_.open_len, s_.Dk, b, h);
    this->append(d_.v, d_.open_v, d_.segment_len, d_.open_len, s_.Dv, b, h);
  }

  void attend(int64_t i) const {
    const int64_t b = i / (s_.Tq * s_.Hq), t = i / s_.Hq % s_.Tq, h = i % s_.Hq;
    const int64_t kv = h / (s_.Hq / s_.Hkv), n = d_.open_len + t + 1;
    const auto Dk = static_cast<size_t>(s_.Dk), Dv = static_cast<size_t>(s_.Dv);
    std::vector<C> query(Dk), scores(static_cast<size_t>(n)), out(Dv);
    base::load_row<C>(s_.dtype, at(d_.q, s_.dtype, b, t, h), s_.Dk, s_.Dk, static_cast<C>(d_.scale),
                      query.data());
    this->score(query, this->open_row(d_.open_k, b, kv, d_.segment_len, 0, s_.Dk), n,
                scores.data());
    const C logit = d_.gate == nullptr ? C(0) : static_cast<const C*>(d_.gate)[h];
    const C g = C(1) / (C(1) + std::exp(-logit));
    const C local = d_.M == nullptr && d_.bypass ? C(1) : C(1) - g;
    this->add(local, scores.data(), this->open_row(d_.open_v, b, kv, d_.segment_len, 0, s_.Dv), n,
              out);
    if (d_.M != nullptr) retrieve(g, b, t, h, kv, out);
    base::store_row<C>(s_.dtype, out.data(), s_.Dv, C(1),
                       const_cast<char*>(at(d_.out, s_.dtype, b, t, h)));
    static_cast<C*>(d_.lse)[(b * s_.Hq + h) * s_.Tq + t] = log_sum_exp(scores.data(), n);
  }

 private:
  // out += g phi(q_mem) M / max(phi(q_mem) z, 1e-6)
  void retrieve(C g, int64_t b, int64_t t, int64_t h, int64_t kv, std::vector<C>& out) const {
    const auto Dk = static_cast<size_t>(s_.Dk), Dv = static_cast<size_t>(s_.Dv);
    std::vector<C> phi(Dk), held(Dv);
    base::load_row<C>(s_.dtype, at(d_.q_mem, s_.dtype, b, t, h), s_.Dk, s_.Dk, C(1), phi.data());
    const size_t state = static_cast<size_t>(b * s_.Hkv + kv);
    const C *M = static_cast<const C*>(d_.M) + state * Dk * Dv, *z = static_cast<const C*>(d_.z);
    C norm = 0;
    for (size_t d = 0; d < Dk; ++d) {
      phi[d] = phi[d] > 0 ? phi[d] + 1 : std::exp(phi[d]);
      norm += phi[d] * z[state * Dk + d];
      for (size_t e = 0; e < Dv; ++e) held[e] += phi[d] * M[d * Dv + e];
    }
    for (size_t e = 0; e < Dv; ++e) out[e] += g * held[e] / std::max(norm, C(1e-6));
  }

  const InfiniDecodeParams& d_;
};

template <class C>
void run(const LandmarkDecodeParams& p, const ThreadPool& pool) {
  const AttnShape& s = p.shape;
  LandmarkDecode<C> decode(p);
  parallel(pool, s.B * s.Hkv, [&](int64_t i) { decode.join(i); });
  if (p.used > 0) {
    parallel(pool, s.B * s.Tq * s.Hq, [&](int64_t i) { decode.score_landmarks(i); });
    parallel(pool, s.B * p.choice_tokens * p.choice_heads, [&](int64_t i) { decode.choose(i); });
  }
  parallel(pool, s.B * s.Tq * s.Hq, [&](int64_t i) { decode.attend(i); });
}

template <class C>
void run(const InfiniDecodeParams& p, const ThreadPool& pool) {
  const InfiniDecode<C> decode(p);
  parallel(pool, p.shape.B * p.shape.Hkv, [&](int64_t i) { decode.join(i); });
  parallel(pool, p.shape.B * p.shape.Tq * p.shape.Hq, [&](int64_t i) { decode.attend(i); });
}

}  // namespace

void landmark_decode(const LandmarkDecodeParams& params, const ThreadPool& pool) {
  params.shape.dtype == DType::kFloat64 ? run<double>(params, pool) : run<float>(params, pool);
}

void infini_decode(const InfiniDecodeParams& params, const ThreadPool& pool) {
  params.shape.dtype == DType::kFloat64 ? run<double>(params, pool) : run<float>(params, pool);
}

}  // namespace lctx::cpu
