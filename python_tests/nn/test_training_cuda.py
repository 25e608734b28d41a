"""Ten steps of training on the GPU follow those in fp32, as closely as plain PyTorch does."""

import functools

import pytest
import torch

from lctx_kernels import nn
from lctx_kernels.nn import attention, dilated

pytestmark = pytest.mark.cuda
VOCAB, STEPS = 256, 10
OPTIONS = {
    "linear": ("infini", {"segment_len": 128, "update": "linear"}),
    "delta": ("infini", {"segment_len": 128, "update": "delta"}),
    "landmark": ("landmark", {"block_size": 64}),
    "dilated": ("dilated", {"segment_lengths": [128, 512], "dilation_rates": [1, 4]}),
    "full": ("full", None),
}
FUNCTIONS = {
    attention: ("flash_attention", "infini_attention", "landmark_attention"),
    dilated: ("dilated_attention",),
}


def trace(method, options, heads, device, dtype):
    """Losses of the first steps of the same model on the same text."""
    torch.manual_seed(0)
    config = nn.LlamaConfig(
        VOCAB, 256, 2, heads, num_kv_heads=min(heads, 2), attention=method,
        options={} if options is None else {method: options},
    )  # fmt: skip
    model = nn.Llama(config).to(device)
    optimizer = torch.optim.AdamW(nn.parameter_groups(model, lr=5e-4, gate_lr=1e-2))
    generator = torch.Generator().manual_seed(1)
    # Texts that repeat phrases: there is something to learn, also from afar.
    ids = torch.randint(VOCAB, (4, 96), generator=generator).repeat(1, 6)[:, :520].to(device)
    losses = []
    for _ in range(STEPS):
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = model.loss(ids, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["D64", "D128", "D256"])
@pytest.mark.parametrize("name", OPTIONS)
def test_losses_of_training_are_those_of_fp32(name, heads, monkeypatch):
    method, options = OPTIONS[name]
    right = trace(method, options, heads, "cpu", None)
    ours = trace(method, options, heads, "cuda", torch.bfloat16)
    for module, names in FUNCTIONS.items():
        for function in names:
            plain = functools.partial(getattr(module, function), backend="reference")
            monkeypatch.setattr(module, function, plain)
    plain = trace(method, options, heads, "cuda", torch.bfloat16)
    assert right[-1] < right[0] - 1  # it learns
    error, allowed = (ours - right).abs().max(), (plain - right).abs().max()
    # The rest of the model is in bf16 in both: its rounding is most of either difference.
    assert error <= 1.5 * allowed + 5e-3, (ours, plain, right)
