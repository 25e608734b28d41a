"""Weights go from nn.Llama to transformers' files and back: the same logits, the same bits."""

import pytest
import torch
from hf.tiny import METHODS, VOCAB, base, close, converted, hf, tokens
from transformers import AutoModelForCausalLM

from lctx_kernels import nn

OPTIONS = {
    "full": {}, "infini": {"segment_len": 8, "update": "delta", "first": "gate"},
    "landmark": {"block_size": 5},
    "dilated": {"segment_lengths": [8, 16], "dilation_rates": [1, 2]},
}  # fmt: skip


def ours(attention, **changes):
    torch.manual_seed(0)
    methods = {attention} if isinstance(attention, str) else set(attention)
    options = {name: OPTIONS[name] for name in methods if OPTIONS[name]}
    config = nn.LlamaConfig(
        VOCAB, 32, 2, 4, num_kv_heads=2, attention=attention, options=options, **changes
    )
    model = nn.Llama(config).double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("attention", [*OPTIONS, ["infini", "full"], ["full", "dilated"]])
def test_there_and_back(attention, tie, tmp_path):
    model, ids = ours(attention, tie=tie, norm_eps=1e-6), tokens(2, 30)
    hf.export_llama(model).save_pretrained(tmp_path)
    assert [file.suffix for file in tmp_path.glob("model*")] == [".safetensors"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    rtol = {"rtol": 1e-5, "atol": 1e-5}  # transformers has cos and sin in fp32, gates too
    close(exported(ids).logits[..., :VOCAB], model(ids), **rtol)
    again = hf.import_llama(exported).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].to(torch.float32), weight.to(torch.float32))
    close(again(ids), model(ids), **rtol)


@pytest.mark.parametrize("method", [None, *METHODS])
def test_models_of_transformers_come_in(method):
    changes = {"attention_bias": False, "mlp_bias": False}
    theirs = base(**changes) if method is None else converted(method, **changes)
    ids = tokens(2, 30)
    close(hf.import_llama(theirs)(ids), theirs(ids).logits[..., :VOCAB], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hf.import_llama(base("qwen3")), "Qwen3ForCausalLM; expected LlamaForCausalLM"),
        (lambda: hf.import_llama(converted("ring", options={})), "RingLlamaForCausalLM; expected"),
        (lambda: hf.import_llama(base(attention_bias=True)), "attention_bias = True"),
        (lambda: hf.import_llama(base(head_dim=16)), "head_dim = 16"),
        (
            lambda: hf.import_llama(converted("landmark", options={"landmark_id": 5})),
            "landmark_id is 5; expected the last token, 60",
        ),
        (lambda: hf.export_llama(ours(["infini", "landmark"])), "one method besides full"),
        (lambda: hf.export_llama(ours("full", dropout=0.1)), "dropout is 0.1; expected 0"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(NotImplementedError, match=message):
        make()
