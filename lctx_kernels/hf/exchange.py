"""Weights between `nn.Llama` and transformers' Llama, the same numbers both ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn.attention import FullAttention, InfiniAttention, LandmarkAttention
from ..nn.dilated import DilatedAttention
from ..nn.llama import Llama, LlamaConfig
from ..nn.rotary import Rotary
from ._compat import FAMILIES
from .conversion import convert

LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.k_proj.weight": "self_attn.k_proj.weight",
    "attention.v_proj.weight": "self_attn.v_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "attention.memory_gate.weight": "self_attn.memory_gate.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "gate_proj.weight": "mlp.gate_proj.weight",
    "up_proj.weight": "mlp.up_proj.weight",
    "down_proj.weight": "mlp.down_proj.weight",
}
OPTIONS = {
    "infini": ("segment_len", "update", "first", "detach_every"),
    "landmark": ("block_size", "top_k", "select", "offload", "max_blocks"),
    "dilated": ("segment_lengths", "dilation_rates", "head_offset", "mix_grad"),
}


def _names(model: Llama) -> dict[str, str]:
    """Our name of every weight -> transformers' name."""
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if model.output is not None:
        names["output.weight"] = "lm_head.weight"
    own = model.state_dict().keys()
    for index in range(model.config.num_layers):
        for ours, theirs in LAYER.items():
            if f"layers.{index}.{ours}" in own:
                names[f"layers.{index}.{ours}"] = f"model.layers.{index}.{theirs}"
    return names


def export_llama(model: Llama) -> Any:
    """See lctx_kernels.hf.export_llama."""
    config, methods = model.config, model.config.methods()
    _require_exportable(model)
    layer: Any = model.layers[0]
    eps = config.norm_eps
    if eps is None:
        eps = torch.finfo(model.norm.weight.dtype).eps
    theirs = FAMILIES["llama"].config_class(
        vocab_size=config.vocab_size, hidden_size=config.d_model,
        intermediate_size=layer.gate_proj.out_features, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, head_dim=layer.attention.head_dim,
        num_key_value_heads=config.num_kv_heads or config.num_heads, rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=config.tie, max_position_embeddings=1 << 20,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    made = FAMILIES["llama"].load("ForCausalLM")(theirs).to(model.norm.weight.dtype)
    chosen = [index for index, method in enumerate(methods) if method != "full"]
    if chosen:
        method = methods[chosen[0]]
        attention: Any = model.layers[chosen[0]].attention
        options = {name: getattr(attention, name) for name in OPTIONS[method]}
        made = convert(made, method, layers=chosen, **options)
    weights = {theirs: model.state_dict()[ours] for ours, theirs in _names(model).items()}
    _load(made, weights)
    return made.to(model.norm.weight.device)


def import_llama(model: Any) -> Llama:
    """See lctx_kernels.hf.import_llama."""
    config = model.config
    spec = getattr(config, "lctx", None)
    method, options = ("full", {}) if spec is None else (spec["method"], spec["options"])
    _require_importable(model, method)
    if method == "landmark" and options["landmark_id"] != config.vocab_size - 1:
        raise NotImplementedError(
            f"hf.import_llama: landmark_id is {options['landmark_id']}; expected the last token, "
            f"{config.vocab_size - 1}"
        )
    chosen = [] if spec is None else spec["layers"]
    count = config.num_hidden_layers
    own = {name: options[name] for name in OPTIONS.get(method, ())}
    made = Llama(
        LlamaConfig(
            config.vocab_size - (method == "landmark"), config.hidden_size, count,
            config.num_attention_heads, config.num_key_value_heads, config.intermediate_size,
            [method if index in chosen else "full" for index in range(count)],
            {} if spec is None else {method: own}, config.rope_parameters["rope_theta"],
            tie=config.tie_word_embeddings, norm_eps=config.rms_norm_eps,
        )
    ).to(model.model.norm.weight)  # fmt: skip
    given = model.state_dict()
    _load(made, {ours: given[theirs] for ours, theirs in _names(made).items()})
    return made


def _load(model: Any, weights: dict[str, Tensor]) -> None:
    """Copy weights; of an output layer with a row for the landmark, the others."""
    own = model.state_dict()
    with torch.no_grad():
        for name, weight in weights.items():
            rows = min(len(own[name]), len(weight))
            own[name][:rows].copy_(weight[:rows])


def _require_exportable(model: Llama) -> None:
    methods = set(model.config.methods()) - {"full"}
    if len(methods) > 1:
        raise NotImplementedError(
            f"hf.export_llama: attention is {sorted(methods)}; expected one method besides full: a "
            "transformers model has one"
        )
    if model.config.dropout:
        raise NotImplementedError(
            f"hf.export_llama: dropout is {model.config.dropout}; expected 0: transformers' Llama "
            "has none"
        )
    known = (FullAttention, InfiniAttention, LandmarkAttention, DilatedAttention)
    for layer in model.layers:
        attention: Any = layer.attention
        plain = type(attention) in known and isinstance(attention.q_norm, torch.nn.Identity)
        rotary = getattr(attention, "rotary", None)
        if isinstance(attention, DilatedAttention) and attention.rel_pos_bias is not None:
            plain = False
        if not plain or not isinstance(rotary, Rotary) or rotary.xpos_base is not None:
            raise NotImplementedError(
                f"hf.export_llama: {type(attention).__name__} with norms, biases or positions that "
                "Llama does not have (qk_norm, use_xpos, use_rel_pos_bias, rope_base=None); "
                "expected none of them"
            )


def _require_importable(model: Any, method: str) -> None:
    config = model.config
    kind = str(getattr(config, "model_type", "")).removeprefix(f"lctx_{method}_")
    if kind != "llama" or method not in ("full", *OPTIONS):
        raise NotImplementedError(
            f"hf.import_llama: {type(model).__name__}; expected LlamaForCausalLM, or one converted "
            f"to {', '.join(OPTIONS)}"
        )
    wrong = [
        name
        for name, found in (
            ("attention_bias", config.attention_bias), ("mlp_bias", config.mlp_bias),
            ("rope_parameters", config.rope_parameters["rope_type"] != "default"),
            ("head_dim", config.head_dim * config.num_attention_heads != config.hidden_size),
        )
        if found
    ]  # fmt: skip
    if wrong:
        given = ", ".join(f"{name} = {getattr(config, name)}" for name in wrong)
        raise NotImplementedError(
            f"hf.import_llama: {given}; expected no biases, plain rotary embeddings and head_dim = "
            "hidden_size / num_attention_heads: nn.Llama has no others"
        )
