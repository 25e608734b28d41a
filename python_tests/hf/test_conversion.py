"""What conversion keeps, what it changes, and what it refuses."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from hf.tiny import FAMILIES, LAYERS, METHODS, VOCAB, base, close, converted, hf, tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lctx_kernels import nn
from lctx_kernels.data.landmarks import insert_landmarks
from lctx_kernels.hf.models import model_class
from lctx_kernels.hf.training import segmentwise_backward

CASES = [(family, method) for family in FAMILIES for method in METHODS]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("infini", {"segment_len": 64, "gate_init": 5.0}),  # one segment: no memory to read
        ("infini", {"segment_len": 64, "first": "gate", "gate_init": -80.0}),
        ("dilated", {"segment_lengths": [64, 64], "dilation_rates": [1, 1]}),
        ("landmark", {"block_size": 64}),  # one block
    ],
)
def test_where_the_method_is_dense_attention_the_logits_are_those_of_the_base(
    family, method, options
):
    ids = tokens(2, 30)
    want = base(family)(ids).logits
    model = converted(method, family, options=options)
    close(model(ids).logits[..., :VOCAB], want)
    mask = torch.ones_like(ids)
    mask[1, 23:] = 0  # pads on the right
    close(model(ids, attention_mask=mask).logits[1, :23, :VOCAB], want[1, :23])


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_are_attention_inside_segments(family):
    ids, model = tokens(1, 24), converted("infini", family, options={
        "segment_len": 8, "first": "gate", "gate_init": -80.0})  # fmt: skip
    mask = torch.full((24, 24), -torch.inf, dtype=torch.float64).triu(1)
    i = torch.arange(24)
    mask[i[:, None] // 8 != i // 8] = -torch.inf
    dense = base(family)
    want = dense(ids, attention_mask=mask[None, None], position_ids=(i % 8)[None]).logits
    close(model(ids).logits, want)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_saved_and_loaded(family, method, tmp_path):
    model, ids = converted(method, family, torch.float32), tokens(1, 40)
    if method == "infini":
        for gate in nn.gate_parameters(model):
            torch.nn.init.normal_(gate)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"lctx_{method}_{family}"
    assert saved["lctx"]["method"] == method
    assert [f.suffix for f in tmp_path.glob("model*")] == [".safetensors"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and type(again.config) is type(model.config)
    assert again.config.lctx == model.config.lctx
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_a_new_process_loads_after_register(tmp_path):
    model, ids = converted("infini"), tokens(1, 20)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch; from lctx_kernels import hf; hf.register()\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64)\n"
        f"print(repr(model(torch.tensor({ids.tolist()})).logits[0, -1, 7].item()))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True,
                         check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == model(ids).logits[0, -1, 7].item()


def test_a_base_checkpoint_loads_into_a_converted_class(tmp_path):
    dense, ids = base(dtype=torch.float32), tokens(1, 30)
    dense.save_pretrained(tmp_path)
    hf.register()
    cls = model_class("llama", "infini")
    values = AutoConfig.from_pretrained(tmp_path).to_dict()
    values.pop("model_type")
    spec = converted("infini", options={"segment_len": 64, "gate_init": -3.0}).config.lctx
    model = cls.from_pretrained(tmp_path, config=cls.config_class(**values, lctx=spec))
    assert [gate.tolist() for gate in nn.gate_parameters(model)] == [[-3.0] * 4] * LAYERS
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("method", METHODS)
def test_pickled_models_and_caches_go_on_in_a_new_process(method, tmp_path):
    model, ids = converted(method), tokens(1, 20)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        torch.save((model, cache, ids[:, :1]), tmp_path / "model.pt")
        want = model(ids[:, :1], past_key_values=cache).logits[0, -1, 7].item()
    code = (
        "import sys, torch; torch.set_grad_enabled(False)\n"
        "model, cache, ids = torch.load(sys.argv[1], weights_only=False)\n"
        "print(repr(model(ids, past_key_values=cache).logits[0, -1, 7].item()))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True,
                         text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == want


def test_gates_stay_fp32_in_a_half_model(tmp_path):
    converted("infini", dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {gate.dtype for gate in nn.gate_parameters(model)} == {torch.float32}
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model(tokens(1, 20)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["infini", "dilated"])
@pytest.mark.parametrize("layers", [[1], [-1], (0,)])
def test_some_layers(method, layers, tmp_path):
    model, ids = converted(method, layers=layers), tokens(2, 30)
    chosen = [layer % LAYERS for layer in layers]
    assert model.config.lctx["layers"] == chosen
    dense, all_layers = base()(ids).logits, converted(method)(ids).logits
    ours = model(ids).logits
    assert not torch.allclose(ours, dense) and not torch.allclose(ours, all_layers)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    close(again(ids).logits, ours)
    if method == "infini":
        gates = [hasattr(layer.self_attn, "memory_gate") for layer in model.model.layers]
        assert gates == [index in chosen for index in range(LAYERS)]


def test_layers_that_slide_stay_as_they_are():
    changes = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    model = converted("infini", "gemma3_text", **changes)
    assert model.config.lctx["layers"] == [1]
    ids = tokens(1, 30)
    segment = {"segment_len": 64, "first": "bypass"}
    same = converted("infini", "gemma3_text", options=segment, **changes)
    close(same(ids).logits, base("gemma3_text", **changes)(ids).logits)
    wide = changes | {"sliding_window": 8}
    assert converted("infini", "gemma3_text", **wide).config.lctx["layers"] == [0, 1]


def test_landmarks_are_a_token_with_the_mean_embedding():
    model = base()
    mean = model.get_input_embeddings().weight.mean(0)
    hf.convert(model, "landmark", block_size=5)
    assert (
        model.config.vocab_size == VOCAB + 1
        and model.config.lctx["options"]["landmark_id"] == VOCAB
    )
    close(model.get_input_embeddings().weight[VOCAB], mean, rtol=1e-6, atol=1e-6)
    assert model.generation_config.suppress_tokens == [VOCAB]
    given = hf.convert(base(), "landmark", block_size=5, landmark_id=7)
    assert given.config.vocab_size == VOCAB and given.config.lctx["options"]["landmark_id"] == 7


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3_text"])
def test_landmarks_inserted_by_the_model_or_in_the_data_are_the_same(family):
    model, ids = converted("landmark", family), tokens(1, 23)
    inside = model(ids, labels=ids)
    with_marks, labels = (torch.tensor([x]) for x in insert_landmarks(ids[0].tolist(), VOCAB, 4))
    model.config.lctx["options"]["insert"] = False
    outside = model(with_marks, labels=labels)
    close(outside.logits[:, with_marks[0] != VOCAB], inside.logits)
    close(outside.loss, inside.loss, rtol=1e-6)  # transformers computes it in fp32
    embedded = model.get_input_embeddings()(ids)
    with pytest.raises(NotImplementedError, match="insert is False with inputs_embeds"):
        model(inputs_embeds=embedded)
    with pytest.raises(NotImplementedError, match="insert is False with a cache"):
        model(with_marks, use_cache=True)
    model.config.lctx["options"]["insert"] = True
    close(model(inputs_embeds=embedded).logits, inside.logits)


@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_are_those_of_the_ordinary_tokens(method):
    out = converted(method)(tokens(2, 23), output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 23, 32)] * (LAYERS + 1)
    assert isinstance(converted(method)(tokens(1, 9), return_dict=False), tuple)


@pytest.mark.parametrize("method", METHODS)
def test_copies_are_independent(method):
    model, ids = converted(method), tokens(1, 20)
    twin = copy.deepcopy(model)
    want = model(ids).logits
    close(twin(ids).logits, want)
    torch.nn.init.zeros_(twin.lm_head.weight)
    close(model(ids).logits, want)


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("ring", {"layout": "spiral"}, ValueError, "layout is 'spiral'; expected one of zigzag"),
        ("ring", {"timeout": 0}, ValueError, "timeout is 0; expected seconds above 0 or None"),
        ("ring", {"layers": [0]}, NotImplementedError, "would see this rank's tokens alone"),
        ("sliding", {}, ValueError, "method is 'sliding'; expected one of infini, landmark"),
        ("infini", {"segments": 4}, TypeError, "infini has no option segments; expected some of"),
        ("infini", {"segment_len": 0}, ValueError, "segment_len is 0; expected an int >= 1"),
        ("infini", {"update": "add"}, ValueError, "update is 'add'; expected one of linear, delta"),
        ("infini", {"gate_init": None}, ValueError, "gate_init is None; expected a number"),
        ("infini", {"layers": [2]}, ValueError, "layers is .2.; expected some of 0 to 1"),
        ("infini", {"layers": "01"}, TypeError, "layers is '01'; expected a list of ints, some"),
        ("infini", {"layers": [True]}, TypeError, "layers is .True.; expected a list of ints"),
        ("infini", {"layers": []}, ValueError, "layers is ..; expected some of 0 to 1"),
        ("dilated", {"segment_lengths": [4]}, ValueError, "dilated needs dilation_rates"),
        ("dilated", {"segment_lengths": [4], "dilation_rates": [1, 2]}, ValueError, "1 entries"),
        ("landmark", {"layers": [0]}, NotImplementedError, "would leave layers .1. as they are"),
        ("landmark", {"offload": True}, ValueError, "offload without top_k.*try top_k=4"),
        ("landmark", {"landmark_id": 99}, ValueError, "landmark_id is 99; expected a token below"),
        ("landmark", {"select": "layer"}, ValueError, "expected one of token_and_head, "),
    ],
)  # fmt: skip
def test_wrong_options(method, options, error, message):
    with pytest.raises(error, match=message):
        hf.convert(base(), method, **options)


def test_wrong_models():
    with pytest.raises(TypeError, match=r"model is Linear; expected a transformers model"):
        hf.convert(torch.nn.Linear(2, 2), "infini")
    with pytest.raises(ValueError, match=r"converted already, to infini"):
        hf.convert(converted("infini"), "landmark")
    with pytest.raises(NotImplementedError, match=r"model is LlamaModel; expected one of LlamaFor"):
        hf.convert(base().model, "infini")
    with pytest.raises(TypeError, match=r"LlamaForCausalLM is not converted"):
        hf.make_cache(base())


CAPPED = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 30.0}


def capped(**options):
    return converted("infini", "gemma2", options={"segment_len": 8, "gate_init": 0.5} | options,
                     **CAPPED)  # fmt: skip


def test_capped_scores_of_infini_are_those_of_the_base():
    ids, dense = tokens(2, 24), base("gemma2", **CAPPED)
    dense.config._attn_implementation = "eager"  # whose softmax is in fp32
    ours = capped(segment_len=64)(ids).logits
    close(ours, dense(ids).logits, rtol=1e-5, atol=1e-5)
    uncapped = converted("infini", "gemma2", options={"segment_len": 64})(ids).logits
    assert not torch.allclose(ours, uncapped, atol=1e-2)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_wide_caps_of_infini_are_no_caps(update):
    ids, options = tokens(2, 29), {"segment_len": 8, "gate_init": 0.5, "update": update}
    wide = converted("infini", "gemma2", options=options, attn_logit_softcapping=1e9)
    none = converted("infini", "gemma2", options=options)
    results = []
    for model in (wide, none):
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    close(results[0][0], results[1][0], rtol=1e-6)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        close(a, b, rtol=1e-6, atol=1e-8)


def test_capped_scores_of_infini_in_training_and_generation():
    model, ids = capped(detach_every=1), tokens(2, 21)
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(model(out).logits[:, 20:-1].argmax(-1), out[:, 21:])
    model.train()
    model(ids, labels=ids).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    segmentwise_backward(model, {"input_ids": ids, "labels": ids})
    for p, grad in zip(model.parameters(), want, strict=True):
        close(p.grad, grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["landmark", "dilated"])
def test_capped_scores_are_refused(method):
    with pytest.raises(NotImplementedError, match=r"attn_logit_softcapping is 50.0; expected None"):
        converted(method, "gemma2", attn_logit_softcapping=50.0)


def test_forwards_that_were_replaced_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = base()
    accelerate.hooks.add_hook_to_module(
        model.model.layers[1].self_attn, accelerate.hooks.AlignDevicesHook("cpu")
    )
    with pytest.raises(NotImplementedError, match=r"has a forward of its own \(device_map"):
        hf.convert(model, "infini")


def test_loaded_with_a_device_map(tmp_path):
    model, ids = converted("infini", dtype=torch.float32), tokens(1, 20)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_windows_are_refused():
    with pytest.raises(NotImplementedError, match=r"layer 0 slides over 6 tokens.*segment_len = 8"):
        converted("infini", "mistral", sliding_window=6)
    with pytest.raises(NotImplementedError, match=r"layer 0 slides over 6 tokens"):
        converted("dilated", "mistral", sliding_window=6)
    with pytest.raises(NotImplementedError, match=r"would leave layers \[0\] as they are"):
        converted("landmark", "gemma3_text", sliding_window=6,
                  layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    assert converted("infini", "mistral", sliding_window=8).config.lctx["layers"] == [0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_forward_refuses(method):
    model, ids = converted(method), tokens(2, 12)
    dense = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises((ValueError, NotImplementedError), match=r"attention_mask has 4 dimensions"):
        model(ids, attention_mask=dense)
    hole = torch.ones_like(ids)
    hole[0, 4] = 0
    with pytest.raises(ValueError, match=r"pads between the tokens of a row"):
        model(ids, attention_mask=hole)
    packed = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with pytest.raises(NotImplementedError, match=r"packed|texts"):
        model(ids, position_ids=packed)
    pads = torch.ones_like(ids)
    pads[1, :9] = 0  # in this row the jump is among the pads, in the other one it is not
    with pytest.raises(NotImplementedError, match=r"position_ids jump inside a row"):
        model(ids, attention_mask=pads, position_ids=packed)
    model.config.attention_dropout = 0.1
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    model(ids)
    with pytest.raises(NotImplementedError, match=r"attention_dropout is 0.1 in training"):
        model.train()(ids)


@pytest.mark.parametrize("method", METHODS)
def test_attention_weights_are_refused(method):
    model, ids = converted(method), tokens(2, 12)
    with pytest.raises(NotImplementedError, match=r"output_attentions is True; expected False"):
        model(ids, output_attentions=True)


def test_a_registered_method_does_not_run_as_another_attention():
    model, ids = converted("dilated"), tokens(2, 12)
    want = model(ids).logits
    model.set_attn_implementation("sdpa")
    with pytest.raises(NotImplementedError, match=r"is 'sdpa'; expected 'lctx_dilated'"):
        model(ids)
    model.set_attn_implementation("lctx_dilated")
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("method", ["infini", "landmark"])
def test_what_a_cached_model_refuses(method):
    model, ids = converted(method), tokens(2, 12)
    with pytest.raises(TypeError, match=r"past_key_values is DynamicCache; expected the result of"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask has 11 columns; expected 12, 0 seen"):
        model(ids, attention_mask=torch.ones(2, 11))
    with pytest.raises(ValueError, match=r"exactly one of input_ids and inputs_embeds"):
        model.model(ids, inputs_embeds=torch.zeros(2, 12, 32))
    with pytest.raises(RuntimeError, match=r"called outside of its converted model"):
        model.model.layers[0].self_attn(torch.zeros(1, 3, 32).double())
    cache = model(ids, use_cache=True).past_key_values
    for call in (lambda: cache.crop(-1), cache.layers[0].offload, cache.layers[0].prefetch):
        with pytest.raises(NotImplementedError, match=r"State is not supported"):
            call()
    with pytest.raises(RuntimeError, match=r"an ordinary attention layer updates it"):
        base()(ids, past_key_values=hf.make_cache(model))
