"""attn_implementation="lctx_dense" against transformers' own attention in fp64."""

import pytest
import torch
import transformers
from hf.tiny import SHAPE, base, hf, tokens
from transformers.masking_utils import create_causal_mask

from lctx_kernels.hf import dense

T = 37
CHANGES = {"mistral": {"sliding_window": 9}, "gemma2": {"attn_logit_softcapping": 5.0}}


def models(family):
    """The same model with PyTorch's attention and with ours."""
    hf.register()
    theirs, ours = (base(family, **CHANGES.get(family, {})) for _ in range(2))
    ours.set_attn_implementation("lctx_dense")
    assert ours.config._attn_implementation == "lctx_dense"
    return theirs, ours


def step(model, ids, **inputs):
    """Logits, and all gradients in one vector."""
    model.zero_grad()
    out = model(ids, labels=ids, use_cache=False, **inputs)
    out.loss.backward()
    return out.logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def check(family, ids, tokens=None, **inputs):
    theirs, ours = models(family)
    (want, want_grad), (logits, grad) = (step(model, ids, **inputs) for model in (theirs, ours))
    at = slice(None) if tokens is None else tokens
    torch.testing.assert_close(logits[at], want[at])
    if tokens is None:  # the loss of a pad depends on what its row attends to
        torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"])
def test_logits_and_gradients(family):
    check(family, tokens(2, T))


@pytest.mark.parametrize("left", [True, False])
def test_pads(left):
    kept = torch.ones(2, T, dtype=torch.int64)
    kept[1, slice(0, 8) if left else slice(T - 8, T)] = 0
    positions = (kept.cumsum(1) - 1).clamp(min=0)
    check("llama", tokens(2, T), kept.bool(), attention_mask=kept, position_ids=positions)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("cuts", [[[5, 20]], [[5, 20], [36, 37]]])
def test_packed_texts(family, cuts):
    rows = [torch.cat([torch.arange(b - a) for a, b in zip([0, *c], [*c, T], strict=True)])
            for c in cuts]  # fmt: skip
    check(family, tokens(len(cuts), T), position_ids=torch.stack(rows))


def test_generation():
    ids, kept = tokens(2, T), torch.ones(2, T, dtype=torch.int64)
    kept[1, :8] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want, out = (m.eval().generate(ids, attention_mask=kept, **options) for m in models("llama"))
    assert torch.equal(out, want)


def test_refusals():
    _, model = models("llama")
    square = torch.zeros(2, 1, T, T, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="attention_mask has 4 dimensions; expected 2"):
        model(tokens(2, T), attention_mask=square)
    inputs = {"config": model.config, "inputs_embeds": torch.zeros(2, T, 8)}
    inputs |= {"attention_mask": None, "past_key_values": None}

    def both_ways(row, head, query, key):
        return key < 10

    with pytest.raises(NotImplementedError, match="a mask function of your own"):
        create_causal_mask(**inputs, or_mask_function=both_ways)
    with pytest.raises(NotImplementedError, match="a mask function of your own"):
        create_causal_mask(**inputs, and_mask_function=lambda b, h, q, k: k % 3 > 0)
    with pytest.raises((NotImplementedError, ValueError), match="lctx_dense: a"):
        model.generate(tokens(1, T), max_new_tokens=3, cache_implementation="static")
    _, capped = models("gemma2")
    with pytest.raises(NotImplementedError, match="softcap is"):
        capped(tokens(2, T))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (
            "Llama4",
            {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        ),
        ("Phimoe", {"sliding_window": 8, "num_local_experts": 2}),
    ],
)
def test_layers_that_do_not_hand_on_their_window_are_refused(family, changes):
    config = getattr(transformers, f"{family}TextConfig", None)
    config = config or getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(config(**SHAPE | changes))
    model.set_attn_implementation("lctx_dense")
    with pytest.raises(NotImplementedError, match="attention_chunk_size or a sliding_window"):
        model(tokens(1, T))


def test_what_else_would_change_scores_is_refused():
    _, model = models("llama")
    layer = model.model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, 4, T, 8).unbind()
    dense.attention(layer, q, k, v, None, position_ids=torch.arange(T)[None])
    with pytest.raises(NotImplementedError, match="position_bias, sinks given to the attention"):
        dense.attention(layer, q, k, v, None, sinks=torch.zeros(4), position_bias=torch.zeros(T))


def test_compiled():
    theirs, ours = models("llama")
    ids = tokens(2, T)
    want = theirs(ids, use_cache=False).logits
    compiled = torch.compile(ours, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, want)
