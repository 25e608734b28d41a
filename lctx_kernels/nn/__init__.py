"""Attention layers as `torch.nn` modules, and small models made of them."""

from .attention import FullAttention, InfiniAttention, LandmarkAttention, SelfAttention
from .dilated import DilatedAttention
from .gate import MemoryGate, gate_parameters, parameter_groups
from .llama import Llama, LlamaConfig
from .longnet import AutoregressiveWrapper, LongNetTransformer
from .ring import RingAttention

__all__ = [
    "AutoregressiveWrapper",
    "DilatedAttention",
    "FullAttention",
    "InfiniAttention",
    "LandmarkAttention",
    "Llama",
    "LlamaConfig",
    "LongNetTransformer",
    "MemoryGate",
    "RingAttention",
    "SelfAttention",
    "gate_parameters",
    "parameter_groups",
]
