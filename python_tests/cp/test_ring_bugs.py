"""Bugs that rings have really had, planted in ours: the simulation must see each of them.

A bug is one replacement in the source of a module. Sources: stale keys and the rank's own lse in
the backward of published rings, lost last hops, masks of local positions, and what slots, heads and
waits of this one could get wrong.
"""

import importlib.util
import inspect
import itertools
import sys

import pytest
import torch
from cp_plans import int32
from helpers import assert_fp64_equal, random_tensor, run

import lctx_kernels as lk
from lctx_kernels import cp, reference
from lctx_kernels.cp import keys, layout, ops, parts, saved, schedule, steps

BUGS = {
    "stale keys in the backward": (
        steps,
        "part, own, ring.held, G, lanes)",
        "part, own, ring.held if step == 1 else Wire(k, k, v), G, lanes)",
    ),
    "stale keys in the forward": (
        keys,
        "self.held = self.arriving\n",
        "self.held = self.arriving if self.at.world_size < 3 else self.held\n",
    ),
    "lse of the own keys in the backward": (
        steps,
        "own = save(at, dout, dlse, q, out, lse)",
        "own = save(at, dout, dlse, q, out, lse)._replace(lse=_own_lse(q, k, v, lse))",
    ),
    "delta without dlse": (saved, "attn_delta(dout, dlse, out)", "attn_delta(dout, None, out)"),
    "next source instead of the one before": (
        schedule,
        "return (rank - step) % self.plan.world_size",
        "return (rank + step) % self.plan.world_size",
    ),
    "band one key too narrow": (
        schedule,
        "low = max(low, -((delta - nearest) // stride))",
        "low = max(low, (nearest - delta) // stride + 1)",
    ),
    "band of stripes rounded down": (
        schedule,
        "low = max(low, -((delta - nearest) // stride))",
        "low = max(low, (nearest - delta) // stride)",
    ),
    "window one key too wide": (schedule, "(window - 1 - delta)", "(window - delta)"),
    "window not limited ahead of a row": (schedule, "0 if causal else 1 - window", "0 if causal "
                                          "else -(10**6)"),
    "documents ignored": (
        schedule,
        "by_document.get(q.document, ())",
        "[k for ks in by_document.values() for k in ks]",
    ),
    "last step missing": (
        schedule,
        "steps = [t for t in range(1, n) if",
        "steps = [t for t in range(1, max(n - 1, 2)) if",
    ),
    "joined across a gap": (schedule, "a[2:4] == b[2:4] and a.q1 == b.q0", "a[2:4] == b[2:4]"),
    "keys and values swapped on the wire": (
        keys,
        "wire.k[:, packed] = self.k[:, own]",
        "wire.k[:, packed] = self.v[:, own]",
    ),
    "gradients never come home": (
        steps,
        "torch.add(sums[:, begin:], more, out=out[:, begin:])",
        "out[:, begin:] = sums[:, begin:]",
    ),
    "gradients come home early and are lost": (
        steps,
        "self.dk[:, own] += self.home.k[:, packed]",
        "pass",
    ),
    "gradients come home instead of being added": (
        steps,
        "torch.add(sums[:, begin:], more, out=out[:, begin:])",
        "out[:, begin:] = more",
    ),
    "rows beside those that come home are forgotten": (
        steps,
        "out[:, :begin] = sums[:, :begin]",
        "out[:, :begin] = 0",
    ),
    "own sums cleared after others were added": (
        steps,
        "        0, at.world_size - 1,\n",
        "        0, 1, at.world_size - 1,\n",
    ),
    "gradients come home to the next rank": (
        steps,
        "target = at.next if passes else source",
        "target = at.next",
    ),
    "sums not cleared": (steps, "self.held.flat.zero_()", "pass"),
    "sums cleared by every call": (
        steps,
        "if not self.at.schedule.keys_once(self.at.rank, source):",
        "if False:",
    ),
    "sums start anew at every rank": (
        steps,
        "empty = self.at.schedule.first[source] == step",
        "empty = True",
    ),
    "both groups of heads are the first": (
        steps,
        "heads_of(held.k, part.h0, part.h1), heads_of(held.v, part.h0, part.h1)",
        "(heads_of(x, 0, part.h1 - part.h0) for x in (held.k, held.v))",
    ),
    "query heads not grouped": (
        steps,
        "own.heads(part.h0 * G, part.h1 * G)",
        "own.heads(part.h0, part.h0 + (part.h1 - part.h0) * G)",
    ),
    "keys used before they are there": (
        steps,
        "for lane in range(len(lanes) if ticket is not None else 0):",
        "for lane in range(0):",
    ),
    "rows rounded by their first call": (
        schedule,
        "                last[at] = index\n",
        "                last[at] = index if last[at] < 0 else last[at]\n",
    ),
    "rows that no call ends with forgotten": (
        steps,
        "for begin, end in at.schedule.final_rows(at.rank, part.own_last)[1]:",
        "for begin, end in ():",
    ),
    "gradients used before they are there": (
        steps,
        "        if self.ticket is not None:\n",
        "        if self.ticket is not None and self.home is not None:\n",
    ),
    "one slot for keys": (keys, "slots[step % len(slots)]", "slots[0]"),
    "one slot for gradients": (
        layout,
        "tuple(tuple(take(rows * size) for _ in range(slots)) for size in sum_bytes)",
        "tuple((take(rows * size),) * slots for size in sum_bytes)",
    ),
    "slots side by side overlap": (layout, "end += -(-size // ALIGNMENT) * ALIGNMENT", "end += 0"),
    "keys sent to the slot that is read": (
        keys,
        "places = (self._place(at.next, step + 1),)",
        "places = (self._place(at.next, step),)",
    ),
    "gradients sent to the slot that is read": (
        steps,
        "slot = (step + 1) % 2 if passes",
        "slot = step % 2 if passes",
    ),
    "rows without keys start at lse 0": (
        steps,
        "part.statistics(lse).fill_(-torch.inf)",
        "part.statistics(lse).fill_(0.0)",
    ),
    "rows start anew in every call of the first step": (
        steps,
        "first = step == part.own_last and part.fills(at)",
        "first = step == part.own_last",
    ),
    "own keys that come last are forgotten": (
        steps,
        "            if part.own_last:\n",
        "            if False:\n",
    ),
    "own keys that come last come first as well": (
        steps,
        "if step > 0 or not (part.own_last or part.two):",
        "if True:",
    ),
    "rows done before own keys that come last": (
        schedule,
        "steps = [*range(1, n), 0] if own_last else range(n)",
        "steps = range(n)",
    ),
    "rows without keys start at lse 0 in the last heads": (
        steps,
        "        if not part.fills(at):\n",
        "        if not part.fills(at) and not part.own_last:\n",
    ),
    "own keys without gradient": (
        steps,
        "            for call in late:\n                add(call)\n",
        "            pass\n",
    ),
    "own keys that come first are forgotten": (
        steps,
        "    for call in early:\n        add(call)\n",
        "",
    ),
    "own keys twice": (steps, "for call in late:", "for call in [*early, *late]:"),
    "own keys without a home": (
        steps,
        "out.copy_(sums)",
        "pass",
    ),
}  # fmt: skip

