"""What the processes of python_tests/cp/test_methods_two_gpus.py do: the other methods by NCCL."""

import torch
from cp_gpu_workers import gpu_group
from cp_workers import global_tensors
from helpers import errors

import lctx_kernels as lk
from lctx_kernels import cp

SEGMENT = 64  # of Infini; every rank has whole ones


def infini(update):
    def call(q, k, v, plan=None, group=None):
        return lk.infini_attention(q, k, v, segment_len=SEGMENT, update=update, group=group)[0]

    return call


def landmark(q, k, v, plan=None, group=None):
    return lk.landmark_attention(q, k, v, block_size=50, plan=plan, group=group)


def dilated(q, k, v, plan=None, group=None):
    return lk.dilated_attention(q, k, v, [128, 700, 4096], [1, 2, 4], plan=plan, group=group)


CALLS = {
    "infini linear": infini("linear"),
    "infini delta": infini("delta"),
    "landmark": landmark,
    "dilated": dilated,
}


def results(call, x, **options):
    """out, dq, dk, dv."""
    leaves = [t.detach().requires_grad_() for t in x[:3]]
    out = call(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, x[3])


def error_ratios(rank, n, name, layout, dtype):
    """Errors of a rank's (out, dq, dk, dv) over those of one GPU, both against fp64."""
    group, call = gpu_group(rank), CALLS[name]
    plan = cp.make_plan(n * 8 * SEGMENT, n, layout=layout)
    x = global_tensors(plan.seq_len, B=2, D=64, dtype=dtype)
    exact = results(call, [t.double() for t in x])
    alone = results(call, [t.cuda() for t in x])
    mine = results(call, [cp.shard(plan, t.cuda(), 1, rank) for t in x], plan=plan, group=group)
    ratios = []
    for a, b, c in zip(mine, alone, exact, strict=True):
        one, own = (cp.shard(plan, t, 1, rank) for t in (b.cpu(), c))
        ratios.append(errors(a.cpu(), own).rms / errors(one, own).rms)
    return ratios


def decoding(rank, n):
    """New queries over a cache whose parts differ in length; a rank may hold nothing."""
    group, found = gpu_group(rank), []
    for Tq, cut, dtype in (
        (1, 0, torch.bfloat16),
        (1, 700, torch.float16),
        (5, 999, torch.bfloat16),
    ):
        k, v = (t.cuda() for t in global_tensors(1000, B=2, D=128, dtype=dtype)[1:3])
        q = global_tensors(Tq, B=2, D=128, dtype=dtype, seed=5)[0].cuda()
        mine = slice(0, cut) if rank == 0 else slice(cut, 1000)
        out = cp.decode_attention(q, k[:, mine], v[:, mine], group=group)
        exact = lk.flash_attention(*(t.cpu().double() for t in (q, k, v)), causal=False)
        alone = lk.flash_attention(q, k, v, causal=False)
        found.append(errors(out.cpu(), exact).rms / errors(alone.cpu(), exact).rms)
    return found


def moving(rank, n):
    """Shards come together and move along the sequence, and so do their gradients."""
    group = gpu_group(rank)
    for layout, dim, dtype in (("zigzag", 1, torch.bfloat16), ("striped", 2, torch.float32)):
        plan = cp.make_plan(101, n, layout=layout)
        x = global_tensors(101)[0].transpose(1, dim).to(dtype).contiguous().cuda()
        mine = cp.shard(plan, x, dim, rank).requires_grad_()
        whole = cp.unshard(plan, mine, dim, group)
        assert torch.equal(whole, x)
        moved = cp.roll(plan, mine, 3, dim, group)
        wanted = torch.roll(x, 3, dim)
        assert torch.equal(moved, cp.shard(plan, wanted, dim, rank))
        (grad,) = torch.autograd.grad(whole, mine, x)
        assert torch.equal(grad, n * cp.shard(plan, x, dim, rank))
