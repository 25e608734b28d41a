"""What ranks of a ring do in test_ring.py: models over gloo against the base model alone."""

import copy

import torch
import torch.distributed as dist
from hf.tiny import FAMILIES, LAYERS, base, close, hf, tokens
from transformers import DynamicCache

from lctx_kernels import cp

WINDOWS = {
    "mistral": {"sliding_window": 6},
    "gemma3_text": {
        "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"][:LAYERS],
    },
}  # fmt: skip


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def over_ranks(model, inputs):
    loss, grads = loss_and_gradients(model, inputs)
    for x in (loss, *grads.values()):
        dist.all_reduce(x)
    return loss, grads


def same(ours, want, atol=1e-7):
    """transformers computes losses, cos and sin in fp32."""
    close(ours[0], want[0], rtol=1e-6, atol=1e-6)
    assert ours[1].keys() == want[1].keys()
    for name in want[1]:
        close(ours[1][name], want[1][name], rtol=1e-5, atol=atol)


def all_families(rank, n):
    for family in FAMILIES:
        base_losses_and_gradients(family)


def base_losses_and_gradients(family):
    """Any length, any layout, pads behind the text, checkpointing: the base model's numbers."""
    changes = WINDOWS.get(family, {})
    dense = base(family, **changes).train()
    for T, layout in ((37, "zigzag"), (24, "striped"), (24, "contiguous")):
        ids = tokens(2, T)
        mask = torch.ones_like(ids)
        mask[1, 20:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        want = loss_and_gradients(dense, {"input_ids": ids, "labels": labels, "use_cache": False})
        ring = hf.convert(base(family, **changes), "ring", layout=layout).train()
        inputs = hf.shard_inputs(ring, {"input_ids": ids, "labels": ids, "attention_mask": mask})
        assert inputs["input_ids"].shape[1] < T
        same(over_ranks(ring, inputs), want)
    ring.gradient_checkpointing_enable({"use_reentrant": False})
    same(over_ranks(ring, inputs), want)


def documents(rank, n):
    """Packed documents do not see each other."""
    parts = [tokens(1, length, seed=length) for length in (9, 17, 6)]
    dense, count = base().train(), sum(x.shape[1] - 1 for x in parts)
    total, grads = 0, None
    for part in parts:
        inputs = {"input_ids": part, "labels": part, "use_cache": False}
        loss, found = loss_and_gradients(dense, inputs | {"num_items_in_batch": count})
        total = total + loss
        found = {n: g.clone() for n, g in found.items()}
        grads = found if grads is None else {n: grads[n] + found[n] for n in found}
    ids = torch.cat(parts, dim=1)
    bounds = torch.tensor([0, 9, 26, 32], dtype=torch.int32)
    plan = cp.make_plan(32, n, cu_seqlens=bounds)
    ring = hf.convert(base(), "ring").train()
    inputs = hf.shard_inputs(ring, {"input_ids": ids, "labels": ids}, plan)
    same(over_ranks(ring, inputs), (total, grads), atol=1e-5)  # at other positions than alone


def groups_and_copies(rank, n):
    """Two rings of half of the ranks; a copy keeps the group; gathered logits are the base's."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    ring = hf.convert(base(), "ring", group=groups[rank // 2])
    ids = tokens(1, 21, seed=rank // 2)
    inputs = hf.shard_inputs(ring, {"input_ids": ids})
    plan = inputs["ring_plan"]
    with torch.no_grad():
        for model in (ring, copy.deepcopy(ring)):
            logits = cp.unshard(plan, model(**inputs).logits, 1, groups[rank // 2])
            close(logits, base()(ids).logits)


def drawn(model, ids, seed, **options):
    torch.manual_seed(seed)
    return model.generate(ids, max_new_tokens=9, do_sample=True, pad_token_id=0, **options)


def generation(rank, n):
    """Every rank generates what the base model does alone, from prompts of any length."""
    for family in FAMILIES:
        changes = WINDOWS.get(family, {})
        dense, ring = base(family, **changes), hf.convert(base(family, **changes), "ring")
        for T in (37, 1):
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
            ids = tokens(2, T)
            assert torch.equal(ring.generate(ids, **options), dense.generate(ids, **options))
    ids = tokens(2, 23)
    assert torch.equal(drawn(ring, ids, seed=3), drawn(dense, ids, seed=3))
    options |= {"num_beams": 3, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(ring.generate(ids, **options), dense.generate(ids, **options))
    cache = hf.make_cache(ring)
    with torch.no_grad():  # a prompt, more tokens at once, one token
        want = dense(torch.cat([ids, ids], 1)).logits
        found = [ring(part, past_key_values=cache).logits
                 for part in (ids, ids[:, :22], ids[:, 22:])]  # fmt: skip
    assert cache.get_seq_length() == 46
    close(torch.cat(found, 1), want[:, 22:])
    held = cache.layers[0].rows.states[0]
    assert held.k.value.shape[1] == held.lengths[rank] and sum(held.lengths) == 46
    cache.reset()
    with torch.no_grad():
        close(ring(ids, past_key_values=cache).logits, want[:, 22:23])


def refusals(rank, n):
    """What a ring refuses, before anything is sent."""
    ring, ids = hf.convert(base(), "ring"), tokens(1, 20)
    inputs = hf.shard_inputs(ring, {"input_ids": ids, "labels": ids})
    messages = []
    for call in (
        lambda: ring(inputs["input_ids"], labels=inputs["labels"]),
        lambda: ring(ids, use_cache=True, ring_plan=inputs["ring_plan"]),
        lambda: ring(ids, ring_plan=inputs["ring_plan"]),
        lambda: ring(**inputs, position_ids=torch.arange(10)[None]),
        lambda: ring(**inputs, attention_mask=torch.tensor([[0] + [1] * 9])),
        lambda: ring.generate(ids, max_new_tokens=3, use_cache=False),
        lambda: ring.generate(ids, max_new_tokens=3 + rank),
        lambda: ring.generate(ids + rank, max_new_tokens=3),
        lambda: drawn(ring, ids, seed=rank),
        lambda: ring(ids, past_key_values=DynamicCache()),
        lambda: ring(ids, use_cache=True, position_ids=torch.arange(1, 21)[None]),
        lambda: ring(ids[:, :0], use_cache=True),
    ):
        try:
            call()
        except (TypeError, ValueError, NotImplementedError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("no error")
    return messages
