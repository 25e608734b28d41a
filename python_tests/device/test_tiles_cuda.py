"""Tiles in shared memory: TMA boxes of strided tensors, the swizzle, stmatrix, ldmatrix, sums."""

import ctypes

import pytest
import torch
from device.device_library import (
    HALF,
    TensorMap,
    call,
    coordinates,
    integers,
    needs_gpu,
    same_bits,
)

pytestmark = needs_gpu


class CopyArgs(ctypes.Structure):
    _fields_ = (
        ("load", TensorMap),
        ("store", TensorMap),
        ("load_at", ctypes.c_int32 * 5),
        ("store_at", ctypes.c_int32 * 5),
        ("tile_bytes", ctypes.c_int32),
        ("vector_bytes", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("source", ctypes.c_void_p),
        ("vector", ctypes.c_void_p),
        ("raw", ctypes.c_void_p),
        ("ordered", ctypes.c_void_p),
        ("vector_out", ctypes.c_void_p),
    )


def swizzled(tile):
    """The bytes of a tile as they lie in shared memory: bits 4-6 of an address XOR bits 7-9."""
    logical = tile.contiguous().view(-1).view(torch.uint8)
    address = torch.arange(logical.numel(), device=logical.device)
    physical = torch.empty_like(logical)
    physical[address ^ (((address >> 7) & 7) << 4)] = logical
    return physical


def overlap(size, length, start):
    """The part of start .. start + length inside 0 .. size, counted from 0 and from start."""
    low, high = max(start, 0), max(min(start + length, size), max(start, 0))
    return slice(low, high), slice(low - start, high - start)


def parts(x, box, at):
    """The elements of x that are in the box at `at`: their indices in x, and in the box."""
    return tuple(zip(*map(overlap, x.shape, box, at), strict=True))


def copy(box, rows, load=None, load_at=(0,) * 5, store=None, store_at=(0,) * 5, **pointers):
    """Run copy_kernel; returns the tile as it lies, and ordered (rows, columns) by swizzled_unit.

    rows: of the tile, per chunk of 64 columns.
    """
    args = CopyArgs(load_at=coordinates(load_at), store_at=coordinates(store_at), rows=rows)
    count = torch.Size(box).numel()
    raw = torch.zeros(count * 2, dtype=torch.uint8, device="cuda")
    ordered = torch.zeros(rows, count // rows, dtype=torch.int16, device="cuda")
    args.tile_bytes, args.raw, args.ordered = count * 2, raw.data_ptr(), ordered.data_ptr()
    if load is not None:
        args.load = TensorMap.of(load, box)
    if store is not None:
        args.store = TensorMap.of(store, box)
    for name, value in pointers.items():
        setattr(args, name, value)
    call("copy", args)
    return raw, ordered


def check_load(x, box, rows, at):
    inside, of_box = parts(x, box, at)
    expected = torch.zeros(box, dtype=x.dtype, device="cuda")
    expected[of_box] = x[inside]
    raw, ordered = copy(box, rows, load=x, load_at=at)
    assert torch.equal(raw, swizzled(expected)), at
    by_rows = expected.view(-1, rows, 64).transpose(0, 1).reshape(rows, -1)
    assert torch.equal(ordered, by_rows.view(torch.int16)), at


def check_store(x, box, at):
    inside, of_box = parts(x, box, at)
    tile = torch.randn(box, device="cuda").to(x.dtype)
    expected = torch.randn_like(x.contiguous())  # what lies around stays
    x.copy_(expected)
    expected[inside] = tile[of_box]
    source = swizzled(tile)
    copy(box, box[-2], store=x, store_at=at, source=source.data_ptr())
    assert torch.equal(x, expected), at


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


def contiguous(D=128):
    return random(2, 100, 3, D).permute(0, 2, 1, 3)[:, :, None]  # (B, H, 1, T, D)


def heads_first(D=128):
    return random(2, 3, 1, 100, D)


def split(D=256):
    """Chunks of 64 columns as a dimension: one box is a whole tile."""
    return random(2, 100, 3, D // 64, 64).permute(0, 2, 3, 1, 4)


def dilated(r=4, T=100, H=3):
    """Rows of one phase: position row * r + phase."""
    return random(2, T // r, r, H, 128).permute(0, 3, 2, 1, 4)


def dilated_split(r=4, T=100, H=3):
    return random(2, T // r, r * H, 2, 64).permute(0, 2, 3, 1, 4)


def groups(length=51):
    """Groups of 51 rows in boxes of 56."""
    return random(2, 5, length, 3, 80).permute(0, 3, 1, 2, 4)


# A view, its box, rows of the tile, and corners: inside, over an end, wholly outside.
ROW_CORNERS = [(1, 2, 0, row, 64) for row in (0, 8, -5, -64, 90, 100, 500)]
ROW_CORNERS += [(0, 0, 0, 70, -16), (0, 2, 0, -1, 120), (1, 3, 0, 0, 0), (2, 0, 0, 0, 0)]
CASES = {
    "contiguous": (contiguous, (1, 1, 1, 64, 64), 64, ROW_CORNERS),
    "heads first": (heads_first, (1, 1, 1, 64, 64), 64, ROW_CORNERS),
    "D 80": (lambda: contiguous(80), (1, 1, 1, 176, 64), 176, ROW_CORNERS),
    "D 96": (lambda: contiguous(96), (1, 1, 1, 256, 64), 256, ROW_CORNERS),
    "split": (split, (1, 1, 4, 64, 64), 64, [(1, 2, 0, t, 0) for t in (0, -3, 60, 100)]),
    "part of split": (
        split,
        (1, 1, 2, 128, 64),
        128,
        [(0, 1, c, row, 0) for c in (-1, 2, 3) for row in (-7, 9)],
    ),
    "dilated": (
        dilated,
        (1, 1, 1, 16, 64),
        16,
        [(1, 2, phase, row, 64) for phase in (0, 3, 4) for row in (0, -4, 20, 25)],
    ),
    "dilated split": (
        dilated_split,
        (1, 1, 2, 16, 64),
        16,
        [(1, head, 0, row, 0) for head in (0, 11) for row in (0, -4, 20)],
    ),
    "groups": (
        groups,
        (1, 1, 2, 56, 64),
        2 * 56,
        [(1, 2, g, row, column) for g in (0, -1, 4, 5) for row in (0, -6, 8) for column in (0, 64)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_load(name):
    make, box, rows, corners = CASES[name]
    for at in corners:
        check_load(make(), box, rows, at)


@pytest.mark.parametrize("name", CASES)
def test_store(name):
    make, box, _, corners = CASES[name]
    for at in corners:
        if min(at) >= 0:  # a store before the start of a dimension is an illegal instruction
            check_store(make(), box, at)


def test_copy_to_another_layout():
    """One kernel loads a phase of a dilated view and stores it as rows of a head-first tensor."""
    x, y = dilated(), torch.zeros(2, 3, 1, 25, 128, dtype=torch.bfloat16, device="cuda")
    for column in (0, 64):
        copy(
            (1, 1, 1, 32, 64), 32, load=x, load_at=(1, 2, 3, 0, column), store=y,
            store_at=(0, 1, 0, 0, column),
        )  # fmt: skip
    assert torch.equal(y[0, 1, 0], x[1, 2, 3])
    assert y.count_nonzero() == y[0, 1, 0].count_nonzero()


@pytest.mark.parametrize("with_tile", [True, False])
@pytest.mark.parametrize(("first", "count"), [(0, 4), (4, 64), (12, 500), (64, 1024)])
def test_vector_on_the_barrier_of_a_tile(first, count, with_tile):
    vector = torch.randn(2048, device="cuda")
    out = torch.full((count + 4,), torch.nan, device="cuda")
    x = contiguous()
    load = {"load": x, "load_at": (1, 1, 0, 60, 0)} if with_tile else {}
    pointers = {"vector": vector.data_ptr() + 4 * first, "vector_out": out.data_ptr()}
    raw, _ = copy((1, 1, 1, 64, 64), 64, **load, vector_bytes=4 * count, **pointers)
    assert torch.equal(out[:count], vector[first : first + count])
    assert out[count:].isnan().all()
    expected = torch.zeros(64, 64, dtype=x.dtype, device="cuda")
    expected[:40] = x[1, 1, 0, 60:, :64]
    assert torch.equal(raw, swizzled(expected)) if with_tile else (raw == 255).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("N", [64, 80, 128, 256])
def test_fragments(N, dtype):
    """Registers -> stmatrix -> TMA store is rounding; ldmatrix gives the registers back."""
    x = torch.randn(64, N, device="cuda")
    out = torch.full((64, N), torch.nan, dtype=dtype, device="cuda")
    read = torch.zeros(N // 16, 128, 4, 2, dtype=dtype, device="cuda")
    read_trans = torch.zeros_like(read)
    call("fragments", dtype, N, x, out, read, read_trans)
    assert same_bits(out, x.to(dtype))

    thread = torch.arange(128, device="cuda").view(1, -1, 1, 1)
    step = torch.arange(N // 16, device="cuda").view(-1, 1, 1, 1)
    matrix = torch.arange(4, device="cuda").view(1, 1, -1, 1)
    pair = torch.arange(2, device="cuda")
    row0, column0 = thread // 32 * 16 + matrix % 2 * 8, step * 16 + matrix // 2 * 8
    i, j = thread % 32 // 4, thread % 4 * 2 + pair
    assert same_bits(read, out[row0 + i, column0 + j])
    assert same_bits(read_trans, out[row0 + j, column0 + i])


# ---- sums ----

TENSOR, BULK, REGISTERS = range(3)
BLOCKS, TIMES = 300, 5


def summed(source):
    """What all blocks add together: each adds source + its number, TIMES times."""
    return TIMES * (BLOCKS * source + BLOCKS * (BLOCKS - 1) // 2)


@pytest.mark.parametrize("form", [BULK, REGISTERS])
def test_many_blocks_add_to_one_tile(form):
    source, out = integers(64, 32), integers(64, 32)
    expected = out + summed(source)
    call("sum", form, None, None, source, out, BLOCKS, TIMES)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("swizzle", [0, 128])
@pytest.mark.parametrize("row", [0, 5, 30, 60, 500])
def test_many_blocks_add_to_one_box(row, swizzle):
    """Clipped like a store: in rows, and in columns, of which there are 16 from column 64 on."""
    out = integers(2, 60, 3, 80)
    x, source = out.permute(0, 2, 1, 3)[:, :, None], integers(64, 32)
    box, at = (1, 1, 1, 64, 32), (1, 1, 0, row, 64)
    expected = x.clone()
    inside, of_box = parts(x, box, at)
    expected[inside] += summed(source).view(box)[of_box]
    tensor_map = TensorMap.of(x, box, swizzle)
    call("sum", TENSOR, tensor_map, coordinates(at), source, None, BLOCKS, TIMES)
    assert torch.equal(x, expected)
