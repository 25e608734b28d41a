"""Tiny random models of every family."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from lctx_kernels import hf
from lctx_kernels.hf._compat import FAMILIES

VOCAB, LAYERS = 61, 2
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
MORE = {
    "mistral": {"sliding_window": None},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {
        "attn_logit_softcapping": None, "layer_types": ["full_attention"] * LAYERS,
        "query_pre_attn_scalar": 24,
    },
    "gemma3_text": {"layer_types": ["full_attention"] * LAYERS, "query_pre_attn_scalar": 24},
}  # fmt: skip
METHODS = {
    "infini": {"segment_len": 8, "gate_init": 0.5},
    "landmark": {"block_size": 5},
    "dilated": {"segment_lengths": [8, 16], "dilation_rates": [1, 2]},
}


def base(family="llama", dtype=torch.float64, **changes):
    """A model of a family with random weights, biases and norms among them."""
    torch.manual_seed(0)
    config = FAMILIES[family].config_class(**SHAPE | MORE.get(family, {}) | changes)
    model = FAMILIES[family].load("ForCausalLM")(config).to(dtype).eval()
    model.config._attn_implementation = "sdpa"  # "eager" has its softmax in fp32
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.1
            parameter.add_(spread * torch.randn_like(parameter) * ("embed" not in name))
    return model


def converted(method, family="llama", dtype=torch.float64, options=None, layers=None, **changes):
    options = METHODS[method] if options is None else options
    return hf.convert(base(family, dtype, **changes), method, layers=layers, **options)


def tokens(B, T, seed=0):
    return torch.randint(2, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a, b, rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


__all__ = ["FAMILIES", "METHODS", "VOCAB", "base", "close", "converted", "hf", "tokens"]
assert transformers
