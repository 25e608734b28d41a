"""Ring attention as a layer, and in this package's Llama."""

import pytest
import torch
from nn import ring_on_ranks
from processes import run_ranks_well

from lctx_kernels import nn


@pytest.mark.dist
def test_rows_and_gradients_are_those_of_the_dense_layer():
    run_ranks_well(ring_on_ranks.layer, 3)


@pytest.mark.dist
def test_losses_and_gradients_are_those_of_the_dense_model():
    for messages in run_ranks_well(ring_on_ranks.llama, 2):
        assert [m.split(";")[0] for m in messages] == [
            messages[0].split(";")[0],
            "RingAttention: a state for generation is not built",
            "LlamaConfig: attention is ['ring', 'full']",
        ]
        assert "this rank has 7 tokens" in messages[0] and "try cp.shard" in messages[0]


def test_without_a_group():
    with pytest.raises(ValueError, match="there is no default process group"):
        nn.RingAttention(32, 4)(torch.zeros(1, 4, 32))
