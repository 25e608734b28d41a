"""Options of the methods in a converted model: names, defaults, checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cache.landmark import SELECT
from ..cp.plan import LAYOUTS

Check = Callable[[Any], bool]


def _int(least: int, none: bool = False) -> tuple[Check, str]:
    def check(value: Any) -> bool:
        if value is None:
            return none
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return check, f"an int >= {least}" + (" or None" if none else "")


def _ints() -> tuple[Check, str]:
    check, _ = _int(1)
    return (
        lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(check, value)),
        "a list of ints >= 1",
    )


def _one_of(*choices: str) -> tuple[Check, str]:
    return lambda value: value in choices, f"one of {', '.join(choices)}"


_BOOL = (lambda value: isinstance(value, bool), "True or False")
_NUMBER = (
    lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "a number",
)
_SECONDS = (
    lambda value: value is None or (_NUMBER[0](value) and value > 0),
    "seconds above 0 or None",
)
REQUIRED = object()

OPTIONS: dict[str, dict[str, tuple[Any, tuple[Check, str]]]] = {
    "infini": {
        "segment_len": (2048, _int(1)),
        "update": ("linear", _one_of("linear", "delta")),
        "first": ("bypass", _one_of("gate", "bypass")),
        "detach_every": (0, _int(0)),
        "gate_init": (-4.0, _NUMBER),
    },
    "landmark": {
        "block_size": (64, _int(2)),
        "landmark_id": (None, _int(0, none=True)),
        "insert": (True, _BOOL),
        "top_k": (None, _int(1, none=True)),
        "select": ("token_and_head", _one_of(*SELECT)),
        "offload": (False, _BOOL),
        "max_blocks": (None, _int(1, none=True)),
        "chunk_len": (None, _int(1, none=True)),
    },
    "dilated": {
        "segment_lengths": (REQUIRED, _ints()),
        "dilation_rates": (REQUIRED, _ints()),
        "head_offset": ("mod", _one_of("mod", "block")),
        "mix_grad": ("exact", _one_of("exact", "detached")),
    },
    "ring": {
        "layout": ("zigzag", _one_of(*LAYOUTS)),
        "deterministic": (True, _BOOL),
        "timeout": (None, _SECONDS),
    },
}
"""Method -> option -> (default, (check, what is expected))."""

CACHE_OPTIONS = {
    "infini": (),
    "landmark": ("top_k", "select", "offload", "max_blocks"),
    "dilated": (),
    "ring": (),
}
"""Options that `make_cache` may set differently for one generation."""


def complete(method: str, options: dict[str, Any], where: str = "hf.convert") -> dict[str, Any]:
    """`options` with defaults filled in.

    Raises:
        ValueError: An unknown method, a missing option, or a value that does not fit.
        TypeError: An unknown option.
    """
    if method not in OPTIONS:
        raise ValueError(f"{where}: method is {method!r}; expected one of {', '.join(OPTIONS)}")
    known = OPTIONS[method]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"{where}: {method} has no option {', '.join(unknown)}; expected some of "
            f"{', '.join(known)}"
        )
    filled = {}
    for name, (default, (check, expected)) in known.items():
        value = options.get(name, default)
        if value is REQUIRED:
            raise ValueError(f"{where}: {method} needs {name}, {expected}")
        if not check(value):
            raise ValueError(f"{where}: {name} is {value!r}; expected {expected}")
        filled[name] = list(value) if isinstance(value, tuple) else value
    _check_together(method, filled, where)
    return filled


def _check_together(method: str, options: dict[str, Any], where: str) -> None:
    if method == "dilated":
        lengths, rates = options["segment_lengths"], options["dilation_rates"]
        if len(lengths) != len(rates):
            raise ValueError(
                f"{where}: segment_lengths has {len(lengths)} entries, dilation_rates has "
                f"{len(rates)}; expected one of each per branch"
            )
    if method == "landmark" and options["top_k"] is None:
        useless = [name for name in ("offload", "max_blocks") if options[name]]
        if useless:
            raise ValueError(
                f"{where}: {', '.join(useless)} without top_k; expected top_k, the number of "
                "blocks to retrieve; try top_k=4"
            )


def refuse_in_scores(where: str, dropout: float, softcap: float | None = None) -> None:
    """Refuse what no method does between scores and values, for a layer of class `where`.

    Raises:
        NotImplementedError: Dropout inside attention, soft-capped scores.
    """
    if dropout:
        raise NotImplementedError(
            f"{where}: attention_dropout is {dropout} in training; expected 0, dropout inside "
            "attention is not built; try from_pretrained(..., attention_dropout=0.0): layers read "
            "it when they are made"
        )
    if softcap is not None:
        raise NotImplementedError(f"{where}: softcap is {softcap}; expected None")


def refuse_other_attention(model: Any, name: str, kwargs: dict[str, Any]) -> None:
    """Refuse what would make a backbone whose attention is a registered function another model.

    Raises:
        NotImplementedError: Another attention function than `name`, or attention weights wanted.
    """
    where, given = type(model).__name__, model.config._attn_implementation
    if given != name:
        raise NotImplementedError(
            f"{where}: attn_implementation is {given!r}; expected {name!r}, which is what converts "
            f"the layers; try model.set_attn_implementation({name!r})"
        )
    refuse_weights(where, model.config, kwargs)


def refuse_weights(where: str, config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a forward that is to return attention weights.

    Raises:
        NotImplementedError: output_attentions, as an argument or in the configuration.
    """
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise NotImplementedError(
            f"{where}: output_attentions is True; expected False, the weights never exist"
        )