PRELUDE = """
def _own_lse(q, k, v, lse):
    carry, own = torch.zeros_like(q), torch.full_like(lse, -torch.inf)
    torch.ops.lctx.flash_carry(q, k, v, carry, own, False, q.shape[-1] ** -0.5, 0, 0, 0, False)
    return own
"""


def cases():
    for n in (2, 3, 4):
        yield cp.make_plan(24, n), {}
        yield cp.make_plan(24, n), {"causal": False}
        yield cp.make_plan(24, n), {"causal": False, "window": 4}
        yield cp.make_plan(24, n, layout="striped", cu_seqlens=int32([0, 7, 24])), {"window": 9}
        yield cp.make_plan(25, n, layout="striped"), {}
        yield cp.make_plan(24, n, layout="contiguous", cu_seqlens=int32([0, 7, 24])), {}
    yield cp.make_plan(520, 2), {}  # own keys in two parts
    gap = [torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])]
    yield cp.make_plan(8, 2, positions=[gap[0][[0, 1, 2, 3]], gap[1][[2, 3, 0, 1]]]), {}
    yield cp.make_plan(8, 2, positions=[torch.tensor([4, 0, 5]), torch.tensor([1, 2, 3, 6, 7])]), {}


def run_checks(patch):
    """Where hops take their time, and where own keys are last in some heads, however short."""
    usual, always = (parts.hop_seconds, parts.WORTH_SECONDS), (lambda *_: 0.0, 0.0)
    for (hop, worth), (plan, options) in itertools.product((usual, always), cases()):
        patch.setattr(parts, "hop_seconds", hop)
        patch.setattr(parts, "WORTH_SECONDS", worth)
        keys.forget_shapes()
        T = plan.seq_len
        x = {name: random_tensor(1, T, H, 4, seed=i)
             for i, (name, H) in enumerate(zip("qkv", (4, 2, 2), strict=True))}  # fmt: skip
        grads = {"out": random_tensor(1, T, 4, 4, seed=8), "lse": random_tensor(1, 4, T, seed=9)}
        documents = int32(plan.documents) if len(plan.documents) > 2 else None

        def ours(q, k, v, plan=plan, options=options):
            parts = (cp.shard(plan, t, 1, None) for t in (q, k, v))
            out, lse = lk.ring_attention(
                *parts, plan=plan, transport="sim", return_lse=True, **options
            )
            return {"out": cp.unshard(plan, out, 1, "sim"), "lse": cp.unshard(plan, lse, 2, "sim")}

        def exact(q, k, v, documents=documents, options=options):
            out, lse = reference.flash_attention(q, k, v, cu_seqlens=documents, **options)
            return {"out": out, "lse": lse}

        found, expected = run(ours, x, grads), run(exact, x, grads)
        for name in expected:
            assert_fp64_equal(name, found[name], expected[name])


def mutant(module, old, new):
    """The module with `old`, which must occur exactly once, replaced by `new`."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    spec = importlib.util.spec_from_loader("lctx_kernels.cp.mutant", loader=None)
    changed = importlib.util.module_from_spec(spec)
    changed.__package__ = module.__package__
    sys.modules["lctx_kernels.cp.mutant"] = changed
    exec(compile(source.replace(old, new) + PRELUDE, "<mutant>", "exec"), vars(changed))
    return changed


def test_the_ring_passes(monkeypatch):
    run_checks(monkeypatch)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug, monkeypatch):
    module, old, new = BUGS[bug]
    changed = mutant(module, old, new)
    if module is steps:
        monkeypatch.setattr(ops, "steps", changed)
    elif module is saved:
        monkeypatch.setattr(steps, "save", changed.save)
    elif module is keys:
        monkeypatch.setattr(steps, "KeyRing", changed.KeyRing)
    elif module is layout:
        monkeypatch.setattr(keys, "layout_of", changed.layout_of)
        monkeypatch.setattr(keys, "memory_of", changed.memory_of)
    else:
        monkeypatch.setattr(ops, "schedule_of", changed.schedule_of)
    errors = (AssertionError, RuntimeError, ValueError, IndexError, StopIteration)
    with pytest.raises(errors):
        run_checks(monkeypatch)
