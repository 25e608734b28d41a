import inspect

import pytest
import torch
from helpers import random_tensor

import lctx_kernels as lk
from lctx_kernels.nn import DilatedAttention
from lctx_kernels.nn.relative import RelativeBias, dilated_attention_with_bias


def layer(*args, seed=0, **options):
    torch.manual_seed(seed)
    return DilatedAttention(*args, **options).double()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("T", [1, 7, 16, 37])
@pytest.mark.parametrize("causal", [False, True])
def test_is_the_op_between_projections(T, causal):
    module = layer(24, 4, [1, 3], [4, 16], causal=causal, num_kv_heads=2)
    x = random_tensor(2, T, 24)
    q, k, v = module.project(x)
    want = lk.dilated_attention(q, k, v, [4, 16], [1, 3], causal=causal)
    out = module(x)
    assert out.shape == x.shape
    close(out, module.o_proj(want.flatten(2)))


def test_scalars_are_one_branch():
    x = random_tensor(1, 20, 16)
    close(layer(16, 2, 2, 8)(x), layer(16, 2, [2], [8])(x))
    assert layer(16, 2, 2, 8, casual=True).causal


def test_dropout_acts_on_the_output_in_training_alone():
    module, x = layer(16, 2, 1, 8, 0.5), random_tensor(2, 30, 16)
    dropped = (module(x) == 0).double().mean().item()
    assert 0.3 < dropped < 0.7
    module.eval()
    assert not (module(x) == 0).any()


def test_qk_norm_leaves_the_values_alone():
    module, x = layer(16, 2, 1, 8, qk_norm=True), random_tensor(1, 9, 16)
    q, k, v = module.project(x)
    close(v, module.v_proj(x).unflatten(-1, (2, 8)))
    for y in (q, k):
        close(y.mean(-1), torch.zeros_like(y[..., 0]))


@pytest.mark.parametrize("options", [{"use_xpos": True}, {"rope_base": 1e4}, {}])
@pytest.mark.parametrize("kv", [2, 4])
def test_a_state_gives_what_the_whole_text_gives(options, kv):
    module = layer(32, 4, [1, 2], [4, 16], causal=True, num_kv_heads=kv, **options)
    x, state = random_tensor(2, 21, 32), module.new_state()
    parts = [module(part, state) for part in x.split([9, 1, 1, 10], dim=1)]
    close(torch.cat(parts, dim=1), module(x))


def test_true_lengths():
    module, x = layer(16, 2, [1, 2], [4, 8], rope_base=1e4), random_tensor(2, 12, 16)
    out = module(x, seqlens=torch.tensor([12, 7], dtype=torch.int32))
    close(out[0], module(x[:1])[0])
    close(out[1, :7], module(x[1:, :7])[0])


def dense_with_bias(module, x, seqlens):
    """The multiset union of the branches' keys as one dense softmax."""
    q, k, v = module.project(x)
    B, T, H, D = q.shape
    i = torch.arange(T)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
    scores = scores + module.rel_pos_bias(i[:, None] - i).movedim(-1, 0)
    counts = torch.zeros(B, H, T, T, dtype=q.dtype)
    for w, r in zip(module.segment_lengths, module.dilation_rates, strict=True):
        selected = (i % w % r) == (torch.arange(H) % r)[:, None]
        pair = selected[:, :, None] & selected[:, None] & (i[:, None] // w == i // w)
        counts += (pair & (i <= i[:, None]) if module.causal else pair).double()
    real = i < seqlens[:, None]
    counts *= (real[:, :, None] & real[:, None])[:, None]
    weights = counts * scores.exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return module.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
def test_bias_is_added_to_the_scores_at_true_distances(causal):
    module = layer(24, 4, [1, 3], [5, 16], causal=causal, use_rel_pos_bias=True)
    torch.nn.init.normal_(module.rel_pos_bias.weight)
    x, seqlens = random_tensor(2, 23, 24), torch.tensor([23, 14], dtype=torch.int32)
    out = module(x, seqlens=seqlens)
    close(out, dense_with_bias(module, x, seqlens))
    (grad,) = torch.autograd.grad(out.square().sum(), module.rel_pos_bias.weight)
    (want,) = torch.autograd.grad(
        dense_with_bias(module, x, seqlens).square().sum(), module.rel_pos_bias.weight
    )
    close(grad, want)


def test_no_bias_is_the_kernel():
    module = layer(24, 4, [1, 3], [5, 16], causal=True, use_rel_pos_bias=True)
    torch.nn.init.zeros_(module.rel_pos_bias.weight)
    q, k, v = module.project(random_tensor(2, 23, 24))
    options = {"causal": True, "head_offset": "block", "seqlens": None}
    ours = dilated_attention_with_bias(q, k, v, [5, 16], [1, 3], module.rel_pos_bias, **options)
    close(ours, lk.dilated_attention(q, k, v, [5, 16], [1, 3], **options))


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_t5(causal):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-300, 301)
    bias = RelativeBias(1, causal)
    with torch.no_grad():
        bias.weight.copy_(torch.arange(32.0)[:, None])
    theirs = t5.T5Attention._relative_position_bucket(-distance, bidirectional=not causal)
    assert bias(distance)[:, 0].tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((16, 3, 1, 8), {}, ValueError, "d_model is 16, num_heads is 3"),
        ((16, 4, [1, 2], [8]), {}, ValueError, "2 entries of dilation_rate, 1 of segment_size"),
        ((16, 4, 1.5, 8), {}, TypeError, "dilation_rate is 1.5"),
        ((16, 4, 1, 0), {}, ValueError, "segment_size is 0; expected numbers >= 1"),
        ((16, 4, 1, 8), {"use_xpos": True, "rope_base": 1e4}, ValueError, "expected one of the"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        DilatedAttention(*arguments, **options)


def test_what_a_bias_cannot_do_is_refused():
    module = layer(16, 2, 1, 8, causal=True, use_rel_pos_bias=True)
    with pytest.raises(NotImplementedError, match="expected a causal layer without bias"):
        module.new_state()
    with pytest.raises(NotImplementedError, match="expected a causal layer"):
        layer(16, 2, 1, 8).new_state()
    with pytest.raises(NotImplementedError, match="mix_grad is 'detached' with use_rel_pos_bias"):
        layer(16, 2, 1, 8, use_rel_pos_bias=True, mix_grad="detached")(random_tensor(1, 8, 16))


def test_signature_is_that_of_longnet():
    names = list(inspect.signature(DilatedAttention).parameters)
    assert names[:9] == [
        "d_model", "num_heads", "dilation_rate", "segment_size", "dropout", "causal", "use_xpos",
        "use_rel_pos_bias", "qk_norm",
    ]  # fmt: skip
