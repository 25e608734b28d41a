"""What the processes of python_tests/cp do: the other methods over ranks."""

import functools

import torch
import torch.distributed as dist
from cp_workers import global_tensors

import lctx_kernels as lk
from lctx_kernels import cp


def compare_over_ranks(whole, local, x, shards, rank, *, grads):
    """Results of `local` on this rank's parts against those of `whole`, with all gradients.

    whole, local: tensors by name -> (list of results by row, list of results that all ranks have).
    shards: how a tensor is cut for a rank. The objective is the sum over all ranks.
    """
    leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
    rows, common = whole(**leaves)
    mine = {n: shards(n, t, rank).detach().clone().requires_grad_() for n, t in x.items()}
    my_rows, my_common = local(**mine)
    tolerance = {"atol": 1e-10, "rtol": 1e-9}
    for (name, a), b in zip(rows, my_rows, strict=True):
        torch.testing.assert_close(b, shards(name, a, rank), **tolerance)
    for a, b in zip(common, my_common, strict=True):
        torch.testing.assert_close(b, a, **tolerance)
    weights = [grads(t) for _, t in rows]
    loss = sum((t * w).sum() for (_, t), w in zip(rows, weights, strict=True))
    loss = loss + sum(t.sin().sum() for t in common)
    own = sum(
        (t * shards(n, w, rank)).sum() for t, (n, _), w in zip(my_rows, rows, weights, strict=True)
    )
    if rank == 0:  # the common results count once
        own = own + sum(t.sin().sum() for t in my_common)
    else:
        own = own + sum((0 * t).sum() for t in my_common)
    wanted = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = torch.autograd.grad(own, list(mine.values()), allow_unused=True)
    for name, a, b in zip(x, wanted, found, strict=True):
        if shards(name, x[name], rank) is x[name]:  # the same on all ranks: their sum counts
            b = torch.zeros_like(x[name]) if b is None else b.clone()
            dist.all_reduce(b)
        if a is None:
            assert b is None or not b.any()
        else:
            torch.testing.assert_close(b, shards(name, a, rank), **tolerance, msg=name)


def weight_like(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)


def infini_cases(rank, n):
    q, k, v, _ = global_tensors(29, B=2)
    state = {"M": torch.randn(2, 2, 8, 8).double(), "z": torch.rand(2, 2, 8).double() + 1}
    dist.broadcast(state["M"], 0), dist.broadcast(state["z"], 0)
    gate, extra = torch.tensor([0.3, -0.2, 0.0, 1.0]).double(), global_tensors(29, B=2, seed=3)
    for cuts in ([0, 8, 24, 29][: n + 1], [0, 0, 12, 29][: n + 1]):
        cuts = [*cuts[:n], 29]
        for update, first, given in (
            ("linear", "gate", True),
            ("delta", "gate", True),
            ("linear", "bypass", False),
            ("delta", "bypass", False),
        ):
            x = {"q": q, "k": k, "v": v, "gate": gate}
            if given:
                x |= {"q_mem": extra[0], "k_mem": extra[1], **state}

            def shards(name, t, r, cuts=cuts):
                if name in ("gate", "M", "z"):
                    return t
                return t[:, cuts[r] : cuts[r + 1]]

            def call(group, update=update, first=first, M=None, z=None, **x):
                mem = None if M is None else (M, z)
                out, mem = lk.infini_attention(
                    **x, mem=mem, segment_len=4, update=update, first=first, group=group
                )
                return ([("out", out)] if group is None else [out]), list(mem)

            compare_over_ranks(
                functools.partial(call, None), functools.partial(call, dist.group.WORLD), x,
                shards, rank, grads=weight_like,
            )  # fmt: skip
    infini_detached(rank, n)
    infini_twice(rank, n)
    infini_autocast(rank, n)
    message = ""
    try:
        lk.infini_attention(q, k, v, segment_len=4, group=dist.group.WORLD)
    except ValueError as error:
        message = str(error)
    assert "expected whole segments of segment_len = 4" in message


def infini_twice(rank, n):
    """A gradient of a gradient is refused, not wrong."""
    x = [t.requires_grad_() for t in global_tensors(4)[:3]]
    out, _ = lk.infini_attention(*x, segment_len=4, group=dist.group.WORLD)
    message = ""
    try:
        grads = torch.autograd.grad(out.sum(), x, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), x)
    except NotImplementedError as error:
        message = str(error)
    assert "double backward" in message


