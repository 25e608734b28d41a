"""Large rooms in the CPU's memory that a GPU reads and writes: pinned in their exact size.

torch pins a power of two of bytes and keeps it for good; a room of some GiB has pages of its own,
which come from all threads at once and go back to the system with it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_BYTES = 1 << 26  # below, torch's own pinned memory, which is at hand again at once


class PinnedRoom:
    """A tensor in pinned memory, of any values, until `free`.

    Args:
        shape, dtype: Of `value`.
        gpu: Device that reads and writes it.

    Raises:
        RuntimeError: The system does not pin so much.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, gpu: torch.device) -> None:
        self.size, self.gpu = math.prod(shape) * dtype.itemsize, gpu
        self.registered = self.size >= LEAST_BYTES
        self.value: Tensor
        if not self.registered:
            with torch.cuda.device(gpu):
                self.value = torch.empty(shape, dtype=dtype, pin_memory=True)
            return
        pages = mmap.mmap(-1, self.size)
        with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        self.value = torch.frombuffer(pages, dtype=dtype).view(*shape)
        self.value.zero_()  # so that the pages are there, and large, when they are pinned
        with torch.cuda.device(gpu):
            error = torch.cuda.cudart().cudaHostRegister(self.value.data_ptr(), self.size, 0)
        if int(error) != 0:
            with contextlib.suppress(RuntimeError):  # else the next launch reports this error again
                torch.ones(1, device=gpu)
            raise RuntimeError(
                f"offload: pinning {self.size / 2**30:.1f} GiB of the CPU's memory failed "
                f"({error}); try max_blocks, or offload=False"
            )

    def on_gpu(self) -> Tensor:
        """`value` as a tensor of the GPU: its kernels read the CPU's memory over the bus."""
        alias = torch.as_tensor(_Bytes(self.value), device=self.gpu)
        return alias.view(self.value.dtype).view(self.value.shape)

    def free(self) -> None:
        """Give the pages back; no kernel and no copy may use them any more."""
        if self.registered:
            torch.cuda.cudart().cudaHostUnregister(self.value.data_ptr())
            self.registered = False


class _Bytes:
    """Memory as the CUDA array interface describes it."""

    def __init__(self, room: Tensor) -> None:
        self.room = room  # lives as long as what reads it
        self.__cuda_array_interface__ = {
            "shape": (room.nbytes,), "typestr": "|u1", "data": (room.data_ptr(), False),
            "version": 3,
        }  # fmt: skip
