"""What ranks do in test_ring_layer.py: ring layers over gloo against dense ones alone."""

import copy

import torch
import torch.distributed as dist

import lctx_kernels as lk
from lctx_kernels import cp, nn

SHAPE = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def added_up(x):
    dist.all_reduce(x)
    return x


def layer(rank, n):
    """Any layout, a window, documents: the rank's rows of the dense layer, and its gradients."""
    torch.manual_seed(0)
    dense = nn.FullAttention(32, 4, num_kv_heads=2, qk_norm=True).double()
    x, g = torch.randn(2, 2, 37, 32, dtype=torch.float64)
    for layout in ("zigzag", "striped", "contiguous"):
        ring = nn.RingAttention(32, 4, num_kv_heads=2, qk_norm=True, layout=layout).double()
        ring.load_state_dict(dense.state_dict())
        plan = cp.make_plan(37, n, layout=layout)
        out = ring(cp.shard(plan, x, 1, rank), plan=plan)
        dense.zero_grad()
        want = dense(x)
        close(out, cp.shard(plan, want, 1, rank))
        want.backward(g)
        out.backward(cp.shard(plan, g, 1, rank).contiguous())
        for ours, theirs in zip(ring.parameters(), dense.parameters(), strict=True):
            close(added_up(ours.grad), theirs.grad)
        even = torch.randn(1, 4 * n, 32, dtype=torch.float64, generator=torch.Generator())
        mine = ring(cp.shard(ring.plan(4), even, 1, rank))  # the plan of equal lengths
        close(mine, cp.shard(ring.plan(4), dense(even), 1, rank))
    near = nn.RingAttention(32, 4, num_kv_heads=2, qk_norm=True, window=5).double()
    near.load_state_dict(dense.state_dict())
    assert not torch.allclose(near(cp.shard(ring.plan(4), even, 1, rank)), mine)


def llama(rank, n):
    """Losses and gradients of the ranks add up to those of the dense model."""
    torch.manual_seed(0)
    dense = nn.Llama(nn.LlamaConfig(97, **SHAPE)).double()
    group = dist.new_group(list(range(n)))
    ring = nn.Llama(nn.LlamaConfig(97, attention="ring", **SHAPE), group).double()
    ring.load_state_dict(dense.state_dict())
    ring = copy.deepcopy(ring)
    ids = torch.randint(97, (2, 41))
    labels = ids.masked_fill(torch.rand(2, 41) < 0.2, -100)
    want, ours = dense.loss(ids, labels), ring.loss(ids, labels)
    want.backward()
    ours.backward()
    close(added_up(ours.detach()), want.detach())
    for mine, theirs in zip(ring.parameters(), dense.parameters(), strict=True):
        close(added_up(mine.grad), theirs.grad)
    plan = cp.make_plan(41, n, cu_seqlens=torch.tensor([0, 15, 41], dtype=torch.int32))
    parts = [(dense.loss(x, y), (y[:, 1:] != -100).sum()) for x, y in zip(
        ids.split([15, 26], 1), labels.split([15, 26], 1), strict=True)]  # fmt: skip
    together = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
    close(added_up(ring.loss(ids, labels, plan=plan).detach()), together.detach())
    close(ring(cp.shard(plan, ids, 1, rank), plan=plan)[:, :1], dense(ids[:, :15])[
        :, cp.shard_positions(plan, rank)[:1]])  # fmt: skip
    messages = []
    for call in (
        lambda: ring(ids[:, :7], plan=plan),
        lambda: ring.generate(ids, 2, chunk=5),
        lambda: nn.LlamaConfig(97, attention=["ring", "full"], num_layers=2).methods(),
    ):
        try:
            call()
        except (ValueError, NotImplementedError) as error:
            messages.append(str(error))
    return messages


def generation(rank, n):
    """Every rank generates what the dense model does alone; its keys are a part of all."""
    torch.manual_seed(0)
    dense = nn.Llama(nn.LlamaConfig(97, **SHAPE)).double()
    for T, options in (
        (41, {}),
        (30, {"layout": "striped"}),
        (20, {"layout": "contiguous"}),
        (1, {}),  # ranks without any
    ):
        config = nn.LlamaConfig(97, attention="ring", options={"ring": options}, **SHAPE)
        ring = nn.Llama(config).double()
        ring.load_state_dict(dense.state_dict())
        ids = torch.randint(97, (2, T))
        want = dense.generate(ids, 12)
        assert torch.equal(ring.generate(ids, 12), want)
        eos = int(want[0, T + 3])
        assert torch.equal(ring.generate(ids, 12, eos=eos), dense.generate(ids, 12, eos=eos))
    torch.manual_seed(rank)
    drawn = ring.generate(ids, 12, temperature=2.0)
    drawn_elsewhere = [torch.empty_like(drawn) for _ in range(n)]
    dist.all_gather(drawn_elsewhere, drawn)
    assert all(torch.equal(x, drawn) for x in drawn_elsewhere)
    message = ""
    try:
        ring.generate(ids + rank, 1)
    except ValueError as error:
        message = str(error)
    return message


@torch.no_grad()
def states(rank, n):
    """Layers with states against the dense layer: windows, documents, any order of positions."""
    torch.manual_seed(0)
    x = torch.randn(3, 60, 32, dtype=torch.float64)
    documents = torch.tensor([0, 9, 25, 40], dtype=torch.int32)
    shuffled = torch.randperm(40).tensor_split(n)
    for plan, begin, window in (
        (cp.make_plan(40, n), 0, None),
        (cp.make_plan(40, n), 0, 7),
        (cp.make_plan(40, n, layout="striped"), 0, 25),
        (cp.make_plan(40, n, cu_seqlens=documents), 25, None),
        (cp.make_plan(40, n, cu_seqlens=documents), 25, 20),
        (cp.make_plan(40, n, positions=shuffled), 0, 30),
    ):
        ring = nn.RingAttention(32, 4, num_kv_heads=2, window=window).double()
        state = ring.new_state()
        ring(cp.shard(plan, x[:, :40], 1, rank), state, plan)
        parts = [ring(x[:, a:b], state) for a, b in ((40, 41), (41, 42), (42, 47))]
        rows = torch.tensor([2, 0])
        state = state.select(rows)
        parts = [part[rows] for part in parts]
        parts += [ring(x[rows, a:b], state) for a, b in ((47, 48), (48, 60))]
        q, k, v = ring.project(x[rows, begin:])
        at = torch.arange(begin, 60)[None, :, None]
        want = lk.flash_attention(ring.rope(q, at), ring.rope(k, at), v, window=window)
        close(torch.cat(parts, 1), ring.output(want)[:, 40 - begin :])
        assert state.seen == 60 and sum(state.lengths) == 60
        assert max(state.lengths) - min(state.lengths) <= 12  # the longest chunk
    fresh = nn.RingAttention(32, 4, num_kv_heads=2).new_state()
    parts = [fresh.attend(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 9))]
    close(torch.cat(parts, 1), lk.flash_attention(q[:, :9], k[:, :9], v[:, :9]))  # no prompt
    messages = []
    for call in (
        lambda: ring(x, state, plan),
        lambda: state.read(plan, rank, k, v),
    ):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages
