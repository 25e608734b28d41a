"""Ring attention in models of transformers: over ranks, losses and gradients of the base."""

import pytest
import torch
from hf import ring_on_ranks
from hf.tiny import base, close, hf, tokens
from processes import run_ranks_well
from transformers import AutoModelForCausalLM


@pytest.mark.dist
def test_losses_and_gradients_are_those_of_the_base():
    run_ranks_well(ring_on_ranks.all_families, 2)


@pytest.mark.dist
def test_documents_do_not_see_each_other():
    run_ranks_well(ring_on_ranks.documents, 3)


@pytest.mark.dist
def test_groups_and_copies():
    run_ranks_well(ring_on_ranks.groups_and_copies, 4)


@pytest.mark.dist
def test_generates_what_the_base_does():
    run_ranks_well(ring_on_ranks.generation, 3)


@pytest.mark.dist
def test_what_a_ring_refuses():
    expected = [
        "ValueError: RingLlamaForCausalLM: labels without shift_labels",
        "ValueError: RingLlamaModel: ring_plan is given with a cache",
        "ValueError: RingLlamaModel: this rank has 20 tokens",
        "ValueError: RingLlamaModel: position_ids are not those",
        "NotImplementedError: RingLlamaModel: attention_mask has pads",
        "NotImplementedError: RingLlamaForCausalLM.generate: use_cache is False",
        "ValueError: RingLlamaForCausalLM.generate: nothing was sent, because the ranks were",
        "ValueError: RingLlamaModel: nothing was sent, because the ranks were",
        "ValueError: RingLlamaForCausalLM.generate: nothing was sent, because the ranks were",
        "TypeError: RingLlamaModel: past_key_values is DynamicCache; expected the result of",
        "ValueError: RingLlamaModel: position_ids are not 0 to 19",
        "ValueError: RingLlamaModel: the prompt is empty",
    ]
    for messages in run_ranks_well(ring_on_ranks.refusals, 2):
        for message, start in zip(messages, expected, strict=True):
            assert message.startswith(start)


def test_weights_are_those_of_the_base(tmp_path):
    """A saved ring loads, and into the base class too."""
    ring, ids = hf.convert(base(dtype=torch.float32), "ring", timeout=30.0), tokens(1, 9)
    ring.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(ring) and again.config.lctx == ring.config.lctx
    dense = type(base()).from_pretrained(tmp_path)
    close(dense(ids).logits, base(dtype=torch.float32)(ids).logits, rtol=1e-5, atol=1e-5)


def test_without_a_group():
    with pytest.raises(ValueError, match="there is no default process group"):
        hf.convert(base(), "ring")(tokens(1, 9))
