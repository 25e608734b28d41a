"""The ring of stages, the tile queue, the order of tiles and dependent launches."""

import pytest
import torch
from device.device_library import call, needs_gpu

pytestmark = needs_gpu


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("consumer_warps", [1, 4, 8, 12])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_ring(stages, consumer_warps):
    """Every warp sees every piece, in order, and nothing is overwritten under it."""
    steps, blocks = 700, 8
    source = torch.randint(2**31, (steps, 128), dtype=torch.int32, device="cuda")
    errors, pieces = zeros(1), zeros(1)
    call("ring", stages, consumer_warps, source, steps, blocks, errors, pieces)
    assert errors.item() == 0
    assert pieces.item() == blocks * consumer_warps * 32 * steps


SHAPES = [
    (m_blocks, heads, batches, section)
    for m_blocks in (1, 2, 7, 33)
    for heads, batches in ((1, 1), (5, 1), (8, 3), (3, 7))
    for section in (1, 2, 4, 5, 16, 100)
]
SHAPES += [(129, 16, 8, 6), (2048, 8, 2, 16), (1, 64, 64, 7)]


def expected_order(m_blocks, heads, batches, section):
    """Sections of heads; in each the longest tiles of all heads, then the next shorter ones."""
    all_heads = range(heads * batches)
    return [
        (m_block, head % heads, head // heads)
        for first in range(0, len(all_heads), section)
        for m_block in reversed(range(m_blocks))
        for head in all_heads[first : first + section]
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_order(shape):
    m_blocks, heads, batches, _ = shape
    expected = torch.tensor(expected_order(*shape), dtype=torch.int32)
    tiles = torch.full_like(expected, -1, device="cuda")
    call("order", *shape, tiles)
    assert torch.equal(tiles.cpu(), expected)
    assert len(set(map(tuple, tiles.tolist()))) == m_blocks * heads * batches


@pytest.mark.parametrize("consumer_warps", [1, 8, 12])
@pytest.mark.parametrize("blocks", [1, 5, 132, 264])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 3, 2, 4), (33, 8, 2, 5)], ids=str)
def test_queue(shape, blocks, consumer_warps):
    """Every tile is taken by one block, there once by each warp."""
    m_blocks, heads, batches, _ = shape
    counter, times = zeros(1), zeros(consumer_warps, m_blocks * heads * batches)
    block = torch.full_like(times, -1)
    call("queue", *shape, blocks, consumer_warps, counter, times, block)
    assert (times == 1).all()
    assert (block == block[0]).all()
    assert block.min() >= 0
    assert block.max() < blocks


@pytest.mark.parametrize("blocks", [1, 16])
def test_dependent_launch(blocks):
    """The second kernel starts while the first one runs, and yet sees all that it writes."""
    started, overlapped = zeros(1), zeros(1)
    data, seen = zeros(blocks, 128), zeros(blocks, 128)
    call("dependent_launch", blocks, started, data, seen, overlapped)
    assert overlapped.item() == 1
    assert (seen == 1).all()
