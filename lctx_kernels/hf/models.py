"""Classes of converted models, one per method and family, for transformers' Auto classes."""

from __future__ import annotations

import inspect
from functools import cache, wraps
from typing import Any, NoReturn

from torch import nn

from ..cp.groups import Ranks
from ..nn.gate import MemoryGate
from . import dense, dilated, ring
from ._compat import (
    FAMILIES,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    change_class,
)
from .attention import attention_class
from .backbone import DilatedBackbone, InfiniBackbone, LandmarkBackbone
from .cache import make_cache
from .options import OPTIONS

NO_DENSE_LAYERS = "lctx_converted"
REGISTERED = {"dilated": dilated.NAME, "ring": ring.NAME}  # attention functions of transformers
BACKBONES: dict[str, type[Any]] = {
    "infini": InfiniBackbone, "landmark": LandmarkBackbone, "dilated": DilatedBackbone,
    "ring": ring.RingBackbone,
}  # fmt: skip


class ConvertedModel:
    """Mixed into the ForCausalLM class of a family, before it; `config.lctx` says what to build."""

    _keep_in_fp32_modules_strict = frozenset(["memory_gate"])
    family: str
    method: str

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "lctx", None) is None:
            raise ValueError(
                f"{type(self).__name__}: config.lctx is missing; expected the result of "
                "lctx_kernels.hf.convert, or a folder saved from it"
            )
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        mode = args[0] if args else kwargs.get("generation_mode")
        if self.method != "dilated" and getattr(mode, "value", "") == "assisted_generation":
            raise NotImplementedError(
                f"{type(self).__name__}.generate: assistant_model or prompt_lookup_num_tokens is "
                "given; candidates that are rejected would have to be taken back from a memory, "
                "which cannot be; expected neither"
            )
        if self.method == "ring":
            ring.check_generation(self, f"{type(self).__name__}.generate", generation_config)
        if self.method == "dilated" or given is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, *args, **kwargs
            )
            return
        if generation_config.cache_implementation is not None:
            raise NotImplementedError(
                f"{type(self).__name__}.generate: cache_implementation is "
                f"{generation_config.cache_implementation!r}; expected None: this model has a "
                "cache of its own (lctx_kernels.hf.make_cache)"
            )
        if getattr(generation_config, "is_assistant", False):
            raise NotImplementedError(
                f"{type(self).__name__}: as an assistant its cache would have to be rolled back, "
                "which a memory cannot be; expected an unconverted assistant"
            )
        model_kwargs["past_key_values"] = make_cache(self)

    def make_cache(self, **options: Any) -> Any:
        """See lctx_kernels.hf.make_cache."""
        return make_cache(self, **options)


def install(model: Any) -> None:
    """Turn the layers of `model`, of a class of this module, into what its config says."""
    spec, config = model.config.lctx, model.config
    backbone = model.model
    _refuse_replaced_forwards(
        model, backbone, [backbone.layers[i].self_attn for i in spec["layers"]]
    )
    change_class(backbone, backbone_class(model.family, model.method))
    if model.method == "ring" and not hasattr(backbone, "_lctx_ranks"):
        backbone._lctx_ranks = Ranks()
    if model.method in REGISTERED:
        config._attn_implementation = REGISTERED[model.method]
        return
    for index in spec["layers"]:
        attention = backbone.layers[index].self_attn
        attention.__class__ = attention_class(model.family, model.method)
        if model.method == "infini" and not hasattr(attention, "memory_gate"):
            device = attention.q_proj.weight.device
            gate = MemoryGate(config.num_attention_heads, float(spec["options"]["gate_init"]))
            attention.memory_gate = gate.to(device)
    if len(spec["layers"]) == config.num_hidden_layers:
        config._attn_implementation = NO_DENSE_LAYERS


def _refuse_replaced_forwards(model: Any, backbone: Any, attentions: list[Any]) -> None:
    """A forward on the instance, as of accelerate's hooks, would go on calling the old class."""
    for module in (model, backbone, *attentions):
        if "forward" in module.__dict__:
            raise NotImplementedError(
                f"hf.convert: {type(module).__name__} has a forward of its own (device_map, a "
                "compiled forward); expected a model as it is built; try converting on one device, "
                "then save_pretrained and from_pretrained(device_map=...)"
            )


@cache
def backbone_class(family: str, method: str) -> type[nn.Module]:
    """The backbone class of a family with a method in it."""
    entry = FAMILIES[family]
    base = entry.load("TextModel" if family == "gemma3_text" else "Model")
    name = f"{method.capitalize()}{base.__name__}"
    return type(name, (BACKBONES[method], base), {"__module__": __name__})


@cache
def model_class(family: str, method: str) -> type[Any]:
    """The ForCausalLM class of a family with a method in it."""
    entry = FAMILIES[family]
    base, base_config = entry.load("ForCausalLM"), entry.config_class
    prefix = method.capitalize()
    config = type(
        f"{prefix}{base_config.__name__}", (base_config,),
        {
            "__module__": __name__, "model_type": f"lctx_{method}_{family}",
            "__annotations__": {"lctx": dict[str, Any] | None}, "lctx": None,
        },
    )  # fmt: skip
    names = {
        "__module__": __name__, "family": family, "method": method, "config_class": config,
        "__annotations__": {"config": config},
    }  # fmt: skip
    if method == "ring":
        names["forward"] = _shifted_forward(base)
    return type(f"{prefix}{base.__name__}", (ConvertedModel, base), names)


def __getattr__(name: str) -> Any:
    """Classes of converted models by name: pickle asks for them in a process that has made none."""
    for method in OPTIONS:
        for family, entry in FAMILIES.items():
            if not name.startswith(method.capitalize() + entry.prefix):
                continue
            register()
            model = model_class(family, method)
            for made in (model, model.config_class, backbone_class(family, method)):
                if made.__name__ == name:
                    return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _shifted_forward(base: type[Any]) -> Any:
    """The forward of a family's ForCausalLM class, for labels that are shifted already."""

    @wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(base.forward).bind(self, *args, **kwargs).arguments
        shifted = given.get("kwargs", {}).get("shift_labels")
        ring.require_shifted(type(self).__name__, given.get("labels"), shifted)
        return base.forward(self, *args, **kwargs)

    return forward


def _never(module: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"{type(module).__name__}: an unconverted layer in a model whose layers are all converted"
    )


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """No layer takes a mask."""


@cache
def register() -> None:
    """See lctx_kernels.hf.register."""
    dense.register()
    dilated.register()
    ring.register()
    AttentionInterface.register(NO_DENSE_LAYERS, _never)
    AttentionMaskInterface.register(NO_DENSE_LAYERS, _no_mask)
    for method in OPTIONS:
        for family in FAMILIES:
            model = model_class(family, method)
            AutoConfig.register(model.config_class.model_type, model.config_class)
            AutoModelForCausalLM.register(model.config_class, model)
