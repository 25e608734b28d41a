"""Feedforward and loss over chunks of tokens: activations of one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import _ops, _remat, _token_loss  # noqa: F401  (_token_loss defines the ops)
from ._dtypes import DATA_DTYPES, autocast, autocast_dtype, dtype_name
from ._operands import describe, values_readable


def _check_chunk_size(op: str, chunk_size: Any) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int | torch.SymInt):
        raise TypeError(f"{op}: chunk_size is {describe(chunk_size)}; expected an int >= 1")
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}; expected an int >= 1; nearest is 1")


def _check_data(op: str, name: str, tensor: Any, min_dim: int, layout: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in DATA_DTYPES:
        expected = ", ".join(map(dtype_name, DATA_DTYPES))
        raise TypeError(f"{op}: {name} is {describe(tensor)}; expected a tensor of {expected}")
    if tensor.dim() < min_dim:
        raise ValueError(f"{op}: {name} is {describe(tensor)}; expected {layout}")


def blockwise_feedforward(
    fn: Callable[[Tensor], Tensor], x: Tensor, chunk_size: int, *, remat: bool | str = True
) -> Tensor:
    """`fn` on chunks of tokens, so that its activations exist for one chunk at a time.

    Args:
        fn: Maps (..., L, D) to (..., L, E), each token on its own, such as an MLP; its parameters
            receive their gradients as usual.
        x: (..., T, D).
        chunk_size: Tokens per chunk (>= 1); the last chunk may be shorter.
        remat: Recompute a chunk's activations in the backward instead of keeping them: True, False,
            or the name of a policy: "nothing_saveable" is True, "everything_saveable" False,
            "dots_saveable" keeps matrix products, "dots_with_no_batch_dims_saveable" those of two
            matrices alone, "attention_saveable" attention alone; both of dots keep attention, too.

    Returns:
        (..., T, E), exactly fn(x) up to the rounding of its matmuls.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: A chunk size below 1, an unknown policy, x with fewer than two dimensions, or
            an `fn` that changes the number of tokens.

    Source: Liu and Abbeel 2023 (arXiv 2305.19370), algorithm 1.
    Equivalent to: fn(x).

    >>> import torch
    >>> from lctx_kernels import blockwise_feedforward
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    >>> x = torch.randn(2, 100, 8)
    >>> torch.allclose(blockwise_feedforward(mlp, x, chunk_size=32), mlp(x), atol=1e-6)
    True
    """
    op = "blockwise_feedforward"
    if not callable(fn):
        raise TypeError(f"{op}: fn is {describe(fn)}; expected a callable")
    policy = _remat.policy_of(op, "remat", remat)
    _check_data(op, "x", x, 2, "at least 2 dimensions (..., T, D)")
    _check_chunk_size(op, chunk_size)
    parts = []
    for chunk in x.split(chunk_size, dim=-2):
        part = _remat.run(policy, fn, chunk)
        if part.shape[:-1] != chunk.shape[:-1]:
            raise ValueError(
                f"{op}: fn mapped {describe(chunk)} to {describe(part)}; expected it to keep all "
                "dimensions but the last"
            )
        parts.append(part)
    return torch.cat(parts, dim=-2)


def blockwise_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_size: int,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of a linear output layer whose logits exist for one chunk of tokens at a time.

    Memory beyond inputs and gradients: chunk_size * V logits in fp32 instead of all of them; the
    backward recomputes them. Logits, losses and gradients are summed in fp32 (fp64 for fp64).

    Args:
        hidden: (..., D) last hidden states, fp32, fp64, bf16 or fp16.
        weight: (V, D) output layer, in hidden's dtype; logits are hidden @ weight.T.
        labels: (...) int64 in [0, V), or `ignore_index`; already shifted, token i predicts
            labels[i].
        chunk_size: Tokens per chunk (>= 1); the last chunk may be shorter.
        ignore_index: Label of tokens that do not count.
        reduction: "mean" over the tokens that count (nan if there is none, as in PyTorch), "sum",
            or "none".

    Returns:
        A scalar, or (...) for "none", in fp32 (fp64 for fp64).

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, devices or values that do not fit; labels out of range are seen before
            the work on CPU tensors only.

    Source: Liu and Abbeel 2023 (arXiv 2305.19370), section 3, applied to the loss.
    Equivalent to: torch.nn.functional.cross_entropy(hidden @ weight.T, labels) in fp32.

    >>> import torch
    >>> from lctx_kernels import blockwise_cross_entropy
    >>> hidden, weight = torch.randn(2, 50, 16), torch.randn(1000, 16)
    >>> labels = torch.randint(1000, (2, 50))
    >>> loss = blockwise_cross_entropy(hidden, weight, labels, chunk_size=32)
    >>> logits = (hidden @ weight.T).flatten(0, 1)
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy(logits, labels.flatten()))
    True
    """
    _check_cross_entropy(hidden, weight, labels, chunk_size, ignore_index, reduction)
    rows = labels.reshape(-1)
    loss, _ = _ops.call("token_loss_fwd", {
        "hidden": autocast(hidden).reshape(-1, hidden.shape[-1]), "weight": autocast(weight),
        "labels": rows, "chunk_size": chunk_size, "ignore_index": ignore_index,
    })  # fmt: skip
    if reduction == "none":
        return cast(Tensor, loss.reshape(labels.shape))
    total: Tensor = loss.sum()
    return total if reduction == "sum" else total / (rows != ignore_index).sum()


def _check_cross_entropy(
    hidden: Any, weight: Any, labels: Any, chunk_size: Any, ignore_index: Any, reduction: Any
) -> None:
    op = "blockwise_cross_entropy"
    _check_data(op, "hidden", hidden, 1, "at least 1 dimension (..., D)")
    _check_data(op, "weight", weight, 2, "2 dimensions (V, D)")
    _check_chunk_size(op, chunk_size)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index is {describe(ignore_index)}; expected an int")
    if reduction not in ("mean", "sum", "none"):
        error = ValueError if isinstance(reduction, str) else TypeError
        raise error(f"{op}: reduction is {describe(reduction)}; expected mean, sum or none")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels is {describe(labels)}; expected an int64 tensor (...)")
    given = f"hidden {describe(hidden)}, weight {describe(weight)}, labels {describe(labels)}"
    if autocast_dtype(hidden) != autocast_dtype(weight):
        raise TypeError(f"{op}: {given}; expected one dtype; try weight.to(hidden.dtype)")
    if not hidden.device == weight.device == labels.device:
        raise ValueError(f"{op}: {given}; expected one device")
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"{op}: {given}; expected hidden (..., D) and weight (V, D)")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"{op}: {given}; expected labels of shape {tuple(hidden.shape[:-1])}")
    if values_readable(labels):
        counted = labels[labels != ignore_index]
        if bool(((counted < 0) | (counted >= weight.shape[0])).any()):
            raise ValueError(
                f"{op}: labels hold {counted.min()} to {counted.max()}; expected 0 to V - 1 = "
                f"{weight.shape[0] - 1}, or ignore_index = {ignore_index}"
            )
