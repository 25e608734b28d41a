"""The measurements with random weights by name, at full size and tiny."""

from collections.abc import Callable
from typing import Any

from . import generation, long_training, step_time

Log = Callable[[str], None]


def _gemma(device: str, log: Log, tiny: bool) -> Any:
    """Gemma-2B shape, 32,768 tokens, AdamW, no gradient checkpointing."""
    shape, T, N = ("tiny", 256, 64) if tiny else ("gemma-2b, heads of 128", 32768, 2048)
    return long_training.segmentwise(shape, T, N, "adamw", device, steps=3, log=log)


def _gemma_256(device: str, log: Log, tiny: bool) -> Any:
    """The same with Gemma's own 8 heads of 256."""
    shape, T, N = ("tiny", 256, 64) if tiny else ("gemma-2b", 32768, 2048)
    return long_training.segmentwise(shape, T, N, "adamw", device, steps=3, log=log)


def _llama(device: str, log: Log, tiny: bool) -> Any:
    """Llama-3-8B shape, Adafactor; as much of 1M tokens as 10 seconds hold."""
    shape, T, N = ("tiny", 512, 64) if tiny else ("llama-3-8b", 1 << 20, 2048)
    return long_training.segmentwise(shape, T, N, "adafactor", device, seconds=10.0, log=log)


def _llama_whole(device: str, log: Log, tiny: bool) -> Any:
    """Llama-3-8B shape, Adafactor, all of 1M tokens."""
    shape, T, N = ("tiny", 512, 64) if tiny else ("llama-3-8b", 1 << 20, 2048)
    return long_training.segmentwise(shape, T, N, "adafactor", device, log=log)


def _prompt(device: str, log: Log, tiny: bool) -> Any:
    """Landmark, Llama-7B shape, a prompt of 32k tokens, blocks in the CPU's memory."""
    shape, T = ("tiny", 3000) if tiny else ("llama-7b", 32768)
    return generation.landmark_long_prompt(shape, T, device, log, select="head")


def _histories(device: str, log: Log, tiny: bool) -> Any:
    """Landmark, 8k and 256k tokens of history, blocks in the CPU's memory."""
    lengths = (512, 4096) if tiny else (8192, 262144)
    shape = "tiny" if tiny else "llama-3.2-1b"
    return generation.landmark_histories(shape, lengths, device, log)


def _stream(device: str, log: Log, tiny: bool) -> Any:
    """Infini, 4k, 64k and 1M tokens of history."""
    lengths = (256, 1024) if tiny else (4096, 65536, 1 << 20)
    shape, N = ("tiny", 64) if tiny else ("llama-3.2-1b", 2048)
    return generation.infini_stream(shape, lengths, device, log, segment=N)


def _steps(device: str, log: Log, tiny: bool) -> Any:
    """Step time of converted models beside cuDNN's attention in the same models."""
    cases = [("tiny", 512, False, 2), ("tiny", 1024, True, 1)] if tiny else step_time.CASES
    return step_time.reach(device, log, cases)


def _steps_gemma(device: str, log: Log, tiny: bool) -> Any:
    """The same of Gemma, with heads of 256."""
    return step_time.reach(device, log, [("tiny", 256, False, 1)] if tiny else step_time.GEMMA)


MEASURED: dict[str, Callable[[str, Log, bool], Any]] = {
    "gemma-32k": _gemma, "gemma-32k-heads-of-256": _gemma_256, "stream": _stream,
    "histories": _histories, "prompt-32k": _prompt, "steps": _steps,
    "steps-gemma": _steps_gemma, "llama-1m": _llama, "llama-1m-whole": _llama_whole,
}  # fmt: skip
