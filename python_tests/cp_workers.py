"""What the processes of python_tests/cp do: a rank's share of each check."""

import contextlib
import functools
import gc
import json
import os
import signal
import time
import weakref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import checkpoint

import lctx_kernels as lk
from lctx_kernels import cp, reference
from lctx_kernels.cp import process_group
from lctx_kernels.cp.registry import known_transport
from lctx_kernels.cp.transport import Note


def global_tensors(T, *, B=1, Hq=4, Hkv=2, D=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, Hq, D), (B, T, Hkv, D), (B, T, Hkv, D), (B, T, Hq, D))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def local_run(plan, rank, x, **options):
    """out, lse, dq, dk, dv of one rank, or with rank=None of all ranks by simulation."""
    parts = [cp.shard(plan, t, 1, rank) for t in x]
    leaves = [t.requires_grad_() for t in parts[:3]]
    if rank is None:
        options = {**options, "transport": "sim"}
        options.pop("group", None)
    out, lse = lk.ring_attention(*leaves, plan=plan, return_lse=True, **options)
    weight = torch.arange(lse.numel()).reshape(lse.shape).to(lse) * 0 + 0.5
    grads = torch.autograd.grad([out, lse], leaves, [parts[3], weight])
    return out.detach(), lse.detach(), *grads


def check_case(rank, plan, x, **options):
    """A process group gives the bits of the simulation, and what attention over all gives."""
    mine = local_run(plan, rank, x, **options)
    everything = local_run(plan, None, x, **options)
    offset = sum(plan.lengths[:rank])
    for i, (ours, simulated) in enumerate(zip(mine, everything, strict=True)):
        dim = 2 if i == 1 else 1
        assert torch.equal(ours, simulated.narrow(dim, offset, plan.lengths[rank]))
    documents = torch.tensor(plan.documents, dtype=torch.int32) if len(plan.documents) > 2 else None
    kept = {n: v for n, v in options.items() if n in ("causal", "window", "scale")}
    doubles = (t.double() for t in x[:3])
    exact = reference.flash_attention(*doubles, cu_seqlens=documents, **kept)[0]
    tolerance = 1e-10 if x[0].dtype == torch.float64 else 2e-2
    torch.testing.assert_close(
        mine[0].double(), cp.shard(plan, exact, 1, rank), atol=tolerance, rtol=tolerance
    )


def many_cases(rank, n):
    """Layouts, masks, lengths, dtypes, documents; strided inputs; empty ranks."""
    bounds = torch.tensor([0, 5, 5, 23, 41], dtype=torch.int32)
    for layout in ("zigzag", "striped", "contiguous"):
        check_case(rank, cp.make_plan(41, n, layout=layout), global_tensors(41, B=2))
        packed = cp.make_plan(41, n, layout=layout, cu_seqlens=bounds)
        check_case(rank, packed, global_tensors(41), window=12, timeout=30)
    check_case(rank, cp.make_plan(n - 1, n), global_tensors(n - 1))
    odd = [torch.arange(r * r, (r + 1) * (r + 1) if r < n - 1 else 37) for r in range(n)]
    check_case(rank, cp.make_plan(37, n, positions=odd), global_tensors(37, Hkv=1), causal=False)
    check_case(rank, cp.make_plan(64, n), global_tensors(64, D=16, dtype=torch.bfloat16))
    return len(cp.hop_log())


def equal_lengths_need_no_plan(rank, n):
    x = global_tensors(8 * n)
    plan = cp.make_plan(8 * n, n)
    q, k, v = (cp.shard(plan, t, 1, rank) for t in x[:3])
    by_plan = lk.ring_attention(q, k, v, plan=plan)
    assert torch.equal(lk.ring_attention(q, k, v), by_plan)
    bounds = torch.tensor([0, 3, 8 * n], dtype=torch.int32)
    packed = plan.with_documents(bounds.tolist())
    assert torch.equal(
        lk.ring_attention(q, k, v, cu_seqlens=bounds), lk.ring_attention(q, k, v, plan=packed)
    )
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(lk.ring_attention(*strided), by_plan)


