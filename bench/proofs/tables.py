"""Tables and the plot of the proofs, from their JSON alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lctx_kernels.demo_plot import short

from ..machine import machine_line
from .goals import STEP_GOALS

ORDER = ("full", "dilated", "infini", "infini-delta", "landmark")
COLOURS = {
    "full": "#6b6b6b", "dilated": "#e69f00", "infini": "#009e73", "infini-delta": "#56b4e9",
    "landmark, k = 2": "#d55e00", "landmark, k = 4": "#cc79a7",
}  # fmt: skip
MISSING = "_Not measured yet: `python -m bench.proofs` measures it._"


def read(folder: Path, name: str) -> Any:
    """A committed result, or None."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def conditions(results: Sequence[Any]) -> str:
    """A line for each machine, with its commits and days."""
    runs_of: dict[str, set[tuple[str, str]]] = {}
    for x in results:
        line, commit = machine_line(x["machine"]).rsplit(" ", 1)
        runs_of.setdefault(line, set()).add((commit, x["date"]))
    lines = []
    for line, runs in sorted(runs_of.items()):
        commits, days = (", ".join(sorted(set(names))) for names in zip(*runs, strict=True))
        lines.append(f"{line}{'s' if ', ' in commits else ''} {commits}; {days}.")
    return " ".join(lines)


def runs(folder: Path) -> list[Any]:
    """The committed training runs in the order of tables."""
    found = [read(folder, f"train-{method}") for method in ORDER]
    return [run for run in found if run is not None]


def training(folder: Path) -> str:
    """Pass keys by length and bits per byte by context, a row for each way to read a model."""
    results = runs(folder)
    if not results:
        return MISSING
    times = [1 << i for i in range(len(next(iter(results[0]["passkey"].values()))))]
    contexts = [x["context"] for x in next(iter(results[0]["bits_per_byte"].values()))][::2]
    head = ["", "steps"] + [f"{n}x" for n in times]
    head += [f"{short(n)} B" for n in contexts]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --: |" * (len(head) - 1)]
    for run in results:
        for name, found in run["passkey"].items():
            hits = {
                x["length"] // found[0]["length"]: f"{100 * x['accuracy']:.0f} %" for x in found
            }
            bits = {
                x["context"]: f"{x['bits_per_byte']:.2f}"
                for x in run["bits_per_byte"].get(name, [])
            }
            cells = [name, str(run["curve"][-1]["step"])]
            cells += [hits.get(n, "-") for n in times] + [bits.get(n, "-") for n in contexts]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", conditions(results)])


def steps(folder: Path) -> str:
    """Time of a training step beside the same model with PyTorch's attention."""
    results = [x for x in (read(folder, name) for name in ("steps", "steps-gemma")) if x]
    if not results:
        return MISSING
    lines = [
        "| shape | tokens | method | step, s | against | step, s | ratio | goal |",
        "| --- | --: | --- | --: | --- | --: | --: | --: |",
    ]
    for case in (case for result in results for case in result["found"]):
        for name, (rival, goal, least) in STEP_GOALS.items():
            if name not in case.get("ratios", {}):
                continue
            ratio, times = case["ratios"][name], case["seconds"]
            wanted = f"at most {goal:.2f}x{'' if ratio <= goal else ' (missed)'}"
            wanted = wanted if case["tokens"] >= least else "-"
            shape = case["shape"] + (", recomputed" if case["checkpointing"] else "")
            lines.append(
                f"| {shape} | {short(case['tokens'])} | {name} | {times[name]:.3f} | {rival} "
                f"| {times[rival]:.3f} | **{ratio:.2f}x** | {wanted} |"
            )
    return "\n".join([*lines, "", conditions(results)])


