"""What attention remembers between calls while it generates: one state per layer and method.

Every state has `attend`, which takes the projections of the next tokens and returns what the op on
the whole sequence would return for them, `select` for beam search, and `seen`, the number of
tokens so far. `Rows` keeps the states of a batch whose rows have different lengths.
"""

from .decode import RopeTable
from .dilated import DilatedState
from .flash import FlashState
from .infini import InfiniState
from .landmark import LandmarkState, RetrievalState
from .ring import RingState
from .rows import Rows

__all__ = [
    "DilatedState",
    "FlashState",
    "InfiniState",
    "LandmarkState",
    "RetrievalState",
    "RingState",
    "RopeTable",
    "Rows",
]
