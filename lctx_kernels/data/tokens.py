"""Tokenizers trained on the text at hand, and texts cut into rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .text import Document

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
IGNORE = -100  # label of a token that is not learned


def _need(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is missing ({error}); try: pip install 'lctx_kernels[train]'"
        ) from error


def train_tokenizer(documents: Iterable[Document], vocab_size: int = 4096) -> Any:
    """A byte-level BPE tokenizer of transformers, trained on documents; it decodes any bytes back.

    Args:
        documents: Texts, read as UTF-8.
        vocab_size: Tokens, with the 256 bytes and the three special ones (>= 259).

    Returns:
        PreTrainedTokenizerFast with <pad> = 0, <s> = 1, </s> = 2, which pads on the left, as
        generation wants it.

    Raises:
        ValueError: A vocabulary that is too small.
        ImportError: tokenizers or transformers is missing.

    Source: Sennrich et al. 2016 (arXiv 1508.07909); the work is done by `tokenizers`.
    """
    if vocab_size < 259:
        raise ValueError(f"train_tokenizer: vocab_size is {vocab_size}; expected at least 259")
    tokenizers, transformers = _need("tokenizers"), _need("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, BOS, EOS], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(_lines(documents), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS,
        clean_up_tokenization_spaces=False, padding_side="left",
    )  # fmt: skip


def _lines(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        yield from document.data.decode("utf-8", "replace").splitlines(keepends=True)


def pack(
    documents: Iterable[Document], tokenizer: Any, seq_len: int, *, keep_shorter: int = 2
) -> Any:
    """Documents as rows of at most `seq_len` tokens, no row with tokens of two documents.

    A memory would carry one text into the next, so documents are not joined. A document begins with
    the tokenizer's beginning and ends with its end, where it has them. Tokens of prompts have
    no label; rows without any label are dropped.

    Args:
        documents: Texts, read as UTF-8.
        tokenizer: A tokenizer of transformers.
        seq_len: Tokens of a row.
        keep_shorter: Rows of fewer tokens, at the ends of documents, are dropped.

    Returns:
        datasets.Dataset with input_ids, and bytes, what the row's text takes in UTF-8; with labels
        if any document has a prompt.

    Raises:
        ValueError: Numbers that do not fit, or no row at all.
        ImportError: datasets is missing.
    """
    if seq_len < 2 or keep_shorter < 1:
        raise ValueError(
            f"pack: seq_len is {seq_len}, keep_shorter is {keep_shorter}; expected at least 2 and 1"
        )
    datasets, documents = _need("datasets"), list(documents)
    prompts = [d.data[: d.prompt].decode("utf-8", "replace") for d in documents]
    texts = datasets.Dataset.from_dict(
        {
            "text": [d.data.decode("utf-8", "replace") for d in documents],
            "prompt": [len(prompt) for prompt in prompts],
        }
    )
    labelled = any(prompts)

    def rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"input_ids": [], "bytes": []}
        if labelled:
            out["labels"] = []
        for text, prompt in zip(batch["text"], batch["prompt"], strict=True):
            encoded = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
            if tokenizer.bos_token_id is not None:
                ids, offsets = [tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
            if tokenizer.eos_token_id is not None:
                ids, offsets = [*ids, tokenizer.eos_token_id], [*offsets, (len(text), len(text))]
            labels = [
                IGNORE if prompt and end <= prompt else token
                for token, (_, end) in zip(ids, offsets, strict=True)
            ]
            begin = 0
            for start in range(0, len(ids), seq_len):
                end = min(start + seq_len, len(ids))
                stop = len(text) if end == len(ids) else max(begin, offsets[end][0])
                wanted = any(label != IGNORE for label in labels[start + 1 : end]) or not labelled
                if end - start >= keep_shorter and wanted:
                    out["input_ids"].append(ids[start:end])
                    if labelled:
                        out["labels"].append(labels[start:end])
                    out["bytes"].append(len(text[begin:stop].encode()))
                begin = stop
        return out

    packed = texts.map(rows, batched=True, remove_columns=["text", "prompt"], keep_in_memory=True)
    if len(packed) == 0:
        raise ValueError(f"pack: no document has {keep_shorter} tokens; expected longer texts")
    return packed


class Collator:
    """Rows of tokens to input_ids, labels and attention_mask (B, T), padded on the right.

    Args:
        pad_id: Token of the pads, whose labels are -100.

    >>> batch = Collator(0)([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
    >>> batch["labels"].tolist()
    [[5, 6, 7], [8, -100, -100]]
    """

    def __init__(self, pad_id: int = 0) -> None:
        self.pad_id = pad_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Features with input_ids, and perhaps labels, to a batch."""
        import torch

        T = max(len(feature["input_ids"]) for feature in features)
        rows = [list(feature["input_ids"]) for feature in features]
        labels = [list(feature.get("labels", feature["input_ids"])) for feature in features]
        return {
            "input_ids": torch.tensor([row + [self.pad_id] * (T - len(row)) for row in rows]),
            "labels": torch.tensor([row + [-100] * (T - len(row)) for row in labels]),
            "attention_mask": torch.tensor([[1] * len(r) + [0] * (T - len(r)) for r in rows]),
        }
