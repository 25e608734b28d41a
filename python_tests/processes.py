"""Several processes with a gloo group, for the tests of python_tests/cp."""

import faulthandler
import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from multiprocessing import connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "lctx_kernels"])


class Outcome(NamedTuple):
    """What a rank returned or raised, or error = "died"."""

    value: Any = None
    error: str | None = None
    text: str = ""
    fields: dict[str, Any] | None = None
    seconds: float = 0.0


STACKS_AFTER = 60.0  # seconds, then a rank that still runs says where
ALONE = 30.0  # seconds that a rank may go on after another one has raised or died


def _child(function, rank, world_size, port, arguments, pipe):
    faulthandler.enable()
    faulthandler.dump_traceback_later(STACKS_AFTER)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    start = time.monotonic()
    try:
        outcome = Outcome(function(rank, world_size, *arguments))
    except Exception as error:
        fields = {n: v for n, v in vars(error).items() if isinstance(v, int | str | tuple)}
        text = "".join(traceback.format_exception(error))
        outcome = Outcome(None, type(error).__name__, text, fields)
    pipe.send(outcome._replace(seconds=time.monotonic() - start))
    pipe.close()
    os._exit(0)  # a group whose peers are gone need not be taken down in order


def run_ranks(function, world_size, *arguments, limit=120.0):
    """function(rank, world_size, *arguments) in as many processes; the outcome of each.

    This process keeps the store, as torchrun does, so that it outlives every rank.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    for rank in range(world_size):
        receive, send = CONTEXT.Pipe(duplex=False)
        task = (function, rank, world_size, store.port, arguments, send)
        process = CONTEXT.Process(target=_child, args=task, daemon=True)
        process.start()
        send.close()
        processes.append(process)
        pipes.append(receive)
    outcomes = _outcomes(pipes, limit)
    for process in processes:
        if len(outcomes) < world_size:
            process.kill()
        process.join(10)
    if len(outcomes) < world_size:
        late = [rank for rank in range(world_size) if rank not in outcomes]
        said = "".join(f"\nrank {r}: {o.error}\n{o.text}" for r, o in outcomes.items() if o.error)
        raise AssertionError(f"ranks {late} of {world_size} still ran at the end.{said}")
    return [outcomes[rank] for rank in range(world_size)]


def _outcomes(pipes, limit):
    """Of every rank that ends in time: before the limit, and soon after one that has failed."""
    deadline, outcomes = time.monotonic() + limit, {}
    while len(outcomes) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in outcomes]
        ready = connection.wait(waiting, max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                outcomes[rank] = pipe.recv()
            except EOFError:
                outcomes[rank] = Outcome(error="died")
            if outcomes[rank].error is not None:
                deadline = min(deadline, time.monotonic() + ALONE)
    return outcomes


def run_ranks_well(function, world_size, *arguments):
    """The values that all ranks returned; fails with the trace of the first that raised."""
    outcomes = run_ranks(function, world_size, *arguments)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank}:\n{outcome.text}"
    return [outcome.value for outcome in outcomes]
