"""The kernels of csrc/tests: where their library is, and how Python calls them."""

import ctypes
import functools
import os
from pathlib import Path

import pytest
import torch

BUILT = Path(__file__).resolve().parents[2] / "build" / "liblctx_device_tests.so"
PATH = os.environ.get("LCTX_DEVICE_TESTS", str(BUILT))
needs_library = pytest.mark.skipif(
    "LCTX_DEVICE_TESTS" not in os.environ and not BUILT.is_file(),
    reason="build/liblctx_device_tests.so was not built: make device-tests",
)
needs_gpu = [pytest.mark.cuda, needs_library]
HALF = (torch.bfloat16, torch.float16)
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@functools.cache
def library():
    return ctypes.CDLL(PATH)


def c_argument(x):
    if x is None or isinstance(x, ctypes.c_void_p | ctypes.Array):
        return x
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, torch.dtype):
        return ctypes.c_int(TYPES[x])
    if isinstance(x, ctypes.Structure):
        return ctypes.byref(x)
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int(x)


def call_host(name, *args):
    """Call lctx_test_<name>; what it complains about is raised."""
    function = getattr(library(), f"lctx_test_{name}")
    function.restype = ctypes.c_char_p
    complaint = function(*map(c_argument, args))
    if complaint:
        raise RuntimeError(complaint.decode())


def call(name, *args):
    """The same for a function that runs kernels: its last argument is the stream."""
    call_host(name, *args, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))


class TensorMap(ctypes.Structure):
    """A tensor as TMA sees it. Dimensions and box are in torch's order, the innermost last."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("swizzle", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5),
        ("box", ctypes.c_int32 * 5),
    )

    @classmethod
    def of(cls, x, box, swizzle=128):
        assert x.dim() == 5
        assert x.stride(-1) == 1
        return cls(
            TYPES[x.dtype],
            swizzle,
            x.data_ptr(),
            (ctypes.c_int64 * 5)(*x.shape[::-1]),
            (ctypes.c_int64 * 5)(*x.stride()[::-1]),
            (ctypes.c_int32 * 5)(*box[::-1]),
        )


def coordinates(at):
    """Where a box starts, in torch's order, as TMA wants it."""
    return (ctypes.c_int32 * 5)(*at[::-1])


def integers(*shape, dtype=torch.float32, high=4):
    """Random integers, so small that sums of their products are exact."""
    return torch.randint(-high, high + 1, shape, device="cuda").to(dtype)


def same_bits(a, b):
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))
