"""What is measured: operations, shapes, competitors, the suites made of them, and FLOP formulas."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Pass = Literal["fwd", "fwd_bwd"]
PASSES: tuple[Pass, ...] = ("fwd", "fwd_bwd")
DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Shape:
    """One problem: (B, T, Hq, D) queries against Hkv key/value heads."""

    T: int
    B: int = 1
    Hq: int = 8
    Hkv: int = 8
    D: int = 64
    dtype: str = "fp32"

    def __str__(self) -> str:
        heads = f"h{self.Hq}" if self.Hq == self.Hkv else f"h{self.Hq}/{self.Hkv}"
        return f"b{self.B}-t{self.T}-{heads}-d{self.D}-{self.dtype}"


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
        else:
            raise ValueError(
                f"shape {text!r}: cannot read {part!r}; expected parts as 8k, b2, h32/8, d128, bf16"
            )
    shape = Shape(**{**default.__dict__, **values})
    if min(shape.T, shape.B, shape.Hq, shape.Hkv, shape.D) < 1 or shape.Hq % shape.Hkv:
        raise ValueError(f"shape {text!r}: sizes must be positive and Hq a multiple of Hkv")
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
# Names of PyTorch's own attention and of other packages; which of them run depends on the machine.
COMPETITORS = (
    "sdpa",
    "sdpa-cudnn",
    "sdpa-flash",
    "sdpa-efficient",
    "sdpa-math",
    "flex",
    "fa4",
    "torch-merge",
)
BACKWARD_FACTOR = 2.5  # five products instead of two


def op_options(name: str, device: str) -> dict[str, Any]:
    """Options of an op in the benchmark; on a GPU Infini's and LongNet's are the papers' own."""
    return dict(
        PAPER_OPTIONS[name] if device == "cuda" and name in PAPER_OPTIONS else OPS[name].options
    )


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
        return 6.0 * B * T * Hq * D * (1 if pass_ == "fwd" else 3)
    if op == "infini":
        local = 2.0 * B * Hq * T * min(options["segment_len"], T) * D
        memory = 2.0 * B * (Hq + Hkv * (2 if options.get("update") == "delta" else 1)) * T * D * D
    elif op == "dilated":
        branches = zip(options["segment_lengths"], options["dilation_rates"], strict=True)
        clipped = [(min(w, T), r) for w, r in branches]
        local = sum(2.0 * B * Hq * D * (T / w) * math.ceil(w / r) ** 2 for w, r in clipped)
    else:
        local = 2.0 * B * Hq * T * T * D
    if pass_ == "fwd":
        return local + memory
    return local * (1 + BACKWARD_FACTOR) + memory * 3


def min_bytes(op: str, shape: Shape, pass_: Pass) -> int:
    """Bytes of inputs and outputs, each moved once; the backward reads five and writes three."""
    size = {"fp64": 8, "fp32": 4}.get(shape.dtype, 2)
    rows = shape.B * shape.T * shape.D * size
    if op == "merge":
        return rows * shape.Hq * (3 if pass_ == "fwd" else 9)
    forward = rows * (2 * shape.Hq + 2 * shape.Hkv)
    return forward if pass_ == "fwd" else forward + rows * (4 * shape.Hq + 4 * shape.Hkv)


@dataclass(frozen=True)
class Goal:
    """`candidate` is to run at `speed` times the speed of `versus`, or faster."""

    candidate: str
    versus: str
    speed: float


@dataclass(frozen=True)
class Group:
    """Candidates timed against each other, round robin, on the same inputs."""

    shape: Shape
    pass_: Pass
    candidates: tuple[str, ...]
    goals: tuple[Goal, ...] = ()

    def __str__(self) -> str:
        return f"{self.shape} {self.pass_}"


METHODS = ("infini", "dilated", "landmark")
LONG_GOALS = (
    Goal("infini", "sdpa", 6.0),
    Goal("dilated", "sdpa", 3.0),
    Goal("landmark", "flash", 0.8),
)


def cpu_reach() -> list[Group]:
    """The CPU's goals: dense attention near SDPA, the three methods well ahead of it at 16k."""
    dense = [
        Group(Shape(T=T, D=D), pass_, ("sdpa", "flash"), (Goal("flash", "sdpa", 0.8),))
        for T in (2048, 8192)
        for D in (64, 128)
        for pass_ in PASSES
    ]
    long = [
        Group(Shape(T=16384), pass_, ("sdpa", "flash", *METHODS), LONG_GOALS) for pass_ in PASSES
    ]
    return dense + long


def cpu_scaling() -> list[Group]:
    """Time against length, for the plot; 16k comes from the goals."""
    return [
        Group(Shape(T=T), "fwd_bwd", ("sdpa", "flash", *METHODS)) for T in (1024, 2048, 4096, 8192)
    ]


def gpu_dense() -> list[Group]:
    """Dense attention with Hq * D = 2048 against what ships with torch, and FlashAttention-4."""
    rivals = ("sdpa-cudnn", "sdpa-flash", "flex", "fa4")
    return [
        Group(
            Shape(T=T, B=B, Hq=2048 // D, Hkv=2048 // D, D=D, dtype="bf16"),
            pass_,
            (*rivals, "flash"),
        )
        for D in (64, 128)
        for B, T in ((16, 2048), (8, 4096), (2, 16384))
        for pass_ in PASSES
    ]


def gpu_methods() -> list[Group]:
    """The methods against dense cuDNN, and the merge against plain PyTorch."""
    shapes = {
        "landmark": [Shape(T=T, Hq=16, Hkv=16, D=128, dtype="bf16") for T in (2048, 8192, 32768)],
        "dilated": [Shape(T=T, Hq=16, Hkv=16, D=64, dtype="bf16") for T in (8192, 32768, 131072)],
        "infini": [
            Shape(T=T, Hq=32, Hkv=Hkv, D=128, dtype="bf16")
            for Hkv in (32, 8)
            for T in (8192, 32768)
        ],
    }
    groups = [
        Group(shape, pass_, ("sdpa-cudnn", op))
        for op in METHODS[::-1]
        for shape in shapes[op]
        for pass_ in PASSES
    ]
    merge = Shape(T=16384, Hq=16, Hkv=16, D=128, dtype="bf16")
    return groups + [Group(merge, pass_, ("torch-merge", "merge")) for pass_ in PASSES]


TIMED_SUITES = {
    "cpu": {"reach": cpu_reach, "scaling": cpu_scaling},
    "cuda": {"dense": gpu_dense, "methods": gpu_methods},
}
MEMORY_LENGTHS = {"cpu": (2048, 4096, 8192), "cuda": (8192, 16384, 32768)}
MEMORY_CANDIDATES = {"cpu": ("sdpa", *OPS), "cuda": ("sdpa-cudnn", *OPS)}
QUICK_LENGTHS = (256, 512, 1024)


def quick(group: Group) -> Group:
    """The same group at a sixteenth of the length, without goals: shows that it runs."""
    length = max(group.shape.T // 16, 128)
    return Group(Shape(**{**group.shape.__dict__, "T": length}), group.pass_, group.candidates)
