"""The goals of the Hopper backward: groups for one H200 in bf16, of the backward alone.

Rivals and shapes are those of the forward (hopper.py). Everything counts: statistics of the rows,
conversions, sums.
"""

from .hopper import CUDNN, DENSE_LENGTHS, INFINI_LENGTHS, dilated, infini, landmark, shape
from .registry import Goal, Group

LANDMARK_GOALS = (
    (128, 64, 0.78, 0.95),
    (64, 64, 0.65, 0.85),
    (128, 51, 0.65, 0.85),
    (128, 256, 0.65, 0.85),
)


def hopper_backward() -> list[Group]:
    """Every goal of the backward."""
    # At 1M the graphs of both rivals do not fit the memory together.
    lengths = INFINI_LENGTHS[:-1]
    return [
        *_dense(),
        *landmark("bwd", LANDMARK_GOALS),
        *dilated("bwd", 1.4, 1.05),
        *infini("bwd", 1.25, 1.05, lengths),
    ]


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
