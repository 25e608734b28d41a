"""The ops behind `blockwise_cross_entropy`, in PyTorch: logits of one chunk of tokens at a time."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from . import _ops
from ._dtypes import stat_dtype, without_autocast

_library = torch.library.Library("lctx", "FRAGMENT")
_library.define(
    "token_loss_fwd(Tensor hidden, Tensor weight, Tensor labels, int chunk_size, int ignore_index)"
    " -> (Tensor loss, Tensor lse)"
)
_library.define(
    "token_loss_bwd(Tensor dloss, Tensor hidden, Tensor weight, Tensor labels, Tensor lse,"
    " int chunk_size, int ignore_index, bool needs_hidden, bool needs_weight)"
    " -> (Tensor dhidden, Tensor dweight)"
)


def _matmul(a: Tensor, b: Tensor, stat: torch.dtype) -> Tensor:
    """a @ b with the result, and the sums on the way to it, in `stat`."""
    low = a.dtype if b.dtype == stat else b.dtype
    if a.device.type == "cuda" and low != stat:
        return torch.mm(a.to(low), b.to(low), out_dtype=stat)
    return a.to(stat) @ b.to(stat)


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """loss (N,) = logsumexp(W h) - (W h)[label] of each token, and that logsumexp."""
    ignored = labels == ignore_index
    target = labels.masked_fill(ignored, 0).unsqueeze(-1)
    lse = hidden.new_empty(hidden.shape[0], dtype=stat_dtype(hidden.dtype))
    loss = torch.empty_like(lse)
    with without_autocast(hidden.device.type):
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            logits = _matmul(hidden[rows], weight.t(), lse.dtype)
            lse[rows] = logits.logsumexp(-1)
            loss[rows] = lse[rows] - logits.gather(-1, target[rows]).squeeze(-1)
    return loss.masked_fill_(ignored, 0), lse


def _backward(
    dloss: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, chunk_size: int,
    ignore_index: int, needs_hidden: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dlogits = dloss * (softmax(W h) - onehot(label)), chunk by chunk, and through the matmul."""
    ignored = labels == ignore_index
    target = labels.masked_fill(ignored, 0).unsqueeze(-1)
    dloss = dloss.masked_fill(ignored, 0)
    # Rows are brought to at most 1, so that fp16 products do not underflow under a mean.
    unit = dloss.abs().amax().clamp(min=torch.finfo(lse.dtype).tiny) if len(dloss) else 1.0
    dloss = (dloss / unit).unsqueeze(-1)
    dhidden = hidden.new_empty(hidden.shape if needs_hidden else 0)
    dweight = weight.new_zeros(weight.shape if needs_weight else 0, dtype=lse.dtype)
    with without_autocast(hidden.device.type):
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            dlogits = _matmul(hidden[rows], weight.t(), lse.dtype)
            dlogits.sub_(lse[rows].unsqueeze(-1)).exp_()
            dlogits.scatter_add_(-1, target[rows], dlogits.new_full(target[rows].shape, -1))
            dlogits.mul_(dloss[rows])
            if needs_hidden:
                dhidden[rows] = (_matmul(dlogits, weight, lse.dtype) * unit).to(dhidden.dtype)
            if needs_weight:
                dweight += _matmul(dlogits.t(), hidden[rows], lse.dtype)
    return dhidden, dweight.mul_(unit).to(weight.dtype)


def _forward_fake(a: SimpleNamespace) -> tuple[Tensor, ...]:
    loss = a.hidden.new_empty(a.hidden.shape[0], dtype=stat_dtype(a.hidden.dtype))
    return loss, torch.empty_like(loss)


def _backward_fake(a: SimpleNamespace) -> tuple[Tensor, ...]:
    return (
        a.hidden.new_empty(a.hidden.shape if a.needs_hidden else 0),
        a.weight.new_empty(a.weight.shape if a.needs_weight else 0),
    )


_library.impl("token_loss_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("token_loss_bwd", _backward, "CompositeExplicitAutograd")
_ops.register("token_loss", (_forward_fake, _backward_fake))
