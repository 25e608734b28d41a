"""What ranks do in test_distributed.py: converted models sharded by FSDP2, against one process."""

import torch
from hf.tiny import close, converted, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lctx_kernels import nn
from lctx_kernels.hf.training import segmentwise_backward


def sharded(model, **options):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    gates = [module for module in model.modules() if isinstance(module, nn.MemoryGate)]
    for module in (*gates, *model.model.layers):  # gates are fp32: a group has one dtype
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def gradients(rank, n, method):
    """Losses and gradients of every rank's rows are those of all rows in one process."""
    alone, model = converted(method).train(), sharded(converted(method).train())
    ids = tokens(2 * n, 40)
    alone(ids, labels=ids).loss.backward()
    mine = ids[2 * rank : 2 * rank + 2]
    model(mine, labels=mine).loss.backward()
    for (name, ours), want in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert want.grad is not None, name
        close(ours.grad.full_tensor(), want.grad, rtol=1e-6, atol=1e-7)  # losses are in fp32


def mixed_precision(rank, n, method):
    """Weights in fp32, computed with in bf16: a step, and segment by segment for infini."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(converted(method, dtype=torch.float32).train(), mp_policy=policy)
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False), tokens(2, 40)
    losses = []
    for _ in range(8):
        if method == "infini":
            loss = segmentwise_backward(model, {"input_ids": ids, "labels": ids})
        else:
            loss = model(ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
