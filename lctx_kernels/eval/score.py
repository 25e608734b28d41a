"""Answers of a model to samples, and their scores by length and depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .tasks import Sample


@dataclass(frozen=True)
class Score:
    """One sample's answer. score: Share of the right answers that it holds, 0 to 1."""

    task: str
    length: int
    depth: float
    tokens: int
    answer: str
    expected: tuple[str, ...]
    score: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def share_found(answer: str, expected: Sequence[str]) -> float:
    """Share of `expected` that stands in `answer`, letters of either case.

    >>> share_found("It is 71432.", ["71432", "9"])
    0.5
    """
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    samples: Iterable[Sample],
    *,
    max_new_tokens: int = 32,
    on_score: Callable[[Score], None] | None = None,
    **generate: Any,
) -> list[Score]:
    """Let a transformers model answer samples, greedily.

    Args:
        model: With `generate`.
        tokenizer: Of transformers.
        samples: From make_samples.
        max_new_tokens: Tokens of an answer.
        on_score: Called after every sample, for a progress bar.
        generate: More for model.generate, such as prefill_chunk_size.

    Source: Hsieh et al. 2024 (arXiv 2404.06654), section 4: the score is the share of the answers
    that the output contains.
    """
    scores = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for sample in samples:
        ids = torch.tensor([encode_prompt(tokenizer, sample.prompt)], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
            do_sample=False, pad_token_id=pad, **generate,
        )  # fmt: skip
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        score = Score(
            sample.task, sample.length, sample.depth, ids.shape[1], answer, sample.answers,
            share_found(answer, sample.answers),
        )  # fmt: skip
        scores.append(score)
        if on_score is not None:
            on_score(score)
    return scores


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt, with the tokenizer's beginning and without its end."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def table(scores: Sequence[Score]) -> str:
    """Mean scores as text: a row per depth, a column per length, in percent.

    >>> places = [(length, depth) for length in (64, 128) for depth in (0, 1)]
    >>> print(table([Score("passkey", n, depth, n, "", ("1",), 1.0) for n, depth in places]))
    depth     64    128
     0.00   100%   100%
     1.00   100%   100%
     mean   100%   100%
    """
    lengths = sorted({score.length for score in scores})
    depths = sorted({score.depth for score in scores})

    def cell(chosen: list[float]) -> str:
        return f"{100 * sum(chosen) / len(chosen):6.0f}%" if chosen else f"{'-':>7}"

    lines = ["depth" + "".join(f"{length:7d}" for length in lengths)]
    for depth in depths:
        cells = (
            cell([s.score for s in scores if (s.length, s.depth) == (length, depth)])
            for length in lengths
        )
        lines.append(f"{depth:5.2f}" + "".join(cells))
    means = (cell([s.score for s in scores if s.length == length]) for length in lengths)
    return "\n".join([*lines, " mean" + "".join(means)])
