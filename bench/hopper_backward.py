"""The goals of the Hopper backward: groups for one H200 in bf16, of the backward alone.

Rivals and shapes are those of the forward (hopper.py). Everything counts: statistics of the rows,
conversions, sums.
"""

from .hopper import (
    CUDNN,
    DENSE_LENGTHS,
    DILATED_LENGTHS,
    INFINI_LENGTHS,
    KIBI,
    LANDMARK_LENGTHS,
    LOCAL,
    shape,
)
from .registry import Goal, Group


def hopper_backward() -> list[Group]:
    """Every goal of the backward."""
    return [*_dense(), *_landmark(), *_dilated(), *_infini()]


def _dense() -> list[Group]:
    """Speed against cuDNN: D, causal, deterministic, goal, aim."""
    table = (
        (128, True, False, 1.03, 1.13),
        (128, False, False, 1.0, 1.13),
        (64, True, False, 1.03, None),
        (64, False, False, 1.03, None),
        (256, True, False, 0.85, 1.0),
        (128, True, True, 0.90, 1.0),
    )
    groups = []
    for D, causal, deterministic, speed, aim in table:
        label = f"flash, D {D}, {'causal' if causal else 'full'}"
        label += ", deterministic" if deterministic else ""
        goal = Goal("flash", CUDNN, speed, aim, label=label)
        options = (("deterministic", True),) if deterministic else ()
        lengths = DENSE_LENGTHS if D < 256 else DENSE_LENGTHS[:3]
        groups += [
            Group(shape(T, D, causal=causal), "bwd", (CUDNN, "flash"), (goal,), options)
            for T in lengths
        ]
    return groups


def _landmark() -> list[Group]:
    """Speed against dense cuDNN: D, block size, goal, aim."""
    table = ((128, 64, 0.78, 0.95), (64, 64, 0.65, 0.85), (128, 51, 0.65, 0.85),
             (128, 256, 0.65, 0.85))  # fmt: skip
    groups = []
    for D, block_size, speed, aim in table:
        label = f"landmark, D {D}, block {block_size}"
        goal = Goal("landmark", CUDNN, speed, aim, label=label)
        options = (("block_size", block_size),)
        groups += [
            Group(shape(T, D), "bwd", (CUDNN, "landmark"), (goal,), options)
            for T in LANDMARK_LENGTHS
        ]
    return groups


def _dilated() -> list[Group]:
    """Time over that of the same FLOPs by cuDNN at length 2048."""
    goal = Goal(
        "dilated", LOCAL, 1 / 1.4, 1 / 1.05, measure="flops", as_cost=True, label="dilated, D 64"
    )
    return [
        Group(shape(T, 64, B=1, Hq=16), "bwd", (LOCAL, "dilated"), (goal,)) for T in DILATED_LENGTHS
    ]


def _infini() -> list[Group]:
    """Time over that of the local part alone by cuDNN, with grouped or with repeated heads."""
    groups = []
    for Hkv in (32, 8):
        rivals = (LOCAL,) if Hkv == 32 else (LOCAL, f"{LOCAL}-expanded")
        for update in ("linear", "delta"):
            label = f"infini, {update}, Hkv {Hkv}"
            goals = tuple(
                Goal("infini", rival, 1 / 1.25, 1 / 1.05, as_cost=True, label=label)
                for rival in rivals
            )
            options = (("segment_len", 2 * KIBI), ("update", update))
            groups += [
                Group(shape(T, 128, B=1, Hq=32, Hkv=Hkv), "bwd", (*rivals, "infini"), goals,
                      options)
                for T in INFINI_LENGTHS[:-1]  # at 1M both graphs together do not fit the memory
            ]  # fmt: skip
    return groups
