"""Where landmark tokens go: after every mem_freq ordinary tokens of a row, and its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache.rows import Span


class Insertion(NamedTuple):
    """A batch with landmarks inserted.

    keep: (B or 1, T) int64, where each ordinary token went; 0 for pads.
    length: Columns of the longest row with landmarks.
    spans: Per row the columns that hold tokens, all starting at 0; None if all rows are full.
    """

    keep: Tensor
    length: int
    spans: list[Span] | None


def insertion(
    T: int, mem_freq: int, seen: Sequence[int], spans: Sequence[Span] | None, device: Any = None
) -> Insertion:
    """Where T columns of ordinary tokens go, in rows that have seen `seen` ordinary tokens.

    Args:
        T: Columns of ordinary tokens and pads.
        mem_freq: Ordinary tokens between landmarks (>= 1).
        seen: Ordinary tokens of each row before these.
        spans: Columns of each row that hold tokens; None if all do.
        device: Of the result.

    >>> insertion(5, 2, [0], None).keep.tolist()  # o o L o o L o
    [[0, 1, 3, 4, 6]]
    """
    if spans is None and len(set(seen)) == 1:  # in numbers of the CPU: no GPU waits for them
        before, token = seen[0] % mem_freq, torch.arange(T, device=device)[None]
        return Insertion(token + (before + token) // mem_freq, T + (before + T) // mem_freq, None)
    bounds = [(0, T)] * len(seen) if spans is None else list(spans)
    old = torch.tensor([n % mem_freq for n in seen], device=device)[:, None]
    starts = torch.tensor([start for start, _ in bounds], device=device)[:, None]
    token = torch.arange(T, device=device) - starts  # number in its row
    keep = token + (old + token) // mem_freq
    lengths = [
        end - start + (n % mem_freq + end - start) // mem_freq
        for n, (start, end) in zip(seen, bounds, strict=True)
    ]
    real = (token >= 0) & (token < torch.tensor([e - s for s, e in bounds], device=device)[:, None])
    return Insertion(keep.masked_fill(~real, 0), max(lengths), [(0, n) for n in lengths])


def spread(x: Tensor, inserted: Insertion, filler: Tensor, spans: Sequence[Span] | None) -> Tensor:
    """x (B, T, ...) moved to (B, length, ...), `filler` (...) at landmarks and at the pads."""
    B, rest = x.shape[0], x.shape[2:]
    out = filler.to(x.dtype).expand(B, inserted.length, *rest).clone()
    if inserted.spans is None:
        out[:, inserted.keep[0]] = x
        return out
    for row, (start, end) in enumerate(spans or [(0, x.shape[1])] * B):
        out[row, inserted.keep[row, start:end]] = x[row, start:end]
    return out


def gather(x: Tensor, inserted: Insertion) -> Tensor:
    """The ordinary tokens of x (B, length, ...) in their old columns: (B, T, ...)."""
    if inserted.spans is None:
        return x[:, inserted.keep[0]]
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, inserted.keep]


def insert_landmarks(
    ids: Sequence[int],
    landmark_id: int,
    mem_freq: int,
    labels: Sequence[int] | None = None,
    *,
    predict_landmarks: bool = False,
    ignore_index: int = -100,
) -> tuple[list[int], list[int]]:
    """Tokens of one text with landmarks after every mem_freq of them, and labels to go with them.

    The labels are what a model is given that shifts them itself: label j is the target of token
    j - 1. The token before a landmark predicts the token after it, the landmark predicts nothing.

    Args:
        ids: Ordinary tokens.
        landmark_id: The landmark token.
        mem_freq: Ordinary tokens between landmarks (>= 1).
        labels: One per token, shifted by nobody yet; None is the tokens themselves.
        predict_landmarks: Train to predict landmarks too: the labels are the new tokens.
        ignore_index: Label of what is not to be predicted.

    Returns:
        (tokens, labels), no landmark after the last token.

    Raises:
        ValueError: A text that holds the landmark token, or labels of another length.

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 4.1, and its code.

    >>> insert_landmarks([5, 6, 7, 8, 9], 0, 2)
    ([5, 6, 0, 7, 8, 0, 9], [5, 6, 7, -100, 8, 9, -100])
    """
    labels = ids if labels is None else labels
    if mem_freq < 1:
        raise ValueError(f"insert_landmarks: mem_freq is {mem_freq}; expected at least 1")
    if len(labels) != len(ids):
        raise ValueError(
            f"insert_landmarks: {len(ids)} tokens and {len(labels)} labels; expected as many"
        )
    if landmark_id in ids:
        raise ValueError(
            f"insert_landmarks: the text holds token {landmark_id}, the landmark; expected "
            "ordinary tokens alone"
        )
    new_ids: list[int] = []
    new_labels: list[int] = []
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if i and i % mem_freq == 0:
            new_ids.append(landmark_id)
            new_labels.append(landmark_id if predict_landmarks else label)
            label = label if predict_landmarks else ignore_index
        new_ids.append(token)
        new_labels.append(label)
    return new_ids, new_labels


class LandmarkCollator:
    """Batches of texts with landmarks inserted, padded on the right.

    Args:
        landmark_id, mem_freq, predict_landmarks: As in `insert_landmarks`.
        pad_id: Token of the pads, whose labels are -100 and whose attention_mask is 0.

    >>> batch = LandmarkCollator(landmark_id=0, mem_freq=2)([{"input_ids": [5, 6, 7]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 6, 0, 7]], [[5, 6, 7, -100]])
    """

    def __init__(
        self, landmark_id: int, mem_freq: int, *, predict_landmarks: bool = False, pad_id: int = 0
    ) -> None:
        self.landmark_id, self.mem_freq = landmark_id, mem_freq
        self.predict_landmarks, self.pad_id = predict_landmarks, pad_id

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Features with input_ids, perhaps labels, to input_ids, labels, attention_mask (B, T)."""
        rows = [
            insert_landmarks(
                list(feature["input_ids"]), self.landmark_id, self.mem_freq,
                feature.get("labels"), predict_landmarks=self.predict_landmarks,
            )
            for feature in features
        ]  # fmt: skip
        T = max(len(ids) for ids, _ in rows)
        pads = [T - len(ids) for ids, _ in rows]
        return {
            "input_ids": torch.tensor(
                [ids + [self.pad_id] * n for (ids, _), n in zip(rows, pads, strict=True)]
            ),
            "labels": torch.tensor(
                [labels + [-100] * n for (_, labels), n in zip(rows, pads, strict=True)]
            ),
            "attention_mask": torch.tensor([[1] * (T - n) + [0] * n for n in pads]),
        }
