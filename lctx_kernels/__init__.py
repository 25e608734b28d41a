"""Attention over very long contexts: Infini, Landmark, LongNet's dilated, and Ring attention.

Layout is (B, T, H, D) everywhere, any strides with stride(-1) == 1; query heads are a multiple of
key/value heads. `python -m lctx_kernels.info` says what this installation can run.

>>> import torch
>>> from lctx_kernels import flash_attention
>>> q, k, v = torch.randn(3, 1, 128, 8, 64)
>>> flash_attention(q, k, v).shape
torch.Size([1, 128, 8, 64])
"""

from . import cp, hf, nn
from ._version import __version__
from .blockwise import blockwise_cross_entropy, blockwise_feedforward
from .checkpoint_policy import checkpoint_policy
from .dilated import dilated_attention
from .flash import flash_attention
from .infini import InfiniMemory, infini_attention
from .landmark import fused_landmark_attention, landmark_attention
from .merge import merge_attention
from .ring import ring_attention
from .supports import supports

__all__ = [
    "InfiniMemory",
    "__version__",
    "blockwise_cross_entropy",
    "blockwise_feedforward",
    "checkpoint_policy",
    "cp",
    "dilated_attention",
    "flash_attention",
    "fused_landmark_attention",
    "hf",
    "infini_attention",
    "landmark_attention",
    "merge_attention",
    "nn",
    "ring_attention",
    "supports",
]
