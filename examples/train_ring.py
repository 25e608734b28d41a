"""Trains a small Llama-style model whose sequences are split over ranks by ring attention.

    torchrun --nproc-per-node 4 examples/train_ring.py --dp 2 --cp 2
    torchrun --nproc-per-node 4 examples/train_ring.py --cp 2 --tp 2
    torchrun --nproc-per-node 8 examples/train_ring.py --fsdp 2 --cp 2 --tp 2

Four dimensions of one device mesh: `dp` and `fsdp` ranks read different sequences, `cp` ranks hold
parts of the same ones, `tp` ranks hold different heads and columns (torch's own tensor
parallelism). FSDP2 shards the parameters over fsdp x cp and keeps a copy for each dp rank. Any
split of the ranks gives the same losses. It runs on CPUs with gloo and on GPUs with NCCL, and
learns its own source text.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional

from lctx_kernels import cp, ring_attention

VOCABULARY = 128  # ASCII


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding of x (B, L, H, D) by angles (L, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """Attention and feed-forward, each after a norm, as in Llama."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, key_heads * self.head_dim, bias=False)
        self.v = nn.Linear(width, key_heads * self.head_dim, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor, plan: cp.Plan, group: object) -> Tensor:
        """x (B, L, width): this rank's tokens; the heads that this rank has come from q, k, v."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))
        q, k = rotate(q, angles), rotate(k, angles)
        x = x + self.o(ring_attention(q, k, v, plan=plan, group=group).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Token embedding, blocks, norm and head."""

    def __init__(self, width: int = 64, heads: int = 4, key_heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads, key_heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, plan: cp.Plan, group: object) -> Tensor:
        """Logits of tokens (B, L) that stand at positions (L,) of the whole sequence."""
        half = self.head_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=tokens.device) / half)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, positions[:, None] * frequencies, plan, group)
        return self.head(self.norm(x))


def parallelize(model: Model, mesh: DeviceMesh) -> None:
    """Heads and columns over tp, parameters over fsdp x cp, copies of them over dp."""
    if mesh["tp"].size() > 1:
        columns = dict.fromkeys(("q", "k", "v", "gate", "up"), ColwiseParallel())
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], {**columns, "o": RowwiseParallel(),
                                                   "down": RowwiseParallel()})  # fmt: skip
    mesh["fsdp", "cp"]._flatten("fsdp_cp")
    data = mesh["dp", "fsdp_cp"]
    for module in (*model.blocks, model):
        fully_shard(module, mesh=data)


def batch_of(text: Tensor, step: int, batch: int, length: int) -> Tensor:
    """(batch, length) tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
    return text[starts + torch.arange(length)]


def train(options: argparse.Namespace) -> list[float]:
    """Losses of all steps, the same on every rank."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    readers = dist.get_world_size() // (options.cp * options.tp)  # of different sequences
    shape = (readers // options.fsdp, options.fsdp, options.cp, options.tp)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("dp", "fsdp", "cp", "tp"))
    reader = mesh["dp"].get_local_rank() * options.fsdp + mesh["fsdp"].get_local_rank()
    group, rank = mesh["cp"].get_group(), mesh["cp"].get_local_rank()
    text = torch.tensor(list(Path(__file__).read_bytes())).clamp(max=VOCABULARY - 1)
    plan = cp.make_plan(options.length, options.cp)
    positions = cp.shard_positions(plan, rank).to(device)

    torch.manual_seed(0)
    model = Model().to(device)
    parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    losses = []
    for step in range(options.steps):
        tokens = batch_of(text, step, options.batch, options.length)
        labels = cp.shift_labels(tokens)  # before sharding: a row's next token may be elsewhere
        count = (labels != -100).sum()
        mine = torch.arange(options.batch).chunk(readers)[reader]
        x, y = (cp.shard(plan, t[mine], 1, rank).to(device) for t in (tokens, labels))
        logits = model(x, positions, plan, group)
        loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / count
        (loss * readers * options.cp).backward()  # FSDP takes the mean over its ranks
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / options.tp  # tp ranks compute the same loss
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def main() -> None:
    """Read the command line, train, print the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dp", type=int, help="checked against the number of processes")
    parser.add_argument("--fsdp", type=int, default=1, help="ranks that share parameters")
    parser.add_argument("--cp", type=int, default=1, help="ranks that share a sequence")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share a layer's heads")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="sequences of all ranks")
    parser.add_argument("--length", type=int, default=130, help="tokens of a sequence")
    options = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    world_size = dist.get_world_size()
    given = options.fsdp * options.cp * options.tp
    if world_size % given or (options.dp is not None and options.dp * given != world_size):
        parser.error(f"dp x fsdp x cp x tp is not the number of processes, {world_size}")
    losses = train(options)
    if dist.get_rank() == 0:
        print(" ".join(f"{loss:.4f}" for loss in losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
