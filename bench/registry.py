"""What is measured: operations, shapes, competitors, and FLOP formulas; suites.py combines them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Pass = Literal["fwd", "fwd_bwd", "bwd"]
Measure = Literal["time", "flops", "bytes"]
PASSES: tuple[Pass, ...] = ("fwd", "fwd_bwd")  # of most suites; "bwd" is the second half alone
DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Shape:
    """One problem: the last Tq (None: all) of T positions as queries, Hq heads of D against Hkv."""

    T: int
    B: int = 1
    Hq: int = 8
    Hkv: int = 8
    D: int = 64
    dtype: str = "fp32"
    Tq: int | None = None
    causal: bool = True

    @property
    def queries(self) -> int:
        return self.T if self.Tq is None else self.Tq

    def __str__(self) -> str:
        heads = f"h{self.Hq}" if self.Hq == self.Hkv else f"h{self.Hq}/{self.Hkv}"
        length = f"t{self.T}" if self.Tq is None else f"q{self.Tq}-t{self.T}"
        mask = "" if self.causal else "-full"
        return f"b{self.B}-{length}-{heads}-d{self.D}-{self.dtype}{mask}"


def parse_shape(text: str, default: Shape) -> Shape:
    """A shape such as "8k" or "b2-t16k-h32/8-d128-bf16"; what is not said is that of `default`.

    >>> str(parse_shape("16k-h32/8-bf16", Shape(T=1)))
    'b1-t16384-h32/8-d64-bf16'
    """
    values: dict[str, Any] = {}
    for part in text.lower().split("-"):
        if part in DTYPES:
            values["dtype"] = part
        elif match := re.fullmatch(r"t?(\d+)(k?)", part):
            values["T"] = int(match[1]) * (1024 if match[2] else 1)
        elif match := re.fullmatch(r"h(\d+)(?:/(\d+))?", part):
            values["Hq"], values["Hkv"] = int(match[1]), int(match[2] or match[1])
        elif match := re.fullmatch(r"([bd])(\d+)", part):
            values[match[1].upper()] = int(match[2])
        elif match := re.fullmatch(r"q(\d+)", part):
            values["Tq"] = int(match[1])
        elif part == "full":
            values["causal"] = False
        else:
            raise ValueError(
                f"shape {text!r}: cannot read {part!r}; expected parts as 8k, b2, h32/8, d128,"
                " bf16, q1 (queries), full (no causal mask)"
            )
    shape = Shape(**{**default.__dict__, **values})
    sizes = (shape.T, shape.B, shape.Hq, shape.Hkv, shape.D, shape.queries)
    if min(sizes) < 1 or shape.Hq % shape.Hkv or shape.queries > shape.T:
        raise ValueError(
            f"shape {text!r}: sizes must be positive, Hq a multiple of Hkv, queries at most T"
        )
    return shape


@dataclass(frozen=True)
class Op:
    """One of our operations: its options in the benchmark and its necessary work."""

    name: str
    formula: str  # FLOPs of the forward, as flops() computes them
    options: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(
        default_factory=dict
    )  # options for the check at a short length


BRANCHES = {"segment_lengths": [2048, 4096, 8192, 16384], "dilation_rates": [1, 2, 4, 8]}
PAPER_OPTIONS: dict[str, dict[str, Any]] = {
    "infini": {"segment_len": 2048},
    "dilated": {
        "segment_lengths": [2048 << i for i in range(5)],
        "dilation_rates": [1 << i for i in range(5)],
    },
}
SMALL_BRANCHES = {"segment_lengths": [64, 128, 256, 512], "dilation_rates": [1, 2, 4, 8]}
OPS = {
    op.name: op
    for op in (
        Op("flash", "2*B*Hq*T*T*D"),
        Op("landmark", "2*B*Hq*T*T*D", {"block_size": 64}, {"block_size": 64}),
        Op("dilated", "sum over branches of 2*B*Hq*D*(T/w)*ceil(w/r)^2", BRANCHES, SMALL_BRANCHES),
        Op("infini", "2*B*T*D*(Hq*S + (Hq + Hkv)*D)", {"segment_len": 1024}, {"segment_len": 128}),
        Op("merge", "6*B*T*Hq*D"),
    )
}
# Ours without a public function: the step of a ring on (out, lse) in fp32, defined as flash is.
VARIANTS = {"flash_carry": "flash"}
LOCAL_SEGMENT = 2048
COPY_BYTES = 4 << 30
# What measures a floor instead of doing the same work: attention inside segments of 2048 tokens, as
# a batch, and a copy of 4 GiB from device to device.
BASELINES = {
    op.name: op
    for op in (Op("local", f"2*B*Hq*T*min({LOCAL_SEGMENT}, T)*D"), Op("copy", "0 (4 GiB copied)"))
}
# Names of PyTorch's own attention and of other packages; which of them run depends on the machine.
# "local-...-expanded" has its key/value heads repeated beforehand.
COMPETITORS = (
    "sdpa",
    "sdpa-cudnn",
    "sdpa-flash",
    "sdpa-efficient",
    "sdpa-math",
    "flex",
    "fa4",
    "torch-merge",
    "local-sdpa",
    "local-sdpa-cudnn",
    "local-sdpa-cudnn-expanded",
    "copy",
)
BACKWARD_FACTOR = 2.5  # five products instead of two


def op_options(name: str, device: str) -> dict[str, Any]:
    """Options of ours in the benchmark; on a GPU Infini's and LongNet's are the papers' own."""
    if name in VARIANTS:
        return {}
    return dict(
        PAPER_OPTIONS[name] if device == "cuda" and name in PAPER_OPTIONS else OPS[name].options
    )


