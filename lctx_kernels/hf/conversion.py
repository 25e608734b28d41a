"""Conversion of a transformers model in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._compat import FAMILIES, PreTrainedModel, change_class
from .models import install, model_class, register
from .options import complete


def convert(model: Any, method: str, *, layers: Sequence[int] | None = None, **options: Any) -> Any:
    """See lctx_kernels.hf.convert."""
    group = options.pop("group", None) if method == "ring" else None
    options = complete(method, options)
    family = _family(model)
    _refuse_scores_that_differ(model, family, method)
    chosen = _choose_layers(model, method, layers, options)
    register()
    if method == "landmark":
        _give_landmark_token(model, options)
    target = model_class(family, method)
    spec = {"method": method, "layers": chosen, "options": options}
    old = model.config
    values = {k: v for k, v in old.to_dict().items() if k not in ("model_type", "lctx")}
    config = target.config_class(**values, lctx=spec)
    config._attn_implementation = old._attn_implementation
    config.architectures = [target.__name__]
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config
    change_class(model, target)
    model._keep_in_fp32_modules_strict = {
        *(model._keep_in_fp32_modules_strict or ()),
        *target._keep_in_fp32_modules_strict,
    }
    install(model)
    if method == "ring":
        model.model._lctx_ranks.group = group
    return model


def _family(model: Any) -> str:
    given = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"hf.convert: model is {given}; expected a transformers model")
    if getattr(model.config, "lctx", None) is not None:
        raise ValueError(
            f"hf.convert: {given} is converted already, to {model.config.lctx['method']}; expected "
            "an unconverted model"
        )
    family = str(model.config.model_type)
    known = ", ".join(FAMILIES[name].prefix + "ForCausalLM" for name in FAMILIES)
    if family not in FAMILIES or type(model) is not FAMILIES[family].load("ForCausalLM"):
        raise NotImplementedError(f"hf.convert: model is {given}; expected one of {known}")
    return family


def _refuse_scores_that_differ(model: Any, family: str, method: str) -> None:
    """What changes the scores before the softmax: no kernel does, Infini's states do."""
    config = model.config
    capped = family == "gemma2" and config.attn_logit_softcapping is not None
    if capped and method != "infini":
        raise NotImplementedError(
            "hf.convert: config.attn_logit_softcapping is "
            f"{config.attn_logit_softcapping}; expected None, no kernel caps scores; nearest is "
            "method 'infini', which then runs in plain PyTorch, or "
            "config.attn_logit_softcapping = None before the model is made, and some fine-tuning"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise NotImplementedError(
            "hf.convert: config.use_bidirectional_attention is True; expected a causal model"
        )


def _windows(model: Any) -> list[int | None]:
    """The sliding window of every layer, None where it sees everything."""
    config, windows = model.config, []
    types = getattr(config, "layer_types", None)
    for index in range(config.num_hidden_layers):
        sliding = types is None or types[index] == "sliding_attention"
        windows.append(getattr(config, "sliding_window", None) if sliding else None)
    return windows


def _choose_layers(
    model: Any, method: str, layers: Sequence[int] | None, options: dict[str, Any]
) -> list[int]:
    count, windows = model.config.num_hidden_layers, _windows(model)
    wide = options.get("segment_len") or float("inf")
    fits = [
        window is None or method == "ring" or (method == "infini" and window >= wide)
        for window in windows
    ]
    if layers is None:
        chosen = [index for index in range(count) if fits[index]]
    elif isinstance(layers, str) or not (
        isinstance(layers, Sequence) and all(type(index) is int for index in layers)
    ):
        raise TypeError(
            f"hf.convert: layers is {layers!r}; expected a list of ints, some of 0 to {count - 1}, "
            "or None"
        )
    else:
        chosen = sorted({index + count if index < 0 else index for index in layers})
        wrong = [index for index in chosen if not 0 <= index < count]
        if wrong or not chosen:
            raise ValueError(
                f"hf.convert: layers is {list(layers)}; expected some of 0 to {count - 1}"
            )
    narrow = [index for index in chosen if not fits[index]]
    if narrow or not chosen:
        index = narrow[0] if narrow else 0
        raise NotImplementedError(
            f"hf.convert: layer {index} slides over {windows[index]} tokens; expected layers that "
            "see everything"
            + (f", or a window of at least segment_len = {wide}" if method == "infini" else "")
            + "; nearest is other layers, or config.sliding_window = None"
        )
    why = {
        "landmark": "the landmark tokens are part of the text that every layer sees; nearest is "
        "layers=None and config.layer_types without sliding_attention",
        "ring": "the others would see this rank's tokens alone; nearest is layers=None",
    }
    if method in why and len(chosen) != count:
        left = sorted(set(range(count)) - set(chosen))
        raise NotImplementedError(
            f"hf.convert: {method} would leave layers {left} as they are; expected all layers: "
            f"{why[method]}"
        )
    return chosen


def _give_landmark_token(model: Any, options: dict[str, Any]) -> None:
    """Choose or make the token's row in the embedding, and forbid to generate it."""
    size = model.get_input_embeddings().weight.shape[0]
    if options["landmark_id"] is None:
        options["landmark_id"] = size
        mean = model.get_input_embeddings().weight.detach().float().mean(0)
        model.resize_token_embeddings(size + 1, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[size] = mean
            head = model.get_output_embeddings()
            if head is not None and head.weight is not model.get_input_embeddings().weight:
                head.weight[size] = head.weight[:size].float().mean(0).to(head.weight.dtype)
    elif options["landmark_id"] >= size:
        raise ValueError(
            f"hf.convert: landmark_id is {options['landmark_id']}; expected a token below {size}, "
            "or None for a new one"
        )
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        suppressed = set(generation.suppress_tokens or []) | {options["landmark_id"]}
        generation.suppress_tokens = sorted(suppressed)
