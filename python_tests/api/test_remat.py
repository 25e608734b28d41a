"""What the policies of `remat` keep, by counting what the backward computes again."""

from collections import Counter

import pytest
import torch
from api.op_calls import rand
from torch.utils._python_dispatch import TorchDispatchMode

import lctx_kernels as lk
from lctx_kernels._remat import POLICIES
from lctx_kernels.nn import Llama, LlamaConfig


class Calls(TorchDispatchMode):
    """How often each op runs inside."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name().removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


class Products(torch.nn.Module):
    """Each kind of thing that a policy may keep: a linear layer, a batched product, attention."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8, bias=False)

    def forward(self, x):
        y = self.linear(x).sin()
        y = y + (torch.bmm(y, y.transpose(1, 2)).sigmoid() @ y).sin()
        heads = y.unflatten(-1, (1, 8))
        return lk.flash_attention(heads, heads, heads).flatten(2).sin()


FORWARDS = {"aten::mm": 1, "aten::bmm": 2, "lctx::flash_fwd": 1, "aten::sigmoid": 1}
BACKWARD_PRODUCTS = {"aten::mm": 2, "aten::bmm": 4}
KEPT = {
    "nothing_saveable": (),
    "everything_saveable": tuple(FORWARDS),
    "attention_saveable": ("lctx::flash_fwd",),
    "dots_saveable": ("aten::mm", "aten::bmm", "lctx::flash_fwd"),
    "dots_with_no_batch_dims_saveable": ("aten::mm", "lctx::flash_fwd"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_policy_keeps_is_not_computed_again(policy):
    torch.manual_seed(0)
    fn, x = Products(), rand(2, 4, 8).requires_grad_()
    inputs = (x, *fn.parameters())
    expected = torch.autograd.grad(fn(x).cos().sum(), inputs)
    y = lk.blockwise_feedforward(fn, x, 4, remat=policy)
    loss = y.cos().sum()
    with Calls() as calls:
        found = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    again = {op: calls.count[op] - BACKWARD_PRODUCTS.get(op, 0) for op in FORWARDS}
    assert again == {op: 0 if op in KEPT[policy] else n for op, n in FORWARDS.items()}


@pytest.mark.parametrize("policy", ["dots_saveable", "attention_saveable", "nothing_saveable"])
def test_policies_compile(policy):
    torch._dynamo.reset()
    torch.manual_seed(0)
    fn, x = Products(), rand(2, 8, 8).requires_grad_()
    compiled = torch.compile(
        lambda x: lk.blockwise_feedforward(fn, x, 8, remat=policy), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    (found,) = torch.autograd.grad(compiled(x).cos().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(fn(x).cos().sum(), x)[0])


@pytest.mark.parametrize("value, error", [(1, TypeError), (None, TypeError), ("dots", ValueError)])
def test_unknown_policies_are_refused(value, error):
    with pytest.raises(error, match=r"remat is .*; expected True, False or one of nothing"):
        lk.blockwise_feedforward(torch.sin, rand(4, 8), 2, remat=value)
    if value is not None:
        with pytest.raises(error, match=r"LlamaConfig: ffn_remat is .*; expected True, False or"):
            Llama(LlamaConfig(vocab_size=9, d_model=8, num_heads=1, ffn_remat=value))
    with pytest.raises(error, match=r"LlamaConfig: remat is .*; expected True, False or one of"):
        Llama(LlamaConfig(vocab_size=9, d_model=8, num_heads=1, remat=value))


def llama(**options):
    torch.manual_seed(0)
    return Llama(LlamaConfig(
        vocab_size=31, d_model=16, num_layers=2, num_heads=2, dropout=0.1,
        attention=["full", "landmark"], options={"landmark": {"block_size": 4}}, **options,
    ))  # fmt: skip


@pytest.mark.parametrize(
    "options, forwards",  # of attention in the backward
    [
        ({"remat": True}, 2),
        ({"remat": "attention_saveable"}, 0),
        ({"remat": "dots_saveable", "ffn_remat": True, "ffn_chunk": 5}, 0),
        ({"ffn_remat": "dots_saveable"}, 0),
    ],
)
def test_a_model_computes_again_what_its_options_say(options, forwards):
    ids = torch.randint(31, (2, 19), generator=torch.Generator().manual_seed(1))
    plain = llama(ffn_chunk=options.get("ffn_chunk", 0), ffn_remat=False)
    model = llama(**options)
    torch.manual_seed(5)
    expected = plain.loss(ids, ids)
    torch.manual_seed(5)
    loss = model.loss(ids, ids)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    with Calls() as calls:
        found = torch.autograd.grad(loss, list(model.parameters()))
    assert calls.count["lctx::flash_fwd"] + calls.count["lctx::landmark_fwd"] == forwards
    torch.testing.assert_close(
        found, torch.autograd.grad(expected, list(plain.parameters())), rtol=0, atol=0
    )


def test_states_are_written_once():
    ids = torch.randint(31, (1, 9), generator=torch.Generator().manual_seed(1))
    plain, model = llama().eval(), llama(remat=True).eval()
    for m in (plain, model):
        states = m.new_states()
        m(ids[:, :5], states).sum().backward()
        m.logits = m(ids[:, 5:], states, 5)
    torch.testing.assert_close(model.logits, plain.logits)
