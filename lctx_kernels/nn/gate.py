"""The gate between memory and local attention, and its own treatment by an optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._dtypes import stat_dtype


class MemoryGate(nn.Module):
    """One logit per query head: sigmoid(weight) is the share of what Infini's memory retrieves.

    Args:
        num_heads: Hq.
        init: First value of every logit: 0 gives both branches half; about -4 to -10 keeps a
            pretrained model nearly what it was and still lets the gate learn; below -17 the sum is
            the local attention to the last bit of fp32, and the gate's gradient is nearly 0.

    Source: Munkhdalai et al. 2024 (arXiv 2404.07143), eq. 10.

    >>> gate = MemoryGate(4, init=-4.0)
    >>> gate(torch.randn(1, 3, 16, dtype=torch.bfloat16)).dtype
    torch.float32
    """

    def __init__(self, num_heads: int, init: float = 0.0) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.full((num_heads,), init, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(Hq,) logits in the dtype of statistics for inputs of x's dtype; x is not read."""
        return self.weight.to(stat_dtype(x.dtype))


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The logits of all gates of a model, whatever wraps them."""
    return [p for module in model.modules() if isinstance(module, MemoryGate)
            for p in module.parameters(recurse=False)]  # fmt: skip


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, gate_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices with weight decay, vectors without, gates on their own.

    Gates that share the learning rate and the weight decay of everything else stay where they are:
    they want a learning rate of about 0.01 and no decay.

    Args:
        model: Any module.
        lr: Learning rate of all but the gates.
        weight_decay: Decay of parameters with two dimensions or more.
        gate_lr: Learning rate of the gates; None is `lr`.

    Returns:
        Groups of parameters that require a gradient, for torch.optim; empty ones are left out.

    >>> from lctx_kernels import nn
    >>> layer = nn.InfiniAttention(32, 4)
    >>> groups = parameter_groups(layer, lr=1e-4, weight_decay=0.1, gate_lr=1e-2)
    >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
    [(4, 0.0001, 0.1), (1, 0.01, 0.0)]
    """
    gates = {id(p) for p in gate_parameters(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in gates]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
        {
            "params": [p for p in trained if id(p) in gates],
            "lr": lr if gate_lr is None else gate_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
