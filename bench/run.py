"""The benchmark's command line: `python -m bench.run` from the repository root, or `lctx bench`.

Without --op it runs the suites of this machine; with --op it times that operation at the shapes
asked for:

    python -m bench.run --op dilated --shapes 8k,32k --against sdpa,flex
    python -m bench.run --save                  # all suites, into bench/results/<machine-kind>/
    python -m bench.run --suite hopper --only landmark
"""

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from .machine import clocks_now, describe_machine, machine_line
from .memory import memory_suite
from .registry import (
    COMPETITORS,
    MEMORY_LENGTHS,
    OPS,
    PASSES,
    QUICK_LENGTHS,
    Group,
    Shape,
    op_of,
    parse_shape,
    quick,
)
from .results import Document, GoalResult, MemoryRow, Row, default_path, goal_results
from .runner import COPY, IsolatedRunner
from .suites import TIMED_SUITES
from .timing import QUICK, Budget

BUDGETS = {"cpu": Budget(), "cuda": Budget(seconds=0.6, min_rounds=3, max_rounds=11)}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def ad_hoc_groups(op: str, shapes: str, against: str, device: str) -> list[Group]:
    """Groups for --op: "dilated" is both passes, "dilated_fwd" the forward alone."""
    default = Shape(T=1, dtype="bf16" if device == "cuda" else "fp32")
    rivals = tuple(filter(None, against.split(",")))
    groups = []
    for name in op.split(","):
        base = next((b for b in OPS if name == b or name in (f"{b}_{p}" for p in PASSES)), None)
        unknown = [r for r in rivals if r not in COMPETITORS and r not in OPS]
        if base is None or unknown:
            raise typer.BadParameter(
                f"{(unknown or [name])[0]!r} is not known; operations: {', '.join(OPS)} (with"
                f" _fwd or _fwd_bwd for one pass), competitors: {', '.join(COMPETITORS)}"
            )
        passes = PASSES if name == base else (name.removeprefix(f"{base}_"),)
        others = [r for r in rivals if (op_of(r) == "merge") == (base == "merge") and r != base]
        for text in shapes.split(","):
            try:
                shape = parse_shape(text, default)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
            groups += [Group(shape, pass_, (*others, base)) for pass_ in passes]
    return groups


def show_rows(group: Group, rows: list[Row], goals: list[GoalResult]) -> None:
    """Print a group: median, spread, rate, percentage of matmul peak, errors; then its goals."""
    print(f"\n{group}")
    for row in rows:
        if row.status != "ok":
            print(f"  {row.candidate:<15} {row.status}: {row.reason}")
            continue
        spread = 100 * (row.q3_s - row.q1_s) / row.median_s
        errors = " ".join(f"{name.replace(' ', '-')}={e:.0e}" for name, e in row.errors.items())
        print(
            f"  {row.candidate:<15} {row.median_s * 1e3:10.3f} ms  IQR {spread:4.1f} %"
            f"  {row.rounds:2d} rounds {row.flops_per_s / 1e9:10.1f} GFLOP/s"
            f"  {row.percent_of_peak:5.1f} % of matmul"
            f"  {row.min_bytes / row.median_s / 1e9:7.1f} GB/s  {errors}"
        )
    for goal in goals:
        print(f"  goal: {goal_line(goal)}")


def goal_line(goal: GoalResult) -> str:
    """What was measured, what was wanted, and whether that is reached, on one line."""
    bound = "at most" if goal.as_cost else "at least"
    kind = {"time": "", "flops": " per FLOP", "bytes": " per byte"}[goal.measure]
    of = ("time" if goal.as_cost else "speed") + kind
    wanted = f"{bound} {goal.shown(goal.wanted):.3g}"
    if goal.aim is not None:
        wanted += f", aim {goal.shown(goal.aim):.3g}"
    if goal.speed is None:
        return f"{goal.candidate}: {of} of {goal.versus} not measured ({wanted})"
    mark = "aim reached" if goal.aim_reached else "reached" if goal.reached else "NOT reached"
    found = f"{goal.shown(goal.speed):.3f}x"
    return f"{goal.candidate}: {found} the {of} of {goal.versus} ({wanted}): {mark}"


