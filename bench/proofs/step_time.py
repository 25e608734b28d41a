"""Forward and backward of converted models of 1B to 8B shapes beside cuDNN's attention in them."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lctx_kernels import hf

from ..timing import describe_error
from .goals import STEP_GOALS
from .shapes import SHAPES, random_model, register, with_shared_weights

SEGMENT = 2048
Case = tuple[str, int, bool, int]
CASES: list[Case] = [
    ("llama-3.2-1b", 8192, False, 5), ("llama-3.2-1b", 32768, False, 3),
    ("llama-3-8b", 8192, False, 3), ("llama-3.2-1b", 131072, True, 1),
]  # fmt: skip
"""Shape, tokens, gradient checkpointing, rounds."""
GEMMA: list[Case] = [("gemma-2b", 8192, False, 3), ("gemma-2b", 16384, False, 1)]


def branches(T: int) -> dict[str, list[int]]:
    """LongNet's branches: segments of 2k tokens, doubled with the rate up to the length."""
    count = max(1, (T // SEGMENT).bit_length())
    return {
        "segment_lengths": [SEGMENT << i for i in range(count)],
        "dilation_rates": [1 << i for i in range(count)],
    }


def candidates(shape: str, T: int, device: str, segment: int = SEGMENT) -> dict[str, Any]:
    """The base model with cuDNN's attention, dense and inside segments, and converted."""
    register()
    base = random_model(shape, device)
    base.config._attn_implementation = "bench_dense"
    local = with_shared_weights(base)
    local.config._attn_implementation = "bench_segments"
    local.config.bench_segment = segment
    convert = {
        "infini": ("infini", {"segment_len": segment}),
        "infini-delta": ("infini", {"segment_len": segment, "update": "delta"}),
        "landmark": ("landmark", {"block_size": 64, "landmark_id": 0}),
        "dilated": ("dilated", branches(T)),
    }
    models = {"dense": base, "segments": local}
    for name, (method, options) in convert.items():
        models[name] = hf.convert(with_shared_weights(base), method, **options)
    return models


def step(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward of the layers, without the output layer."""
    out = model.model(input_ids=ids, use_cache=False).last_hidden_state
    out.sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def warm_up(model: Any, ids: torch.Tensor) -> None:
    """A step of the first layer alone: kernels are chosen and loaded."""
    layers = model.model.layers
    model.model.layers = layers[:1]
    try:
        step(model, ids)
    finally:
        model.model.layers = layers


def measure(
    shape: str, T: int, checkpointing: bool, rounds: int, device: str, segment: int = SEGMENT
) -> dict[str, Any]:
    """Median seconds and peak memory of a step of every candidate, and the ratios of the goals."""
    models = candidates(shape, T, device, segment)
    ids = torch.randint(1, SHAPES[shape][1]["vocab_size"], (1, T), device=device)
    found: dict[str, Any] = {
        "shape": shape, "tokens": T, "checkpointing": checkpointing, "rounds": rounds,
        "layers": SHAPES[shape][1]["num_hidden_layers"], "segment": segment,
        "branches": branches(T), "seconds": {}, "peak_bytes": {}, "errors": {}, "ratios": {},
    }  # fmt: skip
    samples: dict[str, list[float]] = {}
    for name, model in models.items():
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            warm_up(model, ids)
            samples[name] = []
        except Exception as error:  # reported, the others go on
            found["errors"][name] = describe_error(error)
    for turn in range(rounds):
        names = list(samples)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = _now(device)
            step(models[name], ids)
            samples[name].append(_now(device) - started)
            if device == "cuda":
                found["peak_bytes"][name] = torch.cuda.max_memory_allocated()
    found["seconds"] = {name: statistics.median(times) for name, times in samples.items()}
    for name, (rival, _, _) in STEP_GOALS.items():
        if {name, rival} <= found["seconds"].keys():
            found["ratios"][name] = found["seconds"][name] / found["seconds"][rival]
    return found


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def reach(device: str, log: Callable[[str], None], cases: Sequence[Case] = CASES) -> list[Any]:
    """All cases; one that fails is an entry with its error."""
    results = []
    for shape, T, checkpointing, rounds in cases:
        try:
            found = measure(shape, T, checkpointing, rounds, device, min(SEGMENT, T // 4))
        except Exception as error:  # reported
            found = {"shape": shape, "tokens": T, "errors": {"all": describe_error(error)}}
        results.append(found)
        log(f"{shape} {T}: {found.get('seconds')} {found.get('ratios')} {found['errors']}")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return results
