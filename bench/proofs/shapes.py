"""Models of well-known shapes with random weights, and PyTorch's attention to compare with."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface

from lctx_kernels.hf._compat import FAMILIES

GEMMA_2B = {
    "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
    "max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-2b": ("gemma", GEMMA_2B),
    "gemma-2b, heads of 128": (
        "gemma", GEMMA_2B | {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128},
    ),
    "llama-3-8b": (
        "llama",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "tie_word_embeddings": False, "max_position_embeddings": 8192,
        },
    ),
    "llama-3.2-1b": (
        "llama",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "tie_word_embeddings": True, "max_position_embeddings": 131072,
        },
    ),
    "llama-7b": (
        "llama",
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "tie_word_embeddings": False, "max_position_embeddings": 4096,
        },
    ),
    "tiny": (
        "llama",
        {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        },
    ),
}  # fmt: skip


def random_model(shape: str, device: str, **changes: Any) -> Any:
    """A bf16 model of a shape with random weights, made on the device."""
    torch.manual_seed(0)
    family, values = SHAPES[shape]
    config = FAMILIES[family].config_class(**values | {"attention_dropout": 0.0} | changes)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return FAMILIES[family].load("ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)


def with_shared_weights(model: Any) -> Any:
    """Another model with the very same parameters, to convert in another way."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    backends = [SDPBackend.CUDNN_ATTENTION] if q.is_cuda else [SDPBackend.MATH]
    with sdpa_kernel(backends):
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )


def dense(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Dense causal attention by cuDNN, as an attention function of transformers."""
    return _cudnn(query, key, value, scaling).transpose(1, 2).contiguous(), None


def inside_segments(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention by cuDNN inside segments of config.bench_segment tokens."""
    B, _, T, _ = query.shape
    segments = T // module.config.bench_segment

    def cut(x: Tensor) -> Tensor:
        return (
            x.transpose(1, 2).reshape(B * segments, T // segments, *x.shape[1::2]).transpose(1, 2)
        )

    out = _cudnn(cut(query), cut(key), cut(value), scaling)
    return out.transpose(1, 2).reshape(B, T, *query.shape[1::2]), None


def register() -> None:
    """Make "bench_dense" and "bench_segments" known to transformers."""
    for name, function in (("bench_dense", dense), ("bench_segments", inside_segments)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
