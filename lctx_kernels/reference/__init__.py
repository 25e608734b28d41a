"""The definition of every attention in plain PyTorch: dense, differentiable, fp64-capable."""

from .dilated import dilated_attention
from .flash import flash_attention
from .infini import infini_attention
from .landmark import landmark_attention
from .landmark_decode import landmark_decode
from .merge import merge_attention
from .ring import ring_attention

__all__ = [
    "dilated_attention",
    "flash_attention",
    "infini_attention",
    "landmark_attention",
    "landmark_decode",
    "merge_attention",
    "ring_attention",
]
