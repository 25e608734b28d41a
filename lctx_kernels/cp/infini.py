"""Infini attention over ranks: the memory that a rank reads is a prefix over the ranks before it.

Linear rule: the memory is a sum over tokens, so a rank's part is its own sum and the prefix an
exclusive sum. Delta rule: a segment maps M to (I - G) M + W, so a rank's part is the affine map of
its segments, once z, which is a sum, is known. What travels is one (Dk, Dv) state per head and
rank, or one (Dk, Dk + Dv) map, whatever the length of the sequence.
Source: Munkhdalai et al. 2024 (arXiv 2404.07143), eq. 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._dtypes import dtype_name, stat_dtype, without_autocast
from .agree import begin
from .gather import exchange, gathered
from .groups import never_compiled
from .process_group import GroupTransport

State = tuple[Tensor, Tensor]
Local = Callable[[Tensor, State | None], tuple[Tensor, State]]


def _lengths(transport: GroupTransport, x: Tensor) -> list[int]:
    """Tokens of every rank."""
    own = torch.tensor([x.shape[1]], device=x.device)
    parts = exchange(transport, "forward lengths", [own] * transport.world_size)
    return [int(part.item()) for part in parts]


def _check(lengths: list[int], segment_len: int, detach_every: int) -> list[int]:
    """Segments of every rank."""
    last = max((r for r, L in enumerate(lengths) if L), default=0)
    if any(L % segment_len for L in lengths[:last]):
        raise ValueError(
            f"infini_attention: the ranks hold {lengths} tokens; expected whole segments of "
            f"segment_len = {segment_len} on all but the last rank with any"
        )
    segments = [-(-L // segment_len) for L in lengths]
    if detach_every and any(count % detach_every for count in segments):
        raise ValueError(
            f"infini_attention: detach_every = {detach_every} with {segments} segments on the "
            "ranks; expected a divisor of each"
        )
    return segments


def _affine(phi: Tensor, v: Tensor, z: Tensor, segment_len: int) -> Tensor:
    """(B, Hkv, Dk, Dk + Dv): the map M -> A M + W of the delta rule over these segments."""
    (B, L, H, Dk), Dv = phi.shape, v.shape[-1]
    A = torch.eye(Dk, dtype=phi.dtype, device=phi.device).expand(B, H, Dk, Dk)
    both = torch.cat([A, phi.new_zeros(B, H, Dk, Dv)], -1)
    for start in range(0, L, segment_len):
        f, value = (x[:, start : start + segment_len] for x in (phi, v))
        norm = torch.einsum("bnhd,bhd->bnh", f, z).clamp(min=1e-6)
        gain = torch.einsum("bnhd,bnhe->bhde", f, f / norm.unsqueeze(-1))
        written = torch.einsum("bnhd,bnhe->bhde", f, value)
        both = both - gain @ both + functional.pad(written, (Dk, 0))
        z = z + f.sum(1)
    return both


def _prefixes(
    transport: GroupTransport, phi: Tensor, v: Tensor, stats: Tensor, mem: State | None,
    segments: list[int], update: str, segment_len: int,
) -> tuple[State | None, State, Tensor]:  # fmt: skip
    """The memory that this rank reads, that after all ranks, and v to go on with."""
    rank, Dk = transport.rank, phi.shape[-1]
    (B, _, H, _), Dv = phi.shape, v.shape[-1]
    M0, z0 = mem or (phi.new_zeros(B, H, Dk, Dv), phi.new_zeros(B, H, Dk))
    sums = phi.sum(1).unsqueeze(-1)
    if update == "linear":
        sums = torch.cat([sums, torch.einsum("bnhd,bnhe->bhde", phi, stats)], -1)
    parts, v = gathered(transport, "memory", sums, v)
    before, total = parts[:rank].sum(0), parts.sum(0)
    z_in, z_out = z0 + before[..., 0], z0 + total[..., 0]
    empty = mem is None and not any(segments[:rank])
    if update == "linear":
        M_in, M_out = M0 + before[..., 1:], M0 + total[..., 1:]
    else:
        maps, v = gathered(transport, "maps", _affine(phi, stats, z_in, segment_len), v)
        states, held = [M0], mem is not None
        for r, both in enumerate(maps):
            moved = both[..., :Dk] @ states[-1] if held else 0  # of an empty memory nothing is read
            states.append(moved + both[..., Dk:])
            held = held or segments[r] > 0
        M_in, M_out = states[rank], states[-1]
    return (None if empty else (M_in, z_in)), (M_out, z_out), v


@never_compiled
def infini_over_ranks(
    local: Local, k: Tensor, v: Tensor, mem: State | None, *, segment_len: int, update: str,
    detach_every: int, options: dict[str, Any], group: Any,
) -> tuple[Tensor, State]:  # fmt: skip
    """out of this rank, and the memory after all ranks.

    local(v, mem): the rank's own attention. k: the keys that are written to the memory. options:
    what else all ranks must have in common.

    Raises:
        ValueError: Segments that straddle ranks; or the ranks were called with different arguments.
        RingError: A rank that is late, gone, or called with other arguments.
    """
    note = {
        "batch": k.shape[0], "key heads": k.shape[2], "head dims": [k.shape[3], v.shape[3]],
        "dtype": dtype_name(k.dtype), "segment_len": segment_len, "update": update,
        "detach_every": detach_every, "memory given": mem is not None,
        **options,
    }  # fmt: skip
    transport = begin(group, "infini_attention", k, note)
    segments = _check(_lengths(transport, k), segment_len, detach_every)
    stat = stat_dtype(k.dtype)
    gradients = torch.set_grad_enabled(torch.is_grad_enabled() and not detach_every)
    with gradients, without_autocast(k.device.type):
        phi = functional.elu(k.to(stat)) + 1
        state, after, kept = _prefixes(
            transport, phi, v, v.to(stat), mem, segments, update, segment_len
        )
    if detach_every:
        kept, first = v, not any(segments[: transport.rank])
        state = mem if first else state  # what is given is never cut
        after = after if any(segments) or mem is None else mem
    out, _ = local(kept, state)
    return out, after
