"""One command per proof: `python -m bench.proofs train landmark --text FOLDER`.

Results are JSON below bench/results/<machine-kind>/proofs/.
"""

import dataclasses
import datetime
import gc
import json
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lctx_kernels._measure import write_json

from ..machine import describe_machine, machine_kind
from ..results import RESULTS
from ..timing import describe_error
from .evaluate import bits_per_byte, gates, passkey_accuracy
from .measured import MEASURED
from .models import METHODS
from .rows import load_text
from .train import Recipe
from .train import train as train_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
RECIPE = Path(__file__).parent / "recipe.json"
TOP_K = {"landmark": (2, 4)}


def device_here() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def result_path(device: str, name: str, out: Path | None) -> Path:
    """Where a result goes."""
    return (out or RESULTS / machine_kind(device) / "proofs") / f"{name}.json"


@app.callback()
def main() -> None:
    """Proofs that the models work."""


@app.command()
def train(
    method: Annotated[str, typer.Argument(help=f"One of {', '.join(METHODS)}.")],
    text: Annotated[Path | None, typer.Option(help="Folder of documents.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON of a Recipe; default: ours.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the result.")] = None,
    lengths: Annotated[int, typer.Option(help="Longest pass key, in training lengths.")] = 16,
    samples: Annotated[int, typer.Option(help="Pass keys of each length.")] = 40,
    documents: Annotated[
        int, typer.Option(help="Longest held-out documents for bits per byte.")
    ] = 8,
    seconds: Annotated[float, typer.Option(help="Time for training; 0 is no limit.")] = 0,
) -> None:
    """Train one method, measure bits per byte and pass keys by length."""
    device, started = device_here(), time.perf_counter()
    recipe = Recipe(method=method, **json.loads((config or RECIPE).read_text()))
    recipe.seconds = seconds or recipe.seconds
    corpus = load_text(text, device)

    def log(line: str) -> None:
        print(f"{method}: {line}", flush=True)

    model, curve = train_model(recipe, corpus, device, log)
    result: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe), "text_sha256": corpus.sha256, "curve": curve,
        "parameters": sum(p.numel() for p in model.parameters()), "gates": gates(model),
        "training_seconds": time.perf_counter() - started, "passkey": {}, "bits_per_byte": {},
        "machine": describe_machine(device), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    longest = recipe.lengths[-1]
    for top_k in TOP_K.get(method, (None,)):
        name = method if top_k is None else f"{method}, k = {top_k}"
        found: list[dict[str, Any]] = []
        result["passkey"][name] = found
        times = 1
        while times <= lengths:
            found.append(
                passkey_accuracy(model, corpus, times * longest, samples, top_k, recipe.seed + 1)
            )
            log(f"{name} {found[-1]} at {time.perf_counter() - started:.0f} s")
            times *= 2
            write_json(result_path(device, f"train-{method}", out), result)
        result["bits_per_byte"][name] = bits_per_byte(
            model, corpus, lengths * longest, documents, top_k
        )
        log(f"{name} at {time.perf_counter() - started:.0f} s {result['bits_per_byte'][name]}")
        write_json(result_path(device, f"train-{method}", out), result)
    log(f"done in {time.perf_counter() - started:.0f} s")


@app.command()
def measure(
    names: Annotated[str, typer.Argument(help=f"Some of {', '.join(MEASURED)}, or all.")] = "all",
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    tiny: Annotated[bool, typer.Option(help="Tiny shapes, to try the commands.")] = False,
) -> None:
    """Time and memory of large shapes with random weights; each is a file of its own."""
    device = device_here()
    for name in MEASURED if names == "all" else names.split(","):
        started = time.perf_counter()

        def log(line: str, name: str = name, started: float = started) -> None:
            print(f"[{name} {time.perf_counter() - started:.1f} s] {line}", flush=True)

        try:
            found = MEASURED[name](device, log, tiny)
        except Exception as error:  # reported; the others go on
            found = {"error": describe_error(error)}
            log(str(found))
            traceback.print_exc()
        result = {
            "name": name, "found": found, "machine": describe_machine(device),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        write_json(result_path(device, name, out), result)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    app()
