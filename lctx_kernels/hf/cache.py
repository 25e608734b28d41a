"""transformers' cache of a converted model: states of this package behind its interface."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..cache import InfiniState, RingState, Rows
from ..cp.groups import Ranks
from ..cp.plan import Plan
from ..nn.attention import landmark_state
from ._compat import Cache, CacheLayerMixin, DynamicCache
from .options import CACHE_OPTIONS, complete


class ConvertedLayer(CacheLayerMixin):  # type: ignore[misc]
    """What one converted layer keeps; the layer itself calls `attend`, nothing calls `update`.

    Args:
        make: Makes an empty state (`lctx_kernels.cache`).
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.rows: Rows[Any] = Rows(make)
        self.columns = 0  # of the batch that were seen, pads included

    def attend(self, q: Tensor, k: Tensor, v: Tensor, columns: int, **options: Any) -> Tensor:
        """Output of the next tokens, which stand in `columns` columns of the caller's batch."""
        self.is_initialized = True
        self.columns += columns
        return self.rows.attend(q, k, v, **options)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: states make themselves."""

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a converted layer does not hand out keys and values."""
        raise RuntimeError(
            "this cache belongs to a converted model, but an ordinary attention layer updates it; "
            "make one with lctx_kernels.hf.make_cache(model) for that very model"
        )

    def get_seq_length(self) -> int:
        """Columns seen."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a cache that keeps everything: the unconverted layers of the model do."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases of transformers

    def reset(self) -> None:
        """Forget everything."""
        self.rows.reset()
        self.columns, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        if self.columns:
            self.rows.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, given by number or by mask."""
        indices = torch.as_tensor(indices)
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.reorder_cache(torch.arange(self.rows.batch or 0).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was folded into a memory or moved to a store cannot be taken back."""
        if tokens_to_remove != 0:
            self._refuse(f"crop({tokens_to_remove})", "assisted generation is not possible")

    def offload(self) -> None:
        """Refused."""
        self._refuse("offload", 'try hf.convert(model, "landmark", top_k=..., offload=True)')

    def prefetch(self) -> None:
        """Refused."""
        self._refuse("prefetch", 'try hf.convert(model, "landmark", top_k=..., offload=True)')

    def _refuse(self, what: str, instead: str) -> NoReturn:
        state = type(self.rows.states[0]).__name__
        raise NotImplementedError(f"hf.make_cache: {what} of a {state} is not supported; {instead}")


class RingLayer(ConvertedLayer):
    """This rank's part of a layer's keys and values."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(lambda: RingState(ranks.group))

    def read(self, plan: Plan, rank: int, k: Tensor, v: Tensor, window: int | None) -> None:
        """Keep this rank's rows of a prompt, of a layer with this window."""
        self.is_initialized = True
        self.columns += plan.seq_len
        self.rows.batch, state = k.shape[0], self.rows.states[0]
        state.window = window
        state.read(plan, rank, k, v)


class ConvertedCache(Cache):  # type: ignore[misc]
    """The cache of a converted model: one layer each, those of unconverted layers as usual."""

    def seen(self, layer: int, B: int) -> list[int]:
        """Tokens that each of B rows has seen at a converted layer."""
        converted: ConvertedLayer = self.layers[layer]
        return converted.rows.lengths(B)

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()
            if layer.get_seq_length():  # earlier releases of transformers only fill with zeros
                layer.keys, layer.values, layer.is_initialized = None, None, False


def state_maker(
    method: str, options: dict[str, Any], softcap: float | None = None
) -> Callable[[], Any]:
    """What makes an empty state of infini or landmark attention for their options."""
    if method == "infini":
        of_state = ("segment_len", "update", "first")
        return partial(InfiniState, **{n: options[n] for n in of_state}, softcap=softcap)
    names = ("block_size", "top_k", "select", "offload", "max_blocks")
    return partial(landmark_state, **{n: options[n] for n in names})


def ranks_of(model: Any) -> Ranks:
    """The ranks of a ring model."""
    ranks: Ranks = next(m._lctx_ranks for m in model.modules() if hasattr(m, "_lctx_ranks"))
    return ranks


def make_cache(model: Any, **options: Any) -> Any:
    """See lctx_kernels.hf.make_cache."""
    spec = getattr(model.config, "lctx", None)
    if spec is None:
        raise TypeError(
            f"hf.make_cache: {type(model).__name__} is not converted; expected the result of "
            "hf.convert"
        )
    method, known = spec["method"], CACHE_OPTIONS[spec["method"]]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"hf.make_cache: {method} has no option {', '.join(unknown)} for a cache; expected "
            f"{'some of ' + ', '.join(known) if known else 'none'}"
        )
    merged = complete(method, spec["options"] | options, "hf.make_cache")
    cache = DynamicCache(config=model.config)
    if method == "dilated":
        return cache
    layers = cache.layers
    if len(layers) != model.config.num_hidden_layers:
        raise RuntimeError(
            f"hf.make_cache: transformers made {len(layers)} cache layers for "
            f"{model.config.num_hidden_layers} layers of the model"
        )
    if method == "ring":
        ranks = ranks_of(model)
        return ConvertedCache(layers=[RingLayer(ranks) for _ in layers])
    gemma2 = model.config.model_type.endswith("gemma2")
    softcap = model.config.attn_logit_softcapping if gemma2 else None
    make = state_maker(method, merged, softcap)
    for layer in spec["layers"]:
        layers[layer] = ConvertedLayer(make)
    return ConvertedCache(layers=layers)
