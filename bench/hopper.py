"""The goals of the Hopper forward, and time against length: groups for one H200 in bf16.

Dense attention and landmarks are held against cuDNN at the same shape. Dilated and infini
attention are held against a floor: attention inside segments of 2048 tokens by cuDNN over as many
tokens, for the same FLOPs (dilated), or as the local part alone (infini). A decoded token reads
all keys and values once: its floor is the rate of a copy from device to device.
"""

from collections.abc import Sequence

from .registry import Goal, Group, Pass, Shape

CUDNN = "sdpa-cudnn"
LOCAL = "local-sdpa-cudnn"
TOKENS = 32768  # B * T of the dense shapes; Hq * D is 2048
KIBI = 1024
DENSE_LENGTHS = tuple(n * KIBI for n in (4, 8, 16, 32, 64))
LANDMARK_LENGTHS = tuple(n * KIBI for n in (2, 4, 8, 16, 32))
DILATED_LENGTHS = tuple(n * KIBI for n in (32, 64, 128, 256, 512, 1024))
INFINI_LENGTHS = tuple(n * KIBI for n in (8, 32, 128, 512, 1024))
SCALING_LENGTHS = tuple(2048 << i for i in range(10))  # 2k to 1M
LANDMARK_GOALS = (
    (128, 64, 0.92, 1.05),
    (64, 64, 0.88, 1.0),
    (128, 51, 0.75, 0.95),
    (128, 256, 0.75, 0.95),
)
# Pass: the longest dense call (a forward at 512k takes two seconds), and the longest at all.
SCALING_LIMITS: dict[Pass, tuple[int, int]] = {
    "fwd": (256 * KIBI, 1024 * KIBI),
    "bwd": (64 * KIBI, 512 * KIBI),
}


def hopper() -> list[Group]:
    """Every goal of the forward."""
    return [
        *_dense(),
        *landmark("fwd", LANDMARK_GOALS),
        *dilated("fwd", 1.25, 1.0),
        *infini("fwd", 1.15, 1.0, INFINI_LENGTHS),
        *_carry(),
        *_decode(),
    ]


def hopper_scaling() -> list[Group]:
    """Time against length for the plot: 16 heads of 128, and of 64 for dilated attention."""
    dense = (CUDNN, "flash", "landmark", "dilated", "infini")
    groups = []
    for pass_, (longest_dense, longest) in SCALING_LIMITS.items():
        for T in (n for n in SCALING_LENGTHS if n <= longest):
            long = longest_dense < T
            groups += [
                Group(shape(T, 128, B=1), pass_, dense[3:] if long else dense),
                Group(shape(T, 64, B=1, Hq=16), pass_, (LOCAL if long else CUDNN, "dilated")),
            ]
    return groups


def hopper_rivals() -> list[Group]:
    """Dense attention, forward and backward, beside the FlashAttentions and cuDNN.

    FlashAttention-2 is the one of PyTorch; FlashAttention-4 compiles seconds for every mask.
    """
    masks = ((128, True), (128, False), (64, True), (64, False), (256, True))
    lengths: dict[Pass, tuple[int, ...]] = {"fwd": (2, 4, 16), "bwd": (4, 16)}
    return [
        Group(shape(T * KIBI, D, causal=causal), pass_, (CUDNN, "sdpa-flash", "fa4", "flash"))
        for pass_, thousands in lengths.items()
        for D, causal in masks
        for T in thousands
    ]


