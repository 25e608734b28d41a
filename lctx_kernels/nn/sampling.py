"""What models that generate share: one token from the logits of the next, and their mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode; afterwards, also of what fails, in the mode that it had."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B,) tokens for logits (B, V): the likeliest for temperature 0, else a random one.

    Args:
        logits: Of the next token.
        temperature: What the logits are divided by.
        top_k: Only the likeliest k tokens.
        top_p: Only the likeliest tokens, until they hold this share of the probability.
        generator: Source of randomness.

    Raises:
        ValueError: A temperature below 0, or limits that leave no token.

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0.0)
    tensor([1])
    """
    if temperature < 0:
        raise ValueError(f"sample: temperature is {temperature}; expected at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sample: top_k is {top_k}; expected at least 1, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sample: top_p is {top_p}; expected above 0, at most 1, or None")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
