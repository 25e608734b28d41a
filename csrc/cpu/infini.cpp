// Infini-attention (arXiv 2404.07143): dense causal attention inside every segment, gated with what
// the compressive memory of all earlier segments returns. All segments run at once; they only meet
// in a scan over D x D states:
//   gains and z of every segment -> prefix of z -> (delta) decays T -> scan of M -> local
//   attention, retrieval, gate.
// Backward runs the same scan in reverse, on gradients. memory_kernels{,_bwd}.h hold the formulas.
#include "attn_driver.h"
#include "stat_tensors.h"

namespace lctx::cpu {
namespace {

// Sizes and addresses of everything that exists once per (batch, key/value head, segment).
struct Segments {
  const InfiniParams& params;
  const AttnShape& s;
  const MemoryKernels& kernel;
  MemoryLaunch launch;
  int64_t S, chains, stat_bytes;  // chains: (batch, key/value head) pairs

  explicit Segments(const InfiniParams& p)
      : params(p),
        s(p.shape),
        kernel(kernels(p.shape.dtype).memory),
        stat_bytes(dtype_size(stat_dtype(p.shape.dtype))) {
    launch.dtype = s.dtype;
    launch.Dk = s.Dk;
    launch.Dv = s.Dv;
    launch.delta = p.update == InfiniUpdate::kDelta;
    launch.first_bypass = p.first_bypass;
    S = (s.Tq + p.segment_len - 1) / p.segment_len;
    chains = s.B * s.Hkv;
  }

  int64_t G() const { return s.Hq / s.Hkv; }
  int64_t begin(int64_t seg) const { return seg * params.segment_len; }
  int64_t length(int64_t seg) const { return std::min(params.segment_len, s.Tq - begin(seg)); }
  bool empty(int64_t seg) const { return seg == 0 && !params.has_mem; }
  // The state after `done` segments is cut off from the gradient of what follows.
  bool detached(int64_t done) const {
    return done > 0 && params.detach_every > 0 && done % params.detach_every == 0;
  }

  // Piece `index` of an array of pieces of `elements` stat values.
  char* piece(const void* base, int64_t index, int64_t elements) const {
    return static_cast<char*>(const_cast<void*>(base)) + index * elements * stat_bytes;
  }
  char* M(int64_t chain, int64_t seg) const {
    return seg < S ? piece(params.M_states, chain * S + seg, s.Dk * s.Dv)
                   : piece(params.M_out, chain, s.Dk * s.Dv);
  }
  char* z(int64_t chain, int64_t seg) const {
    return seg < S ? piece(params.z_states, chain * S + seg, s.Dk)
                   : piece(params.z_out, chain, s.Dk);
  }

  Rows segment_rows(const TensorView& x, int64_t chain, int64_t seg, int64_t heads,
                    DType dtype) const {
    if (x.data == nullptr) return {};
    TensorView at = x;
    at.data = static_cast<char*>(x.data) + begin(seg) * x.stride_t * dtype_size(dtype);
    return rows_of(at, dtype, chain / s.Hkv, chain % s.Hkv * heads);
  }

  MemoryProblem problem(int64_t chain, int64_t seg) const {
    MemoryProblem p;
    p.N = length(seg);
    p.G = G();
    p.empty = empty(seg);
    p.q_mem = segment_rows(params.q_mem.data != nullptr ? params.q_mem : params.q, chain, seg, G(),
                           s.dtype);
    p.k_mem = segment_rows(params.k_mem.data != nullptr ? params.k_mem : params.k, chain, seg, 1,
                           s.dtype);
    p.v = segment_rows(params.v, chain, seg, 1, s.dtype);
    p.out = segment_rows(params.out, chain, seg, G(), s.dtype);
    p.out_local = segment_rows(params.out_local, chain, seg, G(), s.dtype);
    p.gate = params.gate != nullptr ? piece(params.gate, chain % s.Hkv * G(), 1) : nullptr;
    p.M = M(chain, seg);
    p.z = z(chain, seg);
    p.gain_M = M(chain, seg + 1);
    p.gain_z = z(chain, seg + 1);
    return p;
  }

  template <class Body>
  void for_each(const ThreadPool& pool, const Body& body) const {
    parallel_tasks(pool, chains * S, kernel.scratch(launch),
                   [&](int64_t i, char* scratch) { body(i / S, i % S, scratch); });
  }

  // The z recurrence is the M recurrence of a 1 x Dk state without decay.
  MemoryLaunch z_launch() const {
    MemoryLaunch z = launch;
    z.Dk = 1;
    z.Dv = s.Dk;
    return z;
  }

