import pytest
import torch

from lctx_kernels import nn
from lctx_kernels.data.landmarks import insert_landmarks

OPTIONS = {
    "infini": {"segment_len": 6, "update": "delta"},
    "landmark": {"block_size": 5},
    "dilated": {"segment_lengths": [4, 16], "dilation_rates": [1, 2]},
}
MIXES = {
    "full": "full",
    "infini": "infini",
    "landmark": "landmark",
    "dilated": "dilated",
    "all": ["full", "infini", "landmark", "dilated"],
}


def llama(attention, **options):
    torch.manual_seed(0)
    config = nn.LlamaConfig(
        61, 32, 4, 4, num_kv_heads=2, attention=attention, options=OPTIONS, **options
    )
    return nn.Llama(config)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_generation_is_the_argmax_of_the_whole_text(mix):
    model, ids = llama(mix).double(), torch.randint(61, (2, 13))
    out = model.generate(ids, 12)
    assert torch.equal(out[:, :13], ids)
    logits = model(out)
    assert torch.equal(logits[:, 12:-1].argmax(-1), out[:, 13:])
    assert torch.equal(model.generate(ids, 12, chunk=3), out)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_no_token_sees_a_later_one(mix):
    model, ids = llama(mix).double(), torch.randint(61, (1, 30))
    other = ids.clone()
    other[:, 17:] = (other[:, 17:] + 1) % 61
    a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :17], b[:, :17], rtol=1e-12, atol=1e-12)
    assert not torch.equal(a[:, 17], b[:, 17])


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_every_parameter_learns(mix):
    model, ids = llama(mix), torch.randint(61, (2, 24))
    optimizer = torch.optim.AdamW(nn.parameter_groups(model, lr=3e-3, gate_lr=1e-2))
    losses = []
    for _ in range(25):
        loss = model.loss(ids, ids)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_loss_is_cross_entropy_of_the_next_token():
    model, ids = llama("full").double(), torch.randint(61, (2, 24))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    want = torch.nn.functional.cross_entropy(
        model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(model.loss(ids, labels), want)


def test_landmarks_are_inserted_by_the_model():
    model, ids = llama("landmark").double(), torch.randint(61, (1, 23))
    with_marks, _ = insert_landmarks(ids[0].tolist(), 61, 4)
    hidden = model.embedding(torch.tensor([with_marks]))
    for layer in model.layers:
        hidden = layer(hidden)
    ordinary = torch.tensor(with_marks) != 61
    logits = model.norm(hidden)[:, ordinary] @ model.embedding.weight[:61].T
    torch.testing.assert_close(model(ids), logits)


def test_blockwise_feedforward_is_the_same():
    ids = torch.randint(61, (1, 20))
    torch.testing.assert_close(llama("full", ffn_chunk=6)(ids), llama("full")(ids))


def test_untied_output_and_eos():
    model = llama("full", tie=False)
    assert model.output_weight is model.output.weight
    ids = torch.randint(61, (3, 5))
    free = model.generate(ids, 6)
    eos = int(free[0, 6])
    ended = model.generate(ids, 6, eos=eos)
    assert (ended[0, 6:] == eos).all() and model.training


def test_generation_that_fails_leaves_the_model_in_training():
    model = llama("full")
    wrapper = nn.AutoregressiveWrapper(nn.LongNetTransformer(16, 1, 61, dim_head=8, heads=2))
    prompt = torch.randint(61, (1, 5))
    with pytest.raises(ValueError, match="top_k is 0"):
        model.generate(prompt, 3, temperature=1.0, top_k=0)
    with pytest.raises(ValueError, match="top_k is 0"):
        wrapper.generate(prompt, 3, filter_thres=1.0)
    assert model.training and wrapper.net.training
    with pytest.raises(ValueError, match=r"ids has shape \(1, 0\); expected \(B, T\) with T >= 1"):
        model.generate(prompt[:, :0], 3)
    with pytest.raises(ValueError, match=r"start_tokens has shape \(1, 0\), seq_len is 3"):
        wrapper.generate(prompt[:, :0], 3)


def test_wrong_configurations():
    with pytest.raises(ValueError, match="expected one of full, infini, landmark, dilated"):
        nn.Llama(nn.LlamaConfig(11, attention="sliding"))
    with pytest.raises(ValueError, match="2 layers"):
        nn.Llama(nn.LlamaConfig(11, num_layers=2, attention=["full"]))


def test_longnet_generates_what_it_computes():
    torch.manual_seed(0)
    net = nn.LongNetTransformer(
        32, 2, 61, dim_head=8, heads=4, dilation_rate=[1, 2], segment_size=[8, 32]
    ).double()
    wrapper, prompt = nn.AutoregressiveWrapper(net), torch.randint(1, 61, (2, 7))
    out = wrapper.generate(prompt, 9, temperature=0.0)
    assert out.shape == (2, 9)
    whole = torch.cat([prompt, out], dim=1)
    assert torch.equal(net(whole)[:, 6:-1].argmax(-1), out)
    one = wrapper.generate(prompt[0], 9, temperature=0.0)
    assert torch.equal(one, out[0])
    whole[:, -3:] = 0  # pads
    want = torch.nn.functional.cross_entropy(
        net(whole[:, :-4]).flatten(0, 1), whole[:, 1:-3].flatten()
    )
    torch.testing.assert_close(wrapper(whole), want)


def test_longnet_ends_and_samples():
    torch.manual_seed(0)
    net = nn.LongNetTransformer(16, 1, 11, dim_head=8, heads=2)
    wrapper, prompt = nn.AutoregressiveWrapper(net, max_seq_len=4), torch.randint(1, 11, (2, 9))
    first = wrapper.generate(prompt, 5, temperature=0.0)
    eos = int(first[0, 1])
    ended = wrapper.generate(prompt, 5, eos_token=eos, temperature=0.0)
    end = (first[0] == eos).nonzero()[0, 0]
    assert (ended[0, end + 1 :] == 0).all()
    assert torch.equal(wrapper.generate(prompt[:, -4:], 5, temperature=0.0), first)
    torch.manual_seed(1)
    sampled = {tuple(wrapper.generate(prompt[0], 4, filter_thres=0.0).tolist()) for _ in range(8)}
    assert len(sampled) > 1


def test_longnet_learns():
    torch.manual_seed(0)
    wrapper = nn.AutoregressiveWrapper(nn.LongNetTransformer(32, 2, 61, dim_head=8, heads=4))
    optimizer, ids = torch.optim.AdamW(wrapper.parameters(), lr=3e-3), torch.randint(1, 61, (2, 24))
    losses = []
    for _ in range(25):
        loss = wrapper(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