def moving_tokens(rank, n):
    """unshard and roll, and their gradients."""
    plan = cp.make_plan(11, n)
    x = torch.arange(22.0).reshape(2, 11).requires_grad_()
    local = cp.shard(plan, x, 1, rank)
    assert torch.equal(cp.unshard(plan, local, 1, None), x)
    rolled = cp.roll(plan, local, 3, 1, None)
    assert torch.equal(cp.unshard(plan, rolled, 1, None), x.roll(3, 1))
    weight = torch.arange(11.0) * (rank + 1)
    (grad,) = torch.autograd.grad((cp.unshard(plan, local, 1, None) * weight).sum(), local)
    total = torch.arange(11.0) * sum(range(1, n + 1))  # all ranks' losses count
    assert torch.equal(grad, cp.shard(plan, total.expand(2, -1), 1, rank))
    (grad,) = torch.autograd.grad((rolled * cp.shard(plan, weight, 0, rank)).sum(), local)
    assert grad.shape == local.shape
    loss = (cp.unshard(plan, local, 1, None) ** 3).sum() + (local**3).sum()
    (grad,) = torch.autograd.grad(loss, local, create_graph=True)
    (twice,) = torch.autograd.grad(grad.sum(), local)  # through what the gradient has sent, too
    torch.testing.assert_close(twice, 6 * (n + 1) * local)
    part = local.detach().bfloat16().requires_grad_()
    weight = torch.tensor([1.0, 2**-8, 2**-8][rank % 3], dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad((cp.unshard(plan, part, 1, None) * weight).sum(), part)
    assert n != 3 or (grad == 1 + 2**-7).all()  # rounded once: 1 + 2^-8 in bf16 is 1
    before = torch.arange(11.0)
    with torch.device("meta"):  # a plan is shared: what it keeps is of no default device
        other = cp.make_plan(11, n, layout="striped")
        assert cp.shard_positions(other, rank).device.type == "cpu" and len(other.places) == 2
    assert torch.equal(cp.unshard(other, cp.shard(other, before, 0, rank), 0, None), before)
    for dtype in (torch.int16, torch.bool, torch.float8_e4m3fn):  # not all gloo's
        part = cp.shard(other, before.to(dtype), 0, rank)
        assert torch.equal(cp.unshard(other, part, 0, None).to(before), before.to(dtype).to(before))


def backward_of_one_rank(rank, n):
    """Where nothing travels, one rank may leave its backward out; later calls are in order."""
    starts = torch.arange(0, 8 * n + 1, 8, dtype=torch.int32)
    plan = cp.make_plan(8 * n, n, layout="contiguous", cu_seqlens=starts)
    x = [cp.shard(plan, t, 1, rank).requires_grad_() for t in global_tensors(8 * n)[:3]]
    out = lk.ring_attention(*x, plan=plan)
    if rank == 0:
        out.sum().backward()
    check_case(rank, cp.make_plan(8 * n, n), global_tensors(8 * n))


def groups_and_meshes(rank, n):
    """A mesh dimension and a group of some ranks, with other rings at work beside them."""
    mesh = init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("dp", "cp"))
    plan, own = cp.make_plan(19, 2), mesh["cp"].get_local_rank()
    check_case(own, plan, global_tensors(19, seed=rank // 2), group=mesh["cp"])
    group = dist.new_group([n - 1, 1])
    if rank in (n - 1, 1):
        check_case(dist.get_rank(group), plan, global_tensors(19), group=group)
    message = ""
    try:
        lk.ring_attention(*global_tensors(4)[:3], group=mesh)
    except ValueError as error:
        message = str(error)
    assert "DeviceMesh of 2 dimensions" in message


def destroyed_groups(rank, n):
    """Nothing keeps a group that was destroyed, nor the memory that its transport held."""
    gone = []
    for _ in range(3):
        group = dist.new_group()
        check_case(rank, cp.make_plan(19, n), global_tensors(19), group=group)
        gone.append(weakref.ref(group))
        dist.destroy_process_group(group)
        del group
    check_case(rank, cp.make_plan(19, n), global_tensors(19), group=dist.new_group())
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    assert cp.hop_log() == []  # of the default group, which has done nothing


def checkpoint_and_compile(rank, n):
    plan = cp.make_plan(24, n)
    parts = [cp.shard(plan, t, 1, rank).float().requires_grad_() for t in global_tensors(24)[:3]]

    def block(q, k, v):
        return lk.ring_attention(q.sin(), k, v, plan=plan).cos()

    contexts = functools.partial(
        checkpoint.create_selective_checkpoint_contexts, lk.checkpoint_policy
    )
    wanted = torch.autograd.grad(block(*parts).sum(), parts)
    before = len(cp.hop_log())
    kept = checkpoint.checkpoint(block, *parts, use_reentrant=False, context_fn=contexts)
    grads = torch.autograd.grad(kept.sum(), parts)
    phases = [hop["phase"] for hop in cp.hop_log()[before:]]
    assert phases.count("agreement") == 1 and phases.count("forward kv") == n - 1
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(compiled(*parts).sum(), parts)
    mesh = init_device_mesh("cpu", (n,), mesh_dim_names=("cp",))
    for group in (dist.new_group(list(range(n))), mesh["cp"]):
        one = torch.compile(functools.partial(lk.ring_attention, plan=plan, group=group),
                            fullgraph=True, backend="aot_eager")  # fmt: skip
        assert torch.equal(one(*parts), lk.ring_attention(*parts, plan=plan))
    for a, b, c in zip(wanted, grads, again, strict=True):
        assert torch.equal(a, b) and torch.allclose(a, c)


def log_to_file(rank, n, folder):
    plan = cp.make_plan(20, n)
    local_run(plan, rank, global_tensors(20))
    cp.dump_hop_log(f"{folder}/{rank}.json")
    return json.load(open(f"{folder}/{rank}.json"))


# ---- faults ----


def strike(rank, victim, phase, step, what):
    """Let `what` happen to the victim when it posts this hop."""
    if rank != victim:
        return
    post = process_group.GroupTransport.post

    def faulty(self, hop):
        if (hop.phase, hop.step) == (phase, step):
            what()
        return post(self, hop)

    process_group.GroupTransport.post = faulty


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def killed(rank, n, victim, phase, step, timeout):
    strike(rank, victim, phase, step, _kill)
    local_run(cp.make_plan(40, n), rank, global_tensors(40), timeout=timeout)


def delayed(rank, n, victim, phase, step, timeout):
    """The ring fails on every rank; a new group works."""
    strike(rank, victim, phase, step, functools.partial(time.sleep, timeout + 2))
    plan, x = cp.make_plan(40, n), global_tensors(40)
    try:
        local_run(plan, rank, x, timeout=timeout)
    except cp.RingError as error:
        caught = str(error)
    try:
        local_run(plan, rank, x)
    except cp.RingError as error:
        assert "make another by torch.distributed.new_group" in str(error)
    group = dist.new_group(list(range(n)))
    check_case(rank, plan, x, group=group)
    return caught, cp.hop_log(group)[-1]


def stopped(rank, n, victim, phase, step, timeout):
    """Memory is short on one rank in the middle of a call, and it goes on to the next."""

    def out_of_memory():
        raise MemoryError("no memory for this hop")

    strike(rank, victim, phase, step, out_of_memory)
    plan, x = cp.make_plan(40, n), global_tensors(40)
    if rank != victim:
        local_run(plan, rank, x, timeout=timeout)
        return None
    said = []
    for _ in range(2):
        try:
            local_run(plan, rank, x, timeout=timeout)
        except (MemoryError, cp.RingError) as error:
            said.append(f"{type(error).__name__}: {error}")
    time.sleep(timeout)  # its process keeps the sockets that the others wait on
    return said


def made_again(rank, n):
    """What no rank can have is tried again; what failed on the way is given up."""
    group, cpu = dist.group.WORLD, torch.device("cpu")

    def fail(error):
        raise error

    for error in (NotImplementedError("no"), NotImplementedError("never")):
        with contextlib.suppress(NotImplementedError):
            known_transport(group, cpu, "p2p", lambda error=error: fail(error))
            raise AssertionError("made")
    try:
        known_transport(group, cpu, "p2p", lambda: fail(RuntimeError("out of handles\nat all")))
    except RuntimeError as error:
        assert "out of handles" in str(error)
    given_up = known_transport(group, cpu, "p2p", lambda: fail(AssertionError("made again")))
    try:
        given_up.begin(Note.of({}), 0.0, agree=True)
        raise AssertionError("begun")
    except cp.RingError as error:
        assert "given up: p2p was not made: out of handles; make another" in str(error)


def absent(rank, n, victim, timeout):
    if rank == victim:
        time.sleep(2 * timeout)
        return
    local_run(cp.make_plan(40, n), rank, global_tensors(40), timeout=timeout)


def other_length(rank, n, victim):
    q, k, v = (t[:, : 10 if rank != victim else 9] for t in global_tensors(10)[:3])
    lk.ring_attention(q, k, v, timeout=20)


def not_the_plans_length(rank, n, victim):
    plan = cp.make_plan(10 * n, n)
    q, k, v = (t[:, : 10 if rank != victim else 9] for t in global_tensors(10)[:3])
    lk.ring_attention(q, k, v, plan=plan, timeout=20)


def refused_alone(rank, n, victim):
    """Only one rank calls at all, wrongly: its own error comes, and soon."""
    process_group.ANNOUNCE_SECONDS = 1.0
    if rank == victim:
        q, k, v = global_tensors(10)[:3]
        lk.ring_attention(q, k, v, window=0)
    else:
        time.sleep(4)


def other_window(rank, n, victim):
    q, k, v = global_tensors(10)[:3]
    lk.ring_attention(q, k, v, window=5 if rank == victim else 4, timeout=20)


def refused_at_length(rank, n, victim):
    """A refusal that is long, and not of letters."""
    q, k, v = global_tensors(10)[:3]
    refused = {"transport": "p2p", "layout": "\U0001f600" * 500} if rank == victim else {}
    lk.ring_attention(q, k, v, timeout=20, **refused)


def refused_infini(rank, n, victim):
    lk.infini_attention(
        *global_tensors(8)[:3], segment_len=0 if rank == victim else 4, group=dist.group.WORLD
    )


def refused_landmark(rank, n, victim):
    plan, size = cp.make_plan(8 * n, n), 1 if rank == victim else 4
    lk.landmark_attention(*global_tensors(8)[:3], block_size=size, plan=plan)


def refused_dilated(rank, n, victim):
    plan, w = cp.make_plan(8 * n, n), 0 if rank == victim else 8 * n
    lk.dilated_attention(*global_tensors(8)[:3], [w], [1], plan=plan)


def group_for_other_devices(rank, n, victim):
    group = dist.new_group(backend="cuda:gloo")
    x = global_tensors(4)[:3]
    for call in (
        lambda: cp.unshard(cp.make_plan(4 * n, n), x[0], 1, group),
        lambda: lk.infini_attention(*x, segment_len=4, group=group),
        lambda: cp.decode_attention(*x, group=group),
    ):
        with contextlib.suppress(ValueError):
            call()
            raise AssertionError("not refused")
    lk.ring_attention(*x, group=group)


def unshard_by_another_plan(rank, n, victim):
    plan = cp.make_plan(4 * n, n, layout="striped" if rank == victim else "zigzag")
    cp.unshard(plan, torch.zeros(1, 4), 1, None)


def unshard_of_another_dtype(rank, n, victim):
    dtype = torch.float64 if rank == victim else torch.float32
    cp.unshard(cp.make_plan(4 * n, n), torch.zeros(1, 4, dtype=dtype), 1, None)


def unshard_of_another_batch(rank, n, victim):
    cp.unshard(cp.make_plan(4 * n, n), torch.zeros(2 if rank == victim else 1, 4), 1, None)


def unshard_of_another_length(rank, n, victim):
    cp.unshard(cp.make_plan(4 * n, n), torch.zeros(1, 5 if rank == victim else 4), 1, None)


def roll_by_another_shift(rank, n, victim):
    cp.roll(cp.make_plan(4 * n, n), torch.zeros(1, 4), 2 if rank == victim else 1, 1, None)


def other_order(rank, n, victim, timeout):
    """Two rings whose backwards one rank runs in the other order."""
    plan = cp.make_plan(20, n)
    x = [cp.shard(plan, t, 1, rank).requires_grad_() for t in global_tensors(20)[:3]]
    outs = [lk.ring_attention(*x, window=w, timeout=timeout) for w in (None, 3)]
    for out in outs if rank != victim else outs[::-1]:
        torch.autograd.grad(out.sum(), x)
