"""Converted models on a GPU in bfloat16 against themselves in fp64; the base sets the bar."""

import copy
import functools

import pytest
import torch
from hf.tiny import FAMILIES, LAYERS, SHAPE, VOCAB, hf, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lctx_kernels as lk
from lctx_kernels import nn
from lctx_kernels.hf import attention
from lctx_kernels.hf.training import segmentwise_backward

pytestmark = pytest.mark.cuda
T = 200
METHODS = {
    "infini": {"segment_len": 64, "gate_init": 0.5},
    "delta": {"segment_len": 64, "gate_init": 0.5, "update": "delta", "first": "gate"},
    "landmark": {"block_size": 16},
    "dilated": {"segment_lengths": [64, 256], "dilation_rates": [1, 4]},
}
WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "initializer_range": 0.08}
MORE = {
    "gemma3_text": {"layer_types": ["full_attention"] * LAYERS, "query_pre_attn_scalar": 64},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 256, "num_key_value_heads": 1},
}  # fmt: skip
CASES = [("llama", method) for method in METHODS]
CASES += [(family, method) for family in ("qwen3", "gemma3_text", "gemma") for method in METHODS]


def base(family="llama"):
    torch.manual_seed(0)
    config = FAMILIES[family].config_class(**SHAPE | WIDE | MORE.get(family, {}))
    config._attn_implementation = "sdpa"
    return FAMILIES[family].load("ForCausalLM")(config).to(torch.bfloat16)


def converted(method, family="llama", **options):
    name = "infini" if method == "delta" else method
    return hf.convert(base(family), name, **METHODS[method] | options)


def exact(model):
    """The same weights in fp64 on the CPU."""
    return copy.deepcopy(model).cpu().double()


def step(model, ids, **options):
    """Logits and every gradient of one step."""
    model.zero_grad()
    out = model(ids.to(model.device), labels=ids.to(model.device), use_cache=False, **options)
    out.loss.backward()
    grads = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach().double().cpu(), grads


def relative(ours, want):
    return ((ours - want).square().mean() / want.square().mean().clamp(min=1e-30)).sqrt().item()


def bar(family):
    """Errors of transformers' own bf16 model with PyTorch's attention: logits, worst gradient."""
    ids, model = tokens(2, T), base(family)
    (logits, grads), (want, want_grads) = step(model.cuda(), ids), step(exact(model), ids)
    return relative(logits, want), max(relative(grads[n], want_grads[n]) for n in grads)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_logits_and_gradients(family, method, monkeypatch):
    """Gates, sums of which most cancels and the base has none: their bar is the definition's."""
    ids, model = tokens(2, T), converted(method, family)
    (logits, grads), (want, want_grads) = step(model.cuda(), ids), step(exact(model), ids)
    logits_bar, grads_bar = bar(family)
    assert relative(logits, want) <= 2 * logits_bar
    assert grads.keys() == want_grads.keys()
    by_definition = functools.partial(lk.infini_attention, backend="reference")
    monkeypatch.setattr(attention, "infini_attention", by_definition)
    _, defined = step(model, ids)
    gates = [name for name in grads if "memory_gate" in name]
    gates_bar = max((relative(defined[n], want_grads[n]) for n in gates), default=0)
    for name, grad in grads.items():
        limit = max(grads_bar, gates_bar) if name in gates else grads_bar
        assert relative(grad, want_grads[name]) <= 2 * limit, name


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gemma"])
def test_exact_attention(family):
    """No conversion: attn_implementation="lctx_dense", two packed texts in the second row."""
    hf.register()
    ids, model = tokens(2, T), base(family)
    positions = torch.stack([torch.arange(T), torch.arange(T) % 120])
    want, want_grads = step(exact(model), ids, position_ids=positions)
    theirs, their_grads = step(model.cuda(), ids, position_ids=positions.cuda())
    model.set_attn_implementation("lctx_dense")
    ours, grads = step(model, ids, position_ids=positions.cuda())
    assert relative(ours, want) <= 1.5 * relative(theirs, want)
    bar = max(relative(their_grads[name], want_grads[name]) for name in grads)
    for name, grad in grads.items():
        assert relative(grad, want_grads[name]) <= 1.5 * bar, name


@pytest.mark.parametrize("first", ["bypass", "gate"])
def test_closed_gates_are_the_base(first):
    ids, dense = tokens(2, T), base()
    model = hf.convert(base(), "infini", segment_len=256, first=first, gate_init=-80.0)
    (logits, _), (theirs, _) = step(model.cuda(), ids), step(dense.cuda(), ids)
    want, _ = step(exact(dense), ids)
    assert relative(logits, want) <= 1.5 * relative(theirs, want)


