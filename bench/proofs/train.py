"""Training of one model: next bytes, and pass keys at growing lengths."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lctx_kernels import nn

from .models import build
from .rows import VOCAB, Batch, Text, passkey_rows


@dataclass
class Recipe:
    """What a run is made of. stages: (length of rows, steps)."""

    method: str
    shape: str = "30m"
    stages: list[tuple[int, int]] = field(
        default_factory=lambda: [(128, 120), (256, 120), (512, 120), (1024, 300)]
    )
    tokens: int = 16384  # per step
    lr: float = 1.5e-3
    gate_lr: float = 1e-2
    weight_decay: float = 0.1
    warmup: int = 50
    answer_weight: float = 1.0
    seed: int = 0
    seconds: float = 0.0  # stop after so long; 0 is never
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self.stages)

    def length(self, step: int) -> int:
        """Length of the rows of a step."""
        for length, steps in self.stages:
            if step < steps:
                return length
            step -= steps
        raise IndexError(step)


def losses(logits: Tensor, batch: Batch) -> Tensor:
    """(3,) mean losses: of the text, of the keys' echoes, of the answers."""
    flat = functional.cross_entropy(
        logits[:, :-1, :VOCAB].float().transpose(1, 2), batch.ids[:, 1:], reduction="none"
    )
    hidden, echoes, answers = (x[:, 1:] for x in (batch.hidden, batch.echoes, batch.answers))
    text = ~(hidden | echoes | answers)
    return torch.stack([flat[text].mean(), flat[echoes].mean(), flat[answers].mean()])


def train(recipe: Recipe, text: Text, device: str, log: Callable[[str], None]) -> tuple[Any, Any]:
    """The trained model and its curve, a dict per logged step."""
    model = build(recipe.method, recipe.shape, recipe.seed, **recipe.options).to(device).train()
    groups = nn.parameter_groups(
        model, lr=recipe.lr, weight_decay=recipe.weight_decay, gate_lr=recipe.gate_lr
    )
    fused = device == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=fused)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warmup)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    weights = torch.tensor([1.0, recipe.answer_weight, recipe.answer_weight], device=device)
    curve, started, sums, count = [], time.perf_counter(), torch.zeros_like(weights), 0
    for step in range(recipe.steps):
        T = recipe.length(step)
        batch = passkey_rows(text.train, max(1, recipe.tokens // T), T, generator)
        with torch.autocast(device, torch.bfloat16, enabled=fused):
            logits = model(batch.ids, use_cache=False).logits
        found = losses(logits, batch)
        (found * weights).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        sums, count = sums + found.detach(), count + 1
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            late = recipe.seconds and time.perf_counter() - started > recipe.seconds
            language, echo, answer = (sums / count).tolist()
            entry = {
                "step": step + 1, "length": T, "bits_per_byte": language / math.log(2),
                "echo_nats": echo, "answer_nats": answer, "seconds": time.perf_counter() - started,
            }  # fmt: skip
            curve.append(entry)
            log(" ".join(f"{name} {value:.4g}" for name, value in entry.items()))
            sums, count = torch.zeros_like(weights), 0
            if late:
                break
    return model.eval(), curve
