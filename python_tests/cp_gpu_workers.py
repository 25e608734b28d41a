"""What the processes of python_tests/cp/test_ring_two_gpus.py do, one GPU each if there are two."""

import itertools
import os
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from cp_plans import LAYOUTS, int32
from cp_workers import global_tensors, local_run
from helpers import errors

import lctx_kernels as lk
from bench.machine import be_a_host
from bench.ring import MILLION, forward_and_backward
from lctx_kernels import cp, reference
from lctx_kernels.cp import keys, parts
from lctx_kernels.cp.choose import choose

NAMES = ("out", "lse", "dq", "dk", "dv")
OUT_ERROR = 1.02  # times that of one device
MASKS = ({}, {"causal": False}, {"window": 300})


def take_gpu(rank):
    """One of its own, or the only one."""
    if torch.cuda.device_count() == 1:
        be_a_host(rank)
    torch.cuda.set_device(rank % torch.cuda.device_count())


def gpu_group(rank):
    take_gpu(rank)
    return dist.new_group(backend="nccl")


def gpu_tensors(T, **options):
    return [x.cuda() for x in global_tensors(T, **{"D": 128, "dtype": torch.bfloat16, **options})]


def cases(n):
    """(what, plan, tensors, options): layouts, masks, documents, heads, dtypes, odd lengths."""
    bounds = int32([0, 1, 300, 300, 999, 1100])
    for layout, mask in itertools.product(LAYOUTS, MASKS):
        yield f"{layout} {mask}", cp.make_plan(1100, n, layout=layout), {}, mask
    for layout, mask in itertools.product(LAYOUTS, MASKS[::2]):
        packed = cp.make_plan(1100, n, layout=layout, cu_seqlens=bounds)
        yield f"documents {layout} {mask}", packed, {}, mask
    for heads in ({"Hkv": 1}, {"Hkv": 4}, {"Hq": 3, "Hkv": 3}, {"B": 2}):
        yield f"{heads}", cp.make_plan(700, n), heads, {}
    for D, dtype in ((64, torch.float16), (256, torch.bfloat16)):
        yield f"D {D} {dtype}", cp.make_plan(700, n), {"D": D, "dtype": dtype}, {}
    for T in (n - 1, 0, 4099):
        yield f"{T} tokens", cp.make_plan(T, n), {}, {}
    pieces = [torch.arange(r * r, (r + 1) * (r + 1) if r < n - 1 else 370) for r in range(n)]
    yield "positions", cp.make_plan(370, n, positions=pieces), {}, {}
    for cu_seqlens in (None, bounds):
        plan = cp.make_plan(1100, n, cu_seqlens=cu_seqlens)
        yield f"not deterministic {cu_seqlens}", plan, {}, {"deterministic": False}


WAYS = ("usual", "together", "last")


def take_own_keys(way, usual=(parts.hop_seconds, parts.WORTH_SECONDS, parts.LONG)):
    """Some heads take own keys with the first foreign ones, or last, however long they are."""
    long = {"together": float("inf"), "last": 0}
    chosen = (lambda *_: 0.0, 0.0, long[way]) if way in long else usual
    parts.hop_seconds, parts.WORTH_SECONDS, parts.LONG = chosen
    keys.forget_shapes()


def check_all(rank, n, transport):
    """The bits of the simulation in every case; out as accurate as that of one device."""
    group = gpu_group(rank)
    wrong = []
    for way, (what, plan, shape, options) in itertools.product(WAYS, cases(n)):
        take_own_keys(way)
        x = gpu_tensors(plan.seq_len, **shape)
        bitwise = options.get("deterministic", True)
        mine = local_run(plan, rank, x, group=group, transport=transport, **options)
        every = local_run(plan, None, x, **options)
        found = differences(plan, rank, mine, every, bitwise)
        wrong += [f"{what}, {way}: {text}" for text in found]
        wrong += accuracy(what, plan, rank, x, mine[0], options)
    assert not wrong, "\n".join(wrong)
    return len(cp.hop_log(group))


def differences(plan, rank, mine, every, bitwise=True):
    """Which results of a rank are not those of the simulation; dq to rounding if not bitwise."""
    mine, every = (dict(zip(NAMES, x, strict=True)) for x in (mine, every))
    return differences_of(plan, rank, mine, every, bitwise)


