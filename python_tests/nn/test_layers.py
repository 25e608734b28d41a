import pytest
import torch
from helpers import random_landmarks, random_tensor

import lctx_kernels as lk
from lctx_kernels import nn
from lctx_kernels.nn.rotary import Rotary
from lctx_kernels.nn.sampling import sample


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


LAYERS = {
    "full": lambda **o: nn.FullAttention(32, 4, num_kv_heads=2, **o),
    "infini": lambda **o: nn.InfiniAttention(32, 4, num_kv_heads=2, segment_len=6, **o),
    "delta": lambda **o: nn.InfiniAttention(32, 4, segment_len=6, update="delta", **o),
    "landmark": lambda **o: nn.LandmarkAttention(32, 4, num_kv_heads=2, block_size=5, **o),
    "retrieval": lambda **o: nn.LandmarkAttention(32, 4, block_size=5, top_k=9, **o),
}


@pytest.mark.parametrize("method", LAYERS)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_state_gives_what_the_whole_text_gives(method, qk_norm):
    layer = LAYERS[method](qk_norm=qk_norm).double()
    x, state = random_tensor(2, 33, 32), layer.new_state()
    parts = [layer(part, state) for part in x.split([14, 1, 1, 17], dim=1)]
    close(torch.cat(parts, dim=1), layer(x))


@pytest.mark.parametrize("method", LAYERS)
def test_padded_rows_are_what_they_are_alone(method):
    layer = LAYERS[method]().double()
    x, state = random_tensor(2, 20, 32), layer.new_state()
    spans = [(0, 17), (5, 17)]
    first = layer(x[:, :17], state, spans)
    second = layer(x[:, 17:], state)
    for row, (start, _) in enumerate(spans):
        alone = layer(x[row : row + 1, start:])[0]
        close(first[row, start:], alone[: 17 - start])
        close(second[row], alone[17 - start :])
    close(layer(x[:, :17], spans=spans), first)


def test_dense_layer_is_torch_attention():
    layer, x = LAYERS["full"]().double(), random_tensor(2, 11, 32)
    q, k, v = layer.project(x)
    i = torch.arange(11)[:, None]
    q, k, v = (y.transpose(1, 2) for y in (layer.rope(q, i), layer.rope(k, i), v))
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    close(layer(x), layer.o_proj(want.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_infini_segments_with_memory_are_the_whole_text(update):
    layer = nn.InfiniAttention(32, 4, segment_len=6, update=update, gate_init=1.0).double()
    x = random_tensor(2, 24, 32)
    mem, parts = None, []
    for part in x.split(12, dim=1):
        y, mem = layer.with_memory(part, mem)
        parts.append(y)
    close(torch.cat(parts, dim=1), layer(x))
    close(mem.z, layer.with_memory(x)[1].z)


def test_infini_memory_sees_no_positions():
    """The second of two equal segments reads what the first wrote, wherever its tokens stand."""
    layer = nn.InfiniAttention(16, 2, segment_len=5, gate_init=30.0).double()
    x = random_tensor(1, 5, 16)
    out = layer(torch.cat([x, x[:, [3, 1, 0, 2, 4]]], dim=1))
    out2 = layer(torch.cat([x[:, [4, 2, 1, 0, 3]], x], dim=1))
    close(out[:, 5:][:, [2, 1, 3, 0, 4]], out2[:, 5:])


def test_landmarks_anywhere():
    layer, x = LAYERS["landmark"]().double(), random_tensor(2, 20, 32)
    regular = (torch.arange(20) % 5 == 4).expand(2, 20)
    close(layer(x, is_landmark=regular), layer(x))
    assert not torch.equal(layer(x, is_landmark=random_landmarks(2, 20, 0.3)), layer(x))
    with pytest.raises(NotImplementedError, match="is_landmark is given with a state"):
        layer(x, layer.new_state(), is_landmark=regular)


def test_retrieval_options_need_top_k():
    with pytest.raises(ValueError, match=r"offload is True.*without top_k.*try top_k=4"):
        nn.LandmarkAttention(32, 4, offload=True)
    for options, message in (
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"top_k": 2, "select": "head,token"}, "expected one of token_and_head, head, token"),
        ({"top_k": 2, "max_blocks": 0}, "max_blocks is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            nn.LandmarkAttention(32, 4, **options)


@pytest.mark.parametrize(
    ("layer", "options", "error", "message"),
    [
        (nn.FullAttention, {"num_heads": 5}, ValueError, "num_heads is 5; expected a multiple"),
        (nn.FullAttention, {"num_kv_heads": 3}, ValueError, "num_kv_heads is 3; expected a mul"),
        (nn.FullAttention, {"num_kv_heads": 0}, ValueError, "num_kv_heads is 0; expected an int"),
        (nn.FullAttention, {"head_dim": 8.0}, TypeError, "head_dim is 8.0; expected an int >= 1"),
        (nn.InfiniAttention, {"segment_len": 0}, ValueError, "segment_len is 0; expected an int"),
        (nn.InfiniAttention, {"update": "?"}, ValueError, "update is '.'; expected one of linear"),
        (nn.LandmarkAttention, {"block_size": 1}, ValueError, "block_size is 1; expected an int"),
    ],
)
def test_wrong_options_are_refused_when_the_layer_is_made(layer, options, error, message):
    with pytest.raises(error, match=message):
        layer(**{"d_model": 32, "num_heads": 4} | options)


@pytest.mark.parametrize("method", LAYERS)
def test_inputs_of_another_shape_are_refused(method):
    layer = LAYERS[method]()
    for shape in ((5, 32), (1, 5, 16), (1, 5, 4, 8)):
        with pytest.raises(ValueError, match=r"x has shape .*; expected \(B, T, d_model\) with"):
            layer(torch.zeros(shape))


@pytest.mark.parametrize("method", LAYERS)
def test_states_are_of_one_batch_and_can_be_saved(method, tmp_path):
    layer, x = LAYERS[method](), random_tensor(2, 17, 32, dtype=torch.float32)
    state = layer.new_state()
    with torch.no_grad():
        layer(x, state)
        torch.save(state, tmp_path / "state.pt")
        with pytest.raises(ValueError, match=r"are of 1 rows, those before of 2; expected equal"):
            layer(x[:1], state)
        again = torch.load(tmp_path / "state.pt", weights_only=False)
        assert torch.equal(layer(x[:, :1], again), layer(x[:, :1], state))


@pytest.mark.parametrize("xpos", [None, 512.0])
def test_rotary_depends_on_distances_alone(xpos):
    rotary = Rotary(16, xpos_base=xpos)
    q, k = random_tensor(2, 16)
    near = [rotary(q, torch.tensor(i)) @ rotary(k, torch.tensor(j), key=True)
            for i, j in ((7, 3), (1007, 1003))]  # fmt: skip
    close(*near)


def test_rotary_is_that_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4)
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(9)[None])
    x = random_tensor(1, 4, 9, 16, dtype=torch.float32)
    want, _ = llama.apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(Rotary(16)(x, torch.arange(9)), want)


