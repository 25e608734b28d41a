"""The one timer: every candidate once per round, medians over the rounds.

Candidates alternate because clocks and neighbours drift: timed one after the other, the same kernel
can read 10 % apart. On a CPU a sample is `torch.utils.benchmark`'s blocked_autorange (its
block-size search warms the caches up again after the other candidates). On a GPU a sample is one
pair of CUDA events around one call with cold L2.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.utils.benchmark import Timer

Candidate = Callable[[], object]

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU of today
LAUNCH_AHEAD_CYCLES = 2_000_000  # about 1 ms: the host queues a call before the GPU gets to it


@dataclass(frozen=True)
class Budget:
    """How long to measure. Rounds go on until `seconds` are spent, within the two bounds."""

    seconds: float = 12.0
    min_rounds: int = 3
    max_rounds: int = 15
    sample_seconds: float = 0.1  # least time of one CPU sample

    def rounds(self, round_seconds: float) -> int:
        wanted = int(self.seconds / max(round_seconds, 1e-9))
        return min(max(wanted, self.min_rounds), self.max_rounds)


QUICK = Budget(seconds=1.0, min_rounds=1, max_rounds=3, sample_seconds=0.01)


@dataclass
class Timing:
    """Seconds per call, one sample per round; `error` is set instead if a call raised."""

    samples: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def time_round_robin(
    candidates: Mapping[str, Candidate],
    device: torch.device | str = "cpu",
    budget: Budget | None = None,
) -> dict[str, Timing]:
    """Time every candidate once per round; each round starts one candidate further on.

    A candidate that raises is dropped and its error kept; the others go on.
    """
    budget = budget or Budget()
    on_gpu = torch.device(device).type == "cuda"
    sampler = _cuda_sampler() if on_gpu else _cpu_sampler(budget)
    timings = {name: Timing() for name in candidates}
    if on_gpu:  # compile and fill the allocator's cache; a CPU sample warms itself up
        for name, fn in candidates.items():
            _sample(timings[name], fn, sampler, keep=False)

    started, done, rounds = time.perf_counter(), 0, 1
    while done < rounds:
        names = [name for name, timing in timings.items() if timing.error is None]
        for name in _rotated(names, done):
            _sample(timings[name], candidates[name], sampler)
        done += 1
        if done == 1:
            rounds = budget.rounds(time.perf_counter() - started)
    return timings


def _sample(
    timing: Timing, fn: Candidate, sampler: Callable[[Candidate], float], keep: bool = True
) -> None:
    try:
        if keep:
            timing.samples.append(sampler(fn))
        else:
            fn()
    except Exception as error:  # one failing candidate must not end the benchmark
        timing.error = describe_error(error)


def describe_error(error: BaseException) -> str:
    """Type and first line of an exception, for a table; a line ending in a colon takes the next."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _rotated(names: list[str], by: int) -> list[str]:
    by = by % len(names) if names else 0
    return names[by:] + names[:by]


def _cpu_sampler(budget: Budget) -> Callable[[Candidate], float]:
    threads = torch.get_num_threads()

    def sample(fn: Candidate) -> float:
        timer = Timer("fn()", globals={"fn": fn}, num_threads=threads, timer=time.perf_counter)
        return timer.blocked_autorange(min_run_time=budget.sample_seconds).median

    return sample


def _cuda_sampler() -> Callable[[Candidate], float]:
    # Flushed by reading: written lines would stay in the cache, and the candidate would pay for
    # bringing them back to memory (a fifth of the time of a decoded token over 64k keys).
    flush = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(fn: Candidate) -> float:
        flush.sum()
        torch.cuda._sleep(LAUNCH_AHEAD_CYCLES)
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3

    return sample
