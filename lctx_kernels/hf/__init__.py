"""Hugging Face models with the attention of this package; transformers is imported when needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context import SegmentMemory as SegmentMemory
    from .training import SegmentTrainer as SegmentTrainer

__all__ = [
    "SegmentMemory",
    "SegmentTrainer",
    "convert",
    "export_llama",
    "import_llama",
    "make_cache",
    "register",
    "shard_inputs",
]


def convert(model: Any, method: str, *, layers: Sequence[int] | None = None, **options: Any) -> Any:
    """Give a transformers model infini, landmark, dilated or ring attention, in place.

    The model keeps its weights, its class becomes one such as `InfiniLlamaForCausalLM`, which
    saves, loads (after `register()`), generates and trains like any other. Its attention layers are
    subclasses of transformers' own: no modeling code is copied. `use_cache=None` means False in a
    forward of infini and landmark models; `generate` makes their cache by itself.

    Args:
        model: LlamaForCausalLM, or that of Mistral, Qwen 2 and 3, Gemma 1, 2 and 3 (text).
        method: "infini", "landmark", "dilated" or "ring".
        layers: Layers to convert; None is all that do not slide over a window shorter than they
            need. Landmark and ring need all layers.
        options: For infini segment_len=2048, update="linear", first="bypass", detach_every=0,
            gate_init=-4.0 (as in `infini_attention` and `nn.MemoryGate`). For landmark
            block_size=64, landmark_id=None (a new token), insert=True (the model inserts the
            landmarks; False: the data has them), and for generation top_k=None (all blocks),
            select="token_and_head", offload=False, max_blocks=None, chunk_len=None (ordinary
            tokens that are fed at a time with top_k). For dilated segment_lengths, dilation_rates,
            head_offset="mod", mix_grad="exact". For ring layout="zigzag" (where no plan is given),
            deterministic=True, timeout=None, and group=None (ProcessGroup, 1-D DeviceMesh or the
            default group; not saved): every rank calls the model with `shard_inputs`.

    Returns:
        model.

    Raises:
        TypeError: An unknown option, or no transformers model.
        ValueError: A value or layers that do not fit, or a model that is converted already.
        NotImplementedError: A model or a feature of it that the method cannot serve: another
            family, soft-capped scores, windows.
        ImportError: transformers is missing.

    Source: the papers of the methods; this package.
    Equivalent to: the same model with lctx_kernels.infini_attention, landmark_attention,
    dilated_attention or ring_attention in place of its attention.

    >>> from transformers import LlamaConfig, LlamaForCausalLM  # doctest: +SKIP
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_attention_heads=4,
    ...     intermediate_size=128, num_hidden_layers=2))  # doctest: +SKIP
    >>> model = convert(model, "infini", segment_len=1024)  # doctest: +SKIP
    """
    from .conversion import convert as run

    return run(model, method, layers=layers, **options)


def make_cache(model: Any, **options: Any) -> Any:
    """Cache of a converted model, for `model.generate(..., past_key_values=...)` and for forwards.

    `generate` makes one by itself; make your own to go on after it, or for other options.

    Args:
        model: A converted model.
        options: For landmark top_k, select, offload, max_blocks, instead of those of `convert`.

    Returns:
        A transformers `Cache` whose infini layers have a constant size; of a ring model this rank's
        part of the keys and values, which `generate` and forwards fill on all ranks.

    Raises:
        TypeError: A model that is not converted, or an unknown option.
        ValueError: A value that does not fit.

    >>> make_cache(object())
    Traceback (most recent call last):
    TypeError: hf.make_cache: object is not converted; expected the result of hf.convert
    """
    spec = getattr(getattr(model, "config", None), "lctx", None)
    if spec is None:
        raise TypeError(
            f"hf.make_cache: {type(model).__name__} is not converted; expected the result of "
            "hf.convert"
        )
    from .cache import make_cache as run

    return run(model, **options)


def shard_inputs(model: Any, inputs: dict[str, Any], plan: Any = None) -> dict[str, Any]:
    """What this rank gives a ring model: its rows of a batch of whole texts.

    The losses of all ranks add up to that of the batch, and so do their gradients; where these are
    averaged (DDP, FSDP), multiply the loss by the number of ranks.

    Args:
        model: Of `convert(model, "ring")`, perhaps wrapped.
        inputs: input_ids (B, T), the same on every rank of the group; perhaps labels (B, T) as
            transformers takes them, and attention_mask with pads on the right.
        plan: `cp.Plan` of T tokens, perhaps with documents; None makes one of the model's layout.

    Returns:
        input_ids, ring_plan, and with labels: labels and shift_labels (B, L), shifted before they
        were cut, and num_items_in_batch, the labels that count on all ranks.

    Raises:
        TypeError: A model without a ring.
        ValueError: A plan of another length, no process group, or pads before tokens.

    Source: Liu et al. 2023 (arXiv 2310.01889).

    >>> shard_inputs(object(), {})
    Traceback (most recent call last):
    TypeError: hf.shard_inputs: object has no ring; expected the result of hf.convert(model, "ring")
    """
    modules = model.modules() if hasattr(model, "modules") else ()
    if not any(hasattr(module, "_lctx_ranks") for module in modules):
        raise TypeError(
            f"hf.shard_inputs: {type(model).__name__} has no ring; expected the result of "
            'hf.convert(model, "ring")'
        )
    from .ring import shard_inputs as run

    return run(model, inputs, plan)


def register() -> None:
    """Make converted models and `attn_implementation="lctx_dense"` known to transformers.

    `convert` does it too; call it before `AutoModelForCausalLM.from_pretrained` of a saved one, or
    of a causal model with exact attention by this package: padded rows, sliding windows, packed
    texts (position_ids that restart) and caches that grow are served.

    Raises:
        ImportError: transformers is missing.
    """
    from .models import register as run

    run()


def export_llama(model: Any) -> Any:
    """A transformers Llama with the weights and the attention of an `nn.Llama`.

    Args:
        model: `nn.Llama` whose layers are full, or one other method, in some or all of them.

    Returns:
        LlamaForCausalLM, or what `convert` makes of it: save_pretrained writes safetensors.

    Raises:
        NotImplementedError: Several methods, dropout, or positions and norms that Llama lacks.
        ImportError: transformers is missing.

    >>> from lctx_kernels import nn
    >>> model = nn.Llama(nn.LlamaConfig(97, 32, 2, 4, attention="infini"))
    >>> export_llama(model).save_pretrained("out")  # doctest: +SKIP
    """
    from .exchange import export_llama as run

    return run(model)


def import_llama(model: Any) -> Any:
    """An `nn.Llama` with the weights and the attention of a transformers Llama.

    Args:
        model: LlamaForCausalLM, as it is or converted to infini, landmark or dilated.

    Returns:
        `nn.Llama` that gives the same logits.

    Raises:
        NotImplementedError: Another family, biases, scaled rotary embeddings, or a head dimension
            of its own.
        ImportError: transformers is missing.

    >>> model = AutoModelForCausalLM.from_pretrained("llama-folder")  # doctest: +SKIP
    >>> small = import_llama(model)  # doctest: +SKIP
    """
    from .exchange import import_llama as run

    return run(model)


def __getattr__(name: str) -> Any:
    if name == "SegmentMemory":
        from .context import SegmentMemory

        return SegmentMemory
    if name == "SegmentTrainer":
        from .training import SegmentTrainer

        return SegmentTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