  // Runs body(chain, first column, end column) over slices of Dv: the recurrence is independent per
  // value column.
  template <class Body>
  void for_each_slice(const ThreadPool& pool, const Body& body) const {
    constexpr int64_t kColumns = 64;
    const int64_t slices = (s.Dv + kColumns - 1) / kColumns;
    parallel_tasks(pool, chains * slices, kernel.scratch(launch), [&](int64_t i, char* scratch) {
      const int64_t c0 = i % slices * kColumns;
      body(i / slices, c0, std::min(c0 + kColumns, s.Dv), scratch);
    });
  }

  // T of every segment, (chains, S, Dk, Dk); empty for the linear rule.
  Buffer decays(const ThreadPool& pool) const {
    if (!launch.delta) return Buffer();
    Buffer all(chains * S * s.Dk * s.Dk * stat_bytes);
    for_each(pool, [&](int64_t chain, int64_t seg, char* scratch) {
      MemoryProblem p = problem(chain, seg);
      p.decay = piece(all.get(), chain * S + seg, s.Dk * s.Dk);
      kernel.decay(launch, p, scratch);
    });
    return all;
  }
  const void* decay_of(const Buffer& all, int64_t chain, int64_t seg) const {
    return launch.delta ? piece(all.get(), chain * S + seg, s.Dk * s.Dk) : nullptr;
  }

  // Local attention: every segment a causal problem of its own.
  std::vector<Problem> local_problems(const AttnLaunch& attn, const AttnParams& local,
                                      const AttnGrads* grads, const void* delta) const {
    std::vector<Problem> problems;
    for (int64_t chain = 0; chain < chains; ++chain) {
      const int64_t h = chain % s.Hkv * G();
      const Problem whole = make_problem(local, attn, chain / s.Hkv, h, G(), grads, delta);
      for (int64_t seg = 0; seg < S; ++seg)
        problems.push_back(slice_problem(whole, attn, begin(seg), length(seg)));
    }
    return problems;
  }
};

// 1 - sigmoid(gate) of every head, then ones: what the local part's gradient is multiplied by.
template <class C>
void local_weights(const InfiniParams& params, C* weights) {
  for (int64_t h = 0; h < params.shape.Hq; ++h) {
    const double logit = params.gate != nullptr ? static_cast<const C*>(params.gate)[h] : 0.0;
    weights[h] = static_cast<C>(1.0 / (1.0 + __builtin_exp(logit)));
    weights[params.shape.Hq + h] = C(1);
  }
}

// Adds every segment's share, in a fixed order.
template <class C>
void reduce_dgate(const Segments& seg, const C* shares, C* dgate) {
  const int64_t G = seg.G();
  for (int64_t chain = 0; chain < seg.chains; ++chain) {
    for (int64_t i = 0; i < seg.S; ++i) {
      for (int64_t g = 0; g < G; ++g)
        dgate[chain % seg.s.Hkv * G + g] += shares[(chain * seg.S + i) * G + g];
    }
  }
}

// Everything the backward keeps per segment, all stat.
struct InfiniBackward {
  const Segments& seg;
  const InfiniParams& params;
  const InfiniGrads& grads;
  const ThreadPool& pool;
  const AttnShape& s = seg.s;
  const int64_t matrix = s.Dk * s.Dv;
  Buffer delta{s.B * s.Hq * s.Tq * seg.stat_bytes};
  Buffer ret_M{seg.chains * seg.S * matrix * seg.stat_bytes},
      ret_z{seg.chains * seg.S * s.Dk * seg.stat_bytes};
  Buffer dM{seg.chains * seg.S * matrix * seg.stat_bytes},
      dz{seg.chains * seg.S * s.Dk * seg.stat_bytes};
  Buffer write_z{seg.chains * seg.S * s.Dk * seg.stat_bytes};
  Buffer dgate{seg.chains * seg.S * seg.G() * seg.stat_bytes};
  Buffer unused{seg.chains * matrix *
                seg.stat_bytes};  // takes the gradient of a memory that was not given

  MemoryProblem problem(int64_t chain, int64_t i, const TensorView& dq, const TensorView& dk,
                        const TensorView& dv, const MemoryLaunch& launch) const {
    const DType stat = stat_dtype(s.dtype);
    MemoryProblem p = seg.problem(chain, i);
    const int64_t at = chain * seg.S + i;
    p.dout = seg.segment_rows(grads.dout, chain, i, seg.G(), s.dtype);
    p.delta = stat_rows(delta.get(), s.dtype, s.Hq, s.Tq, chain / s.Hkv, chain % s.Hkv * seg.G());
    p.delta.data = static_cast<char*>(p.delta.data) + seg.begin(i) * seg.stat_bytes;
    p.dq_mem = launch.add_dq ? seg.segment_rows(dq, chain, i, seg.G(), stat)
                             : seg.segment_rows(grads.dq_mem, chain, i, seg.G(), s.dtype);
    p.dk_mem = launch.add_dk ? seg.segment_rows(dk, chain, i, 1, stat)
                             : seg.segment_rows(grads.dk_mem, chain, i, 1, s.dtype);
    p.dv = seg.segment_rows(dv, chain, i, 1, stat);
    p.ret_M = seg.piece(ret_M.get(), at, matrix);
    p.ret_z = seg.piece(ret_z.get(), at, s.Dk);
    p.dM = seg.piece(dM.get(), at, matrix);
    p.dz = seg.piece(dz.get(), at, s.Dk);
    p.write_z = seg.piece(write_z.get(), at, s.Dk);
    p.dgate = seg.piece(dgate.get(), at, seg.G());
    return p;
  }

