"""Training of one model: next bytes, and pass keys at growing lengths."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lctx_kernels import nn

from .models import build
from .rows import LEAST, VOCAB, Batch, Text, passkey_rows

CHECK = 25  # steps


@dataclass
class Recipe:
    """What a run is made of.

    lengths: Of the longest rows; a step's rows have at least `shortest` of it, so that questions
    stand anywhere in segments and blocks. The next length's turn comes after its steps in
    `steps_at`; without that, when the answers' loss is below `advance`.
    steps: Of the optimiser, `tokens` each. answer_weight, last_weight: Of the losses of echoes and
    answers, before and at the last length.
    decoys: Numbers of other names in every row of the last length.
    """

    method: str
    shape: str = "30m"
    lengths: list[int] = field(default_factory=lambda: [128, 256, 512, 1024])
    steps_at: list[int] | None = None
    shortest: float = 1.0
    advance: float = 0.5
    steps: int = 1400
    tokens: int = 16384
    lr: float = 1.5e-3
    gate_lr: float = 1e-2
    weight_decay: float = 0.1
    warmup: int = 50
    answer_weight: float = 1.0
    last_weight: float = 3.0
    decoys: int = 0
    seed: int = 0
    seconds: float = 0.0  # the last step and the end of the learning rate at the latest; 0: never
    options: dict[str, Any] = field(default_factory=dict)


def losses(logits: Tensor, batch: Batch) -> Tensor:
    """(3,) mean losses: of the text, of the keys' echoes, of the answers."""
    flat = functional.cross_entropy(
        logits[:, :-1, :VOCAB].float().transpose(1, 2), batch.ids[:, 1:], reduction="none"
    )
    hidden, echoes, answers = (x[:, 1:] for x in (batch.hidden, batch.echoes, batch.answers))
    masks = torch.stack([~(hidden | echoes | answers), echoes, answers])
    return (flat * masks).sum((1, 2)) / masks.sum((1, 2))  # without waiting for the GPU


def train(recipe: Recipe, text: Text, device: str, log: Callable[[str], None]) -> tuple[Any, Any]:
    """The trained model and its curve, a dict every CHECK steps."""
    started = time.perf_counter()
    model = build(recipe.method, recipe.shape, recipe.seed, **recipe.options).to(device).train()
    groups = nn.parameter_groups(
        model, lr=recipe.lr, weight_decay=recipe.weight_decay, gate_lr=recipe.gate_lr
    )
    fused = device == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=fused)

    def done(step: int) -> float:
        """Share of the run that is over."""
        share = step / recipe.steps
        if recipe.seconds:
            share = max(share, (time.perf_counter() - started) / recipe.seconds)
        return min(share, 1.0)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warmup)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done(step))))

    generator = torch.Generator(device).manual_seed(recipe.seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    chance = random.Random(recipe.seed)
    weights = torch.tensor([[1.0, w, w] for w in (recipe.answer_weight, recipe.last_weight)])
    weights = weights.to(device)
    curve: list[dict[str, float]] = []
    sums, lengths = torch.zeros_like(weights[0]), list(recipe.lengths)
    for step in range(1, recipe.steps + 1):
        T = max(LEAST, int(lengths[0] * (1 - (1 - recipe.shortest) * chance.random())))
        decoys = recipe.decoys if len(lengths) == 1 else 0
        batch = passkey_rows(text.train, max(1, recipe.tokens // T), T, generator, decoys)
        with torch.autocast(device, torch.bfloat16, enabled=fused):
            logits = model(batch.ids, use_cache=False).logits
        found = losses(logits, batch)
        (found * weights[int(len(lengths) == 1)]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        sums += found.detach()
        if step % CHECK:
            continue
        language, echo, answer = (sums / CHECK).tolist()
        seconds = time.perf_counter() - started
        entry = {
            "step": step, "length": lengths[0], "bits_per_byte": language / math.log(2),
            "echo_nats": echo, "answer_nats": answer, "seconds": seconds,
        }  # fmt: skip
        curve.append(entry)
        log(" ".join(f"{name} {value:.4g}" for name, value in entry.items()))
        sums.zero_()
        if recipe.steps_at is not None:
            passed = sum(step >= end for end in accumulate(recipe.steps_at))
            lengths = recipe.lengths[min(passed, len(recipe.lengths) - 1) :]
        elif len(lengths) > 1 and answer < recipe.advance:
            lengths.pop(0)
        if recipe.seconds and seconds > recipe.seconds:
            break
    return model.eval(), curve
