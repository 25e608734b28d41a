"""What the processes of `test_random_calls` do: ring_attention, drawn at random, bit for bit.

Several calls are under way at once, in two groups and on several streams, their inputs lie anywhere
in memory that holds NaN, and are overwritten after a forward without a backward, only some
gradients are asked for, and backwards come in another order.
"""

import itertools
import random
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from cp_gpu_workers import WAYS, differences_of, take_gpu, take_own_keys
from cp_plans import LAYOUTS, int32

import lctx_kernels as lk
from lctx_kernels import cp

LENGTHS = (0, 1, 2, 65, 129, 300, 513, 1000, 1025, 2048, 3001, 4100)
DTYPES = (torch.bfloat16, torch.float16)
RESULTS, GRADIENTS = ("out", "lse"), ("dq", "dk", "dv")
STREAMS = 3  # the first is the current one


class Case(NamedTuple):
    """A call, the same one on every rank."""

    plan: cp.Plan
    tensors: list[torch.Tensor]
    options: dict[str, Any]
    leaves: tuple[bool, ...]  # which of q, k, v want a gradient
    outputs: tuple[str, ...]  # which of out and lse have one
    places: tuple[int, ...]  # how q, k, v and dout lie in memory
    group: int
    stream: int


def draw_plan(r, n):
    T = r.choice((*LENGTHS, r.randint(1, 5000)))
    cuts = sorted(r.randint(0, T) for _ in range(r.randint(0, 6)))
    documents = int32([0, *cuts, T]) if cuts else None
    layout = r.choice((*LAYOUTS, "pieces"))
    if layout in LAYOUTS:
        return cp.make_plan(T, n, layout=layout, cu_seqlens=documents)
    cuts = sorted([0, T, *(r.randint(0, T) for _ in range(9))])
    pieces = [torch.arange(a, b) for a, b in itertools.pairwise(cuts)]
    r.shuffle(pieces)
    ends = sorted(r.randint(0, T) for _ in range(n - 1))  # ranks may be empty
    positions = torch.cat(pieces).tensor_split(ends)
    return cp.make_plan(T, n, positions=positions, cu_seqlens=documents)


def draw(r, n, seed):
    plan = draw_plan(r, n)
    B, D, dtype = r.choice((1, 1, 2, 3)), r.choice((64, 128, 256)), r.choice(DTYPES)
    Hkv, G = r.choice((1, 2, 3, 4, 8)), r.choice((1, 1, 2, 3, 4))
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors = [
        torch.randn(B, plan.seq_len, heads, D, generator=generator, device="cuda").to(dtype)
        for heads in (Hkv * G, Hkv, Hkv, Hkv * G)
    ]
    leaves = tuple(r.random() < 0.8 for _ in range(3)) if r.random() < 0.8 else (False,) * 3
    return Case(
        plan,
        tensors,
        {
            "causal": r.random() < 0.75,
            "window": r.choice((None, None, None, 1, 33, 300, 1000, plan.seq_len + 5)),
            "scale": r.choice((None, None, 0.3)),
            "deterministic": r.random() < 0.7,
        },
        leaves,
        r.choice((RESULTS, RESULTS[:1], RESULTS[1:])) if any(leaves[:2]) else RESULTS[:1],
        tuple(r.randrange(5) for _ in range(4)),
        r.randrange(2),
        r.randrange(STREAMS),
    )


def put(x, place):
    """A copy of (B, L, H, D) with other strides; what lies around it is NaN."""
    B, L, H, D = x.shape
    if place == 0:
        return x.clone()
    if place == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    sizes, at = {
        2: ((B, L, H, 2 * D), (0, 0, 0)),
        3: ((B + 1, L + 3, H + 2, D), (1, 2, 1)),
        4: ((B, L + 5, H, D), (0, 0, 0)),
    }[place]
    around = x.new_full(sizes, torch.nan)
    inside = around[at[0] :, at[1] :, at[2] :][:B, :L, :H, :D]
    return inside.copy_(x)


def begin(case, rank, places, **more):
    """The forward; what the backward needs."""
    parts = [
        put(cp.shard(case.plan, x, 1, rank), place).detach()
        for x, place in zip(case.tensors, places, strict=True)
    ]
    leaves = [x.requires_grad_(wanted) for x, wanted in zip(parts, case.leaves, strict=False)]
    found = lk.ring_attention(*leaves, plan=case.plan, return_lse=True, **case.options, **more)
    if not any(case.leaves):
        for x in leaves:
            x.fill_(torch.nan)  # keys may leave from where they were; the stream waits for that
    return leaves, dict(zip(RESULTS, found, strict=True)), parts[3]


def end(case, begun):
    """Every result by its name, with the gradients that were asked for."""
    leaves, found, dout = begun
    given = {"out": dout, "lse": torch.full_like(found["lse"], 0.5)}
    outputs = [found[name] for name in case.outputs]
    results = {name: x.detach() for name, x in found.items()}
    names = [name for name, wanted in zip(GRADIENTS, case.leaves, strict=True) if wanted]
    if names:
        of_outputs = [given[name] for name in case.outputs]
        wanted = [x for x in leaves if x.requires_grad]
        grads = torch.autograd.grad(outputs, wanted, of_outputs, materialize_grads=True)
        results.update(zip(names, grads, strict=True))
    return results


def random_calls(rank, n, transport, rounds):
    """Hops made, when every result of `rounds` rounds of one to four calls is the simulation's."""
    take_gpu(rank)
    groups = [dist.new_group(backend="nccl") for _ in range(2)]
    beside = [torch.cuda.Stream() for _ in range(STREAMS - 1)]
    wrong = []
    for seed in range(rounds):
        r = random.Random(seed)
        take_own_keys(r.choice(WAYS))
        cases = [draw(r, n, seed) for _ in range(r.choice((1, 1, 2, 4)))]
        streams = [torch.cuda.current_stream(), *beside]
        begun, mine = [], {}
        for case in cases:
            streams[case.stream].wait_stream(streams[0])
            with torch.cuda.stream(streams[case.stream]):
                own = {"group": groups[case.group], "transport": transport, "timeout": 60.0}
                begun.append(begin(case, rank, case.places, **own))
        for i in r.sample(range(len(cases)), len(cases)):
            with torch.cuda.stream(streams[cases[i].stream]):
                mine[i] = end(cases[i], begun[i])
        torch.cuda.synchronize()
        for i, case in enumerate(cases):
            every = end(case, begin(case, None, (0,) * 4, transport="sim"))
            found = differences_of(case.plan, rank, mine[i], every, case.options["deterministic"])
            shapes = [tuple(x.shape) for x in case.tensors[:2]]
            wrong += [f"{seed} {i} {text}: {shapes} {case._replace(tensors=[])}" for text in found]
    assert not wrong, "\n".join(wrong[:5])
    return sum(len(cp.hop_log(group)) for group in groups)
