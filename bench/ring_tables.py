"""The ring's results as Markdown tables."""

from lctx_kernels.demo_plot import short

from .results import Document, Row

RIVAL, SOLO = "fa2-ring", "ring-solo"
HOP_GOAL_US = 12
PASSES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward + backward"}


def _work(row: Row) -> str:
    s, options = row.shape, row.options
    kind = "packed documents" if "documents" in options else short(s["T"])
    more = ", deterministic" if options.get("deterministic") else ""
    return f"{kind} | {s['Hq']} / {s['Hkv']} | {PASSES[row.pass_]}{more}"


def _most(alone: Row) -> str:
    """Speed against the slowest GPU of all GPUs, each with as much work as it does in the time."""
    if not alone.gpus_s or not alone.median_s:
        return "-"
    return f"{sum(alone.median_s / seconds for seconds in alone.gpus_s):.2f}x"


def ring_goals_table(document: Document) -> list[str]:
    """Times of one GPU and of the ring, their ratio and its goal; host time and memory."""
    each = any(row.gpus_s for row in document.rows)
    lines = [
        "| tokens | Hq / Hkv | pass | one GPU, ms | ring, ms | speed | goal | TFLOP/s a GPU |",
        "| --- | --- | --- | --: | --: | --: | --: | --: |",
    ]
    if each:
        lines = [lines[0] + " the most |", lines[1] + " --: |"]
    rows = {(r.group, r.candidate): r for r in document.rows if r.group and r.median_s}
    gpus = int(document.machine["kind"].rpartition("x")[2])
    first = [r for (_, name), r in rows.items() if name == "flash"]
    for alone in first:
        ring = next(
            r for (group, name), r in rows.items() if group == alone.group and name[:5] == "ring-"
        )
        of_group = [g for g in document.goals if g.group == alone.group]
        goal = next((g for g in of_group if g.versus == "flash"), None)
        assert alone.median_s and ring.median_s and ring.flops_per_s
        wanted = "-"
        if goal is not None:
            wanted = f"{goal.wanted:g}x{'' if goal.reached else ' (missed)'}"
        lines.append(
            f"| {_work(alone)} | {1e3 * alone.median_s:.2f} | {1e3 * ring.median_s:.2f} "
            f"| **{alone.median_s / ring.median_s:.2f}x** | {wanted} "
            f"| {ring.flops_per_s / gpus / 1e12:.0f} |" + (f" {_most(alone)} |" if each else "")
        )
    hops = [r for r in document.rows if r.op == "hop" and r.median_s]
    if hops:
        times = [(r.candidate.removeprefix("hop-"), 1e6 * r.median_s) for r in hops]  # type: ignore[operator]
        said = (f"{name} {us:.1f}{' (missed)' if us > HOP_GOAL_US else ''}" for name, us in times)
        lines += ["", f"Host time of a hop, us (goal at most {HOP_GOAL_US}): {', '.join(said)}."]
    for memory in document.memory:
        lines.append(
            f"Peak of the {PASSES[memory.pass_]} at {short(memory.lengths[0])} tokens, Hq / Hkv "
            f"{memory.shape['Hq']} / {memory.shape['Hkv']}: {memory.extra_bytes[0] / 2**20:.0f} MiB"
            f" beyond inputs and results; the formula says {memory.promised_bytes[0] / 2**20:.0f}."
        )
    return lines


def ring_transports_table(document: Document) -> list[str]:
    """Speed against one GPU of every transport."""
    names = list(dict.fromkeys(r.candidate for r in document.rows if r.candidate[:5] == "ring-"))
    heads = " | ".join(name.removeprefix("ring-") for name in names)
    lines = [
        f"| tokens | Hq / Hkv | pass | {heads} |",
        "| --- | --- | --- |" + " --: |" * len(names),
    ]
    for alone in [r for r in document.rows if r.candidate == "flash" and r.median_s]:
        rings = {r.candidate: r for r in document.rows if r.group == alone.group}
        if not set(names) <= set(rings):
            continue
        speeds = " | ".join(
            f"{alone.median_s / r.median_s:.3f}x" if (r := rings[name]).median_s else "-"
            for name in names
        )
        lines.append(f"| {_work(alone)} | {speeds} |")
    return lines


def ring_rival_table(document: Document) -> list[str]:
    """TFLOP/s of a GPU of the ring and of FlashAttention-2's ring, and their ratio."""
    lines = [
        "| tokens | Hq / Hkv | pass | ring, TFLOP/s a GPU | on FlashAttention-2 | ratio | goal |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    gpus = int(document.machine["kind"].rpartition("x")[2])
    for rival in [r for r in document.rows if r.candidate == RIVAL and r.flops_per_s]:
        of_group = [r for r in document.rows if r.group == rival.group]
        ring = next(r for r in of_group if r.candidate[:5] == "ring-")
        goal = next(g for g in document.goals if g.group == rival.group and g.versus == RIVAL)
        assert ring.flops_per_s and rival.flops_per_s
        lines.append(
            f"| {_work(ring)} | {ring.flops_per_s / gpus / 1e12:.0f} "
            f"| {rival.flops_per_s / gpus / 1e12:.0f} "
            f"| **{ring.flops_per_s / rival.flops_per_s:.2f}x** "
            f"| {goal.wanted:g}x{'' if goal.reached else ' (missed)'} |"
        )
    return lines


def ring_solo_table(document: Document) -> list[str]:
    """Both ranks' times on one GPU, and the speed that two would have."""
    lines = [
        "| tokens | Hq / Hkv | pass | whole sequence, ms | rank 0 | rank 1 | speed of two |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    alone = {row.group: row for row in document.rows if row.candidate == "flash"}
    for ring in [row for row in document.rows if row.candidate == SOLO]:
        one = alone[ring.group]
        assert one.median_s and ring.median_s
        ranks = " | ".join(f"{1e3 * seconds:.2f}" for seconds in ring.gpus_s)
        lines.append(
            f"| {_work(ring)} | {1e3 * one.median_s:.2f} | {ranks} "
            f"| **{one.median_s / ring.median_s:.2f}x** |"
        )
    return lines