def shape(
    T: int, D: int, *, B: int | None = None, Hq: int | None = None, Hkv: int | None = None,
    Tq: int | None = None, causal: bool = True,
) -> Shape:  # fmt: skip
    Hq = 2048 // D if Hq is None else Hq
    B = max(TOKENS // T, 1) if B is None else B
    return Shape(T, B, Hq, Hq if Hkv is None else Hkv, D, "bf16", Tq, causal)


def _dense() -> list[Group]:
    """Speed against cuDNN: D, causal, lengths, goal, aim."""
    table = (
        (128, True, (2048,), 1.05, 1.2),
        (128, True, DENSE_LENGTHS, 1.05, 1.13),
        (128, False, DENSE_LENGTHS, 1.03, 1.13),
        (64, True, DENSE_LENGTHS, 1.03, None),
        (64, False, DENSE_LENGTHS, 1.05, None),
        (256, True, DENSE_LENGTHS, 1.10, 1.25),
    )
    groups = []
    for D, causal, lengths, speed, aim in table:
        label = f"flash, D {D}, {'causal' if causal else 'full'}"
        label += ", 2k" if lengths == (2048,) else ""
        goal = Goal("flash", CUDNN, speed, aim, label=label)
        groups += [
            Group(shape(T, D, causal=causal), "fwd", (CUDNN, "flash"), (goal,)) for T in lengths
        ]
    return groups


def landmark(pass_: Pass, table: Sequence[tuple[int, int, float, float]]) -> list[Group]:
    """Speed against dense cuDNN; table: D, block size, goal, aim."""
    groups = []
    for D, block_size, speed, aim in table:
        label = f"landmark, D {D}, block {block_size}"
        goal = Goal("landmark", CUDNN, speed, aim, label=label)
        options = (("block_size", block_size),)
        groups += [
            Group(shape(T, D), pass_, (CUDNN, "landmark"), (goal,), options)
            for T in LANDMARK_LENGTHS
        ]
    return groups


def dilated(pass_: Pass, cost: float, aim: float) -> list[Group]:
    """Time over that of the same FLOPs by cuDNN at length 2048."""
    goal = Goal(
        "dilated", LOCAL, 1 / cost, 1 / aim, measure="flops", as_cost=True, label="dilated, D 64"
    )
    return [
        Group(shape(T, 64, B=1, Hq=16), pass_, (LOCAL, "dilated"), (goal,)) for T in DILATED_LENGTHS
    ]


def infini(pass_: Pass, cost: float, aim: float, lengths: Sequence[int]) -> list[Group]:
    """Time over that of the local part alone by cuDNN, with grouped or with repeated heads."""
    groups = []
    for Hkv in (32, 8):
        rivals = (LOCAL,) if Hkv == 32 else (LOCAL, f"{LOCAL}-expanded")
        for update in ("linear", "delta"):
            label = f"infini, {update}, Hkv {Hkv}"
            goals = tuple(
                Goal("infini", rival, 1 / cost, 1 / aim, as_cost=True, label=label)
                for rival in rivals
            )
            options = (("segment_len", 2048), ("update", update))
            groups += [
                Group(shape(T, 128, B=1, Hq=32, Hkv=Hkv), pass_, (*rivals, "infini"), goals,
                      options)
                for T in lengths
            ]  # fmt: skip
    return groups


def _carry() -> list[Group]:
    """What carrying (out, lse) in fp32 through a step of a ring costs over the plain forward."""
    goal = Goal(
        "flash_carry", "flash", 1 / 1.05, 1 / 1.02, as_cost=True, label="fp32 carry of a ring step"
    )
    one = shape(8 * KIBI, 128, B=1, causal=False)
    return [Group(one, "fwd", ("flash", "flash_carry"), (goal,))]


def _decode() -> list[Group]:
    """Bytes of keys and values per second over those of a copy: B, T, goal, aim."""
    table = (
        (1, 64 * KIBI, 0.89, 1.0),
        (4, 64 * KIBI, 0.89, 1.0),
        (1, 512 * KIBI, 1.0, 1.08),
    )
    groups = []
    for Hq in (32, 8):
        for B, T, speed, aim in table:
            label = f"one token, Hq {Hq}, {B} x {T // KIBI}k keys"
            goal = Goal("flash", "copy", speed, aim, measure="bytes", label=label)
            one = shape(T, 128, B=B, Hq=Hq, Hkv=8, Tq=1)
            groups.append(Group(one, "fwd", ("copy", CUDNN, "flash"), (goal,)))
    return groups