def is_ours(candidate: str) -> bool:
    return candidate in OPS or candidate in VARIANTS


def op_of(candidate: str) -> str:
    """The operation whose definition and FLOPs a candidate has; "flash" for dense rivals."""
    if candidate in OPS:
        return candidate
    family = candidate.partition("-")[0]
    others = {**VARIANTS, "torch-merge": "merge"}
    return others.get(candidate, family if family in BASELINES else "flash")


def formula(op: str) -> str:
    return (OPS | BASELINES)[op].formula


def flops(op: str, shape: Shape, pass_: Pass, options: Mapping[str, Any]) -> float:
    """Necessary floating-point operations of a causal call; competitors count as dense ("flash").

    The products of the softmax part cost 2.5 times as much backward, Infini's memory products
    twice.

    >>> flops("flash", Shape(T=1024), "fwd", {}) == 2 * 8 * 1024**2 * 64
    True
    """
    B, T, Hq, Hkv, D = shape.B, shape.T, shape.Hq, shape.Hkv, shape.D
    memory = 0.0
    if op == "merge":
        return 6.0 * B * T * Hq * D * {"fwd": 1, "bwd": 2, "fwd_bwd": 3}[pass_]
    if op == "copy":
        return 0.0
    if op == "local":
        local = 2.0 * B * Hq * T * min(LOCAL_SEGMENT, T) * D
    elif op == "infini":
        local = 2.0 * B * Hq * T * min(options["segment_len"], T) * D
        memory = 2.0 * B * (Hq + Hkv * (2 if options.get("update") == "delta" else 1)) * T * D * D
    elif op == "dilated":
        branches = zip(options["segment_lengths"], options["dilation_rates"], strict=True)
        clipped = [(min(w, T), r) for w, r in branches]
        local = sum(2.0 * B * Hq * D * (T / w) * math.ceil(w / r) ** 2 for w, r in clipped)
    elif shape.Tq is None and shape.causal:
        local = 2.0 * B * Hq * T * T * D
    else:  # the last Tq positions, each of which sees nearly all keys
        local = 4.0 * B * Hq * shape.queries * T * D
    forward, backward = pass_ != "bwd", pass_ != "fwd"
    return local * (forward + BACKWARD_FACTOR * backward) + memory * (forward + 2 * backward)


def min_bytes(op: str, shape: Shape, pass_: Pass) -> int:
    """Bytes of inputs and outputs, each moved once; the backward reads five and writes three."""
    if op == "copy":
        return 2 * COPY_BYTES
    size = {"fp64": 8, "fp32": 4}.get(shape.dtype, 2)
    query_row = shape.B * shape.queries * shape.Hq * shape.D * size
    if op == "merge":
        return query_row * {"fwd": 3, "bwd": 6, "fwd_bwd": 9}[pass_]
    key_row = shape.B * shape.T * shape.Hkv * shape.D * size
    return {"fwd": 2, "bwd": 4, "fwd_bwd": 6}[pass_] * (query_row + key_row)


@dataclass(frozen=True)
class Goal:
    """`candidate` is to be at least `speed` times as fast as `versus`, better still `aim` times.

    Speed is the reciprocal of time, of time per FLOP ("flops") or of time per byte ("bytes").
    `as_cost`: shown as its reciprocal, "at most 1 / speed of the time".
    """

    candidate: str
    versus: str
    speed: float
    aim: float | None = None
    measure: Measure = "time"
    as_cost: bool = False
    label: str = ""  # the line of a table that it belongs to


@dataclass(frozen=True)
class Group:
    """Candidates timed against each other, round robin, on the same inputs.

    options: of our candidates in this group, where they are not the benchmark's.
    """

    shape: Shape
    pass_: Pass
    candidates: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = "".join(f" {name}={value}" for name, value in self.options)
        return f"{self.shape} {self.pass_}{options}"


MEMORY_LENGTHS = {"cpu": (2048, 4096, 8192), "cuda": (8192, 16384, 32768)}
MEMORY_CANDIDATES = {"cpu": ("sdpa", *OPS), "cuda": ("sdpa-cudnn", *OPS)}
QUICK_LENGTHS = (256, 512, 1024)


def quick(group: Group) -> Group:
    """The same group at a sixteenth of the length or less, without goals: shows that it runs."""
    length = max(min(group.shape.T // 16, 2048), 128)
    return replace(group, shape=replace(group.shape, T=length), goals=())
