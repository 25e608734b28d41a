"""What the processes of python_tests/cp/test_ring_two_gpus.py do where something goes wrong."""

import functools
import itertools
import os
import signal
import time

import torch
import torch.distributed as dist
from cp_gpu_workers import differences, gpu_group, gpu_tensors, take_gpu
from cp_workers import local_run

import lctx_kernels as lk
from lctx_kernels import cp
from lctx_kernels.cp import device, failed
from lctx_kernels.cp.choose import choose


def strike(phase, step, what):
    """Let `what` happen once, when this rank posts this hop."""
    post = device.DeviceTransport.post

    def faulty(self, hop):
        if (hop.phase, hop.step) == (phase, step):
            device.DeviceTransport.post = post
            what()
        return post(self, hop)

    device.DeviceTransport.post = faulty


def caught(plan, rank, x, group, calls=1, **options):
    """(seconds, text, phase, step, peers) of the RingError of one of some calls; there must be one.

    By NCCL a rank whose last hop is late gets what it needs, and hears of it in the next call.
    """
    begin = time.monotonic()
    try:
        for _ in range(calls):
            local_run(plan, rank, x, group=group, **options)
            cp.synchronize(group)
    except cp.RingError as error:
        torch.cuda.synchronize()  # nothing hangs on the device either
        return time.monotonic() - begin, str(error), error.phase, error.step, error.peers
    raise AssertionError("no RingError")


def killed(rank, n, transport, phase, step, timeout):
    group = gpu_group(rank)
    plan, x = cp.make_plan(1100, n), gpu_tensors(1100)
    local_run(plan, rank, x, group=group, transport=transport)
    if rank == 1:
        strike(phase, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    found = caught(plan, rank, x, group, transport=transport, timeout=timeout)
    at = choose(group, x[0].device, transport)
    failed.let_go([at])
    failed.free([at])
    return found, at.memory_bytes > 0 and at.ring.memory != 0


def late_and_again(rank, n, transport, rounds, timeout):
    """One rank is late, in turn and in every phase; each time a new group works.

    What the old one held is free then.
    """
    take_gpu(rank)
    plan, x = cp.make_plan(1100, n), gpu_tensors(1100)
    every, found, old = local_run(plan, None, x), [], None
    begin = sum(plan.lengths[:rank])
    hops = itertools.cycle([("forward kv", 0), ("backward kv", 0), ("backward dkv", 1)])
    for round_, (phase, step) in zip(range(rounds), hops, strict=False):
        group = dist.new_group(backend="nccl")
        for i, ours in enumerate(local_run(plan, rank, x, group=group, transport=transport)):
            dim = 2 if i == 1 else 1
            assert torch.equal(ours, every[i].narrow(dim, begin, plan.lengths[rank]))
        if old is not None:
            assert old.ring.memory == 0 and old.memory_bytes == 0 and old.ring.let_go(0.0)
        old = choose(group, x[0].device, transport)
        assert not old.ring.let_go(0.0) and old.ring.memory != 0  # nothing has failed yet
        late = rank == round_ % n
        if late:
            strike(phase, step, functools.partial(time.sleep, timeout + 1))
        options = {"transport": transport, "timeout": timeout}
        calls = 2 if late and transport == "nccl" else 1
        found.append(caught(plan, rank, x, group, calls=calls, **options))
        dist.barrier()  # of the processes, by gloo
    return found


def stopped(rank, n, transport, phase, step, timeout):
    """Memory is short on rank 1 in the middle of a call, and it goes on to the next."""
    group = gpu_group(rank)
    plan, x = cp.make_plan(1100, n), gpu_tensors(1100)
    local_run(plan, rank, x, group=group, transport=transport)
    if rank == 0:
        return caught(plan, rank, x, group, transport=transport, timeout=timeout)

    def out_of_memory():
        raise MemoryError("no memory for this hop")

    strike(phase, step, out_of_memory)
    said = []
    for _ in range(2):
        try:
            local_run(plan, rank, x, group=group, transport=transport, timeout=timeout)
        except (MemoryError, cp.RingError) as error:
            said.append(f"{type(error).__name__}: {error}")
    torch.cuda.synchronize()
    return said


def captured(rank, n, transport):
    """What a captured call says; the next one, outside, is as ever."""
    group = gpu_group(rank)
    plan, x = cp.make_plan(1100, n), gpu_tensors(1100)
    every = local_run(plan, None, x)
    text = ""
    for i in range(3):
        mine = local_run(plan, rank, x, group=group, transport=transport)
        wrong = differences(plan, rank, mine, every)
        assert not wrong, wrong
        if i != 1:
            continue
        parts = [cp.shard(plan, t, 1, rank) for t in x[:3]]
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                lk.ring_attention(*parts, plan=plan, group=group, transport=transport)
        except NotImplementedError as error:
            text = str(error)
    return text


def ends_early(rank, n, transport):
    """Rank 1 ends while rank 0 has yet to begin."""
    group = gpu_group(rank)
    plan, x = cp.make_plan(1100, n), gpu_tensors(1100)
    every = local_run(plan, None, x)
    for _ in range(2):  # the first agrees, and makes memory
        mine = local_run(plan, rank, x, group=group, transport=transport)
        cp.synchronize(group)
        dist.barrier()
    if rank == 0:
        time.sleep(4)
    mine = local_run(plan, rank, x, group=group, transport=transport, timeout=20.0)
    if rank == 0:
        cp.synchronize(group)
        wrong = differences(plan, rank, mine, every)
        assert not wrong, wrong
    else:
        device._close_all()  # what ends a process that has not raised


def other_order(rank, n, transport, timeout):
    """Two communicators in flight, which one rank uses in the other order.

    A rank may get all that it needs when the other one gives up first, and hears of it in the next
    call.
    """
    take_gpu(rank)
    groups = [dist.new_group(backend="nccl") for _ in range(2)]
    plan, x = cp.make_plan(1100, n), gpu_tensors(1100)
    for group in groups:
        local_run(plan, rank, x, group=group, transport=transport)
    begin, errors_ = time.monotonic(), []
    parts = [cp.shard(plan, t, 1, rank) for t in x[:3]]
    while not errors_:
        for group in groups if rank == 0 else groups[::-1]:
            try:
                lk.ring_attention(
                    *parts, plan=plan, group=group, transport=transport, timeout=timeout
                )
            except cp.RingError as error:
                errors_.append(str(error))
        for group in groups:
            try:
                cp.synchronize(group)
            except cp.RingError as error:
                errors_.append(str(error))
        assert time.monotonic() - begin < 20, "no RingError"
    torch.cuda.synchronize()
    return time.monotonic() - begin, errors_


def other_length(rank, n, transport, timeout):
    """Another length in the first call, and in a later one."""
    group = gpu_group(rank)
    lengths = (700, 1100)
    plans, x = [cp.make_plan(T, n) for T in lengths], [gpu_tensors(T) for T in lengths]
    options = {"group": group, "transport": transport, "timeout": timeout}
    message = ""
    try:
        local_run(plans[rank], rank, x[rank], **options)
    except ValueError as error:
        message = str(error)
    local_run(plans[0], rank, x[0], **options)
    return message, caught(plans[rank], rank, x[rank], **options)
