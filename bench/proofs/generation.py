"""Time and memory of a generated token by the length of the history."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lctx_kernels import hf

from . import ranks
from .shapes import SHAPES, random_model

TOKENS = 60  # generated for a median


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def read(model: Any, cache: Any, tokens: int, chunk: int) -> float:
    """Feed random tokens; seconds."""
    vocab, device = model.config.vocab_size - 1, model.device
    started = _now(device.type)
    for start in range(0, tokens, chunk):
        ids = torch.randint(1, vocab, (1, min(chunk, tokens - start)), device=device)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _now(device.type) - started


@torch.no_grad()
def token_times(model: Any, caches: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median seconds of one more token for every cache, round robin."""
    samples: dict[str, list[float]] = {name: [] for name in caches}
    token, device = torch.ones(1, 1, dtype=torch.int64, device=model.device), model.device.type
    for turn in range(rounds + 3):
        names = list(caches)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = _now(device)
            model(token, past_key_values=caches[name], use_cache=True)
            if turn >= 3:
                samples[name].append(_now(device) - started)
            else:
                _now(device)
    return {name: statistics.median(times) for name, times in samples.items()}


def infini_stream(
    shape: str, lengths: Sequence[int], device: str, log: Callable[[str], None],
    segment: int = 2048, chunk: int = 32768,
) -> dict[str, Any]:  # fmt: skip
    """An infini model reads histories of several lengths, then generates after each."""
    model = hf.convert(random_model(shape, device), "infini", segment_len=segment).eval()
    caches, held, seconds = {}, {}, {}
    for length in lengths:
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        caches[str(length)] = cache = hf.make_cache(model)
        seconds[str(length)] = read(model, cache, length, chunk)
        held[str(length)] = torch.cuda.memory_allocated() - before if device == "cuda" else 0
        log(f"read {length} in {seconds[str(length)]:.2f} s, cache {held[str(length)]} bytes")
    found = {
        "shape": shape, "segment": segment, "seconds_of_reading": seconds,
        "cache_bytes": held, "seconds_of_a_token": token_times(model, caches, TOKENS),
    }  # fmt: skip
    log(str(found))
    return found


@torch.no_grad()
def fill(cache: Any, tokens: int, block: int) -> None:
    """Give every layer of a landmark cache a history of random keys and values."""
    for layer in cache.layers:
        state = layer.rows.states[0]
        k, _ = state.open
        (B, heads, _, D), done = k.shape, 0
        state.reserve(tokens + TOKENS)
        while done < tokens // block:
            n = min(512, tokens // block - done)
            fresh = torch.randn(2, B, n, heads, block, D, dtype=k.dtype, device=k.device)
            state.store.append(*fresh)
            done += n
        state.open_len, state.seen = 0, tokens
        layer.columns = tokens // block * (block - 1)


def landmark_histories(
    shape: str, lengths: Sequence[int], device: str, log: Callable[[str], None], top_k: int = 4,
) -> dict[str, Any]:  # fmt: skip
    """A landmark model with histories of several lengths in the CPU's memory generates."""
    model = random_model(shape, device)
    model = hf.convert(model, "landmark", block_size=64, top_k=top_k, offload=True).eval()
    held, times = {}, {}
    caches = {}
    for length in lengths:
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        caches[str(length)] = cache = hf.make_cache(model)
        read(model, cache, 10, 10)
        fill(cache, length, 64)
        held[str(length)] = torch.cuda.memory_allocated() - before if device == "cuda" else 0
    peaks = {}
    for name, cache in caches.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        token_times(model, {name: cache}, 5)
        if device == "cuda":
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            peaks[name] = weights + held[name] + torch.cuda.max_memory_allocated() - before
    times = token_times(model, caches, TOKENS)
    found = {
        "shape": shape, "top_k": top_k, "block_size": 64, "offload": True, "cache_bytes": held,
        "peak_bytes": peaks, "seconds_of_a_token": times,
    }  # fmt: skip
    log(str(found))
    return found


def landmark_long_prompt(
    shape: str, tokens: int, device: str, log: Callable[[str], None], top_k: int = 4,
    new_tokens: int = 40, select: str = "token_and_head",
) -> dict[str, Any]:  # fmt: skip
    """A landmark model reads a prompt with its blocks in the CPU's memory, and goes on."""
    model = random_model(shape, device)
    model = hf.convert(
        model, "landmark", block_size=64, top_k=top_k, offload=True, chunk_len=1008, select=select
    ).eval()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    cache = hf.make_cache(model)
    seconds = read(model, cache, tokens, tokens)  # as `generate` does: parts are the model's
    log(f"{shape}: {tokens} tokens read in {seconds:.1f} s")
    times = token_times(model, {"": cache}, new_tokens)
    found = {
        "shape": shape, "tokens": tokens, "top_k": top_k, "select": select, "block_size": 64,
        "seconds_of_reading": seconds, "seconds_of_a_token": times[""],
        "tokens_per_second": 1 / times[""], "reading_tokens_per_second": tokens / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": SHAPES[shape][1]["vocab_size"],
    }  # fmt: skip
    found = ranks.together(found)
    log(str(found))
    return found
