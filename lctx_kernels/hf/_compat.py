"""The only file that knows where transformers keeps its names (tested from 5.10 to 5.23)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

try:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoConfig,
        AutoModelForCausalLM,
        PreTrainedModel,
        Trainer,
    )
    from transformers import initialization as init
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
except ImportError as error:
    raise ImportError(
        f"lctx_kernels.hf needs transformers >= 5.10 ({error}); try: pip install 'lctx_kernels[hf]'"
    ) from error

__all__ = [
    "FAMILIES",
    "AttentionInterface",
    "AttentionMaskInterface",
    "AutoConfig",
    "AutoModelForCausalLM",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "Family",
    "PreTrainedModel",
    "Trainer",
    "change_class",
    "init",
]


class Family(NamedTuple):
    """A model family of transformers: its module, and the prefix of its class names."""

    package: str
    prefix: str
    config_name: str

    def load(self, suffix: str) -> Any:
        """The class `<prefix><suffix>`, such as LlamaForCausalLM."""
        module = importlib.import_module(
            f"transformers.models.{self.package}.modeling_{self.package}"
        )
        return getattr(module, self.prefix + suffix)

    @property
    def config_class(self) -> Any:
        """The configuration of the family's causal language model."""
        return getattr(importlib.import_module("transformers"), self.config_name)

    @property
    def rotate(self) -> Callable[..., Any]:
        """The family's apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=)."""
        module = importlib.import_module(
            f"transformers.models.{self.package}.modeling_{self.package}"
        )
        function: Callable[..., Any] = module.apply_rotary_pos_emb
        return function


def change_class(module: Any, cls: type) -> None:
    """Give a model another class, whose hidden states transformers can then still record."""
    module.__class__ = cls
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), module._can_record_outputs)


FAMILIES = {
    "llama": Family("llama", "Llama", "LlamaConfig"),
    "mistral": Family("mistral", "Mistral", "MistralConfig"),
    "qwen2": Family("qwen2", "Qwen2", "Qwen2Config"),
    "qwen3": Family("qwen3", "Qwen3", "Qwen3Config"),
    "gemma": Family("gemma", "Gemma", "GemmaConfig"),
    "gemma2": Family("gemma2", "Gemma2", "Gemma2Config"),
    "gemma3_text": Family("gemma3", "Gemma3", "Gemma3TextConfig"),
}
"""By the model_type of a configuration."""
