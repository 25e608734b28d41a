"""The suites: groups of candidates, by device and name."""

from .hopper import hopper, hopper_rivals, hopper_scaling
from .hopper_backward import hopper_backward
from .registry import PASSES, Goal, Group, Shape

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
    "cuda": {
        "hopper": hopper,
        "backward": hopper_backward,
        "scaling": hopper_scaling,
        "rivals": hopper_rivals,
        "dense": gpu_dense,
        "methods": gpu_methods,
    },
}
