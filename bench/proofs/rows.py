"""Rows to train on: real text, byte by byte, with a pass key in it and the question at the end."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lctx_kernels.data.corpus import digest, read_corpus, split

DIGITS = 5
FACT = "\nThe pass key is {0}. Remember it. {0} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is "
VOCAB = 256
LEAST = len(FACT.format("0" * DIGITS)) + len(QUESTION) + DIGITS  # bytes of a row without text


@dataclass
class Text:
    """Bytes (N,) to train on, documents (n,) held out, longest first, and the digest of both."""

    train: Tensor
    held_out: list[Tensor]
    sha256: str


def load_text(folder: Path | None, device: str) -> Text:
    """The documents of a folder, split by document."""
    documents = read_corpus(folder)
    train, held_out = split(documents, 0.05)

    def tensor(data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)

    joined = tensor(b"\n\n".join(document.data for document in train))
    longest = sorted(held_out, key=lambda document: -len(document.data))
    return Text(joined, [tensor(document.data) for document in longest], digest(documents))


@dataclass
class Batch:
    """ids (B, T) int64, and three masks (B, T) of digits.

    hidden: Where the key is first given. echoes: Where it is given again. answers: At the end.
    """

    ids: Tensor
    hidden: Tensor
    echoes: Tensor
    answers: Tensor


def passkey_rows(text: Tensor, B: int, T: int, generator: torch.Generator) -> Batch:
    """B windows of `text` with the fact anywhere and the question and its answer at the end."""
    device = text.device

    def draw(below: int | Tensor, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=device)

    keys = draw(10, B, DIGITS) + ord("0")
    fact, fact_digits = _with_digits(FACT, keys)
    question, question_digits = _with_digits(QUESTION + "{0}", keys)
    n, m = fact.shape[1], question.shape[1]
    rest = T - n - m
    if rest < 0:
        raise ValueError(f"passkey_rows: T is {T}; expected at least {LEAST}")
    start, place = draw(len(text) - rest, B, 1), draw(rest + 1, B, 1)
    columns = torch.arange(T - m, device=device)[None]
    behind = columns >= place + n
    inside = (columns >= place) & ~behind
    body = text[(start + columns - n * behind).clamp(max=len(text) - 1)].long()
    offset = (columns - place).clamp(0, n - 1)
    body = torch.where(inside, fact.gather(1, offset), body)
    ids = torch.cat([body, question], dim=1)
    hidden, echoes, answers = torch.zeros(3, B, T, dtype=torch.bool, device=device)
    first = fact_digits & (fact_digits.cumsum(0) <= DIGITS)
    hidden[:, : T - m] = inside & first[offset]
    echoes[:, : T - m] = inside & (fact_digits & ~first)[offset]
    answers[:, T - m :] = question_digits
    return Batch(ids, hidden, echoes, answers)


def _with_digits(template: str, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) bytes of a template with each row's digits for {0}; (n,) bool, which are digits."""
    filled = template.format("\0" * DIGITS).encode()
    row = torch.tensor(list(filled), device=keys.device)
    digits = row == 0
    rows = row.repeat(len(keys), 1)
    rows[:, digits] = keys.repeat(1, int(digits.sum()) // DIGITS)
    return rows, digits