def headline(folder: Path) -> str:
    """Training steps and a prompt of models that needed two GPUs elsewhere."""
    lines = [
        "| run | GPUs | tokens | time | tokens/s | peak memory of a GPU, GiB |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    whole = "llama-1m-whole" if read(folder, "llama-1m-whole") else "llama-1m"
    results = []
    for name in (
        f"{name}{gpus}"
        for name in ("gemma-32k-heads-of-256", "gemma-32k", whole)
        for gpus in ("", "-2-gpus")
    ):
        result = read(folder, name) or read(folder, name.replace("-whole", ""))
        if result is None or "error" in result["found"]:
            continue
        x = result["found"]
        results.append(result)
        tokens = short(x["tokens"])
        if not x["whole"]:
            tokens = f"{short(x['segments_done'] * x['segment'])} of {tokens}"
        seconds = x["seconds_of_text"] + x.get("seconds_of_gradients", 0)
        lines.append(
            f"| {x['shape']}, {x['optimizer']}, a step, segments of {x['segment']} "
            f"| {x.get('gpus', 1)} | {tokens} | {seconds + x['seconds_of_optimizer']:.1f} s "
            f"| {x['tokens_per_second']:.0f} | {x['peak_bytes'] / 2**30:.1f} |"
        )
    for name in ("prompt-32k", "prompt-32k-2-gpus"):
        result = read(folder, name)
        if result is None or "error" in result["found"]:
            continue
        x = result["found"]
        results.append(result)
        gpus, peak = x.get("gpus", 1), x["peak_bytes"]
        run = f"{x['shape']}, landmark, top_k = {x['top_k']}, offload"
        lines.append(
            f"| {run}: prompt | {gpus} | {short(x['tokens'])} | {x['seconds_of_reading']:.1f} s "
            f"| {x['reading_tokens_per_second']:.0f} | {peak / 2**30:.1f} |"
        )
        lines.append(
            f"| {run}: a token after it | {gpus} | 1 | {1e3 * x['seconds_of_a_token']:.1f} ms "
            f"| {x['tokens_per_second']:.1f} | |"
        )
    return "\n".join([*lines, "", conditions(results)]) if results else MISSING


def generation(folder: Path) -> str:
    """A generated token by the length of the history."""
    lines = [
        "| | history | a token, ms | cache on the GPU, MiB |",
        "| --- | --: | --: | --: |",
    ]
    results = []
    for name, what in (("stream", "infini"), ("histories", "landmark, top_k = 4, offload")):
        result = read(folder, name)
        if result is None or "error" in result["found"]:
            continue
        results.append(result)
        x = result["found"]
        for length, seconds in sorted(x["seconds_of_a_token"].items(), key=lambda i: int(i[0])):
            lines.append(
                f"| {what} | {short(int(length))} | {1e3 * seconds:.2f} "
                f"| {x['cache_bytes'][length] / 2**20:.1f} |"
            )
    return "\n".join([*lines, "", conditions(results)]) if results else MISSING


def plot(sources: Sequence[Path], path: Path, metadata: dict[str, str]) -> None:
    """Pass keys by length, bits per byte by context, and the gates, into a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    results = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
    figure = Figure(figsize=(15.6, 4.2), layout="constrained")
    keys, bits, bars = figure.subplots(1, 3)
    for run in results:
        for name, found in run["passkey"].items():
            style = {"label": name, "color": COLOURS[name], "marker": "o", "markersize": 4}
            lengths = [x["length"] for x in found]
            keys.plot(lengths, [100 * x["accuracy"] for x in found], **style)
            known = run["bits_per_byte"].get(name, [])
            contexts = [x["context"] for x in known]
            bits.plot(contexts, [x["bits_per_byte"] for x in known], **style)
    trained = next(iter(results[0]["passkey"].values()))[0]["length"]
    ticks = [int(trained * 2.0**i) for i in range(-3, 5)]
    for axes, title, places in (
        (keys, "pass keys found, %", ticks[3:]), (bits, "bits per byte after a context", ticks)
    ):  # fmt: skip
        axes.axvline(trained, color="#bbbbbb", linewidth=1, linestyle=":")
        axes.set(xscale="log", xlabel="bytes", title=title)
        axes.set_xticks(places)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axes.xaxis.set_minor_locator(NullLocator())
    keys.legend(frameon=False)
    gated = {
        run["recipe"]["method"]: [gate for layer in run["gates"] for gate in layer]
        for run in results
        if run["gates"]
    }
    bars.hist(
        list(gated.values()), bins=20, range=(0, 1), label=list(gated),
        color=[COLOURS[name] for name in gated],
    )  # fmt: skip
    bars.set(title="gates: share of the memory", xlabel="sigmoid", ylabel="heads")
    bars.legend(frameon=False)
    for axes in (keys, bits, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"at most {trained} bytes in training (dotted). {machine_line(results[0]['machine'])}",
        fontsize=8, color="#555555",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=metadata)