  // Fills piece S - 1 of every chain of `all` with the gradient of the returned state, or zero.
  void seed(const Buffer& all, const void* dout_state, int64_t elements) const {
    for (int64_t chain = 0; chain < seg.chains; ++chain) {
      char* last = seg.piece(all.get(), chain * seg.S + seg.S - 1, elements);
      const size_t bytes = static_cast<size_t>(elements * seg.stat_bytes);
      if (dout_state == nullptr || seg.detached(seg.S)) {
        std::memset(last, 0, bytes);
      } else {
        std::memcpy(last, seg.piece(dout_state, chain, elements), bytes);
      }
    }
  }

  // Gradient of the state segment i reads, from that of the state it leaves (piece i) and what
  // retrieval added.
  void reverse_scan(const MemoryLaunch& launch, const Buffer& all, const Buffer& gain, void* d_in,
                    int64_t elements, const Buffer* decays, int64_t chain, int64_t c0, int64_t c1,
                    char* scratch) const {
    for (int64_t i = seg.S - 1; i >= 0; --i) {
      const int64_t at = chain * seg.S + i;
      void* first = seg.piece(d_in != nullptr ? d_in : unused.get(), chain, elements);
      void* next = i > 0 ? seg.piece(all.get(), at - 1, elements) : first;
      const void* T = decays != nullptr ? seg.decay_of(*decays, chain, i) : nullptr;
      seg.kernel.step(launch, seg.piece(all.get(), at, elements), T,
                      seg.piece(gain.get(), at, elements), next, c0, c1, scratch);
      if (!seg.detached(i)) continue;
      for (int64_t row = 0; row < launch.Dk; ++row) {
        std::memset(static_cast<char*>(next) + (row * launch.Dv + c0) * seg.stat_bytes, 0,
                    static_cast<size_t>((c1 - c0) * seg.stat_bytes));
      }
    }
  }
};

void add_into(const Buffer& sum, const Buffer& x, int64_t count, DType dtype) {
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == DType::kFloat64) {
      reinterpret_cast<double*>(sum.get())[i] += reinterpret_cast<double*>(x.get())[i];
    } else {
      reinterpret_cast<float*>(sum.get())[i] += reinterpret_cast<float*>(x.get())[i];
    }
  }
}

// Gradients of the states: retrieval everywhere, then the reverse scans of dM and, with what dM
// adds to it, dz.
void memory_state_grads(const InfiniBackward& bwd, const Segments& seg, const MemoryLaunch& launch,
                        const TensorView& dq, const TensorView& dk, const TensorView& dv,
                        const ThreadPool& pool) {
  const AttnShape& s = seg.s;
  const InfiniGrads& grads = bwd.grads;
  const Buffer decays = seg.decays(pool);
  seg.for_each(pool, [&](int64_t chain, int64_t i, char* scratch) {
    seg.kernel.retrieve_bwd(launch, bwd.problem(chain, i, dq, dk, dv, launch), scratch);
  });
  bwd.seed(bwd.dM, grads.dM_out, bwd.matrix);
  seg.for_each_slice(pool, [&](int64_t chain, int64_t c0, int64_t c1, char* scratch) {
    bwd.reverse_scan(launch, bwd.dM, bwd.ret_M, grads.dM_in, bwd.matrix, &decays, chain, c0, c1,
                     scratch);
  });
  if (launch.delta) {
    seg.for_each(pool, [&](int64_t chain, int64_t i, char* scratch) {
      seg.kernel.write_z_bwd(launch, bwd.problem(chain, i, dq, dk, dv, launch), scratch);
    });
    add_into(bwd.ret_z, bwd.write_z, seg.chains * seg.S * s.Dk, s.dtype);
  }
  bwd.seed(bwd.dz, grads.dz_out, s.Dk);
  const MemoryLaunch z_launch = seg.z_launch();
  parallel_tasks(pool, seg.chains, seg.kernel.scratch(z_launch), [&](int64_t chain, char* scratch) {
    bwd.reverse_scan(z_launch, bwd.dz, bwd.ret_z, grads.dz_in, s.Dk, nullptr, chain, 0, s.Dk,
                     scratch);
  });
}

}  // namespace

