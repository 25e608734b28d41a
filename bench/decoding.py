"""Time per generated token against the length of the history: of one layer, and of a model.

    python -m bench.decoding --output bench/results/h200/decoding.json

Histories are random blocks and memories put into the states: what a step does depends on sizes
alone. The time on the device is that of a token's kernels with cold L2, queued ahead of the GPU;
the wall time is that of tokens one after the other, Python included. The models have 4 layers of
the shape of Llama-3-8B with random weights, converted by `lctx_kernels.hf`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lctx_kernels import hf
from lctx_kernels._measure import write_json
from lctx_kernels.cache import InfiniState, RetrievalState, RopeTable
from lctx_kernels.infini import InfiniMemory

from .machine import describe_machine
from .timing import Budget, time_round_robin

KIBI = 1024
DEVICE = "cuda"
BATCH, HEADS, KV_HEADS, HEAD_DIM = 1, 32, 8, 128
BLOCK, TOP_K, SEGMENT = 64, 4, 2048
DTYPE = torch.bfloat16
LAYERS = 4  # of the models


@dataclass
class Row:
    """One state: seconds per token, and bytes that a token has to read."""

    name: str
    history: int
    device_seconds: float
    wall_seconds: float
    bytes_read: int
    gpu_bytes: int


def token() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of one token."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(torch.randn(BATCH, 1, h, HEAD_DIM, device=DEVICE, dtype=DTYPE) for h in heads)


def rope_table() -> RopeTable:
    """Llama's embedding at the places that retrieval needs."""
    places = torch.arange((TOP_K + 3) * BLOCK, device=DEVICE, dtype=torch.float64)[:, None]
    half = torch.arange(HEAD_DIM // 2, device=DEVICE, dtype=torch.float64) / (HEAD_DIM // 2)
    angle = torch.cat([places * 10000.0**-half] * 2, dim=1)
    return RopeTable(torch.stack([angle.cos(), angle.sin()]).float())


def retrieval_state(history: int, select: str, offload: bool) -> RetrievalState:
    """A state that has seen `history` tokens."""
    state = RetrievalState(BLOCK, TOP_K, select, offload)
    blocks, half = history // BLOCK, history // BLOCK // 2 + 1
    for n in (half, blocks - half):  # room for more: nothing grows while it is timed
        shape = (BATCH, n, KV_HEADS, BLOCK, HEAD_DIM)
        state.store.append(*(torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2)))
    state.seen = blocks * BLOCK
    return state


def infini_state(history: int) -> InfiniState:
    """A state with the memory of `history` tokens, half a segment open."""
    state = InfiniState(SEGMENT)
    M = torch.randn(BATCH, KV_HEADS, HEAD_DIM, HEAD_DIM, device=DEVICE)
    state.mem = InfiniMemory(M, torch.rand(BATCH, KV_HEADS, HEAD_DIM, device=DEVICE) * history)
    shape = (BATCH, KV_HEADS, SEGMENT, HEAD_DIM)
    state.open = [torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(3)]
    state.length, state.seen = SEGMENT // 2, history
    state.closed = history // SEGMENT
    return state


def states() -> Iterator[tuple[str, int, Callable[[], Any], dict[str, Any], int]]:
    """Name, history, what makes the state, options of `attend`, bytes read by a token."""
    rope, row = rope_table(), HEAD_DIM * DTYPE.itemsize
    reads = {"token_and_head": HEADS, "head": HEADS, "token": KV_HEADS}
    for history in (8 * KIBI, 256 * KIBI):
        for offload in (False, True):
            for select in ("token_and_head", "token"):
                name = f"landmark, {select}{', offloaded' if offload else ''}"
                keys = (
                    BATCH
                    * row
                    * (KV_HEADS * history // BLOCK + 2 * BLOCK * (reads[select] * TOP_K + KV_HEADS))
                )
                yield (
                    name, history, lambda h=history, s=select, o=offload: retrieval_state(h, s, o),
                    {"rope": rope}, keys,
                )  # fmt: skip
        yield (
            "landmark, plain PyTorch", history,
            lambda h=history: retrieval_state(h, "token_and_head", False),
            {"rope": lambda x, places: rope(x, places)},
            BATCH * row * (KV_HEADS * history // BLOCK + 2 * BLOCK * (HEADS * TOP_K + KV_HEADS)),
        )  # fmt: skip
    for history in (4 * KIBI, 64 * KIBI, 1024 * KIBI):
        memory = 4 * BATCH * KV_HEADS * HEAD_DIM * (HEAD_DIM + 1)
        read = BATCH * row * KV_HEADS * SEGMENT + memory
        yield "infini", history, lambda h=history: infini_state(h), {}, read


def wall_seconds(step: Callable[[], object], runs: int = 7) -> float:
    """Median over runs of 16 tokens of the seconds per token, after a run to warm up."""
    samples = []
    for _ in range(16):
        step()
    for _ in range(runs):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(16):
            step()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - started) / 16)
    return statistics.median(samples)