def infini_autocast(rank, n):
    """The memory is fp32 under autocast, too."""
    x = [t.float() for t in global_tensors(16 * n)[:3]]
    part = [t[:, 16 * rank : 16 * rank + 16] for t in x]
    for update in ("linear", "delta"):
        exact = lk.infini_attention(*(t.bfloat16().double() for t in x), segment_len=16,
                                    update=update)[1]  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            found = lk.infini_attention(
                *part, segment_len=16, update=update, group=dist.group.WORLD
            )[1]
        torch.testing.assert_close(found.M.double(), exact.M, atol=1e-5, rtol=1e-5)


def infini_compiled(rank, n):
    """torch.compile goes round what agrees with other ranks."""
    x = [t.float() for t in global_tensors(8 * n)[:3]]
    part = [t[:, 8 * rank : 8 * rank + 8].clone().requires_grad_() for t in x]

    def call(q, k, v):
        out, _ = lk.infini_attention(q.sin(), k, v, segment_len=4, group=dist.group.WORLD)
        with torch.no_grad():
            return out.cos(), cp.decode_attention(q, k, v).cos()

    for wanted, found in zip(call(*part), torch.compile(call, backend="aot_eager")(*part),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(found, wanted)


def infini_detached(rank, n):
    """detach_every cuts between ranks what it cuts on one device."""
    x = [t.requires_grad_() for t in global_tensors(8 * n)[:3]]
    weight = weight_like(x[0])
    whole = lk.infini_attention(*x, segment_len=4, detach_every=2)
    rows = slice(8 * rank, 8 * rank + 8)
    parts = [t[:, rows] for t in x]
    out, mem = lk.infini_attention(*parts, segment_len=4, detach_every=2, group=dist.group.WORLD)
    torch.testing.assert_close(out, whole[0][:, rows])
    torch.testing.assert_close(mem.M, whole[1].M)
    assert not mem.M.requires_grad
    wanted = torch.autograd.grad((whole[0] * weight).sum(), x)
    found = torch.autograd.grad((out * weight[:, rows]).sum(), x)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b[:, rows], a[:, rows])


def dilated_cases(rank, n):
    q, k, v, _ = global_tensors(37, B=2)
    names = {"lse": 2}

    def run(layout, branches, **options):
        plan = cp.make_plan(37, n, layout=layout)

        def shards(name, t, r):
            return cp.shard(plan, t, names.get(name, 1), r)

        def call(own, q, k, v):
            out, lse = lk.dilated_attention(
                q, k, v, *branches, plan=own, return_lse=True, **options
            )
            seen = lse.masked_fill(lse == -torch.inf, 0)
            return ([("out", out), ("lse", seen)] if own is None else [out, seen]), []

        compare_over_ranks(
            functools.partial(call, None), functools.partial(call, plan),
            {"q": q, "k": k, "v": v}, shards, rank, grads=weight_like,
        )  # fmt: skip

    for layout in ("contiguous", "zigzag"):
        run(layout, ([4, 16, 100], [1, 2, 3]))
        run(layout, ([20], [3]), causal=False, head_offset="block")
        run(layout, ([5, 37], [2, 4]), mix_grad="detached")
    sent = len(cp.hop_log())
    plan = cp.make_plan(16 * n, n, layout="contiguous")
    parts = [cp.shard(plan, t, 1, rank) for t in global_tensors(16 * n)[:3]]
    lk.dilated_attention(*parts, [4, 16], [1, 2], plan=plan)
    hops = cp.hop_log()[sent:]
    assert [hop["phase"] for hop in hops] == ["agreement"]  # nothing of segments inside ranks
    parts = [cp.shard(plan, t, 1, rank) for t in global_tensors(16 * n, Hq=8, Hkv=2)[:3]]
    for offset in ("mod", "block"):
        before = len(cp.hop_log())
        lk.dilated_attention(*parts, [16 * n], [2], plan=plan, head_offset=offset)
        moved = sum(hop["bytes_sent"] for hop in cp.hop_log()[before:] if hop["step"] >= 0)
        # Of a phase half of the rows, those of the ranks before too; the last rank sends nothing.
        rows = 8 * (rank + 1) % (8 * n) * 2 * 8 * 8  # of a key head: k and v, head dimension, bytes
        assert moved == rows * (4 if offset == "mod" else 2), (moved, rows)
    message = ""
    try:
        lk.dilated_attention(*parts, [4], [1], plan=cp.make_plan(16 * n, n, layout="striped"))
    except ValueError as error:
        message = str(error)
    assert 'the plan is "striped"' in message


