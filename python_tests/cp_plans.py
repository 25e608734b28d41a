"""Plans for the tests of python_tests/cp, and what they must be."""

import itertools

import torch
from helpers import random_tensor
from hypothesis import strategies as st

from lctx_kernels import cp

LAYOUTS = ("zigzag", "striped", "contiguous")


def tensors(T, *, B=1, Hkv=2, G=2, Dk=6, Dv=5, dtype=torch.float64, seed=0):
    shapes = ((B, T, Hkv * G, Dk), (B, T, Hkv, Dk), (B, T, Hkv, Dv))
    return {
        name: random_tensor(*s, dtype=dtype, seed=seed + i)
        for i, (name, s) in enumerate(zip("qkv", shapes, strict=True))
    }


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def positions_of(plan):
    """Per rank the list of its positions."""
    return [[p for r in ranges for p in r] for ranges in plan.ranges]


def visible(plan, causal, window):
    """(seq_len, seq_len) bool: the mask over positions, from its definition."""
    i = torch.arange(plan.seq_len)
    mask = (i[:, None] >= i) if causal else torch.ones(plan.seq_len, plan.seq_len, dtype=torch.bool)
    if window:
        mask &= (i[:, None] - i).abs() < window
    document = torch.bucketize(i, torch.tensor(plan.documents), right=True)
    return mask & (document[:, None] == document)


@st.composite
def plans(draw, max_len=24, max_ranks=6):
    """Any length, any number of ranks, any layout or positions, with or without documents."""
    T, n = draw(st.integers(0, max_len)), draw(st.integers(1, max_ranks))
    options = {}
    if draw(st.booleans()):
        options["cu_seqlens"] = int32(
            sorted([0, T, *draw(st.lists(st.integers(0, T), max_size=4))])
        )
    kind = draw(st.sampled_from((*LAYOUTS, "shuffled", "pieces")))
    if kind in LAYOUTS:
        return cp.make_plan(T, n, layout=kind, **options)
    order = list(range(T))
    if kind == "shuffled":
        order = draw(st.permutations(order))
    cuts = sorted([0, T, *(draw(st.integers(0, T)) for _ in range(n - 1))])
    parts = [torch.tensor(order[a:b]) for a, b in itertools.pairwise(cuts)]
    return cp.make_plan(T, n, positions=draw(st.permutations(parts)), **options)


masks = st.tuples(st.booleans(), st.sampled_from([0, 0, 1, 2, 5, 11, 100]))
