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
KEY = "pass key"
DECOYS = (
    "door pin", "user tag", "lot code", "zip code", "page ref", "bus line",
    "row size", "map tile", "test run", "case ref", "tax code", "part tag",
    "key size", "passport", "lock key", "port key",
)  # fmt: skip
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

    hidden: Where a number is first given. echoes: Where it is given again. answers: At the end.
    """

    ids: Tensor
    hidden: Tensor
    echoes: Tensor
    answers: Tensor


def passkey_rows(
    text: Tensor, B: int, T: int, generator: torch.Generator, decoys: int = 0
) -> Batch:
    """B windows of `text` with the fact anywhere and the question and its answer at the end.

    decoys: Numbers of other names that stand in each row too, in sentences like the fact.
    """
    facts, fact_digits = _templates(text.device)
    question, question_digits = _question(text.device)
    n, m = facts.shape[1], question.shape[0]
    rest = T - (1 + decoys) * n - m
    if rest < 0:
        raise ValueError(f"passkey_rows: T is {T}; expected at least {LEAST + decoys * n}")

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=text.device)

    numbers = draw(10, B, 1 + decoys, DIGITS) + ord("0")
    names = 1 + draw(len(DECOYS), B, 1 + decoys)
    names[:, 0] = 0
    order = torch.rand(B, 1 + decoys, generator=generator, device=text.device).argsort(1)
    starts = draw(rest + 1, B, 1 + decoys).sort(1).values
    starts = starts + n * torch.arange(1 + decoys, device=text.device)
    columns = torch.arange(T - m, device=text.device)[None]
    begun = torch.searchsorted(starts, columns.expand(B, -1).contiguous(), right=True)  # (B, T - m)
    latest = (begun - 1).clamp(min=0)
    offset = (columns - starts.gather(1, latest)).clamp(min=0)
    inside, offset = (begun > 0) & (offset < n), offset.clamp(max=n - 1)
    which = order.gather(1, latest)
    digit = fact_digits[offset]  # 0, or its place in the number, counted from 1
    window = draw(len(text) - rest, B, 1)
    body = text[(window + columns - n * begun).clamp(0, len(text) - 1)].long()
    fact = facts[names.gather(1, which), offset]
    number = numbers.flatten(1).gather(1, which * DIGITS + (digit - 1).clamp(min=0) % DIGITS)
    body = torch.where(inside, torch.where(digit > 0, number, fact), body)
    answer = numbers[:, 0].gather(1, ((question_digits - 1).clamp(min=0) % DIGITS).expand(B, m))
    ids = torch.cat([body, torch.where(question_digits > 0, answer, question)], dim=1)
    hidden, echoes, answers = torch.zeros(3, B, T, dtype=torch.bool, device=text.device)
    hidden[:, : T - m] = inside & (digit > 0) & (digit <= DIGITS)
    echoes[:, : T - m] = inside & (digit > DIGITS)
    answers[:, T - m :] = question_digits > 0
    return Batch(ids, hidden, echoes, answers)


def _with_digits(template: str) -> tuple[list[int], list[int]]:
    """Bytes of a template; 0, or the place of a digit among those for {0}, counted from 1."""
    row = list(template.format("\0" * DIGITS).encode())
    return row, [(x == 0) * row[: i + 1].count(0) for i, x in enumerate(row)]


@cache
def _templates(device: torch.device) -> tuple[Tensor, Tensor]:
    """(1 + len(DECOYS), n) bytes of the fact under every name; (n,) as in `_with_digits`."""
    found = [_with_digits(FACT.replace(KEY, name)) for name in (KEY, *DECOYS)]
    rows = torch.tensor([row for row, _ in found], device=device)
    return rows, torch.tensor(found[0][1], device=device)


@cache
def _question(device: torch.device) -> tuple[Tensor, Tensor]:
    row, digits = _with_digits(QUESTION + "{0}")
    return torch.tensor(row, device=device), torch.tensor(digits, device=device)
