"""The four methods as loops over rows, keys and blocks in Python floats: no tensors, no masks.

Inputs are fp64 tensors in the layout of the package; outputs are tensors again. Written from the
papers and independent of `lctx_kernels.reference`, which it checks at tiny sizes.
"""

import math

import torch


def _dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def softmax_row(scored_values, width):
    """Softmax-weighted mean of [(score, value)] and the log of the denominator."""
    if not scored_values:
        return [0.0] * width, -math.inf
    top = max(score for score, _ in scored_values)
    weights = [math.exp(score - top) for score, _ in scored_values]
    total = sum(weights)
    mean = [0.0] * width
    for weight, (_, value) in zip(weights, scored_values, strict=True):
        mean = [m + weight / total * x for m, x in zip(mean, value, strict=True)]
    return mean, top + math.log(total)


def _rows(q, k, v, scale, row):
    """Fill (out, lse) with row(score, value, b, h, i, position of i) for every query row."""
    (B, Tq, Hq, Dk), (Tk, Hkv, Dv) = q.shape, v.shape[1:]
    scale = Dk**-0.5 if scale is None else scale
    ql, kl, vl = q.tolist(), k.tolist(), v.tolist()
    out, lse = q.new_zeros(B, Tq, Hq, Dv), q.new_zeros(B, Hq, Tq)
    for b in range(B):
        for h in range(Hq):
            kv = h // (Hq // Hkv)
            for i in range(Tq):

                def score(j, b=b, h=h, i=i, kv=kv):
                    return scale * _dot(ql[b][i][h], kl[b][j][kv])

                def value(j, b=b, kv=kv):
                    return vl[b][j][kv]

                mean, log_total = row(score, value, b, h, i, Tk - Tq + i)
                out[b, i, h], lse[b, h, i] = torch.tensor(mean, dtype=q.dtype), log_total
    return out, lse


def flash(q, k, v, *, causal=True, scale=None, window=None, cu_seqlens=None):
    Tk, Dv = v.shape[1], v.shape[3]
    starts = [0, Tk] if cu_seqlens is None else cu_seqlens.tolist()

    def document(j):
        return next(n for n in range(len(starts) - 1) if starts[n] <= j < starts[n + 1])

    def row(score, value, b, h, i, position):
        keys = []
        for j in range(Tk):
            if causal and j > position:
                continue
            if window is not None and not position - window < j < position + window:
                continue
            if cu_seqlens is not None and document(j) != document(position):
                continue
            keys.append((score(j), value(j)))
        return softmax_row(keys, Dv)

    return _rows(q, k, v, scale, row)


def landmark(q, k, v, *, block_size=None, is_landmark=None, scale=None):
    (B, Tk), Dv = k.shape[:2], v.shape[3]
    if block_size is not None:
        flags = [[j % block_size == block_size - 1 for j in range(Tk)] for _ in range(B)]
    else:
        flags = is_landmark.tolist()

    def row(score, value, b, h, i, position):
        closed, own = [], []  # closed: (ordinary keys, landmark) of earlier blocks
        for j in range(position + 1):
            if not flags[b][j]:
                own.append(j)
            elif j < position:
                closed.append((own, j))
                own = []
        main = [(score(j), value(j)) for j in own]
        for tokens, gate in closed:
            if tokens:
                mean, _ = softmax_row([(score(j), value(j)) for j in tokens], Dv)
                main.append((score(gate), mean))
        return softmax_row(main, Dv)

    return _rows(q, k, v, scale, row)


def dilated(q, k, v, segment_lengths, dilation_rates, *, causal=True, scale=None, head_offset="mod",
            seqlens=None):  # fmt: skip
    B, T, Hq, Dv = *q.shape[:3], v.shape[3]
    lengths = [T] * B if seqlens is None else seqlens.tolist()

    def row(score, value, b, h, i, position):
        keys = []
        for w, r in zip(segment_lengths, dilation_rates, strict=True):
            heads_per_offset = math.ceil(Hq / r)
            offset = h % r if head_offset == "mod" else h // heads_per_offset
            start = position // w * w
            end = min(start + w, T)
            selected = [j for j in range(start + offset, end, r) if j < lengths[b]]
            if position in selected:
                keys += [j for j in selected if j <= position or not causal]
        return softmax_row([(score(j), value(j)) for j in keys], Dv)

    return _rows(q, k, v, scale, row)