def differences_of(plan, rank, mine, every, bitwise=True):
    """The same of results by their names."""
    begin, wrong = sum(plan.lengths[:rank]), []
    for name, ours in mine.items():
        theirs = every[name].narrow(2 if name == "lse" else 1, begin, plan.lengths[rank])
        same = torch.equal(ours, theirs)
        if not bitwise and name == "dq":
            same = torch.allclose(ours.float(), theirs.float(), atol=2e-2, rtol=2e-2)
        if not same:
            wrong.append(f"{name} differs from the simulation's")
    return wrong


def check_many_ranks(rank, n, gpus):
    """The same by "p2p" where ranks share GPUs: documents in lanes, sums that pass through ranks.

    Calls are in flight together, so that a lane that does not wait finds another call's data.
    """
    torch.cuda.set_device(rank % gpus)
    group = dist.new_group(backend="nccl")
    bounds, wrong = int32([0, 1, 700, 700, 2111, 3000, 4099]), []
    for layout, documents, more in itertools.product(
        LAYOUTS[::2], (None, bounds), ({}, {"deterministic": False}, {"window": 900})
    ):
        plan = cp.make_plan(4099, n, layout=layout, cu_seqlens=documents)
        take_own_keys("last" if more else "together")
        tensors = [gpu_tensors(4099, seed=seed) for seed in range(3)]
        options = {"group": group, "transport": "p2p", "timeout": 30.0, **more}
        calls = [local_run(plan, rank, x, **options) for x in tensors]
        for x, mine in zip(tensors, calls, strict=True):
            every = local_run(plan, None, x, **more)
            found = differences(plan, rank, mine, every, more.get("deterministic", True))
            wrong += [f"{layout} {documents is not None} {more}: {text}" for text in found]
    assert not wrong, "\n".join(wrong)
    return len(cp.hop_log(group))


def accuracy(what, plan, rank, x, out, options):
    if plan.seq_len < 300:
        return []
    documents = int32(plan.documents).cuda() if len(plan.documents) > 2 else None
    mask = {name: value for name, value in options.items() if name != "deterministic"}
    exact = reference.flash_attention(*(t.double() for t in x[:3]), cu_seqlens=documents, **mask)[0]
    single = lk.flash_attention(*x[:3], cu_seqlens=documents, **mask)
    mine, alone = (
        errors(a, cp.shard(plan, exact, 1, rank)).rms
        for a in (out, cp.shard(plan, single, 1, rank))
    )
    return (
        []
        if mine <= OUT_ERROR * alone
        else [f"{what}: error {mine:.3g}, of one device {alone:.3g}"]
    )


def the_same_again(rank, n, gpus):
    """Ten calls by "p2p" in flight, documents in lanes: the bits of the simulation each time."""
    torch.cuda.set_device(rank % gpus)
    group = dist.new_group(backend="nccl")
    plan = cp.make_plan(9001, n, cu_seqlens=int32([0, 1, 2100, 2111, 5000, 9001]))
    for D, options in itertools.product((64, 128), ({}, {"window": 1500})):
        x = gpu_tensors(9001, D=D)
        more = {"group": group, "transport": "p2p", "timeout": 30.0, **options}
        calls = [local_run(plan, rank, x, **more) for _ in range(10)]
        every = local_run(plan, None, x, **options)
        wrong = [text for mine in calls for text in differences(plan, rank, mine, every)]
        assert not wrong, (D, options, wrong)
    return len(cp.hop_log(group))


def keys_overwritten(rank, n):
    """By "p2p" keys leave from where they are: what is written there after a call comes later.

    Rank 0 has its keys from rank 2 long before rank 1, which is late, takes those of rank 0.
    """
    take_gpu(rank)
    group = dist.new_group(backend="nccl")
    positions = [torch.arange(64, 1128), torch.arange(1128, 2128), torch.arange(64)]
    plan = cp.make_plan(2128, n, positions=positions, cu_seqlens=int32([0, 128, 2128]))
    x = gpu_tensors(2128)[:3]
    begin = sum(plan.lengths[:rank])
    every = lk.ring_attention(
        *(cp.shard(plan, t, 1, None) for t in x), plan=plan, transport="sim"
    ).narrow(1, begin, plan.lengths[rank])
    for late in (0.0, 0.5):
        parts = [cp.shard(plan, t, 1, rank).clone() for t in x]
        torch.cuda.synchronize()
        dist.barrier()
        time.sleep(late if rank == 1 else 0.0)
        out = lk.ring_attention(*parts, plan=plan, group=group, transport="p2p", timeout=30.0)
        for t in parts:
            t.fill_(torch.nan)
        assert torch.equal(out, every), late


