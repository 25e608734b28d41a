"""Training steps of small models on a GPU: in bf16, recorded as CUDA graphs.

A step of 30 million parameters is a thousand small kernels; launching them takes longer than they.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lctx_kernels.hf.context import Context
from lctx_kernels.nn import gate_parameters

from .rows import Batch


class Flat(nn.Module):
    """A compiled layer that sees (tokens, D) whatever the rows are: compiled once."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        layer.compile(dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) to the same shape."""
        return self.layer(x.flatten(0, -2)).view_as(x)


class HalfCopy:
    """The model that is trained, in fp32, and one in bf16 that computes."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model)  # buffers, such as frequencies, stay in fp32
        kept = {id(gate) for gate in gate_parameters(self.model)}
        for x in self.model.parameters():
            x.data = x.data if id(x) in kept else x.data.bfloat16()
        for layer in self.model.model.layers:
            for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
                setattr(layer, name, Flat(getattr(layer, name)))
        self.theirs, self.ours = list(model.parameters()), list(self.model.parameters())
        for x in self.theirs:
            x.grad = torch.zeros_like(x)

    def hand_over(self) -> None:
        """Gradients to the model that is trained."""
        torch._foreach_copy_([x.grad for x in self.theirs], [x.grad for x in self.ours])
        for x in self.ours:
            x.grad = None

    @torch.no_grad()
    def take_over(self) -> None:
        """Weights from it."""
        torch._foreach_copy_(self.ours, self.theirs)


def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of a Llama with all layers converted, by its layers, never waiting.

    Its own forward copies numbers to the GPU and asks there for packed rows; graphs allow neither.
    """
    inner, spec = model.model, model.config.lctx
    (B, T), tokens, keep = ids.shape, ids, None
    period = spec["options"].get("segment_len")
    if spec["method"] == "landmark":
        between = spec["options"]["block_size"] - 1
        column = torch.arange(T, device=ids.device)
        keep = column + column // between
        filler = torch.full(
            (B, T + T // between), spec["options"]["landmark_id"], device=ids.device
        )
        tokens = filler.index_copy(1, keep, ids)
    positions = torch.arange(tokens.shape[1], device=ids.device)[None]
    x = inner.embed_tokens(tokens)
    rotary = inner.rotary_emb(x, positions if period is None else positions % period)
    for layer in inner.layers:
        x = layer(x, position_embeddings=rotary, lctx=Context(T))
    x = x if keep is None else x.index_select(1, keep)
    return model.lm_head(inner.norm(x))


class Recorded:
    """Forward, losses and backward of batches of one shape, as one graph.

    `step(batch)` gives a scalar and what is to be returned; gradients go to `half.theirs`.
    """

    def __init__(self, half: HalfCopy, like: Batch, step: Any) -> None:
        self.batch = Batch(*(x.clone() for x in vars(like).values()))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(self.batch)[0].backward()
                half.hand_over()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            loss, self.found = step(self.batch)
            loss.backward()
            half.hand_over()

    def __call__(self, batch: Batch) -> Tensor:
        """What `step` returned for this batch; overwritten by the next one."""
        for ours, new in zip(vars(self.batch).values(), vars(batch).values(), strict=True):
            ours.copy_(new)
        self.graph.replay()
        return self.found
