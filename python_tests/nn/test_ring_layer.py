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
            "Llama.generate: chunk is 5 with ring layers",
            "LlamaConfig: attention is ['ring', 'full']",
        ]
        assert "this rank has 7 tokens" in messages[0] and "try cp.shard" in messages[0]


@pytest.mark.dist
@pytest.mark.parametrize("n", [1, 3])
def test_generates_what_the_dense_model_does(n):
    for message in run_ranks_well(ring_on_ranks.generation, n):
        assert n == 1 or "Llama.generate: nothing was sent, because the ranks were" in message


@pytest.mark.dist
def test_tokens_behind_a_prompt_are_those_of_the_dense_layer():
    for messages in run_ranks_well(ring_on_ranks.states, 3):
        assert [m.split(";")[0] for m in messages] == [
            "RingAttention: a plan is given for tokens behind a prompt of 60",
            "RingState: 60 tokens have been read",
        ]


def test_without_a_group():
    with pytest.raises(ValueError, match="there is no default process group"):
        nn.RingAttention(32, 4)(torch.zeros(1, 4, 32))
