"""Training of one model: next bytes, and pass keys at growing lengths."""

import copy
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
    last_weight: float = 1.0
    last_temperature: float = 1.0
    decoys: int = 0
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


class HalfCopy:
    """The model that is trained, in fp32, and one in bf16 that computes on a GPU.

    Norms and feed-forward layers of the copy are compiled: a small model's time goes into
    elementwise kernels.
    """

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model)  # buffers, such as frequencies, stay in fp32
        kept = {id(gate) for gate in nn.gate_parameters(self.model)}
        for x in self.model.parameters():
            x.data = x.data if id(x) in kept else x.data.bfloat16()
        self.theirs, self.ours = list(model.parameters()), list(self.model.parameters())
        for x in self.theirs:
            x.grad = torch.zeros_like(x)
        for module in self.model.modules():
            if type(module).__name__ in ("LlamaRMSNorm", "LlamaMLP"):
                module.compile(dynamic=True)

    def hand_over(self) -> None:
        """Gradients to the model that is trained."""
        torch._foreach_copy_([x.grad for x in self.theirs], [x.grad for x in self.ours])
        for x in self.ours:
            x.grad = None

    @torch.no_grad()
    def take_over(self) -> None:
        """Weights from it."""
        torch._foreach_copy_(self.ours, self.theirs)


def train(recipe: Recipe, text: Text, device: str, log: Callable[[str], None]) -> tuple[Any, Any]:
    """The trained model, in fp32, and its curve, a dict every CHECK steps."""
    started = time.perf_counter()
    model = build(recipe.method, recipe.shape, recipe.seed, **recipe.options).to(device).train()
    groups = nn.parameter_groups(
        model, lr=recipe.lr, weight_decay=recipe.weight_decay, gate_lr=recipe.gate_lr
    )
    half = HalfCopy(model) if device == "cuda" else None
    running = half.model if half else model
    fused = half is not None
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
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, recipe.last_weight]]).to(device)
    curve: list[dict[str, float]] = []
    sums, lengths = torch.zeros_like(weights[0]), list(recipe.lengths)
    for step in range(1, recipe.steps + 1):
        T = max(LEAST, int(lengths[0] * (1 - (1 - recipe.shortest) * chance.random())))
        decoys = recipe.decoys if len(lengths) == 1 else 0
        batch = passkey_rows(text.train, max(1, recipe.tokens // T), T, generator, decoys)
        logits = running(batch.ids, use_cache=False).logits
        found = losses(logits, batch, recipe.last_temperature)
        (found * weights[int(len(lengths) == 1)]).sum().backward()
        if half:
            half.hand_over()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if half:
            half.take_over()
        else:
            optimizer.zero_grad(set_to_none=True)
        sums += found.detach()
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
