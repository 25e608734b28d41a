"""Converted models in EleutherAI's lm-evaluation-harness; lm_eval is imported when needed."""

from __future__ import annotations

from functools import cache
from typing import Any


def harness_model(model: Any, tokenizer: Any, *, read_cached: bool = False, **options: Any) -> Any:
    """A transformers model, converted or not, as a model of lm_eval.

    Args:
        model: A model, or the folder or name of a saved one; converted ones load too.
        tokenizer: Of transformers, or None for the saved one's own.
        read_cached: Compute likelihoods through the model's cache, as generation does: a landmark
            model then reads `top_k` blocks, chunk by chunk. False is a forward over the whole text.
        options: Of lm_eval's HFLM, such as batch_size, max_length, device, dtype.

    Returns:
        An lm_eval `LM`, for `lm_eval.simple_evaluate(model=..., tasks=[...])`.

    Raises:
        ImportError: lm_eval is missing.

    >>> lm = harness_model("out", None, batch_size=4)  # doctest: +SKIP
    >>> results = lm_eval.simple_evaluate(model=lm, tasks=["wikitext"])  # doctest: +SKIP
    """
    return _model_class()(pretrained=model, tokenizer=tokenizer, read_cached=read_cached, **options)


def register() -> None:
    """Make `--model lctx` known to lm_eval: `lm_eval.simple_evaluate(model="lctx", ...)`.

    Its model_args are those of `harness_model`, such as "pretrained=out,read_cached=True".

    Raises:
        ImportError: lm_eval is missing.
    """
    from lm_eval.api.registry import model_registry, register_model

    if "lctx" not in model_registry:
        register_model("lctx")(_model_class())


@cache
def _model_class() -> type[Any]:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            f"lctx_kernels.eval.harness_model needs lm_eval ({error}); try: "
            "pip install 'lctx_kernels[eval]'"
        ) from error
    from .. import hf

    class HarnessModel(HFLM):  # type: ignore[misc]
        """lm_eval's own model of transformers, with converted classes known to it."""

        def __init__(self, *args: Any, read_cached: bool = False, **options: Any) -> None:
            hf.register()
            self.read_cached = read_cached
            super().__init__(*args, **options)

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            if not self.read_cached:
                return super()._model_call(inps, attn_mask, labels)
            import torch

            dtype = self.mixed_precision_dtype
            with torch.no_grad(), torch.autocast(
                self.device.type, dtype=dtype, enabled=dtype is not None
            ):  # fmt: skip
                return self.model(inps, use_cache=True).logits

    return HarnessModel
