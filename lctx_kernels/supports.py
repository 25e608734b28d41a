"""Asks whether a call would run, without running it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ._checks import RULES, reasons
from .cp.decode import decode_attention
from .dilated import dilated_attention
from .flash import flash_attention
from .infini import infini_attention
from .landmark import landmark_attention
from .merge import merge_attention
from .ring import ring_attention

OPS: dict[str, Callable[..., Any]] = {
    "flash_attention": flash_attention,
    "infini_attention": infini_attention,
    "landmark_attention": landmark_attention,
    "dilated_attention": dilated_attention,
    "merge_attention": merge_attention,
    "ring_attention": ring_attention,
    "cp.decode_attention": decode_attention,
}
assert OPS.keys() == RULES.keys()


def supports(op_name: str, *tensors: Any, **options: Any) -> list[str]:
    """Every reason why a call would be refused; an empty list means that it runs.

    Args:
        op_name: Name of the public function, such as "flash_attention".
        tensors: Its positional arguments, in its order.
        options: Its keyword arguments.

    Returns:
        One sentence per reason: what is given, what is expected, what is nearest.

    Raises:
        ValueError: No such op.
        TypeError: The op has no such argument.

    Source: this package; the same checks run inside every op.
    Equivalent to: calling the op and reading its error message.

    >>> import torch
    >>> from lctx_kernels import supports
    >>> q, k, v = torch.randn(3, 1, 64, 4, 16)
    >>> supports("flash_attention", q, k, v)
    []
    >>> supports("flash_attention", q, k, v, window=0)
    ['window is 0; expected an int >= 1 or None; nearest is 1']
    """
    if op_name not in OPS:
        raise ValueError(f"supports: no op {op_name!r}; expected one of {', '.join(OPS)}")
    parameters = inspect.signature(OPS[op_name]).parameters
    positional = [p.name for p in parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    given = dict(zip(positional, tensors, strict=False)) | options
    unknown = [name for name in given if name not in parameters]
    if unknown or len(tensors) > len(positional):
        extra = ", ".join(unknown) or f"{len(tensors)}th argument"
        raise TypeError(
            f"supports: {op_name} has no {extra}; expected {op_name}({', '.join(parameters)})"
        )
    defaults = {name: None if p.default is p.empty else p.default for name, p in parameters.items()}
    return [reason.text for reason in reasons(op_name, defaults | given)]
