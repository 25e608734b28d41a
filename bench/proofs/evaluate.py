"""What a trained model can do: bits per byte by context, pass keys by length, its gates."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lctx_kernels import hf, nn
from lctx_kernels.cache import landmark
from lctx_kernels.eval.tasks import GRASS

from .rows import DIGITS, QUESTION, VOCAB, Batch, Text, passkey_rows

QUESTION_LENGTH = len(QUESTION)
TARGETS = 512  # bytes that are predicted, behind the longest context


def logits_of(model: Any, ids: Tensor, top_k: int | None) -> Tensor:
    """Logits (B, T, V); with top_k by retrieval of that many blocks, chunk by chunk."""
    device = ids.device.type
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        if top_k is None:
            return model(ids, use_cache=False).logits[..., :VOCAB]
        cache = retrieving(model, top_k=top_k)
        return model(ids, past_key_values=cache, use_cache=True).logits[..., :VOCAB]


def retrieving(model: Any, **options: Any) -> Any:
    """A cache that reads a few blocks, many of them at a time: memory is plenty here."""
    landmark.ROW_ELEMENTS = 1 << 26
    return hf.make_cache(model, **options)


def answer_logits(model: Any, batch: Batch, top_k: int) -> Tensor:
    """Logits (B, DIGITS, V) of the answer as generation computes them, by retrieval.

    The text is read in chunks, each with one choice of blocks a head (`select="head"`), then the
    question and the digits byte after byte, each with a choice of its own.
    """
    device, question = batch.ids.device.type, int((~batch.answers[0]).sum()) - QUESTION_LENGTH
    cache = retrieving(model, top_k=top_k, select="head")
    parts = [batch.ids[:, :question], *batch.ids[:, question:-1].split(1, dim=1)]
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = [
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[..., :VOCAB]
            for part in parts
        ]
    return torch.cat(logits[-DIGITS:], dim=1)


def repeated_sentences(least: int) -> Tensor:
    """At least twice `least` bytes of the sentences among which the papers hide their keys."""
    return torch.tensor(list(GRASS.encode()), dtype=torch.uint8).repeat(1 + 2 * least // len(GRASS))


def passkey_accuracy(
    model: Any, filler: Tensor, T: int, samples: int, top_k: int | None, seed: int
) -> dict[str, Any]:
    """Share of samples whose five digits are all the likeliest; the answer's digits are fed.

    filler: Bytes (N,) that the samples are windows of.
    """
    generator = torch.Generator(filler.device).manual_seed(seed)
    right, digits, done = 0, 0.0, 0
    rows = samples if top_k is not None else max(1, min(samples, 131072 // T))
    while done < samples:
        batch = passkey_rows(filler, min(rows, samples - done), T, generator)
        if top_k is None:
            tail = logits_of(model, batch.ids[:, :-1], None)[:, -DIGITS:]
        else:
            tail = answer_logits(model, batch, top_k)
        hit = tail.argmax(-1) == batch.ids[:, -DIGITS:]
        right, digits = right + int(hit.all(1).sum()), digits + hit.float().mean(1).sum().item()
        done += len(hit)
    return {"length": T, "samples": done, "accuracy": right / done, "digits": digits / done}


def bits_per_byte(
    model: Any, text: Text, longest: int, windows: int, top_k: int | None
) -> list[dict[str, Any]]:
    """Bits per byte of the same held-out bytes after contexts of doubling lengths.

    longest: Bytes of the longest context, a power of two; the documents are those that are longer.
    """
    need = longest + TARGETS
    documents = [document[:need] for document in text.held_out if len(document) >= need][:windows]
    if not documents:
        return []
    rows, found = torch.stack(documents).long(), []
    for context in (128 << i for i in range((longest // 128).bit_length())):
        ids = rows[:, -context - TARGETS :]
        logits = logits_of(model, ids, top_k)[:, -TARGETS - 1 : -1].float()
        loss = functional.cross_entropy(logits.transpose(1, 2), ids[:, -TARGETS:]).item()
        found.append(
            {"context": context, "bits_per_byte": loss / math.log(2), "documents": len(rows)}
        )
    return found


def gates(model: Any) -> list[list[float]]:
    """Share of the memory for every layer and head."""
    return [torch.sigmoid(gate).tolist() for gate in nn.gate_parameters(model)]
