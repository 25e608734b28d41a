"""The cases that every implementation of an attention is checked on."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from helpers import random_qkv


@dataclass(frozen=True)
class Case:
    """Shape, memory layout, magnitude of q, and options of one call."""

    T: int = 37
    Tk: int | None = None
    B: int = 2
    Hq: int = 4
    Hkv: int | None = None
    Dk: int = 16
    Dv: int | None = None
    layout: str = "contiguous"
    magnitude: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_keys(self):
        return self.T if self.Tk is None else self.Tk

    def qkv(self, dtype, device="cpu", seed=0):
        tensors = random_qkv(self.B, self.T, self.Hq, self.Dk, Tk=self.Tk, Hkv=self.Hkv,
                             Dv=self.Dv, dtype=dtype, seed=seed)  # fmt: skip
        tensors[0] *= self.magnitude
        laid_out = (LAYOUTS[self.layout](x.to(device)) for x in tensors)
        return dict(zip("qkv", laid_out, strict=True))


def transposed(x):
    """(B, H, T, D) in memory, as model code has it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def packed(x):
    """Heads of a wider row, with NaN before, between and after."""
    B, T, H, D = x.shape
    buffer = x.new_full((B, T + 2, 2 * H + 3, D + 5), math.nan)
    view = buffer[:, 1 : T + 1, 2 : 2 * H + 2 : 2, 3 : D + 3]
    return view.copy_(x)


def packed_by_16_bytes(x):
    """As packed, with every row on 16 bytes: what the GPU's tensor maps can address."""
    B, T, H, D = x.shape
    buffer = x.new_full((B, T + 2, 2 * H + 3, D + 16), math.nan)
    view = buffer[:, 1 : T + 1, 2 : 2 * H + 2 : 2, 8 : D + 8]
    return view.copy_(x)


def every_other_token(x):
    buffer = x.new_full((x.shape[0], 2 * x.shape[1] + 1, *x.shape[2:]), math.nan)
    return buffer[:, 1::2].copy_(x)


def one_batch_for_all(x):
    """Batch stride 0."""
    return x[:1].expand(x.shape)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": transposed,
    "packed": packed,
    "packed by 16 bytes": packed_by_16_bytes,
    "every other token": every_other_token,
    "one batch for all": one_batch_for_all,
}


def label(case):
    """Readable test id: what differs from the default case."""
    default, parts = Case(), []
    for name, value in vars(case).items():
        if name != "options" and value != getattr(default, name):
            parts.append(f"{name}={value}")
    for name, value in case.options.items():
        text = str(value).replace(" ", "")
        parts.append(f"{name}={text if len(text) < 40 else '...'}")
    return " ".join(parts).replace("layout=", "") or "default"


GQA = [Case(T=33, Hq=8, Hkv=8), Case(T=33, Hq=8, Hkv=2), Case(T=33, Hq=8, Hkv=1)]
HEAD_DIMS = [Case(T=37, B=1, Hq=2, Dk=D) for D in (1, 8, 33, 40, 64, 80, 128, 256)]
VALUE_DIMS = [Case(Dk=24, Dv=40), Case(Dk=40, Dv=7), Case(Dk=192, Dv=128, Hq=2)]
# Scores up to some hundreds: one key takes all, and the running maximum moves often.
SHARP = [Case(T=150, Hkv=2, magnitude=m) for m in (30.0, 300.0)]
LAYOUT_CASES = [Case(Hkv=2, layout=name) for name in LAYOUTS if name != "contiguous"]
LENGTHS = [Case(T=T) for T in (0, 1, 63, 129)] + [Case(T=1000, B=1, Hq=2, Hkv=1, Dk=64)]
NO_BATCH = [Case(B=0)]
UNEQUAL = [
    Case(T=17, Tk=130, Hkv=2),
    Case(T=1, Tk=257, Hkv=1, Dk=64),
    Case(T=130, Tk=17, Hkv=2),
    Case(T=5, Tk=0),
    Case(T=0, Tk=5),
]
COMMON = [*LENGTHS, *NO_BATCH, *GQA, *HEAD_DIMS, *VALUE_DIMS, *SHARP, *LAYOUT_CASES]


def with_options(cases, **options):
    return [replace(c, options={**c.options, **options}) for c in cases]