def test_xpos_beyond_its_range_names_a_base_that_works():
    rotary, far = Rotary(16, xpos_base=64.0), torch.tensor(50_000)
    with pytest.raises(ValueError, match="nearest is xpos_base = ") as error:
        rotary(torch.ones(16), far)
    base = float(str(error.value).split("xpos_base = ")[-1])
    assert Rotary(16, xpos_base=base + 1)(torch.ones(16), far).isfinite().all()


def test_gates_have_their_own_group():
    model = nn.Llama(nn.LlamaConfig(17, 16, 2, 2, attention=["full", "infini"]))
    groups = nn.parameter_groups(model, lr=1e-3, weight_decay=0.1, gate_lr=1e-2)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-3, 0), (1e-2, 0)]
    assert groups[2]["params"] == nn.gate_parameters(model)
    grouped = {id(p) for g in groups for p in g["params"]}
    assert grouped == {id(p) for p in model.parameters()}


def test_sampling():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4000, 4)
    share = torch.bincount(sample(logits), minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].softmax(0), atol=0.04, rtol=0)
    share = torch.bincount(sample(logits, temperature=3.0), minlength=4) / 4000
    torch.testing.assert_close(share, (logits[0] / 3).softmax(0), atol=0.04, rtol=0)
    assert set(sample(logits, top_k=2).tolist()) == {2, 3}
    assert set(sample(logits, top_p=0.7).tolist()) == {2, 3}
    assert set(sample(logits, top_p=0.1).tolist()) == {3}
    assert set(sample(logits, temperature=0.0).tolist()) == {3}
    for limits, message in (
        ({"temperature": -1}, "temperature is -1; expected at least 0"),
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; expected above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(logits, **limits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", LAYERS)
def test_autocast_and_half_precision(method, dtype):
    layer, x = LAYERS[method](), random_tensor(1, 20, 32, dtype=torch.float32)
    want = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        mixed = layer(x)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.float(), want, rtol=0.1, atol=0.03)
    half = LAYERS[method]()
    half.load_state_dict(layer.state_dict())
    half = half.to(dtype)
    assert half(x.to(dtype)).dtype == dtype
    state = half.new_state()
    parts = [half(part.to(dtype), state) for part in x.split([9, 1, 10], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1).float(), want, rtol=0.1, atol=0.03)
    assert lk.supports("flash_attention", *half.project(x.to(dtype))) == []
