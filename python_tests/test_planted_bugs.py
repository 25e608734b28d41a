"""Bugs that such kernels have really had, planted in the definitions: the op checks must see each.

A bug is one replacement in the source of a definition. The checks are those of python_tests/ops.
"""

import inspect
import sys

import pytest
import torch
from op_cases import (
    DILATED_CASES,
    FLASH_CASES,
    INFINI_CASES,
    LANDMARK_CASES,
    MERGE_CASES,
    RING_CASES,
)
from op_checks import (
    check_dilated,
    check_flash,
    check_infini,
    check_landmark,
    check_merge,
    check_ring,
)

from lctx_kernels import reference

FAMILIES = {
    "flash": (check_flash, FLASH_CASES),
    "infini": (check_infini, INFINI_CASES),
    "landmark": (check_landmark, LANDMARK_CASES),
    "dilated": (check_dilated, DILATED_CASES),
    "merge": (check_merge, MERGE_CASES),
    "ring": (check_ring, RING_CASES),
}

BUGS = {
    "flash": {
        "query heads tiled over key/value heads instead of grouped": (
            "x.to(stat).repeat_interleave(group, dim=2)",
            "x.to(stat).repeat(1, 1, group, 1)",
        ),
        "queries aligned to the first positions": (
            "torch.arange(Tk - Tq, Tk, device",
            "torch.arange(Tq, device",
        ),
        "window one key too wide": ("(i - j).abs() < window", "(i - j).abs() <= window"),
        "window ignored on the right of a non-causal row": (
            "(i - j).abs() < window",
            "(i - j) < window",
        ),
        "first token of a document sees the document before": (
            "cu_seqlens, right=True",
            "cu_seqlens + 1, right=True",
        ),
        "empty rows average the values": (
            "weights = (scores - lse).exp()",
            "weights = scores.masked_fill(empty, 0).softmax(-1)",
        ),
        "empty rows return lse 0": (
            "lse.masked_fill(empty, -torch.inf)",
            "lse.masked_fill(empty, 0)",
        ),
        "lse in base 2": ("return out.to(q.dtype), lse", "return out.to(q.dtype), 1.442695 * lse"),
        "lse without gradient": (
            "return out.to(q.dtype), lse",
            "return out.to(q.dtype), lse.detach()",
        ),
        "delta missing in the backward": (
            "weights = (scores - lse).exp()",
            "weights = (scores - lse.detach()).exp()",
        ),
        "scale applied in the forward only": (
            "scores = scale * torch.einsum",
            "scores = _scale_forward_only(scale, q, k) + 0 * torch.einsum",
        ),
        "scale of the value width": ("q.shape[-1] ** -0.5", "v.shape[-1] ** -0.5"),
    },
    "infini": {
        "memory updated before it is read": (
            "dim=1) for x in (M, z)))\n",
            "dim=1) for x in (\n"
            '            M + torch.einsum("bnhd,bnhe->bhde", r[:, t], v[:, t]),\n'
            "            z + r[:, t].sum(1))))\n",
        ),
        "memory heads tiled instead of grouped": (
            "*(x.repeat_interleave(group, dim=1) for x in (M, z))",
            "*(torch.cat([x] * group, dim=1) for x in (M, z))",
        ),
        "normaliser of each feature instead of each row": (
            'norm = torch.einsum("bnhd,bhd->bnh", phi, z).clamp(min=1e-6)',
            "norm = (phi * z.unsqueeze(1)).amax(-1).clamp(min=1e-6)",
        ),
        "key features not mapped": ("r[:, t].sum(1)", "k[:, t].sum(1)"),
        "delta rule reads the new memory": (
            "retrieve(r[:, t], M, z) if update",
            "retrieve(r[:, t], M, z + r[:, t].sum(1)) if update",
        ),
        "gate inverted": ("g * A_mem + (1 - g) * A_dot", "(1 - g) * A_mem + g * A_dot"),
        "bypass although there is a memory": (
            "s == 0 and mem is None and first",
            "s == 0 and first",
        ),
        "bypass of every segment": ("s == 0 and mem is None and first", "mem is None and first"),
        "short last segment not written": (
            "        M, z = M +",
            "        if len(t) == segment_len:\n            M, z = M +",
        ),
        "memory cut one segment late": ("(s + 1) % detach_every", "s % detach_every"),
        "memory always cut": ("if detach_every and (s + 1) % detach_every == 0:", "if True:"),
        "incoming memory cut": ("else mem\n", "else [x.detach() for x in mem]\n"),
        "rotated queries read the memory": ("q if q_mem is None else q_mem", "q"),
        "rotated keys written to the memory": ("k if k_mem is None else k_mem", "k"),
        "segment looks into the future": ("t[:, None] < t,", "t[:, None] + 1 < t,"),
        "denominator guard shifts instead of clamping": (".clamp(min=1e-6)", " + 1e-6"),
    },
    "landmark": {
        "own landmark not excluded": ("own = (~landmark & (block", "own = ((block"),
        "value of the landmark read": ("weights.masked_fill(gates, 0) + share", "weights + share"),
        "landmark of the open block used": ("(landmark & (block <", "(landmark & (block <="),
        "landmark without tokens keeps its weight": (" & nonempty)", ")"),
        "buckets collide after four blocks": (
            "slot, zeros = block[:, None].expand_as",
            "slot, zeros = block[:, None].clamp(max=3).expand_as",
        ),
        "queries aligned to the first positions": (
            "torch.arange(Tk - Tq, Tk, device",
            "torch.arange(Tq, device",
        ),
        "inner softmax over landmark too": (
            "past = (~landmark & (block < own_block))",
            "past = (block < own_block)",
        ),
        "query heads tiled over key/value heads instead of grouped": (
            "x.to(stat).repeat_interleave(group, dim=2)",
            "x.to(stat).repeat(1, 1, group, 1)",
        ),
        "no gradient through the inner softmax": ("+ share * inner", "+ share * inner.detach()"),
        "no gradient through the landmark weight": ("+ share * inner", "+ share.detach() * inner"),
        "regular landmarks one position early": ("((j + 1) % block_size", "((j + 2) % block_size"),
        "flags of the first batch row for all": (
            "block = is_landmark.cumsum(1)",
            "is_landmark = is_landmark[:1].expand(is_landmark.shape)\n"
            "    block = is_landmark.cumsum(1)",
        ),
    },
    "dilated": {
        "mixing weights detached although exact was asked": (
            'alpha.detach() if mix_grad == "detached" else alpha',
            "alpha.detach()",
        ),
        "mixing weights not detached": (
            'alpha.detach() if mix_grad == "detached" else alpha',
            "alpha",
        ),
        "lse of the branch instead of the union in the backward": (
            "out = (alpha * torch.stack(outs)).sum(0)",
            "stale = torch.stack(outs).sum(0)\n"
            "    out = (alpha * torch.stack(outs)).sum(0).detach() + stale - stale.detach()",
        ),
        "branches averaged": (
            "out = (alpha * torch.stack(outs)).sum(0)",
            "out = torch.stack(outs).mean(0)",
        ),
        "a key of several branches counted once": (
            "        branch = scores.masked_fill(~visible",
            "        seen = locals().get('seen', torch.zeros_like(visible))\n"
            "        visible, seen = visible & ~seen, visible | seen\n"
            "        branch = scores.masked_fill(~visible",
        ),
        "offset of the key/value head": ("offset = head % r", "offset = head // group % r"),
        "offset without regard to the head": ("offset = head % r", "offset = 0 * head"),
        "block offset with heads rounded down": ("head // -(-Hq // r)", "head // max(Hq // r, 1)"),
        "positions counted from the start of the sequence": ("(i % w % r", "(i % r"),
        "pads seen by non-causal rows": (
            "visible = selected.unsqueeze(-1) & selected.unsqueeze(-2)",
            "visible = selected.unsqueeze(-1) & (i % w % r == offset).unsqueeze(-2)",
        ),
        "segments see each other": (" & (i[:, None] // w == i // w)", ""),
        "lse of 0 taken for an empty branch": (
            "empty = (lses == -torch.inf).all(0)",
            "lses = lses.masked_fill(lses.abs() < 0.05, -torch.inf)\n"
            "    empty = (lses == -torch.inf).all(0)",
        ),
    },
    "merge": {
        "stale lse: the older part not rescaled": (
            "(side - lse).exp()",
            "(side - torch.maximum(lse_a, lse_b).masked_fill(empty, 0)).exp()",
        ),
        "sides swapped": ("for side in (lse_a, lse_b)", "for side in (lse_b, lse_a)"),
        "no gradient through the weights": ("(side - lse).exp()", "(side - lse).exp().detach()"),
        "lse of the larger side": ("torch.logaddexp(", "torch.maximum("),
        "empty rows return lse 0": (
            "lse.masked_fill(empty, -torch.inf)",
            "lse.masked_fill(empty, 0)",
        ),
    },
    "ring": {
        "causal mask of local positions": (
            "offset = i[:, None] - positions[source]",
            "offset = torch.arange(L)[:, None] - torch.arange(k.shape[1])",
        ),
        "own shard never attended": (
            "for step in range(world_size)",
            "for step in range(1, world_size)",
        ),
        "last hop missing": ("for step in range(world_size)", "for step in range(world_size - 1)"),
        "diagonal masked": ("(offset >= 0)", "(offset > 0)"),
        "stale lse": (
            "out, lse = merge_attention(out, lse, step_out, step_lse)",
            "out, _ = merge_attention(out, lse, step_out, step_lse)\n"
            "            lse = torch.maximum(lse, step_lse)",
        ),
        "partial results summed": (
            "out, lse = merge_attention(out, lse, step_out, step_lse)",
            "out, lse = out + step_out, torch.logaddexp(lse, step_lse)",
        ),
    },
}

PRELUDE = """
def _scale_forward_only(scale, q, k):
    scores = torch.einsum("bihd,bjhd->bhij", q.to(k.dtype), k)
    return (scale * scores).detach() + scores - scores.detach()
"""


def definition(family):
    return getattr(reference, f"{family}_attention")


def mutant(family, old, new):
    """The definition of the family with `old`, which must occur exactly once, replaced by `new`."""
    module = sys.modules[definition(family).__module__]
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    namespace = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(source.replace(old, new) + PRELUDE, f"<mutated {family}>", "exec"), namespace)
    return namespace[f"{family}_attention"]


def run_checks(family, implementation):
    check, cases = FAMILIES[family]
    for case in reversed(cases):  # those with unusual options are last
        if case.T < 200:
            check(implementation, case, torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_definition_passes(family):
    run_checks(family, definition(family))


@pytest.mark.parametrize(
    ("family", "bug"), [(family, bug) for family, bugs in BUGS.items() for bug in bugs]
)
def test_planted_bug_is_found(family, bug):
    with pytest.raises(AssertionError):
        run_checks(family, mutant(family, *BUGS[family][bug]))
