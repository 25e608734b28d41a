"""Rows to train on: real text, byte by byte, with a pass key in it and the question at the end."""

from dataclasses import dataclass
from functools import cache
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
    fact, fact_digits = _with_digits(FACT, text.device)
    question, question_digits = _with_digits(QUESTION + "{0}", text.device)
    n, m = len(fact), len(question)
    rest = T - n - m
    if rest < 0:
        raise ValueError(f"passkey_rows: T is {T}; expected at least {LEAST}")

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=text.device)

    def filled(row: Tensor, digits: Tensor) -> Tensor:
        return torch.where(digits > 0, keys[:, (digits - 1).clamp(min=0) % DIGITS], row)

    keys = draw(10, B, DIGITS) + ord("0")
    start, place = draw(len(text) - rest, B, 1), draw(rest + 1, B, 1)
    columns = torch.arange(T - m, device=text.device)[None]
    behind = columns >= place + n
    inside = (columns >= place) & ~behind
    offset = (columns - place).clamp(0, n - 1)
    body = text[(start + columns - n * behind).clamp(max=len(text) - 1)].long()
    body = torch.where(inside, filled(fact, fact_digits).gather(1, offset), body)
    ids = torch.cat([body, filled(question, question_digits)], dim=1)
    digit = fact_digits[offset] * inside
    hidden, echoes, answers = torch.zeros(3, B, T, dtype=torch.bool, device=text.device)
    hidden[:, : T - m] = (digit > 0) & (digit <= DIGITS)
    echoes[:, : T - m] = digit > DIGITS
    answers[:, T - m :] = question_digits > 0
    return Batch(ids, hidden, echoes, answers)


@cache
def _with_digits(template: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n,) bytes of a template; (n,) 0, or the place among the digits of {0}, counted from 1."""
    row = list(template.format("\0" * DIGITS).encode())
    digits = [(x == 0) * row[: i + 1].count(0) for i, x in enumerate(row)]
    return torch.tensor(row, device=device), torch.tensor(digits, device=device)