def decode_cases(rank, n):
    """New queries over a cache whose parts differ in length; one rank may hold nothing."""
    for Tq, cuts, dtype in (
        (1, [0, 0, 29, 41], torch.float64),
        (3, [0, 17, 18, 41], torch.float64),
        (1, [0, 20, 41, 41], torch.bfloat16),
    ):
        k, v = (t.to(dtype) for t in global_tensors(41, B=2)[1:3])
        q = global_tensors(Tq, B=2, seed=5)[0].to(dtype)
        begin, end = cuts[rank], cuts[rank + 1] if rank < n - 1 else 41
        out = cp.decode_attention(q, k[:, begin:end], v[:, begin:end])
        whole = lk.flash_attention(q, k, v, causal=False)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-2
        torch.testing.assert_close(out, whole, atol=tolerance, rtol=tolerance)
    assert not cp.decode_attention(q, k[:, :0], v[:, :0]).any()  # no keys on any rank
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cp.decode_attention(q.float(), k[:, begin:end].float(), v[:, begin:end])
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, out)
    message = ""
    try:
        cp.decode_attention(q.float().requires_grad_(), k.float(), v.float())
    except NotImplementedError as error:
        message = str(error)
    assert "has no backward" in message


def landmark_cases(rank, n):
    q, k, v, _ = global_tensors(37, B=2)
    marks = torch.rand(2, 37, generator=torch.Generator().manual_seed(3)) < 0.2
    for layout in ("contiguous", "zigzag"):
        plan = cp.make_plan(37, n, layout=layout)

        def shards(name, t, r, plan=plan):
            return cp.shard(plan, t, 2 if name == "lse" else 1, r)

        for options in ({"block_size": 5}, {"is_landmark": marks}):

            def call(own, q, k, v, options=options):
                given = dict(options)
                if own is not None and "is_landmark" in given:
                    given["is_landmark"] = cp.shard(own, marks, 1, rank)
                out, lse = lk.landmark_attention(q, k, v, **given, plan=own, return_lse=True)
                seen = lse.masked_fill(lse == -torch.inf, 0)
                return ([("out", out), ("lse", seen)] if own is None else [out, seen]), []

            compare_over_ranks(
                functools.partial(call, None), functools.partial(call, plan),
                {"q": q, "k": k, "v": v}, shards, rank, grads=weight_like,
            )  # fmt: skip


def another_first(rank, n, victim):
    first = "bypass" if rank == victim else "gate"
    lk.infini_attention(*global_tensors(8)[:3], segment_len=4, first=first, group=dist.group.WORLD)


def another_block_size(rank, n, victim):
    plan, size = cp.make_plan(8 * n, n), 8 if rank == victim else 4
    lk.landmark_attention(*global_tensors(8)[:3], block_size=size, plan=plan)


def another_number_of_rows(rank, n, victim):
    plan = cp.make_plan(8 * n, n)
    x = global_tensors(7 if rank == victim else 8)[:3]
    lk.landmark_attention(*x, block_size=4, plan=plan)


def another_mix_grad(rank, n, victim):
    """Of segments inside ranks, for which nothing travels."""
    plan = cp.make_plan(8 * n, n, layout="contiguous")
    mix = "detached" if rank == victim else "exact"
    lk.dilated_attention(*global_tensors(8)[:3], [4, 8], [1, 2], mix_grad=mix, plan=plan)


def decode_of_other_keys(rank, n, victim):
    q, k, v, _ = global_tensors(8)
    cp.decode_attention(q, k[:, :, :, :4] if rank == victim else k, v)


def decode_of_no_queries(rank, n, victim):
    q, k, v, _ = global_tensors(8)
    cp.decode_attention(None if rank == victim else q, k, v)


def ring_of_no_queries(rank, n, victim):
    q, k, v, _ = global_tensors(8)
    lk.ring_attention(None if rank == victim else q, k, v)
