"""`lctx eval`: passkey, needle, ruler and perplexity of a saved model."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Config,
    Device,
    Dtype,
    MethodOptions,
    load_for_use,
    naming,
    parse_numbers,
    parse_options,
    plain_errors,
    write_json,
)

Model = Annotated[str, typer.Argument(help="Folder or name of a model.")]
Lengths = Annotated[str, typer.Option(help="Tokens of the prompts, such as 512,1024.")]
Depths = Annotated[str, typer.Option(help="Where to hide, 0 is the start and 1 the end.")]
Repeats = Annotated[int, typer.Option(min=1, help="Samples for every length and depth.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer.")]
Chunk = Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt to read at a time.")]
Filler = Annotated[Path | None, typer.Option(help="A text to hide things in; default: grass.")]
Out = Annotated[Path | None, typer.Option(help="JSON file for the results.")]
Plot = Annotated[Path | None, typer.Option(help="Image for a heat map, depth by length.")]
IMAGES = (".png", ".svg", ".pdf")
DEPTHS = "0,0.25,0.5,0.75,1"


def add(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(no_args_is_help=True, help="Measure how a model uses its context.")
    app.add_typer(group, name="eval")
    for name, tasks in TASK_SETS.items():
        group.command(name, help=HELP[name])(_task_command(name, tasks))
    group.command("perplexity")(perplexity)


TASK_SETS = {
    "passkey": ("passkey",),
    "needle": ("needle",),
    "ruler": ("needle", "multikey", "multivalue", "variables", "common_words"),
}
HELP = {
    "passkey": "Ask for a number hidden in a long text.",
    "needle": "Ask for a number hidden in a long text, at every depth and length.",
    "ruler": "Five tasks: one needle, many keys, many values, chains of variables, common words.",
}


def _task_command(name: str, tasks: Sequence[str]) -> Any:
    def command(
        model: Model,
        lengths: Lengths = "512,1024,2048",
        depths: Depths = DEPTHS,
        repeats: Repeats = 4,
        max_new_tokens: NewTokens = 32,
        chunk: Chunk = None,
        filler: Filler = None,
        options: MethodOptions = None,
        seed: int = 0,
        out: Out = None,
        plot: Plot = None,
        device: Device = "auto",
        dtype: Dtype = "auto",
        config: Config = None,
    ) -> None:
        with plain_errors(f"eval {name}"):
            _check_plot(plot)
            scores = run_tasks(
                model, tasks, parse_numbers(lengths, "--lengths"),
                parse_numbers(depths, "--depths", float), repeats=repeats,
                max_new_tokens=max_new_tokens, chunk=chunk, filler=filler,
                options=parse_options(options), seed=seed, device=device, dtype=dtype,
            )  # fmt: skip
            _report(model, scores, out, plot)

    return command


def run_tasks(
    model: str, tasks: Sequence[str], lengths: list[int], depths: list[float], *, repeats: int,
    max_new_tokens: int, chunk: int | None, filler: Path | None, options: dict[str, Any],
    seed: int, device: str, dtype: str,
) -> list[Any]:  # fmt: skip
    """Scores of all samples, with a progress bar."""
    from tqdm import tqdm

    from .. import hf
    from ..data.text import read_document
    from ..eval import evaluate, make_samples

    with naming("--filler"):
        text = None if filler is None else read_document(filler).data.decode("utf-8", "replace")
    tokenizer, loaded = load_for_use(model, device, dtype)
    if options:
        with naming("--set"):
            hf.make_cache(loaded, **options)

    def count(part: str) -> int:
        return len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    samples = [
        sample
        for task in tasks
        for sample in make_samples(
            task, lengths,
            depths if task != "common_words" else depths[:1], count=count, repeats=repeats,
            seed=seed, filler=text,
        )
    ]  # fmt: skip
    scores: list[Any] = []
    bar = tqdm(total=len(samples), unit="sample", desc=tasks[0] if len(tasks) == 1 else "ruler")
    for sample in samples:
        arguments: dict[str, Any] = {} if chunk is None else {"prefill_chunk_size": chunk}
        if options:
            arguments["past_key_values"] = hf.make_cache(loaded, **options)
        scores += evaluate(loaded, tokenizer, [sample], max_new_tokens=max_new_tokens, **arguments)
        bar.update()
        bar.set_postfix(score=f"{sum(s.score for s in scores) / len(scores):.0%}")
    bar.close()
    return scores


def _report(model: str, scores: list[Any], out: Path | None, plot: Path | None) -> None:
    from ..eval import table

    for task in dict.fromkeys(score.task for score in scores):
        chosen = [score for score in scores if score.task == task]
        print(f"\n{task}\n{table(chosen)}")
    if out is not None:
        write_json(out, {"model": model, "scores": [score.as_dict() for score in scores]})
    if plot is not None:
        from ..eval.plot import heat_map

        heat_map(scores, plot, title=model)


def _check_plot(plot: Path | None) -> None:
    """Refuse before hours of work what could not be drawn after them."""
    if plot is None:
        return
    if plot.suffix not in IMAGES:
        raise typer.BadParameter(
            f"{plot}; expected an image, {', '.join(IMAGES)}", param_hint="--plot"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter(
            "matplotlib is missing; try: pip install matplotlib", param_hint="--plot"
        )


def perplexity(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="File; default: an installed text.")] = None,
    lengths: Lengths = "512,1024,2048",
    max_pieces: Annotated[int, typer.Option(min=1, help="Pieces of each length at most.")] = 16,
    chunk: Chunk = None,
    options: MethodOptions = None,
    out: Out = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    config: Config = None,
) -> None:
    """Perplexity and bits per byte of a text against the length of the context."""
    with plain_errors("eval perplexity"):
        import torch
        from tqdm import tqdm

        from .. import hf
        from ..data.corpus import read_corpus
        from ..eval import perplexity as measure

        cache_options, results = parse_options(options), []
        if cache_options and chunk is None:
            raise typer.BadParameter(
                "expected with --set, which is for the cache", param_hint="--chunk"
            )
        numbers = parse_numbers(lengths, "--lengths")
        with naming("--text"):
            document = read_corpus(text)[0]
        tokenizer, loaded = load_for_use(model, device, dtype)
        if cache_options:
            with naming("--set"):
                hf.make_cache(loaded, **cache_options)
        for length in numbers:
            ids, size = _first_tokens(document.data, tokenizer, length * max_pieces)
            bar = tqdm(total=len(ids) // length, unit="text", desc=f"{length} tokens")

            def progress(loss: float, bar: Any = bar) -> None:
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")

            make = None
            if cache_options:
                make = lambda: hf.make_cache(loaded, **cache_options)  # noqa: E731
            results.append(
                measure(loaded, torch.tensor(ids), length, chunk=chunk, n_bytes=size,
                        make_cache=make, on_text=progress)
            )  # fmt: skip
            bar.close()
        print(f"\n{document.name}\n length  perplexity  bits/byte  tokens")
        for r in results:
            print(f"{r.length:7d}{r.perplexity:12.3f}{r.bits_per_byte:11.4f}{r.tokens:8d}")
        if out is not None:
            write_json(out, {
                "model": model, "text": document.name, "sha256": document.sha256,
                "results": [r.as_dict() for r in results],
            })  # fmt: skip


def _first_tokens(data: bytes, tokenizer: Any, most: int) -> tuple[list[int], int]:
    """The first tokens of a text, and the size in bytes of what they stand for."""
    text = data[: 16 * most].decode("utf-8", "replace")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"][:most]
    end = encoded["offset_mapping"][len(ids) - 1][1] if ids else 0
    return ids, len(text[:end].encode())
