"""Selective activation checkpointing that keeps what attention computed."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy


def checkpoint_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save the outputs of the forward ops of this package (out, lse), recompute everything else.

    Attention is the most expensive thing to recompute and its outputs are small: (B, T, H, D) and
    (B, H, T). Hand it to `torch.utils.checkpoint.create_selective_checkpoint_contexts`.

    Args:
        ctx: Selective checkpoint context, unused.
        op: Op overload about to run.
        args, kwargs: Its arguments, unused.

    Returns:
        MUST_SAVE for `lctx::*_fwd`, PREFER_RECOMPUTE for all others.

    Source: Korthikanti et al. 2022 (arXiv 2205.05198), section 5.
    Equivalent to: no checkpointing, in results; in memory, full checkpointing plus (out, lse).

    >>> import functools, torch
    >>> from torch.utils import checkpoint
    >>> from lctx_kernels import checkpoint_policy, flash_attention
    >>> q, k, v = torch.randn(3, 1, 64, 4, 16, requires_grad=True)
    >>> contexts = functools.partial(
    ...     checkpoint.create_selective_checkpoint_contexts, checkpoint_policy
    ... )
    >>> out = checkpoint.checkpoint(
    ...     flash_attention, q, k, v, use_reentrant=False, context_fn=contexts
    ... )
    >>> out.sum().backward()
    """
    if isinstance(op, OpOverload) and op.namespace == "lctx" and op._opname.endswith("_fwd"):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
