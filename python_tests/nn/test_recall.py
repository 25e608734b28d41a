"""Small models learn to find a key that only their long-range part can see."""

import pytest
import torch

from lctx_kernels import nn

KEYS, FILL = 16, 8
MARK = KEYS + FILL
ASK, VOCAB = MARK + 1, MARK + 2
OPTIONS = {
    "infini": {"segment_len": 16, "update": "delta"},
    "landmark": {"block_size": 9},
    "dilated": {"segment_lengths": [16, 4096], "dilation_rates": [1, 1]},
}


def texts(B, T, generator):
    """A marked key in the first third, filler, and at the end the question; labels of the key."""
    ids = torch.randint(KEYS, MARK, (B, T), generator=generator)
    key = torch.randint(KEYS, (B,), generator=generator)
    place = torch.randint(0, T // 3, (B,), generator=generator)
    rows = torch.arange(B)
    ids[rows, place], ids[rows, place + 1] = MARK, key
    ids[:, -2], ids[:, -1] = ASK, key
    labels = torch.full_like(ids, -100)
    labels[:, -1] = key
    return ids, labels


def accuracy(model, T, generator, chunk=None):
    ids, _ = texts(64, T, generator)
    states, seen = model.new_states(), 0
    with torch.no_grad():
        for part in ids[:, :-1].split(chunk or T, dim=1):
            logits = model(part, states, seen)[:, -1]
            seen += part.shape[1]
    return (logits.argmax(-1) == ids[:, -1]).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_a_key_beyond_local_attention_is_found(method):
    generator = torch.Generator().manual_seed(0)
    config = nn.LlamaConfig(VOCAB, 48, 2, 2, d_ff=96, attention=method, options=OPTIONS)
    model = nn.Llama(config)
    optimizer = torch.optim.AdamW(nn.parameter_groups(model, lr=4e-3, gate_lr=3e-2))
    mean, lengths = 3.0, (34, 50, 66, 98)
    for step in range(600):
        loss = model.loss(*texts(16, lengths[step % 4], generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * loss.item()
        if mean < 0.05:
            break
    assert accuracy(model, 98, generator) > 0.9
    assert accuracy(model, 98, generator, chunk=7) > 0.9  # through the states
    if method == "infini":  # the memory is what finds it: without it the answer is a guess
        for gate in nn.gate_parameters(model):
            torch.nn.init.constant_(gate, -30.0)
        assert accuracy(model, 98, generator) < 0.3
