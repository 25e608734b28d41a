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

from . import graphs
from .graphs import HalfCopy, Recorded
from .models import build
from .rows import DIGITS, LEAST, VOCAB, Batch, Text, passkey_rows

CHECK = 25  # steps


@dataclass
class Recipe:
    """What a run is made of.

    lengths: Of the longest rows; a step's rows have at least `shortest` of it, so that questions
    stand anywhere in segments and blocks. The next length's turn comes after its steps in
    `steps_at`; without that, when the answers' loss is below `advance`.
    steps: Of the optimiser, `tokens` each. last_weight: Of the answers' loss at the last length;
    other losses weigh 1. last_temperature: What logits of answers are divided by there: with 1, a
    key that is found well enough for short rows teaches nothing about longer ones.
    recorded: On a GPU compute in bf16, recorded as CUDA graphs, instead of in autocast.
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
    last_weight: float = 1.0
    last_temperature: float = 1.0
    recorded: bool = False
    seed: int = 0
    seconds: float = 0.0  # the last step and the end of the learning rate at the latest; 0: never
    options: dict[str, Any] = field(default_factory=dict)


def losses(logits: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
    """(4,) mean losses: of the text, of the keys' echoes, of the answers; with cooled logits."""
    logits = logits[:, :-1, :VOCAB].float().transpose(1, 2)
    flat = functional.cross_entropy(logits, batch.ids[:, 1:], reduction="none")
    hidden, echoes, answers = (x[:, 1:] for x in (batch.hidden, batch.echoes, batch.answers))
    masks = torch.stack([~(hidden | echoes | answers), echoes, answers])
    means = (flat * masks).sum((1, 2)) / masks.sum((1, 2))  # without waiting for the GPU
    tail = functional.cross_entropy(logits[..., -DIGITS:] / temperature, batch.ids[:, -DIGITS:])
    return torch.cat([means, tail[None]])


class Stepper:
    """Loss and gradients of a batch: in fp32, or on a GPU in bf16, recorded for every length."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.graphs: dict[tuple[int, ...], Recorded] = {}
        gpu = next(model.parameters()).is_cuda
        self.half = HalfCopy(model) if gpu and recipe.recorded else None
        self.autocast = gpu and not recipe.recorded

    def losses(self, batch: Batch, last: bool) -> tuple[Tensor, Tensor]:
        """What is minimised, and all four of `losses`."""
        if self.half:
            scores = graphs.logits(self.half.model, batch.ids)
        else:
            with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
                scores = self.model(batch.ids, use_cache=False).logits
        found = losses(scores, batch, self.recipe.last_temperature)
        text, echo, answer, cooled = found
        return text + echo + (self.recipe.last_weight * cooled if last else answer), found.detach()

    def backward(self, batch: Batch, last: bool) -> Tensor:
        """Gradients into the model; the losses."""
        if self.half is None:
            loss, found = self.losses(batch, last)
            loss.backward()
            return found
        self.half.take_over()
        shape = (*batch.ids.shape, last)
        if shape not in self.graphs:
            self.graphs[shape] = Recorded(self.half, batch, lambda x: self.losses(x, last))
        return self.graphs[shape](batch)


def train(recipe: Recipe, text: Text, device: str, log: Callable[[str], None]) -> tuple[Any, Any]:
    """The trained model, in fp32, and its curve, a dict every CHECK steps."""
    started = time.perf_counter()
    model = build(recipe.method, recipe.shape, recipe.seed, **recipe.options).to(device).train()
    groups = nn.parameter_groups(
        model, lr=recipe.lr, weight_decay=recipe.weight_decay, gate_lr=recipe.gate_lr
    )
    stepper, fused = Stepper(model, recipe), device == "cuda"
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
    curve: list[dict[str, float]] = []
    sums, lengths = torch.zeros(4, device=device), list(recipe.lengths)
    for step in range(1, recipe.steps + 1):
        T = max(LEAST, int(lengths[0] * (1 - (1 - recipe.shortest) * chance.random())))
        batch = passkey_rows(text.train, max(1, recipe.tokens // T), T, generator)
        found = stepper.backward(batch, last=len(lengths) == 1)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if stepper.half is None:  # recorded gradients are overwritten
            optimizer.zero_grad(set_to_none=True)
        sums += found
        if step % CHECK:
            continue
        language, echo, answer, _ = (sums / CHECK).tolist()
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
