"""Measures groups: in this process (Runner), or in one that may die (IsolatedRunner)."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from .candidates import Call, Inputs, build, make_inputs
from .check import Check, Checker, mask
from .machine import measure_copy, measure_peak
from .registry import (
    DTYPES,
    Group,
    flops,
    formula,
    is_ours,
    min_bytes,
    op_of,
    op_options,
)
from .results import Row
from .timing import QUICK, Budget, Timing, describe_error, time_round_robin

GROUP_TIMEOUT_S = {"cpu": 600, "cuda": 60}  # a hanging kernel is to cost little
COPY = "copy"  # key of the bytes per second of a copy, beside the FLOP/s of matmuls by dtype


class Runner:
    """Runs groups on one device: set up, check, time; a failing candidate is a row, not the end."""

    def __init__(self, device: str, backend: str, check: bool, budget: Budget) -> None:
        self.device, self.backend, self.budget = device, backend, budget
        self.checker = Checker(device, backend) if check else None
        self.peaks: dict[str, float] = {}

    def run(self, group: Group) -> list[Row]:
        """The rows of a group, in the order of its candidates."""
        try:
            return self._run(group)
        finally:
            if self.device == "cuda":  # the next group's largest tensors need a whole
                torch.cuda.empty_cache()

    def _run(self, group: Group) -> list[Row]:
        kind = "merge" if op_of(group.candidates[-1]) == "merge" else "attention"
        inputs = make_inputs(group.shape, self.device, kind, pass_=group.pass_)
        rows: dict[str, Row] = {}
        calls: dict[str, Call] = {}
        for name in group.candidates:
            row = rows[name] = self._row(name, group)
            try:
                calls[name] = build(name, inputs, group.pass_, row.options, self.backend)
                result = self._check(name, group, inputs, calls[name], row)
            except Exception as error:  # reported in the row
                row.reason = describe_error(error)
                row.status = _failure(name, row.reason)
                calls.pop(name, None)
                continue
            if result.failures:
                row.status, row.reason = "check_failed", "; ".join(result.failures)
                calls.pop(name)
        if group.goals and not any(goal.candidate in calls for goal in group.goals):
            for name in calls:
                rows[name].status = "unsupported"
                rows[name].reason = "not timed: nothing of ours runs beside it"
            calls.clear()
        timings = time_round_robin(
            {name: call.run for name, call in calls.items()}, self.device, self.budget
        )
        for name, timing in timings.items():
            self._fill(rows[name], group, timing)
        return list(rows.values())

    def peak(self, dtype: str) -> float:
        """Matmul FLOP/s of this process, measured when first asked for; on a GPU copies too."""
        budget = QUICK if self.budget == QUICK else None
        if dtype not in self.peaks:
            self.peaks[dtype] = measure_peak(self.device, getattr(torch, DTYPES[dtype]), budget)
        if self.device == "cuda" and COPY not in self.peaks:
            self.peaks[COPY] = measure_copy(self.device, budget)
        return self.peaks[dtype]

    def _row(self, name: str, group: Group) -> Row:
        options = {}
        if is_ours(name):
            options = op_options(name, self.device) | dict(group.options) | mask(group.shape.causal)
        return Row(
            name, op_of(name), group.pass_, dataclasses.asdict(group.shape), "ok", options=options
        )

    def _check(self, name: str, group: Group, inputs: Inputs, call: Call, row: Row) -> Check:
        if self.checker is None:
            return Check()
        result = self.checker.check(name, group.shape, group.pass_, inputs, call, row.options)
        row.errors, row.limits = result.errors, result.limits
        return result

    def _fill(self, row: Row, group: Group, timing: Timing) -> None:
        if timing.error is not None:
            row.status, row.reason = _failure(row.candidate, timing.error), timing.error
            return
        row.median_s, (row.q1_s, row.q3_s) = timing.median, timing.quartiles
        row.rounds, row.formula = len(timing.samples), formula(row.op)
        row.flops = flops(row.op, group.shape, group.pass_, row.options)
        row.min_bytes = min_bytes(row.op, group.shape, group.pass_)
        row.flops_per_s = row.flops / row.median_s
        row.percent_of_peak = 100 * row.flops_per_s / self.peak(group.shape.dtype)


def _failure(name: str, reason: str) -> str:
    """A rival that does not run here, or a refusal, is "unsupported"; the rest is an error."""
    refused = reason.startswith(NotImplementedError.__name__)
    return "unsupported" if refused or not is_ours(name) else "error"


class IsolatedRunner:
    """A Runner in a worker process: a crash or a hang costs one group, then a new one starts."""

    def __init__(self, device: str, backend: str, check: bool, budget: Budget) -> None:
        self.peaks: dict[str, float] = {}
        self._timeout = GROUP_TIMEOUT_S[device]
        self._settings = (device, backend, check, budget, torch.get_num_threads())
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "IsolatedRunner":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def run(self, group: Group) -> list[Row]:
        """The rows of a group; all are errors if the worker failed or took too long."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, _start_worker, self._settings)
        try:
            rows, peaks = self._pool.submit(_run_in_worker, group).result(self._timeout)
        except Exception as error:  # a dead or hanging worker, or inputs that do not fit
            reason = {
                BrokenProcessPool: "the measuring process died",
                FutureTimeoutError: f"took more than {self._timeout} s",
            }.get(type(error), describe_error(error))
            self._stop()
            shape = dataclasses.asdict(group.shape)
            return [
                Row(name, op_of(name), group.pass_, shape, "error", reason)
                for name in group.candidates
            ]
        self.peaks |= peaks
        if any("CUDA error" in (row.reason or "") for row in rows):
            self._stop()  # such an error stays with its process
        return rows

    def _stop(self) -> None:
        if self._pool is not None:
            workers = list((self._pool._processes or {}).values())
            for worker in workers:
                worker.kill()
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


_runner: Runner | None = None


def _start_worker(device: str, backend: str, check: bool, budget: Budget, threads: int) -> None:
    global _runner
    torch.set_num_threads(threads)
    _runner = Runner(device, backend, check, budget)


def _run_in_worker(group: Group) -> tuple[list[Row], dict[str, float]]:
    assert _runner is not None
    return _runner.run(group), _runner.peaks
