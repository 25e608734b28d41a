"""The models of the proofs: one Llama shape, one method each."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lctx_kernels import hf

from .rows import VOCAB

SEGMENT, BLOCK = 128, 128
METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "full": None,
    "infini": ("infini", {"segment_len": SEGMENT, "first": "gate", "gate_init": 0.0}),
    "infini-delta": (
        "infini", {"segment_len": SEGMENT, "first": "gate", "gate_init": 0.0, "update": "delta"},
    ),
    "landmark": ("landmark", {"block_size": BLOCK, "chunk_len": 2 * (BLOCK - 1)}),
    "dilated": (
        "dilated",
        {"segment_lengths": [256, 1024, 4096, 16384], "dilation_rates": [1, 4, 16, 64]},
    ),
}  # fmt: skip
SHAPES = {
    "30m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}  # fmt: skip


def build(method: str, shape: str, seed: int, **changes: Any) -> Any:
    """A Llama from scratch, fp32, with a method of METHODS whose options may be changed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=1 << 20, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, attention_dropout=0.0,
        **SHAPES[shape],
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    chosen = METHODS[method]
    if chosen is None:
        return model
    name, options = chosen
    return hf.convert(model, name, **options | changes)