@pytest.mark.parametrize("method", METHODS)
def test_generation(method):
    """Logits through the cache, in pieces and padded, are those of the whole text."""
    model, ids, limit = converted(method).cuda().eval(), tokens(2, T).cuda(), 2 * bar("llama")[0]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = hf.make_cache(model)
        parts = [model(part, past_key_values=cache, use_cache=True).logits
                 for part in ids.split([100, 1, 1, 70, 28], dim=1)]  # fmt: skip
        assert relative(torch.cat(parts, 1).double(), whole.double()) <= limit
        pads = torch.zeros(2, 9, dtype=torch.int64, device="cuda")
        mask = torch.cat([pads, torch.ones_like(ids)], dim=1)
        padded = model(torch.cat([pads, ids], 1), attention_mask=mask, use_cache=False).logits
        assert relative(padded[:, 9:].double(), whole.double()) <= limit
    out = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert out.shape == (2, T + 30) and (out < VOCAB).all()
    chunked = model.generate(
        ids, max_new_tokens=5, do_sample=False, pad_token_id=0, prefill_chunk_size=50, num_beams=2
    )
    assert chunked.shape == (2, T + 5)


@pytest.mark.parametrize("offload", [False, True])
def test_retrieval(offload):
    """All blocks retrieved are all blocks read; few of them generate in little memory."""
    model, ids = converted("landmark").cuda().eval(), tokens(2, T).cuda()
    limit = 2 * bar("llama")[0]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        every = hf.make_cache(model, top_k=30, offload=offload)
        parts = [model(part, past_key_values=every, use_cache=True).logits
                 for part in ids.split(70, dim=1)]  # fmt: skip
    assert relative(torch.cat(parts, 1).double(), whole.double()) <= limit
    few = hf.make_cache(model, top_k=2, offload=offload, max_blocks=8)
    out = model.generate(
        ids, past_key_values=few, max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert out.shape == (2, T + 20)


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=2, learning_rate=3e-3,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=True,
        lr_scheduler_type="constant", seed=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(method, checkpointing, tmp_path):
    """fp32 weights under autocast learn; saved, they load and give the same logits."""
    model = converted(method).float()
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, T).tolist()]
    args = arguments(tmp_path, gradient_checkpointing=checkpointing)
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16, device_map="cuda"
    )
    assert {p.dtype for p in nn.gate_parameters(again)} <= {torch.float32}
    model, ids = model.to(torch.bfloat16), tokens(1, T).cuda()
    with torch.no_grad():
        assert relative(again.eval()(ids).logits.double(), model.eval()(ids).logits.double()) < 0.05


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_segmentwise_training(update, tmp_path):
    options = {"update": update, "detach_every": 1, "first": "gate"}
    model, ids = converted("infini", **options), tokens(2, T)
    want, bar_grads = step(exact(model), ids)[1], bar("llama")[1]
    model = model.cuda()
    segmentwise_backward(model.train(), {"input_ids": ids.cuda(), "labels": ids.cuda()})
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad.double().cpu(), want[name]) <= 2 * bar_grads, name
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    trainer = hf.SegmentTrainer(
        model=converted("infini").float(), args=arguments(tmp_path), train_dataset=rows,
        gate_lr=0.05,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_compile(method):
    torch._dynamo.reset()
    model, ids = converted(method).cuda(), tokens(2, T).cuda()
    logits, grads = step(model, ids)
    want, want_grads = step(exact(model), ids)
    compiled = torch.compile(model)
    model.zero_grad()
    out = compiled(ids, labels=ids, use_cache=False)
    out.loss.backward()
    assert relative(out.logits.double().cpu(), want) <= 1.5 * relative(logits, want)
    eager = max(relative(grads[name], want_grads[name]) for name in grads)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative(parameter.grad.double().cpu(), want_grads[name]) <= 1.5 * eager, name


@pytest.mark.parametrize("method", METHODS)
def test_lora(method, tmp_path):
    peft = pytest.importorskip("peft")
    extra = ["memory_gate"] if method in ("infini", "delta") else None
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=extra,
                             task_type="CAUSAL_LM")  # fmt: skip
    lora = peft.get_peft_model(converted(method).float(), config)
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, T).tolist()]
    trainer = Trainer(model=lora, args=arguments(tmp_path), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_ring_of_one_rank(tmp_path):
    """Through NCCL's group: the base model's loss and gradients."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        ids, model = tokens(2, T).cuda(), hf.convert(base(), "ring").cuda()
        want, (_, bar_grads) = step(exact(base()), ids.cpu())[1], bar("llama")
        model(**hf.shard_inputs(model, {"input_ids": ids, "labels": ids})).loss.backward()
        for name, parameter in model.named_parameters():
            assert relative(parameter.grad.double().cpu(), want[name]) <= 2 * bar_grads, name
    finally:
        torch.distributed.destroy_process_group()
