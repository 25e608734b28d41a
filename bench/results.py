"""The JSON of a suite, one document per file: bench/results/<machine-kind>/<suite>.json."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from lctx_kernels._measure import write_json

from .machine import ROOT
from .registry import Group, Pass, Shape

SCHEMA = 1
RESULTS = ROOT / "bench" / "results"
# ok; unsupported: cannot run here, with the reason; check_failed: not timed; error: it raised
STATUSES = ("ok", "unsupported", "check_failed", "error")


@dataclass
class Row:
    """One candidate at one shape: seconds, FLOP/s, and errors as relative RMS against fp64."""

    candidate: str
    op: str
    pass_: str
    shape: dict[str, Any]
    status: str
    reason: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    median_s: float | None = None
    q1_s: float | None = None
    q3_s: float | None = None
    rounds: int = 0
    flops: float | None = None
    formula: str | None = None  # of the forward's FLOPs
    flops_per_s: float | None = None
    percent_of_peak: float | None = None  # of the matmul measured in the same process
    min_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    group: int = 0  # rows and goals of one group of a suite have the same number
    gpus_s: list[float] = field(default_factory=list)  # on several: the median of each
    calls: int = 1  # in a row, of a sample; times are of one


@dataclass
class GoalResult:
    """Speed of `candidate` against `versus` in the same rounds, by the measure of registry.Goal."""

    candidate: str
    versus: str
    pass_: str
    shape: dict[str, Any]
    wanted: float
    speed: float | None
    aim: float | None = None
    measure: str = "time"
    as_cost: bool = False
    label: str = ""
    group: int = 0

    @property
    def reached(self) -> bool:
        return self.speed is not None and self.speed >= self.wanted

    @property
    def aim_reached(self) -> bool:
        return self.speed is not None and self.aim is not None and self.speed >= self.aim

    def shown(self, speed: float) -> float:
        """A speed as this goal states it: itself, or the cost that is its reciprocal."""
        return 1 / speed if self.as_cost else speed


@dataclass
class MemoryRow:
    """Peak bytes beyond inputs and outputs at growing lengths."""

    candidate: str
    pass_: str
    shape: dict[str, Any]  # without T
    lengths: list[int]
    extra_bytes: list[int]
    status: str
    reason: str | None = None
    growth: float | None = None  # longest over shortest
    linear: bool | None = None
    promised_bytes: list[int] = field(default_factory=list)  # by a formula; 5 % more is a failure


@dataclass
class Document:
    """A suite's results with the machine they came from."""

    suite: str
    machine: dict[str, Any]
    peak_flops: dict[str, float] = field(default_factory=dict)
    copy_bytes_per_s: float | None = None
    checked: bool = False
    quick: bool = False
    date: str = ""
    rows: list[Row] = field(default_factory=list)
    goals: list[GoalResult] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def failed(self) -> list[str]:
        """What forbids publishing: failed checks, errors, and memory that is not linear."""
        bad = [r for r in (*self.rows, *self.memory) if r.status in ("check_failed", "error")]
        lines = [f"{r.candidate} {r.pass_} {Shape(**{'T': 0, **r.shape})}: {r.reason}" for r in bad]
        grown = [m for m in self.memory if m.linear is False]
        lines += [
            f"{m.candidate} {m.pass_}: peak memory grows {m.growth:.1f}x over {m.lengths}"
            for m in grown
        ]
        return lines + [
            f"{m.candidate} {m.pass_}: {m.extra_bytes} bytes, promised {m.promised_bytes}"
            for m in self.memory
            if any(e > 1.05 * p for e, p in zip(m.extra_bytes, m.promised_bytes, strict=False))
        ]

    def save(self, path: Path | str) -> None:
        write_json(path, dataclasses.asdict(self))


def default_path(kind: str, suite: str) -> Path:
    return RESULTS / kind / f"{suite}.json"


def load(path: Path | str) -> Document:
    """Read and validate a document. Raises ValueError naming the file and what is wrong."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return parse(data)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a benchmark result: {error}") from None


def parse(data: dict[str, Any]) -> Document:
    """A document from its JSON; unknown or missing fields and values outside their range raise."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"expected an object with schema {SCHEMA}")
    parts = {"rows": Row, "goals": GoalResult, "memory": MemoryRow}
    document = Document(
        **{**data, **{name: [kind(**x) for x in data[name]] for name, kind in parts.items()}}
    )
    for row in document.rows:
        _require(
            row.status in STATUSES and row.pass_ in get_args(Pass),
            f"status or pass of {row.candidate}",
        )
        _require(
            (row.status == "ok") == (row.median_s is not None),
            f"time of {row.candidate} ({row.status})",
        )
        _require(row.median_s is None or row.median_s > 0, f"time of {row.candidate}")
        Shape(**row.shape)
    for memory in document.memory:
        _require(
            memory.status in STATUSES and memory.pass_ in get_args(Pass),
            f"status or pass of {memory.candidate}",
        )
        complete = len(memory.extra_bytes) == len(memory.lengths)
        _require(memory.status != "ok" or complete, f"lengths of {memory.candidate}")
    return document


def goal_results(group: Group, rows: list[Row]) -> list[GoalResult]:
    """The goals of a group, from the rows just measured for it."""
    measured = {row.candidate: row for row in rows if row.median_s}
    shape = dataclasses.asdict(group.shape)
    results = []
    for goal in group.goals:
        ours, theirs = measured.get(goal.candidate), measured.get(goal.versus)
        speed = None
        if ours is not None and theirs is not None:
            speed = _speed(ours, goal.measure) / _speed(theirs, goal.measure)
        results.append(
            GoalResult(goal.candidate, goal.versus, group.pass_, shape, goal.speed, speed,
                       goal.aim, goal.measure, goal.as_cost, goal.label)
        )  # fmt: skip
    return results


def _speed(row: Row, measure: str) -> float:
    work = {"time": 1.0, "flops": row.flops, "bytes": row.min_bytes}[measure]
    assert work and row.median_s
    return work / row.median_s


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"wrong {what}")
