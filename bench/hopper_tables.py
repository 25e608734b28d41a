"""The Hopper suite's results as Markdown tables: the goals in short, and every shape."""

import math
from collections.abc import Iterable

from lctx_kernels.demo_plot import short

from .results import Document, GoalResult, Row

WORK = {"time": "", "flops": " per FLOP", "bytes": " per byte"}
RIVALS = {
    "sdpa-cudnn": "cuDNN, dense",
    "local-sdpa-cudnn": "cuDNN inside segments",
    "local-sdpa-cudnn-expanded": "cuDNN inside segments",
    "flash": "the plain forward",
    "copy": "a copy",
}


def goals_table(document: Document, what: str) -> list[str]:
    """One line for each label: what is compared, the goal, and the range over the lengths."""
    lines = [
        f"| {what}, bf16 | against | lengths | goal | measured, worst to best | reached |",
        "| --- | --- | --- | --- | --- | --: |",
    ]
    for label in dict.fromkeys(goal.label for goal in document.goals):
        goals = binding(goal for goal in document.goals if goal.label == label)
        one, lengths = goals[0], [goal.shape["T"] for goal in goals]
        span = " to ".join(dict.fromkeys((short(min(lengths)), short(max(lengths)))))
        speeds = sorted(goal.speed for goal in goals if goal.speed is not None)
        measured, reached = "-", "-"
        if speeds:
            found = [_factor(one, speed) for speed in (speeds[0], speeds[-1])]
            measured = f"**{' to '.join(dict.fromkeys(found))}**"
            reached = f"{sum(goal.reached for goal in goals)} of {len(goals)}"
        lines.append(
            f"| {label} | {_kind(one)} of {RIVALS[one.versus]} | {span} "
            f"| {'at most ' if one.as_cost else ''}{one.shown(one.wanted):.3g}x "
            f"| {measured} | {reached} |"
        )
    return lines


def _factor(goal: GoalResult, speed: float) -> str:
    """Two decimals, or the third where two would round a miss to the goal."""
    wanted, text = f"{goal.shown(goal.wanted):.2f}", f"{goal.shown(speed):.2f}"
    missed = speed < goal.wanted and text == wanted
    return f"{goal.shown(speed):.3f}x" if missed else f"{text}x"


def _kind(goal: GoalResult) -> str:
    return ("time" if goal.as_cost else "speed") + WORK[goal.measure]


def binding(goals: Iterable[GoalResult]) -> list[GoalResult]:
    """Of several goals at one shape, as with two ways to run a rival, the one hardest to reach."""
    hardest: dict[int, GoalResult] = {}
    for goal in goals:
        other = hardest.get(goal.group)
        if other is None or _speed(goal) < _speed(other):
            hardest[goal.group] = goal
    return list(hardest.values())


def _speed(goal: GoalResult) -> float:
    return math.inf if goal.speed is None else goal.speed


def shapes_table(document: Document, *labels: str) -> list[str]:
    """Every shape of the goals whose label begins so: our time and rate, and the rival's time."""
    lines = [
        "| | B | T | Hq / Hkv | D | ours, ms | rate | of matmul peak | rival, ms | ratio |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    goals = [goal for goal in document.goals if goal.label.startswith(labels)]
    for label in dict.fromkeys(goal.label for goal in goals):
        for goal in binding(goal for goal in goals if goal.label == label):
            ours, rival = rows_of(goal, document)
            if ours is None or rival is None or goal.speed is None:
                continue
            assert ours.median_s and rival.median_s and ours.flops_per_s and ours.min_bytes
            rate, share = f"{ours.flops_per_s / 1e12:.0f} TFLOP/s", f"{ours.percent_of_peak:.0f} %"
            if goal.measure == "bytes":
                rate, share = f"{ours.min_bytes / ours.median_s / 1e12:.2f} TB/s", "-"
            s = goal.shape
            lines.append(
                f"| {label} | {s['B']} | {short(s['T'])} | {s['Hq']} / {s['Hkv']} | {s['D']} "
                f"| {1e3 * ours.median_s:.3f} | {rate} | {share} | {1e3 * rival.median_s:.3f} "
                f"| **{goal.shown(goal.speed):.2f}x** |"
            )
    return lines


DENSE_RIVALS = {
    "sdpa-cudnn": "cuDNN", "sdpa-flash": "FlashAttention-2", "fa4": "FlashAttention-4",
}  # fmt: skip


def rivals_table(document: Document) -> list[str]:
    """Rates of dense attention, ours and those of every rival that could be imported."""
    measured = {row.candidate for row in document.rows if row.median_s}
    rivals = [name for name in DENSE_RIVALS if name in measured]
    heads = " | ".join(f"{DENSE_RIVALS[name]} | ours is" for name in rivals)
    lines = [
        f"| dense attention, bf16 | D | mask | T | ours, TFLOP/s | {heads} |",
        "| --- | --: | --- | --: | --: |" + " --: | --: |" * len(rivals),
    ]
    for group in dict.fromkeys(row.group for row in document.rows):
        rows = {r.candidate: r for r in document.rows if r.group == group}
        ours = rows["flash"]
        if not ours.median_s or not ours.flops_per_s:
            continue
        beside = []
        for row in (rows[name] for name in rivals):
            if row.median_s and row.flops_per_s:
                rate, speed = row.flops_per_s / 1e12, row.median_s / ours.median_s
                beside.append(f"{rate:.0f} | **{speed:.2f}x**")
            else:
                beside.append("- | -")
        s = ours.shape
        what = {"fwd": "forward", "bwd": "backward"}[ours.pass_]
        lines.append(
            f"| {what} | {s['D']} | {'causal' if s['causal'] else 'full'} | {short(s['T'])} "
            f"| {ours.flops_per_s / 1e12:.0f} | {' | '.join(beside)} |"
        )
    return lines


def rows_of(goal: GoalResult, document: Document) -> tuple[Row | None, Row | None]:
    """The measured rows that a goal compares: ours and the rival's."""
    rows = {r.candidate: r for r in document.rows if r.group == goal.group and r.median_s}
    return rows.get(goal.candidate), rows.get(goal.versus)
