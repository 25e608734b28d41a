"""Texts to train on: files, folders and JSON lines, or what the machine has installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from .text import Document, TextError, default_document, read_document

SUFFIXES = (".txt", ".md", ".rst", ".pod", ".jsonl", ".gz", ".py")


def read_corpus(path: Path | str | None = None) -> list[Document]:
    """The documents of a file, a folder or a JSONL file, or the longest installed text.

    A folder gives every text in it (.txt, .md, .rst, .pod, .py, .jsonl, .gz) in the order of names;
    a line of JSONL gives one document, its "text", after its "prompt" if it has one, which is read
    and not learned. Nothing is downloaded.

    Args:
        path: None is the longest text that the machine has.

    Raises:
        TextError: Nothing to read there, or a line that holds no text; the message names it.

    >>> len(read_corpus()[0].data) > 100_000
    True
    """
    if path is None:
        return [default_document()]
    path = Path(path)
    if not path.is_dir():
        return list(_documents(path))
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in SUFFIXES)
    found = [document for file in files for document in _documents(file)]
    if not found:
        raise TextError(f"{path}: no text in this folder, expected {', '.join(SUFFIXES)}")
    return found


def digest(documents: Iterable[Document]) -> str:
    """SHA-256 over the digests of documents: equal corpora have equal ones."""
    return hashlib.sha256("".join(d.sha256 for d in documents).encode()).hexdigest()


def split(
    documents: list[Document], held_out: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Documents to train on and documents to evaluate on, whole documents in each.

    Every document goes where its digest says, so a longer corpus keeps the split. A single document
    is cut once, near its end.

    Args:
        documents: At least one.
        held_out: Share of the second part.

    >>> train, rest = split([Document(str(i), bytes([i])) for i in range(200)], 0.1)
    >>> len(train) + len(rest), 5 < len(rest) < 40
    (200, True)
    """
    if not 0 < held_out < 1:
        raise ValueError(f"split: held_out is {held_out}; expected a number between 0 and 1")
    if len(documents) == 1:
        (whole,) = documents
        cut = int(len(whole.data) * (1 - held_out))
        return (
            [Document(f"{whole.name} (start)", whole.data[:cut], min(whole.prompt, cut))],
            [Document(f"{whole.name} (end)", whole.data[cut:], max(whole.prompt - cut, 0))],
        )
    chosen = [int(d.sha256[:8], 16) < held_out * 2**32 for d in documents]
    if not any(chosen) or all(chosen):
        smallest = min(range(len(documents)), key=lambda i: documents[i].sha256)
        chosen = [i == smallest for i in range(len(documents))]
    rest = [d for d, held in zip(documents, chosen, strict=True) if held]
    return [d for d, held in zip(documents, chosen, strict=True) if not held], rest


def _documents(path: Path) -> Iterator[Document]:
    document = read_document(path)
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        yield from _json_lines(document)
    else:
        yield document


def _json_lines(document: Document) -> Iterator[Document]:
    for number, line in enumerate(document.data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, text = entry.get("prompt", ""), entry["text"]
        except (ValueError, KeyError, TypeError, AttributeError):
            prompt = text = None
        if not isinstance(text, str) or not isinstance(prompt, str):
            raise TextError(
                f'{document.name}:{number}: expected a JSON object with "text", perhaps "prompt"'
            )
        if text:
            begin = prompt.encode()
            yield Document(f"{document.name}:{number}", begin + text.encode(), len(begin))
