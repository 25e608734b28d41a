"""The same measurement on several GPUs, each with texts of its own, under torchrun."""

import os
from typing import Any

import torch
import torch.distributed as dist


def start() -> int:
    """Join the other processes of torchrun, if any; the number of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank()


def end() -> None:
    """Leave them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """Processes, one a GPU."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(model: torch.nn.Module) -> None:
    """The mean over the ranks, once a step."""
    for parameter in model.parameters():
        if parameter.grad is not None and count() > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= count()


def together(found: dict[str, Any]) -> dict[str, Any]:
    """What all ranks found: rates added up, times and bytes of the slowest and largest."""
    if count() == 1:
        return found
    everything: list[Any] = [None] * count()
    dist.all_gather_object(everything, found)
    joined = dict(found, gpus=count())
    for name, value in found.items():
        values = [each[name] for each in everything]
        if name.endswith("tokens_per_second"):
            joined[name] = sum(values)
        elif name.startswith(("seconds", "peak_bytes")) and not isinstance(value, dict):
            joined[name] = max(values)
    return joined