FLASH_CASES = [
    *COMMON,
    *UNEQUAL,
    *with_options([Case(T=1), Case(T=129, Hkv=2), *UNEQUAL], causal=False),
    *with_options([Case(T=70)], scale=0.9),
    *with_options([Case(T=70)], scale=0.0),
    *with_options([Case(T=70)], scale=-0.2),
    *(Case(T=150, Hkv=2, options={"window": w}) for w in (1, 7, 64, 149, 1000)),
    *(Case(T=20, Tk=150, options={"window": w}) for w in (1, 7, 64)),
    *(Case(T=60, Tk=30, options={"window": w, "causal": c}) for w in (1, 9) for c in (True, False)),
    *(Case(T=150, options={"window": w, "causal": False}) for w in (1, 7, 64)),
    *(
        Case(T=150, B=1, Hkv=2, options={"cu_seqlens": starts, "causal": causal})
        for starts in ([0, 150], [0, 0, 1, 64, 64, 64, 129, 150, 150], list(range(151)))
        for causal in (True, False)
    ),
    Case(T=150, B=1, options={"cu_seqlens": [0, 40, 150], "window": 9}),
    Case(T=0, B=1, options={"cu_seqlens": [0, 0]}),
]


LANDMARK_CASES = [
    *with_options([*COMMON, *UNEQUAL], block_size=16),
    *(Case(T=150, Hkv=2, options={"block_size": L}) for L in (2, 3, 51, 64, 128, 149, 150, 151)),
    *(Case(T=20, Tk=150, options={"block_size": L}) for L in (7, 64)),
    *(Case(T=150, Hkv=2, options={"density": p}) for p in (0.0, 0.02, 0.2, 0.7, 1.0)),
    *(Case(T=9, Tk=70, options={"density": p}) for p in (0.1, 0.5)),
    Case(T=90, Tk=30, options={"density": 0.2}),
    Case(T=70, options={"block_size": 8, "scale": 0.9}),
]


LONGNET = ([16, 32, 64], [1, 2, 4])
DILATED_CASES = [
    *with_options(COMMON, branches=LONGNET),
    *(
        Case(T=150, Hq=6, Hkv=2, options={"branches": b, "mix_grad": mix, "head_offset": offset})
        for b in (([10, 70, 300], [1, 3, 5]), ([33], [4]), ([8, 8], [2, 3]), ([5, 40], [9, 7]))
        for mix in ("exact", "detached")
        for offset in ("mod", "block")
    ),
    *(
        Case(T=100, Hkv=2, options={"branches": LONGNET, "causal": c, "seqlens": lengths})
        for c in (True, False)
        for lengths in ([100, 31], [0, 64])
    ),
    Case(T=100, options={"branches": LONGNET, "causal": False, "mix_grad": "detached"}),
    Case(T=100, options={"branches": ([1], [1])}),
    Case(T=70, options={"branches": LONGNET, "scale": 0.9}),
]


ALL_GIVEN = ("gate", "q_mem", "k_mem", "mem")
INFINI_CASES = [
    *with_options(COMMON, segment_len=16),
    *(
        Case(T=70, Hkv=2, Dk=24, Dv=20, options={"segment_len": n, "update": u, "given": ALL_GIVEN})
        for n in (1, 7, 32, 64, 70, 100)
        for u in ("linear", "delta")
    ),
    *(
        Case(T=50, Hkv=2, options={"segment_len": 16, "update": u, "first": f, "given": given})
        for u in ("linear", "delta")
        for f in ("gate", "bypass")
        for given in ((), ("gate",), ("mem",), ("q_mem",), ("k_mem", "mem"), ALL_GIVEN)
    ),
    *(
        Case(T=70, Hkv=2, options={"segment_len": 10, "update": u, "detach_every": n,
                                   "given": ALL_GIVEN})
        for u in ("linear", "delta")
        for n in (1, 2, 3, 7, 9)
    ),
    Case(T=0, options={"given": ALL_GIVEN}),
    Case(T=600, B=1, Hq=2, Hkv=1, Dk=64, options={"segment_len": 128, "update": "delta"}),
    Case(T=70, Hkv=1, options={"segment_len": 16, "scale": 0.9}),
]  # fmt: skip


MERGE_CASES = [*LENGTHS, *NO_BATCH, *HEAD_DIMS, *LAYOUT_CASES]


def contiguous(T, world_size):
    return [
        list(range(T))[r * T // world_size : (r + 1) * T // world_size] for r in range(world_size)
    ]


def zigzag(T, world_size):
    chunks = contiguous(T, 2 * world_size)
    return [chunks[r] + chunks[-1 - r] for r in range(world_size)]


def striped(T, world_size):
    return [list(range(r, T, world_size)) for r in range(world_size)]


RING_CASES = [
    *(
        Case(T=19, Dv=5, Hkv=2, options={"positions": layout(19, world_size), **options})
        for layout in (contiguous, zigzag, striped)
        for world_size in (1, 2, 3, 8)
        for options in ({}, {"causal": False}, {"window": 5}, {"scale": 0.1})
    ),
    Case(T=3, options={"positions": contiguous(3, 5)}),
    Case(T=10, Hkv=1, options={"positions": [[], [7], [0, 1, 2, 3, 4, 5], [], [9, 6, 8]]}),
]