def ring(qs, ks, vs, positions, *, causal=True, scale=None, window=None):
    """Sort the tokens of all ranks by position and attend densely."""
    everywhere = torch.cat(positions)
    order = everywhere.argsort()
    assert everywhere[order].tolist() == list(range(len(order))), "positions must be a permutation"
    q, k, v = (torch.cat(list(x), dim=1)[:, order] for x in (qs, ks, vs))
    out, lse = flash(q, k, v, causal=causal, scale=scale, window=window)
    return [out[:, p] for p in positions], [lse[:, :, p] for p in positions]


def merge(out_a, lse_a, out_b, lse_b):
    out, lse = torch.zeros_like(out_a), torch.zeros_like(lse_a)
    B, T, H, D = out_a.shape
    for b in range(B):
        for t in range(T):
            for h in range(H):
                parts = [(lse_a[b, h, t].item(), out_a[b, t, h].tolist()),
                         (lse_b[b, h, t].item(), out_b[b, t, h].tolist())]  # fmt: skip
                parts = [part for part in parts if part[0] != -math.inf]
                mean, log_total = softmax_row(parts, D)
                out[b, t, h], lse[b, h, t] = torch.tensor(mean, dtype=out.dtype), log_total
    return out, lse


def _phi(x):
    return [y + 1 if y > 0 else math.exp(y) for y in x]


class Memory:
    """One head's M (Dk x Dv) and z (Dk) as nested lists."""

    def __init__(self, Dk, Dv, state=None):
        self.M = [[0.0] * Dv for _ in range(Dk)] if state is None else state[0].tolist()
        self.z = [0.0] * Dk if state is None else state[1].tolist()

    def retrieve(self, p):
        norm = max(_dot(p, self.z), 1e-6)
        return [_dot(p, column) / norm for column in zip(*self.M, strict=True)]

    def write(self, r, value):
        for d, x in enumerate(r):
            self.M[d] = [m + x * y for m, y in zip(self.M[d], value, strict=True)]
            self.z[d] += x


def infini(q, k, v, mem=None, *, gate=None, q_mem=None, k_mem=None, segment_len=2048,
           update="linear", first="gate", scale=None):  # fmt: skip
    (B, T, Hq, Dk), (Hkv, Dv) = q.shape, v.shape[2:]
    q_mem, k_mem = (q if q_mem is None else q_mem), (k if k_mem is None else k_mem)
    scale = Dk**-0.5 if scale is None else scale
    gate = [0.0] * Hq if gate is None else gate.tolist()
    out = q.new_zeros(B, T, Hq, Dv)
    M, z = q.new_zeros(B, Hkv, Dk, Dv), q.new_zeros(B, Hkv, Dk)
    for b in range(B):
        for kv in range(Hkv):
            state = None if mem is None else (mem[0][b, kv], mem[1][b, kv])
            memory = Memory(Dk, Dv, state)
            K, V, Km = k[b, :, kv].tolist(), v[b, :, kv].tolist(), k_mem[b, :, kv].tolist()
            for start in range(0, T, segment_len):
                segment = range(start, min(start + segment_len, T))
                for h in range(kv * (Hq // Hkv), (kv + 1) * (Hq // Hkv)):
                    g = 1 / (1 + math.exp(-gate[h]))
                    if start == 0 and mem is None and first == "bypass":
                        g = 0.0
                    for i in segment:
                        query = q[b, i, h].tolist()
                        keys = range(start, i + 1)
                        scored = [(scale * _dot(query, K[j]), V[j]) for j in keys]
                        local, _ = softmax_row(scored, Dv)
                        found = memory.retrieve(_phi(q_mem[b, i, h].tolist()))
                        row = [g * x + (1 - g) * y for x, y in zip(found, local, strict=True)]
                        out[b, i, h] = torch.tensor(row, dtype=q.dtype)
                writes = []
                for j in segment:
                    known = memory.retrieve(_phi(Km[j])) if update == "delta" else [0.0] * Dv
                    writes.append([x - y for x, y in zip(V[j], known, strict=True)])
                for j, value in zip(segment, writes, strict=True):
                    memory.write(_phi(Km[j]), value)
            M[b, kv] = torch.tensor(memory.M, dtype=q.dtype)
            z[b, kv] = torch.tensor(memory.z, dtype=q.dtype)
    return out, (M, z)
