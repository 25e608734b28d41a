"""Training of converted models: Trainer, checkpointing, compile, LoRA, segment by segment."""

import pytest
import torch
from hf.tiny import METHODS, VOCAB, base, close, converted, hf, tokens
from transformers import Trainer, TrainingArguments

from lctx_kernels import nn
from lctx_kernels.hf.training import segmentwise_backward

INFINI = {"segment_len": 8, "gate_init": 0.3, "first": "gate"}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, ids, labels=None, **options):
    model.zero_grad()
    loss = model(ids, labels=ids if labels is None else labels, **options).loss
    loss.backward()
    return loss.detach(), gradients(model)


def arguments(folder, **options):
    defaults = {
        "max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 3e-3,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "lr_scheduler_type": "constant", "seed": 0,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **defaults | options)


def dataset(T=40):
    return [{"input_ids": row, "labels": row} for row in tokens(4, T).tolist()]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_stock_trainer(method, tmp_path):
    model = converted(method, dtype=torch.float32)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=dataset())
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision(method, tmp_path):
    model = converted(method, dtype=torch.float32)
    args = arguments(tmp_path, bf16=True, gradient_checkpointing=True)
    trainer = Trainer(model=model, args=args, train_dataset=dataset())
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = tokens(1, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        whole = model.eval()(ids, use_cache=False).logits
        cache = hf.make_cache(model)
        parts = [model(part, past_key_values=cache, use_cache=True).logits
                 for part in ids.split(7, dim=1)]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts, 1).float(), whole.float(), rtol=0.1, atol=0.1)


