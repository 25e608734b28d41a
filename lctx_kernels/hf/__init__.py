"""Hugging Face models with the attention of this package. Not built yet; imports nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["convert", "make_cache"]


def _missing(name: str) -> NoReturn:
    raise NotImplementedError(
        f"hf.{name}: converting Hugging Face models is not built yet; nearest is calling the ops "
        "of lctx_kernels from your own attention function"
    )


def convert(model: Any, method: str, *, layers: Sequence[int] | None = None, **options: Any) -> Any:
    """Give a model infini, landmark, dilated or ring attention, in place. Not built yet.

    Raises:
        NotImplementedError: Always, today.

    >>> from lctx_kernels import hf
    >>> hf.convert(None, "infini")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    NotImplementedError: hf.convert: converting Hugging Face models is not built yet; ...
    """
    _missing("convert")


def make_cache(model: Any, **options: Any) -> Any:
    """Cache for `model.generate(past_key_values=...)` of a converted model. Not built yet.

    Raises:
        NotImplementedError: Always, today.
    """
    _missing("make_cache")