def many_calls(rank, n, transport):
    """Calls in flight together, growing and shrinking, two groups at once: no slot is mixed up."""
    groups = [gpu_group(rank), dist.new_group(backend="nccl")]
    lengths = (1100, 300, 2500, 700)
    plans = [cp.make_plan(T, n, layout=LAYOUTS[i % 3]) for i, T in enumerate(lengths)]
    tensors = [gpu_tensors(T, seed=i) for i, T in enumerate(lengths)]
    run = [
        local_run(plan, rank, x, group=group, transport=transport)
        for _ in range(5)
        for plan, x in zip(plans, tensors, strict=True)
        for group in groups
    ]
    every = [local_run(plan, None, x) for plan, x in zip(plans, tensors, strict=True)]
    for i, mine in enumerate(run):
        at = i // 2 % len(plans)
        begin, length = sum(plans[at].lengths[:rank]), plans[at].lengths[rank]
        for j, (ours, all_ranks) in enumerate(zip(mine, every[at], strict=True)):
            assert torch.equal(ours, all_ranks.narrow(2 if j == 1 else 1, begin, length)), (i, j)


def not_on_the_current_gpu(rank, n, transport):
    """Tensors on one GPU, while another is the current one of this process."""
    group = gpu_group(rank)
    plan, x = cp.make_plan(1100, n), gpu_tensors(1100)
    torch.cuda.set_device(1 - rank)
    mine = local_run(plan, rank, x, group=group, transport=transport)
    cp.synchronize(group)
    assert torch.cuda.current_device() == 1 - rank
    wrong = differences(plan, rank, mine, local_run(plan, None, x))
    assert not wrong, wrong


def what_auto_takes(rank, n):
    group = gpu_group(rank)
    plan, x = cp.make_plan(700, n), gpu_tensors(700)
    local_run(plan, rank, x, group=group)
    chosen = choose(group, x[0].device, "auto")
    hops = cp.hop_log(group)
    return type(chosen).__name__, [hop["phase"] for hop in hops], min(h["bytes_sent"] for h in hops)


def host_seconds_of_a_hop(rank, n, transport, count):
    """Seconds of post and wait of a hop of 1 MB in calls of the driver and of NCCL, and in our own.

    Each is the least of many rounds: the machine may be crowded.
    """
    from lctx_kernels.cp.transport import Hop

    group = gpu_group(rank)
    plan, x = cp.make_plan(8192, n), gpu_tensors(8192)
    local_run(plan, rank, x, group=group, transport=transport)
    at = choose(group, x[0].device, transport)
    memory = at.memory(1 << 21, x[0].device)
    half, peer = 1 << 20, 1 - rank
    hop = Hop("forward kv", 0, 0, ((peer, memory[:half]),), ((peer, memory[half:]),), (half,))
    found = []
    for _ in range(count // 100):
        begin, before = time.perf_counter(), at.ring.library_seconds
        for _ in range(100):
            at.wait(at.post(hop))
        spent, theirs = time.perf_counter() - begin, at.ring.library_seconds - before
        found.append((theirs / 100, (spent - theirs) / 100))
        cp.synchronize(group)  # a full queue would make the host wait for the GPU
    return [min(seconds) for seconds in zip(*found, strict=True)]


def nothing_travels(rank, n, transport):
    """The first call of a group, whose documents lie inside ranks; then one that sends."""
    group, x = gpu_group(rank), gpu_tensors(1100)
    for bounds in (int32([0, 550, 1100]), None):
        plan = cp.make_plan(1100, n, layout="contiguous", cu_seqlens=bounds)
        mine = local_run(plan, rank, x, group=group, transport=transport)
        assert not differences(plan, rank, mine, local_run(plan, None, x))


def refused_registration(rank, n):
    """Whether memory is registered where rank 1 may not do so; the bits of the simulation."""
    os.environ["NCCL_LOCAL_REGISTER"] = str(int(rank == 0))
    group = gpu_group(rank)
    plan, x = cp.make_plan(1100, n), gpu_tensors(1100)
    mine = local_run(plan, rank, x, group=group, transport="nccl")
    assert not differences(plan, rank, mine, local_run(plan, None, x))
    return choose(group, x[0].device, "nccl").registered


def memory_of_a_million_tokens(rank, n, transport):
    """Peak bytes of a forward and a backward, and those of the forecast."""
    take_gpu(rank)
    found, forecast = forward_and_backward(
        MILLION, SimpleNamespace(rank=rank, world_size=n), transport
    )
    promised = forecast.forward.memory, forecast.backward.memory
    return (found["fwd"], found["bwd"]), promised
