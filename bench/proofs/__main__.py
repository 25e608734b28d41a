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
from torch import Tensor

from lctx_kernels._measure import write_json

from ..machine import describe_machine, machine_kind, machine_line
from ..results import RESULTS
from ..timing import describe_error
from . import ranks
from .evaluate import bits_per_byte, gates, passkey_accuracy, repeated_sentences
from .measured import MEASURED
from .models import METHODS
from .rows import Text, load_text
from .train import Recipe
from .train import train as train_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
RECIPES = Path(__file__).parent / "recipes"
TOP_K = {"landmark": (2, 4)}
STARTED = time.perf_counter()

Method = Annotated[str, typer.Argument(help=f"One of {', '.join(METHODS)}.")]
Folder = Annotated[Path | None, typer.Option(help="Folder of documents.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the result.")]
Lengths = Annotated[int, typer.Option(help="Longest pass key, in training lengths.")]
Samples = Annotated[int, typer.Option(help="Pass keys of each length.")]
Documents = Annotated[int, typer.Option(help="Held-out documents for bits per byte.")]


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
    method: Method,
    text: Folder = None,
    config: Annotated[Path | None, typer.Option(help="JSON of a Recipe; default: ours.")] = None,
    out: Out = None,
    lengths: Lengths = 16,
    samples: Samples = 40,
    documents: Documents = 8,
    seconds: Annotated[float, typer.Option(help="Time for training; 0 is the recipe's.")] = 0,
    weights: Annotated[Path | None, typer.Option(help="Folder to save the weights in.")] = None,
) -> None:
    """Train one method, measure bits per byte and pass keys by length."""
    device, started = device_here(), time.perf_counter()
    path = config or RECIPES / f"{method}.json"
    recipe = Recipe(method=method, **json.loads(path.read_text()))
    recipe.seconds = seconds or recipe.seconds
    corpus = load_text(text, device)
    model, curve = train_model(recipe, corpus, device, lambda line: log(method, line))
    result: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe), "text_sha256": corpus.sha256, "curve": curve,
        "parameters": sum(p.numel() for p in model.parameters()), "gates": gates(model),
        "training_seconds": time.perf_counter() - started, "passkey": {}, "bits_per_byte": {},
        "machine": describe_machine(device), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    if weights is not None:
        half = {name: x.bfloat16() for name, x in model.state_dict().items()}
        model.save_pretrained(weights, state_dict=half, max_shard_size="14MB")
    assess(model, result, corpus, result_path(device, f"train-{method}", out), lengths, samples,
           documents)  # fmt: skip


@app.command()
def evaluate(
    weights: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    result: Annotated[Path, typer.Argument(help="JSON of its training, which gets the figures.")],
    text: Folder = None,
    lengths: Lengths = 16,
    samples: Samples = 40,
    documents: Documents = 8,
) -> None:
    """Measure a trained model again."""
    from transformers import AutoModelForCausalLM

    from lctx_kernels import hf

    hf.register()
    device, known = device_here(), json.loads(result.read_text())
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).to(device).eval()
    known["evaluated_on"] = machine_line(describe_machine(device))
    assess(model, known, load_text(text, device), result, lengths, samples, documents)


def assess(
    model: Any, result: dict[str, Any], corpus: Text, path: Path, lengths: int, samples: int,
    documents: int,
) -> None:  # fmt: skip
    """Fill in a result's pass keys and bits per byte, written after every figure."""
    method, longest = result["recipe"]["method"], result["recipe"]["lengths"][-1]
    readings = TOP_K.get(method, (None,))
    names = {k: method if k is None else f"{method}, k = {k}" for k in readings}

    def find(kind: str, filler: Tensor) -> None:
        result[kind] = {}
        for top_k, name in names.items():
            result[kind][name] = found = []
            for times in (1 << i for i in range(lengths.bit_length())):
                found.append(
                    passkey_accuracy(
                        model, filler, times * longest, samples, top_k, result["recipe"]["seed"] + 1
                    )
                )
                log(f"{name}, {kind}", str(found[-1]))
                write_json(path, result)

    held_out, grass = torch.cat(corpus.held_out), repeated_sentences(lengths * longest)
    find("passkey", held_out)
    context = 1 << (lengths * longest - 1).bit_length()  # the same bytes for every method
    for top_k, name in names.items():
        bits = bits_per_byte(model, corpus, context, documents, top_k)
        result["bits_per_byte"][name] = bits
        log(name, str(bits))
        write_json(path, result)
    find("passkey_among_grass", grass.to(held_out.device))


def log(name: str, line: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"{name}: {line} [{time.perf_counter() - STARTED:.1f} s]", flush=True)


@app.command()
def measure(
    names: Annotated[str, typer.Argument(help=f"Some of {', '.join(MEASURED)}, or all.")] = "all",
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    tiny: Annotated[bool, typer.Option(help="Tiny shapes, to try the commands.")] = False,
) -> None:
    """Time and memory of large shapes with random weights; each is a file of its own.

    Under torchrun gemma-32k, llama-1m and prompt-32k run on every GPU at once.
    """
    device, rank = device_here(), ranks.start()
    suffix = f"-{ranks.count()}-gpus" if ranks.count() > 1 else ""
    for name in MEASURED if names == "all" else names.split(","):
        started = time.perf_counter()

        def log(line: str, name: str = name, started: float = started) -> None:
            if rank == 0:
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
        if rank == 0:
            write_json(result_path(device, name + suffix, out), result)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    ranks.end()


if __name__ == "__main__":
    app()
