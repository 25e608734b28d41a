"""`lctx samples`: questions about long texts as JSON lines to train on."""

import json
import random
from pathlib import Path
from typing import Annotated

import typer

from .common import Config, load_tokenizer, naming, parse_numbers, plain_errors


def add(app: typer.Typer) -> None:
    """Add the command."""
    from ..eval.tasks import TASKS

    @app.command(help=f"Write questions to train on: {', '.join(TASKS)}.")
    def samples(
        task: Annotated[str, typer.Argument(help="What to ask.")],
        out: Annotated[Path, typer.Argument(help="JSONL file to write.")],
        model: Annotated[
            str | None, typer.Option(help="Whose tokens lengths count; default: bytes.")
        ] = None,
        lengths: Annotated[str, typer.Option(help="Of the prompts, such as 512,1024.")] = "512",
        count: Annotated[int, typer.Option(min=1, help="Samples of every length.")] = 100,
        filler: Annotated[
            Path | None, typer.Option(help="A text to hide things in; default: grass.")
        ] = None,
        seed: int = 0,
        config: Config = None,
    ) -> None:
        with plain_errors("samples"):
            if task not in TASKS:
                raise typer.BadParameter(
                    f"{task!r}; expected one of {', '.join(TASKS)}", param_hint="TASK"
                )
            if out.suffix != ".jsonl":
                raise typer.BadParameter(f"{out}; expected a name ending in .jsonl",
                                         param_hint="OUT")  # fmt: skip
            if out.exists():
                raise typer.BadParameter(f"{out} exists", param_hint="OUT")
            numbers = parse_numbers(lengths, "--lengths")
            lines = _lines(task, numbers, count, model, filler, seed)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("".join(json.dumps(line) + "\n" for line in lines))
            print(f"{len(lines)} samples -> {out}")


def _lines(
    task: str, lengths: list[int], count: int, model: str | None, filler: Path | None, seed: int
) -> list[dict[str, str]]:
    """{"prompt", "text"} of every sample, hidden at random depths."""
    from ..data.text import read_document
    from ..eval import make_samples

    text, size = None, lambda part: len(part.encode())
    if filler is not None:
        with naming("--filler"):
            text = read_document(filler).data.decode("utf-8", "replace")
    if model is not None:
        with naming("--model"):
            tokenizer = load_tokenizer(model)
        size = lambda part: len(  # noqa: E731
            tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        )
    chance, lines = random.Random(seed), []
    for length in lengths:
        for number in range(count):
            (sample,) = make_samples(
                task, [length], [chance.random()], count=size, filler=text,
                seed=seed * 1_000_003 + number,
            )  # fmt: skip
            lines.append({"prompt": sample.prompt, "text": " " + ", ".join(sample.answers)})
    return lines