def test_gates_of_a_stock_trainer_in_a_group_of_their_own(tmp_path):
    model = converted("infini", dtype=torch.float32)
    before = torch.cat(nn.gate_parameters(model)).tolist()
    optimizer = torch.optim.AdamW(nn.parameter_groups(model, lr=0.0, gate_lr=1e-2))
    args = arguments(tmp_path, max_steps=3)
    Trainer(model=model, args=args, train_dataset=dataset(), optimizers=(optimizer, None)).train()
    after = torch.cat(nn.gate_parameters(model)).tolist()
    assert all(a != b for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(model.lm_head.weight, converted("infini", dtype=torch.float32)
                               .lm_head.weight)  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(method, reentrant):
    model, ids = converted(method).train(), tokens(2, 30)
    loss, want = backward(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, grads = backward(model, ids)
    close(again, loss, rtol=1e-6)
    assert grads.keys() == want.keys()
    for name in want:
        close(grads[name], want[name])


@pytest.mark.parametrize("method", METHODS)
def test_padding_does_not_change_gradients(method):
    model, ids = converted(method).train(), tokens(1, 21)
    loss, want = backward(model, ids, use_cache=False)
    for side in ("right", "left"):
        pads = torch.zeros(1, 6, dtype=torch.int64)
        order = (lambda a, b: [a, b]) if side == "right" else (lambda a, b: [b, a])
        padded = torch.cat(order(ids, pads), dim=1)
        labels = torch.cat(order(ids, pads - 100), dim=1)
        mask = torch.cat(order(torch.ones_like(ids), pads), dim=1)
        # the first token after pads on the left is no target of the text alone
        labels[0, 6 if side == "left" else 0] = -100
        again, grads = backward(model, padded, labels, attention_mask=mask, use_cache=False)
        close(again, loss, rtol=1e-5, atol=1e-6)
        for name in want:
            torch.testing.assert_close(grads[name], want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_compile(method):
    torch._dynamo.reset()
    model, ids = converted(method).train(), tokens(2, 24)
    loss, want = backward(model, ids, use_cache=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    again = compiled(ids, labels=ids, use_cache=False).loss
    again.backward()
    close(again.detach(), loss, rtol=1e-6)
    for name, grad in gradients(model).items():
        close(grad, want[name], rtol=1e-6, atol=1e-8)
    positions = torch.arange(24)[None]
    again = compiled(ids, labels=ids, position_ids=positions, use_cache=False).loss
    close(again.detach(), loss, rtol=1e-6)
    with pytest.raises(RuntimeError, match="position_ids jump inside a row"):
        compiled(ids, labels=ids, position_ids=positions % 9, use_cache=False)


@pytest.mark.parametrize("method", METHODS)
def test_lora(method, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = converted(method, dtype=torch.float32), tokens(2, 24)
    extra = {"infini": ["memory_gate"]}.get(method)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=extra,
                             task_type="CAUSAL_LM")  # fmt: skip
    want = model(ids).logits.detach()
    lora = peft.get_peft_model(model, config)
    close(lora(ids).logits, want, rtol=1e-5, atol=1e-5)
    args = arguments(tmp_path / "run", learning_rate=1e-2)
    trainer = Trainer(model=lora, args=args, train_dataset=dataset())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trained = lora.eval()(ids).logits.detach()
    assert not torch.allclose(trained, want, atol=1e-3)
    lora.save_pretrained(tmp_path / "adapter")
    fresh = converted(method, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    close(again(ids).logits, trained, rtol=1e-5, atol=1e-5)
    out = again.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 28)


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("T", [24, 29])
def test_segments_are_the_whole_text_with_the_gradient_cut(update, multiple, T):
    ids = tokens(2, T)
    labels = ids.clone()
    labels[1, 20:] = -100
    options = INFINI | {"update": update, "detach_every": multiple}
    model = converted("infini", options=options).train()
    loss, want = backward(model, ids, labels)
    model.zero_grad()
    inputs = {"input_ids": ids, "labels": labels}
    again = segmentwise_backward(model, inputs, segment_len=8 * multiple)
    close(again, loss.to(again.dtype), rtol=1e-6)
    for name, grad in gradients(model).items():
        close(grad, want[name], rtol=1e-6, atol=1e-8)


def test_segments_with_gradient_checkpointing():
    ids, model = tokens(2, 30), converted("infini", options=INFINI).train()
    inputs = {"input_ids": ids, "labels": ids}
    loss = segmentwise_backward(model, inputs)
    want = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    close(segmentwise_backward(model, inputs), loss)
    for name, grad in gradients(model).items():
        close(grad, want[name])


def test_the_loss_over_segments_is_that_of_generation():
    """Training segment by segment, training on whole texts and the cache see the same text."""
    model, ids = converted("infini", options=INFINI), tokens(1, 40)
    memory = hf.SegmentMemory()
    parts = []
    for part in ids.split(8, dim=1):
        parts.append(model(part, memory=memory).logits)
        memory.advance()
    close(torch.cat(parts, dim=1), model(ids).logits)


def test_segment_trainer(tmp_path):
    model = converted("infini", options=INFINI, dtype=torch.float32)
    args = arguments(tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=12)
    trainer = hf.SegmentTrainer(
        model=model, args=args, train_dataset=dataset(), eval_dataset=dataset(), gate_lr=0.05
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {3e-3, 0.05}
    evaluated = [x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x]
    ids = tokens(4, 40)
    close(evaluated[-1], model.eval()(ids, labels=ids).loss.item(), rtol=1e-4)


def test_segment_trainer_steps_are_those_of_the_stock_trainer(tmp_path):
    """With the gradient cut every segment, the two trainers take the same steps."""
    results = []
    for cls in (Trainer, hf.SegmentTrainer):
        model = converted("infini", options=INFINI | {"detach_every": 1}, dtype=torch.float64)
        args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2, weight_decay=0.0)
        trainer = cls(model=model, args=args, train_dataset=dataset())
        trainer.train()
        results.append((losses(trainer), model.state_dict()))
    close(torch.tensor(results[0][0]), torch.tensor(results[1][0]), rtol=1e-4)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-4, atol=1e-6)


def test_activations_of_one_segment_at_a_time():
    """Bytes saved for the backward do not grow with the number of segments."""

    def saved(T):
        model = converted("infini", options=INFINI).train()
        peak, held = 0, 0

        def pack(x):
            nonlocal peak, held
            held += x.numel()
            peak = max(peak, held)
            return x

        def done(loss):
            nonlocal held
            loss.backward()
            held = 0

        inputs = {"input_ids": tokens(1, T), "labels": tokens(1, T)}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            segmentwise_backward(model, inputs, backward=done)
        return peak

    assert saved(80) == saved(24)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (base, {}, TypeError, "LlamaForCausalLM is not an infini model"),
        (lambda: converted("dilated"), {}, TypeError, "not an infini model"),
        (lambda: converted("infini"), {"segment_len": 12}, ValueError, "multiple of the model's 8"),
        (lambda: converted("infini", layers=[1]), {}, NotImplementedError, "expected all layers"),
    ],
)  # fmt: skip
def test_what_segmentwise_training_refuses(make, options, error, message):
    ids = tokens(1, 20)
    with pytest.raises(error, match=message):
        segmentwise_backward(make(), {"input_ids": ids, "labels": ids}, **options)


def test_segmentwise_training_refuses_pads_before_tokens():
    ids, mask = tokens(1, 20), torch.ones(1, 20)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="expected pads on the right"):
        segmentwise_backward(
            converted("infini"), {"input_ids": ids, "labels": ids, "attention_mask": mask}
        )
    model = converted("infini")
    with pytest.raises(NotImplementedError, match="`memory` with a cache"):
        model(ids, memory=hf.SegmentMemory(), use_cache=True)


def test_landmark_trains_on_texts_of_any_length(tmp_path):
    model = converted("landmark", dtype=torch.float32)
    rows = [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in (7, 13, 20, 21)]
    model.config.lctx["options"]["insert"] = False
    from lctx_kernels.data.landmarks import LandmarkCollator

    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=rows,
        data_collator=LandmarkCollator(landmark_id=VOCAB, mem_freq=4),
    )  # fmt: skip
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