def show_goals(document: Document) -> None:
    """Print every goal of a suite, one line each."""
    print(f"\ngoals of {document.suite}")
    for goal in document.goals:
        print(f"  {goal.label or goal.candidate:<30} {Shape(**goal.shape)!s:<34} {goal_line(goal)}")
    reached = sum(goal.reached for goal in document.goals)
    print(f"{reached} of {len(document.goals)} reached")


def show_memory(rows: list[MemoryRow]) -> None:
    """Print the peak extra memory of each candidate at each length."""
    print(f"\npeak memory beyond inputs and outputs, MiB, T = {rows[0].lengths}")
    for row in rows:
        what = f"  {row.candidate:<15} {row.pass_:<8}"
        if row.status != "ok":
            print(f"{what} {row.status}: {row.reason}")
            continue
        sizes = " ".join(f"{x / 2**20:9.1f}" for x in row.extra_bytes)
        print(
            f"{what} {sizes}   x{row.growth:.1f}, {'linear' if row.linear else 'NOT LINEAR'} in T"
        )


def run_suite(
    name: str,
    runner: IsolatedRunner,
    groups: list[Group],
    document: Document,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Run the groups one after another into `document`, printing and keeping each as it is done."""
    started = time.perf_counter()
    for number, group in enumerate(groups, 1):
        print(f"[{name} {number}/{len(groups)}] {group} ...", file=sys.stderr, flush=True)
        rows = runner.run(group)
        goals = goal_results(group, rows)
        for result in (*rows, *goals):
            result.group = number
        show_rows(group, rows, goals)
        document.rows += rows
        document.goals += goals
        document.peak_flops = {name: rate for name, rate in runner.peaks.items() if name != COPY}
        document.copy_bytes_per_s = runner.peaks.get(COPY)
        keep()
    formulas = {row.op: row.formula for row in document.rows if row.formula}
    print("\nforward FLOPs: " + "; ".join(f"{op} {formula}" for op, formula in formulas.items()))
    if document.goals:
        show_goals(document)
    rates = [f"{dtype} matmul {x / 1e12:.1f} TFLOP/s" for dtype, x in document.peak_flops.items()]
    if document.copy_bytes_per_s is not None:
        rates.append(f"copy {document.copy_bytes_per_s / 1e12:.2f} TB/s")
    print(f"{name}: {time.perf_counter() - started:.0f} s; {', '.join(rates)}", flush=True)


@app.command()
def bench(
    suite: Annotated[
        str, typer.Option(help="all, or one suite of this device: see --list.")
    ] = "all",
    only: Annotated[
        list[str],
        typer.Option(help="Groups with this candidate, or this in a goal's name; repeatable."),
    ] = [],  # noqa: B006
    op: Annotated[str, typer.Option(help="Time this operation instead of a suite.")] = "",
    shapes: Annotated[
        str, typer.Option(help="With --op: lengths or shapes, as 8k,32k-d128,b2-4k-h32/8-bf16.")
    ] = "8k",
    against: Annotated[str, typer.Option(help="With --op: competitors, comma-separated.")] = "sdpa",
    check: Annotated[
        bool, typer.Option(help="Compare with the fp64 definition before timing.")
    ] = True,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    save: Annotated[
        bool, typer.Option(help="Write each suite to bench/results/<machine-kind>/.")
    ] = False,
    quick_run: Annotated[
        bool, typer.Option("--quick", help="Short shapes, few rounds: does it run?")
    ] = False,
    backend: Annotated[str, typer.Option(help="backend= of our operations.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    list_only: Annotated[bool, typer.Option("--list", help="Print the suites and stop.")] = False,
) -> None:
    """Time the attentions against PyTorch's own, each checked against its definition first."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if device not in TIMED_SUITES:
        raise typer.BadParameter(f"{device!r}; expected cpu, cuda or auto", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch sees no CUDA GPU here", param_hint="--device")
    if save and (quick_run or not check or op or only):
        raise typer.BadParameter(
            "needs a whole, checked suite: without --quick, --no-check, --only and --op",
            param_hint="--save",
        )
    plan = _plan(suite, op, shapes, against, device, quick_run)
    if only:
        plan = _selected(plan, only)
    if list_only:
        for name, groups in plan.items():
            print(
                name, *(f"  {group}: {', '.join(group.candidates)}" for group in groups), sep="\n"
            )
        return
    machine = describe_machine(device)
    print(machine_line(machine))
    documents: list[Document] = []
    budget = QUICK if quick_run else BUDGETS[device]
    with IsolatedRunner(device, backend, check, budget) as runner:
        for name, groups in plan.items():
            document = Document(
                name,
                machine,
                checked=check,
                quick=quick_run,
                date=datetime.date.today().isoformat(),
            )
            documents.append(document)
            if name == "memory":
                lengths = QUICK_LENGTHS if quick_run else MEMORY_LENGTHS[device]
                document.memory = memory_suite(device, lengths, backend)
                show_memory(document.memory)
            else:
                run_suite(name, runner, groups, document, lambda: _keep(documents, json))
                document.machine = document.machine | clocks_now(device)
    raise typer.Exit(_report(documents, json, save))


def _plan(
    suite: str, op: str, shapes: str, against: str, device: str, quick_run: bool
) -> dict[str, list[Group]]:
    if op:
        plan = {"op": ad_hoc_groups(op, shapes, against, device)}
    else:
        plan = {name: make() for name, make in TIMED_SUITES[device].items()} | {"memory": []}
        if suite != "all":
            if suite not in plan:
                raise typer.BadParameter(
                    f"{suite!r}; suites of {device}: all, {', '.join(plan)}", param_hint="--suite"
                )
            plan = {suite: plan[suite]}
    if quick_run:
        return {name: list(dict.fromkeys(map(quick, groups))) for name, groups in plan.items()}
    return plan


def _selected(plan: dict[str, list[Group]], only: Sequence[str]) -> dict[str, list[Group]]:
    """The groups with a candidate of one of these names, or a goal with one in its label."""

    def wanted(group: Group) -> bool:
        labels = [goal.label for goal in group.goals]
        return any(o in group.candidates or any(o in x for x in labels) for o in only)

    chosen = {name: list(filter(wanted, groups)) for name, groups in plan.items()}
    chosen = {name: groups for name, groups in chosen.items() if groups}
    if not chosen:
        raise typer.BadParameter(
            f"{', '.join(only)}: no such candidate or goal", param_hint="--only"
        )
    return chosen


def _keep(documents: list[Document], json: Path | None) -> None:
    """Write what there is so far, so that a run that is cut short loses one group at most."""
    if json is None:
        return
    merged = dataclasses.replace(documents[0])
    for other in documents[1:]:
        merged.suite += f"+{other.suite}"
        merged.rows, merged.goals = merged.rows + other.rows, merged.goals + other.goals
        merged.memory = merged.memory + other.memory
        merged.peak_flops = merged.peak_flops | other.peak_flops
        merged.copy_bytes_per_s = merged.copy_bytes_per_s or other.copy_bytes_per_s
    merged.save(json)


def _report(documents: list[Document], json: Path | None, save: bool) -> int:
    failed = [line for document in documents for line in document.failed]
    _keep(documents, json)
    if json is not None:
        print(f"wrote {json}")
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    for document in documents if save else []:
        if document.failed:
            print(f"{document.suite} not saved: a failed check or case forbids it", file=sys.stderr)
            continue
        path = default_path(document.machine["kind"], document.suite)
        document.save(path)
        print(f"wrote {path}")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 1 if a check or a case failed."""
    app(args=arguments, prog_name="bench")


if __name__ == "__main__":
    main()
