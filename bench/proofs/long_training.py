"""Training steps over texts that need two GPUs in the original repositories, segment by segment.

Under torchrun every GPU reads a text of its own, and gradients are averaged once a step.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from lctx_kernels import hf, nn
from lctx_kernels.hf.training import segmentwise_backward

from . import ranks
from .shapes import SHAPES, random_model


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _wait(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def segmentwise(
    shape: str, T: int, segment: int, optimizer_name: str, device: str, *, steps: int = 1,
    seconds: float = 0.0, log: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Steps of segment-wise training of an infini model with random weights.

    Args:
        steps: Optimiser's steps; the last one is timed.
        seconds: Stop the text after so long; 0 reads it to its end.
    """
    model = hf.convert(random_model(shape, device), "infini", segment_len=segment).train()
    if optimizer_name == "adafactor":
        from transformers.optimization import Adafactor

        optimizer: torch.optim.Optimizer = Adafactor(
            model.parameters(), lr=1e-4, scale_parameter=False, relative_step=False
        )
    else:
        groups = nn.parameter_groups(model, lr=1e-5, weight_decay=0.1, gate_lr=1e-2)
        optimizer = torch.optim.AdamW(groups, fused=device == "cuda")
    ids = torch.randint(1, SHAPES[shape][1]["vocab_size"], (1, T), device=device)
    marks: list[float] = []
    peaks: list[int] = []

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        marks.append(_wait(device))
        peaks.append(_peak(device))
        if seconds and marks[-1] - started > seconds:
            raise TimeoutError

    for _ in range(steps):
        marks.clear()
        peaks.clear()
        started, done = _wait(device), True
        try:
            loss = segmentwise_backward(model, {"input_ids": ids, "labels": ids}, backward=backward)
        except TimeoutError:
            done, loss = False, torch.zeros(())
        read = _wait(device)
        ranks.average_gradients(model)
        averaged = _wait(device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended = _wait(device)
    times = [b - a for a, b in pairwise(marks)] or [read - started]
    middle = sorted(times)[len(times) // 2]
    found = {
        "shape": shape, "tokens": T, "segment": segment, "optimizer": optimizer_name,
        "parameters": sum(p.numel() for p in model.parameters()), "segments_done": len(marks),
        "whole": done, "loss": loss.item(), "seconds_of_text": read - started,
        "seconds_of_gradients": averaged - read, "seconds_of_optimizer": ended - averaged,
        "seconds_of_a_segment": middle,
        "tokens_per_second": len(marks) * segment / (read - started),
        "peak_bytes": _peak(device), "peak_bytes_after_two_segments": peaks[:2][-1],
        "peak_bytes_after_the_text": peaks[-1],
        "head_dim": model.model.layers[0].self_attn.head_dim,
    }  # fmt: skip
    found = ranks.together(found)
    log(str(found))
    return found
