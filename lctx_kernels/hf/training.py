"""Training of infini models segment by segment: one backward per segment, memory of one segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.gate import parameter_groups
from ._compat import Trainer
from .context import SegmentMemory

IGNORE = -100


def segments(inputs: dict[str, Any], segment_len: int) -> Iterator[dict[str, Any]]:
    """The segments of a batch, with labels that were shifted before it was cut.

    Args:
        inputs: input_ids (B, T) and labels (B, T) as transformers takes them.
        segment_len: Tokens of a segment.

    Yields:
        input_ids and shift_labels of one segment: the last token of a segment
        predicts the first of the next.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], dim=1)
    for start in range(0, ids.shape[1], segment_len):
        cut = slice(start, start + segment_len)
        yield {"input_ids": ids[:, cut], "shift_labels": shifted[:, cut].contiguous()}


def segmentwise_backward(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    segment_len: int | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Loss of a batch of long texts, with its gradient added to the parameters segment by segment.

    The memory goes from segment to segment, its gradient does not: the result is that of one
    forward and backward over the whole text with `detach_every=1`, in the memory of one segment.

    Args:
        model: A model converted with hf.convert(model, "infini"), all layers, perhaps wrapped.
        inputs: input_ids (B, T), labels (B, T) as transformers takes them, perhaps attention_mask.
        segment_len: Tokens of a forward, a multiple of the model's; None is the model's.
        backward: Called with the loss of every segment; None is loss.backward().
        num_items: What sums of losses are divided by; None is the number of labels that count.

    Returns:
        The loss of the batch, without a gradient.

    Raises:
        TypeError: A model that is not an infini model.
        ValueError: Lengths that do not fit, or pads before tokens.

    Source: Munkhdalai et al. 2024 (arXiv 2404.07143), section 2.2; Type I of InfiniTransformer.
    """
    inner = model
    while not hasattr(inner, "config") and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module  # type: ignore[assignment]
    spec = getattr(getattr(inner, "config", None), "lctx", None)
    if spec is None or spec["method"] != "infini":
        raise TypeError(
            f"segmentwise_backward: {type(model).__name__} is not an infini model; expected the "
            'result of hf.convert(model, "infini")'
        )
    own = spec["options"]["segment_len"]
    step = own if segment_len is None else segment_len
    if step < 1 or step % own:
        raise ValueError(
            f"segmentwise_backward: segment_len is {step}; expected a multiple of the model's {own}"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and bool((mask.diff(dim=1) > 0).any()):
        raise ValueError(
            "segmentwise_backward: attention_mask has pads before tokens; expected pads on the "
            "right"
        )
    if num_items is None:
        num_items = (inputs["labels"][:, 1:] != IGNORE).sum()
    memory, total = SegmentMemory(), torch.zeros((), device=inputs["input_ids"].device)
    for part in segments(inputs, step):
        if bool((part["shift_labels"] == IGNORE).all()):
            with torch.no_grad():
                model(input_ids=part["input_ids"], memory=memory)
        else:
            loss = model(
                input_ids=part["input_ids"], shift_labels=part["shift_labels"],
                labels=part["shift_labels"], memory=memory, num_items_in_batch=num_items,
            ).loss  # fmt: skip
            if backward is None:
                loss.backward()
            else:
                backward(loss)
            total = total + loss.detach()
        memory.advance()
    return total


class SegmentTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer that trains an infini model segment by segment.

    Args:
        segment_len: Tokens of a forward, a multiple of the model's; None is the model's.
        gate_lr: Learning rate of the gates, which have no weight decay; None is that of the rest.
        args, kwargs: As transformers.Trainer. Every text of a batch may be as long as its labels;
            the loss of a text is the mean over all its segments. Under DDP the gradients of every
            segment are averaged on their own.
    """

    def __init__(
        self,
        *args: Any,
        segment_len: int | None = None,
        gate_lr: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.segment_len, self.gate_lr = segment_len, gate_lr

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimiser of the arguments, with the gates in a group of their own."""
        optimizer = getattr(self, "optimizer", None)
        if optimizer is None:
            optimizer = gated_optimizer(self.model, self.args, self.gate_lr)
            self.optimizer = optimizer
        return optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One backward per segment; the loss of the batch."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        if num_items_in_batch is None:
            scale = 1.0 / self.current_gradient_accumulation_steps
        else:
            shared = self.args.average_tokens_across_devices
            scale = float(self.accelerator.num_processes) if shared else 1.0

        def backward(loss: Tensor) -> None:
            self.accelerator.backward(loss * scale)

        with self.compute_loss_context_manager():
            loss = segmentwise_backward(
                model, inputs, segment_len=self.segment_len, backward=backward,
                num_items=num_items_in_batch,
            )  # fmt: skip
        result: Tensor = loss * scale
        return result

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss over all segments; logits of long texts are not kept."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = segmentwise_backward(
                model, inputs, segment_len=self.segment_len, backward=lambda loss: None
            )
        return loss, None, None


def gated_optimizer(model: nn.Module, args: Any, gate_lr: float | None) -> torch.optim.Optimizer:
    """The optimiser that TrainingArguments name, with the gates in a group of their own."""
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    lr = options.pop("lr")
    groups = parameter_groups(model, lr=lr, weight_decay=args.weight_decay, gate_lr=gate_lr)
    optimizer: torch.optim.Optimizer = cls(groups, lr=lr, **options)
    return optimizer