def measure(seconds: float) -> list[Row]:
    """All states, their tokens in turn."""
    steps, found = {}, []
    with torch.no_grad():
        inputs = token()
        for name, history, make, options, read in states():
            before = torch.cuda.memory_allocated()
            state = make()
            gpu_bytes = torch.cuda.memory_allocated() - before
            step = lambda s=state, o=options: s.attend(*inputs, **o)  # noqa: E731
            step()
            steps[f"{name} {history}"] = step
            found.append(Row(name, history, 0.0, wall_seconds(step), read, gpu_bytes))
        timings = time_round_robin(steps, DEVICE, Budget(seconds, 5, 15))
    for row, timing in zip(found, timings.values(), strict=True):
        row.device_seconds = timing.median
    return found


@torch.no_grad()
def measure_models() -> Iterator[dict[str, Any]]:
    """Tokens of converted models, their caches filled with a history."""
    landmark = {"block_size": BLOCK, "top_k": TOP_K, "offload": True}
    for method, options, histories in (
        ("landmark", landmark, (8 * KIBI, 256 * KIBI)),
        ("infini", {"segment_len": SEGMENT}, (4 * KIBI, 1024 * KIBI)),
    ):
        model = hf.convert(llama(), method, **options)
        for history in histories:
            yield measure_model(model, method, history)
        del model
        torch.cuda.empty_cache()


def measure_model(model: Any, method: str, history: int) -> dict[str, Any]:
    """Seconds of a token, and the memory that the GPU holds meanwhile."""
    cache = hf.make_cache(model)
    for layer in cache.layers:
        fill(layer, method, history)
    token = torch.ones(BATCH, 1, dtype=torch.int64, device=DEVICE)

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)

    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = wall_seconds(step)
    peak = torch.cuda.max_memory_allocated()
    print(
        f"model, {method}, {history // KIBI}k: {seconds * 1e3:.2f} ms a token, "
        f"{peak / 1e9:.2f} GB", flush=True,
    )  # fmt: skip
    return {
        "method": method, "history": history, "wall_seconds": seconds, "gpu_peak_bytes": peak,
    }  # fmt: skip


def llama() -> Any:
    """Random weights, on the GPU."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=HEADS * HEAD_DIM, intermediate_size=14336,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        max_position_embeddings=8192,
    )  # fmt: skip
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def fill(layer: Any, method: str, history: int) -> None:
    """Put a random history into a layer of a converted model's cache."""
    if method == "infini":
        state: Any = infini_state(history)
        layer.columns = state.seen
    else:
        state = retrieval_state(history, "token_and_head", True)
        layer.columns = state.seen // BLOCK * (BLOCK - 1)
    layer.rows.states = [state]
    layer.rows.batch, layer.is_initialized = BATCH, True


def table(rows: list[Row]) -> str:
    """For people."""
    head = f"{'state':40} {'history':>8} {'GPU us':>8} {'wall us':>8} {'GB/s':>7} {'GPU MB':>8}"
    lines = [
        f"{r.name:40} {r.history // KIBI:7}k {r.device_seconds * 1e6:8.1f} "
        f"{r.wall_seconds * 1e6:8.1f} {r.bytes_read / r.device_seconds / 1e9:7.0f} "
        f"{r.gpu_bytes / 1e6:8.1f}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--no-models", action="store_true", help="states alone")
    parser.add_argument("--seconds", type=float, default=6.0, help="of the timing on the device")
    arguments = parser.parse_args()
    rows = measure(arguments.seconds)
    print(table(rows), flush=True)
    torch.cuda.empty_cache()
    sizes = {"B": BATCH, "Hq": HEADS, "Hkv": KV_HEADS, "D": HEAD_DIM, "dtype": "bf16"}
    sizes |= {"block_size": BLOCK, "top_k": TOP_K, "segment_len": SEGMENT, "layers": LAYERS}
    results: dict[str, Any] = {"machine": describe_machine(DEVICE), "sizes": sizes}
    results |= {"rows": [asdict(r) for r in rows], "models": []}
    models = iter(()) if arguments.no_models else measure_models()
    while True:  # what is there is written: the models take longest
        if arguments.output is not None:
            write_json(arguments.output, results)
        found = next(models, None)
        if found is None:
            return
        results["models"].append(found)


if __name__ == "__main__":
    main()