void infini_fwd(const InfiniParams& params, const ThreadPool& pool) {
  const Segments seg(params);
  if (seg.chains * seg.S == 0) return;
  seg.for_each(pool, [&](int64_t chain, int64_t i, char* scratch) {
    seg.kernel.gain(seg.launch, seg.problem(chain, i), scratch);
  });
  const MemoryLaunch z_launch = seg.z_launch();
  parallel_tasks(pool, seg.chains, seg.kernel.scratch(z_launch), [&](int64_t chain, char* scratch) {
    for (int64_t i = 0; i < seg.S; ++i) {
      char* next = seg.z(chain, i + 1);
      seg.kernel.step(z_launch, seg.z(chain, i), nullptr, next, next, 0, seg.s.Dk, scratch);
    }
  });
  const Buffer decays = seg.decays(pool);
  seg.for_each_slice(pool, [&](int64_t chain, int64_t c0, int64_t c1, char* scratch) {
    for (int64_t i = 0; i < seg.S; ++i) {
      char* next = seg.M(chain, i + 1);
      seg.kernel.step(seg.launch, seg.M(chain, i), seg.decay_of(decays, chain, i), next, next, c0,
                      c1, scratch);
    }
  });
  AttnParams local = params;
  local.out = params.out_local;
  const AttnLaunch attn = make_launch(local);
  run_forward(attn, seg.local_problems(attn, local, nullptr, nullptr), pool);
  seg.for_each(pool, [&](int64_t chain, int64_t i, char* scratch) {
    seg.kernel.retrieve(seg.launch, seg.problem(chain, i), scratch);
  });
}

void infini_bwd(const InfiniParams& params, const InfiniGrads& grads, const ThreadPool& pool) {
  const Segments seg(params);
  if (grads.dgate != nullptr) {  // stays 0 where there is nothing to sum over
    std::memset(grads.dgate, 0, static_cast<size_t>(params.shape.Hq * seg.stat_bytes));
  }
  if (seg.chains * seg.S == 0) return;
  const AttnShape& s = params.shape;
  const Accumulator dq(s, grads.dq, s.Tq, s.Hq, s.Dk, pool);
  const Accumulator dk(s, grads.dk, s.Tk, s.Hkv, s.Dk, pool);
  const Accumulator dv(s, grads.dv, s.Tk, s.Hkv, s.Dv, pool);
  const InfiniBackward bwd{seg, params, grads, pool};
  MemoryLaunch launch = seg.launch;
  launch.add_dq = params.q_mem.data == nullptr;
  launch.add_dk = params.k_mem.data == nullptr;

  memory_state_grads(bwd, seg, launch, dq.view(), dk.view(), dv.view(), pool);
  seg.for_each(pool, [&](int64_t chain, int64_t i, char* scratch) {
    seg.kernel.write_bwd(launch, bwd.problem(chain, i, dq.view(), dk.view(), dv.view(), launch),
                         scratch);
  });

  const bool wide = s.dtype == DType::kFloat64;
  const Buffer weights(2 * s.Hq * seg.stat_bytes);
  wide ? local_weights(params, reinterpret_cast<double*>(weights.get()))
       : local_weights(params, reinterpret_cast<float*>(weights.get()));
  AttnGrads sums = grads;
  sums.dq = dq.view();
  sums.dk = dk.view();
  sums.dv = dv.view();
  AttnParams local = params;
  local.out = params.out_local;
  AttnLaunch attn = make_launch(local);
  attn.out_dtype = stat_dtype(s.dtype);
  attn.write = Write::kAdd;
  std::vector<Problem> problems = seg.local_problems(attn, local, &sums, bwd.delta.get());
  for (size_t j = 0; j < problems.size(); ++j) {
    const int64_t chain = static_cast<int64_t>(j) / seg.S, i = static_cast<int64_t>(j) % seg.S;
    const bool bypass = params.first_bypass && seg.empty(i);
    problems[j].dout_factor =
        seg.piece(weights.get(), (bypass ? s.Hq : 0) + chain % s.Hkv * seg.G(), 1);
  }
  run_backward(attn, problems, pool);
  if (grads.dgate != nullptr) {
    wide ? reduce_dgate(seg, reinterpret_cast<double*>(bwd.dgate.get()),
                        static_cast<double*>(grads.dgate))
         : reduce_dgate(seg, reinterpret_cast<float*>(bwd.dgate.get()),
                        static_cast<float*>(grads.dgate));
  }
  dq.finish(pool);
  dk.finish(pool);
  dv.finish(pool);
}

}  // namespace lctx::cpu
