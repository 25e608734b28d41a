"""Calls of the decoding ops, and their definitions in fp64, for tests on the CPU and on a GPU."""

import functools
from dataclasses import dataclass, replace

import torch
from gpu_checks import LSE_TOLERANCE
from helpers import assert_close_to_reference, errors, random_memory, random_tensor, stat_dtype
from torch.nn import functional

from lctx_kernels import reference
from lctx_kernels.cache import decode

SELECT = ("token_and_head", "head", "token")


def rope_table(D, size, dtype, device="cpu"):
    """(2, size, D) cos and sin of Llama's embedding."""
    angle = torch.arange(size, dtype=torch.float64)[:, None]
    angle = angle * 100.0 ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    angle = torch.cat([angle, angle], dim=1)
    return torch.stack([angle.cos(), angle.sin()]).to(device, dtype)


@dataclass(frozen=True)
class LandmarkCase:
    """One call of landmark_decode."""

    B: int = 2
    T: int = 1
    Hq: int = 8
    Hkv: int = 2
    D: int = 64
    Dv: int | None = None
    L: int = 16
    count: int = 50
    top_k: int = 3
    always: int = 0
    open_len: int = 5
    select: str = "token_and_head"
    rope: bool = True
    scale: float | None = None

    @property
    def options(self):
        return {
            "open_len": self.open_len, "top_k": self.top_k, "always": self.always,
            "select": self.select, "scale": self.scale,
        }  # fmt: skip

    def tensors(self, dtype, device="cpu", seed=0):
        """Tensors by name; what the open block does not hold yet is NaN."""
        Dv, n = self.Dv or self.D, self.count + self.always
        shapes = {
            "q": (self.B, self.T, self.Hq, self.D), "k": (self.B, self.T, self.Hkv, self.D),
            "v": (self.B, self.T, self.Hkv, Dv),
            "blocks_k": (self.B, n, self.Hkv, self.L, self.D),
            "blocks_v": (self.B, n, self.Hkv, self.L, Dv),
            "open_k": (self.B, self.Hkv, self.L, self.D),
            "open_v": (self.B, self.Hkv, self.L, Dv),
        }  # fmt: skip
        made = {
            name: random_tensor(*shape, dtype=dtype, seed=10 * seed + i).to(device)
            for i, (name, shape) in enumerate(shapes.items())
        }
        for name in ("open_k", "open_v"):
            made[name][:, :, self.open_len :] = torch.nan
        size = (self.top_k + self.always + 2) * self.L
        made["rope"] = rope_table(self.D, size, stat_dtype(dtype), device) if self.rope else None
        return made

    @property
    def keys(self):
        return (self.top_k + self.always + 1) * self.L

    def run(self, tensors):
        landmarks = tensors["blocks_k"][..., -1, :].to(tensors["q"].device).contiguous()
        return decode.landmark_decode(**tensors, landmarks=landmarks, **self.options)

    def exact(self, before, after):
        """The definition in fp64, whose new keys rotate to what `after` holds in its open block."""
        wide = {n: None if x is None else x.double() for n, x in before.items()}
        own = slice(self.open_len, self.open_len + self.T)
        if self.rope:
            cos, sin = wide["rope"][:, own]
            x, half = after["open_k"][:, :, own].double(), self.D // 2
            back = x * cos - torch.cat([-x[..., half:], x[..., :half]], -1) * sin
            wide["k"] = (back / (cos**2 + sin**2)).transpose(1, 2)
        return reference.landmark_decode(**wide, **self.options)

    def check_open(self, before, after):
        """The new keys, rotated and rounded once, and values stand in the open block."""
        own = slice(self.open_len, self.open_len + self.T)
        keys = before["k"].double()
        if self.rope:
            table = decode.RopeTable(before["rope"].double())
            places = torch.arange(own.start, own.stop, device=keys.device)[:, None]
            keys = table(keys, places)
        eps = torch.finfo(before["k"].dtype).eps
        stored = after["open_k"][:, :, own].transpose(1, 2).double()
        torch.testing.assert_close(stored, keys, rtol=eps, atol=eps)
        assert torch.equal(after["open_v"][:, :, own].transpose(1, 2), before["v"])
        for name in ("open_k", "open_v"):
            assert torch.equal(after[name][:, :, : own.start], before[name][:, :, : own.start])
            assert after[name][:, :, own.stop :].isnan().all()


LANDMARK_CASES = {
    "one token": LandmarkCase(),
    "no blocks yet": LandmarkCase(count=0, T=2, open_len=0),
    "fewer blocks than top_k": LandmarkCase(count=2, T=3),
    "as many": LandmarkCase(count=3),
    "one more": LandmarkCase(count=4, T=2),
    "blocks that are always read": LandmarkCase(always=2, T=4, open_len=0),
    "nothing but those": LandmarkCase(count=0, always=1, open_len=0),
    "closes the block": LandmarkCase(T=11),
    "sixteen tokens": LandmarkCase(T=16, open_len=0, Hq=6, Hkv=6),
    "seven heads a group": LandmarkCase(Hq=14, T=2),
    "many heads a group": LandmarkCase(Hq=71, Hkv=1, B=1),
    "short blocks": LandmarkCase(L=2, open_len=1, count=300, top_k=40),
    "blocks of 51": LandmarkCase(L=51, open_len=40, T=9),
    "long blocks": LandmarkCase(L=300, count=9, open_len=299, B=1),
    "head size 80": LandmarkCase(D=80, T=2),
    "head size 128": LandmarkCase(D=128, L=64, count=200, top_k=4, open_len=33),
    "head size 256": LandmarkCase(D=256, L=32, T=3, B=1),
    "no rotation": LandmarkCase(rope=False, scale=0.3),
    "many blocks": LandmarkCase(L=2, open_len=0, count=9000, top_k=5, Hq=4),
}


@dataclass(frozen=True)
class InfiniCase:
    """One call of infini_decode, at the end of a segment's first open_len tokens."""

    B: int = 2
    T: int = 1
    Hq: int = 8
    Hkv: int = 2
    D: int = 64
    Dv: int | None = None
    segment_len: int = 300
    open_len: int = 77
    memory: bool = True
    first: str = "gate"
    gate: bool = True
    scale: float | None = None

    def tensors(self, dtype, device="cpu", seed=0):
        """q, k, v, q_mem, k_mem of all tokens of the segment, M, z and gate."""
        Dv, n = self.Dv or self.D, self.open_len + self.T
        shapes = {
            "q": (self.Hq, self.D), "k": (self.Hkv, self.D), "v": (self.Hkv, Dv),
            "q_mem": (self.Hq, self.D), "k_mem": (self.Hkv, self.D),
        }  # fmt: skip
        made = {
            name: random_tensor(self.B, n, *shape, dtype=dtype, seed=10 * seed + i).to(device)
            for i, (name, shape) in enumerate(shapes.items())
        }
        made["mem"] = made["gate"] = None
        if self.memory:
            state = random_memory(self.B, self.Hkv, self.D, Dv, dtype, seed)
            made["mem"] = tuple(x.to(device) for x in state)
        if self.gate:
            gate = random_tensor(self.Hq, dtype=stat_dtype(dtype), seed=10 * seed + 7)
            made["gate"] = gate.to(device)
        return made

    def rooms(self, tensors):
        """The open segment before the call, NaN where it holds nothing yet."""
        rooms = []
        for name in ("k", "k_mem", "v"):
            x = tensors[name].transpose(1, 2)
            room = x.new_full((*x.shape[:2], self.segment_len, x.shape[3]), torch.nan)
            room[:, :, : self.open_len] = x[:, :, : self.open_len]
            rooms.append(room)
        return rooms

    def run(self, tensors, rooms):
        new = {n: tensors[n][:, self.open_len :] for n in ("q", "k", "v", "q_mem", "k_mem")}
        return decode.infini_decode(
            new["q"], new["k"], new["v"], *rooms, open_len=self.open_len, q_mem=new["q_mem"],
            k_mem=new["k_mem"], mem=tensors["mem"], gate=tensors["gate"], first=self.first,
            scale=self.scale,
        )  # fmt: skip

    def exact(self, tensors):
        wide = {n: x if x is None or n == "mem" else x.double() for n, x in tensors.items()}
        if self.memory:
            wide["mem"] = tuple(x.double() for x in tensors["mem"])
        options = {"segment_len": self.segment_len, "first": self.first, "scale": self.scale}
        out, _ = reference.infini_attention(**wide, **options)
        _, lse = reference.flash_attention(wide["q"], wide["k"], wide["v"], scale=self.scale)
        return out[:, self.open_len :], lse[:, :, self.open_len :]

    def check_open(self, tensors, rooms):
        for name, room in zip(("k", "k_mem", "v"), rooms, strict=True):
            end = self.open_len + self.T
            assert torch.equal(room[:, :, :end], tensors[name].transpose(1, 2))
            assert room[:, :, end:].isnan().all()


INFINI_CASES = {
    "one token": InfiniCase(),
    "first token": InfiniCase(open_len=0),
    "no memory, gate": InfiniCase(memory=False),
    "no memory, bypass": InfiniCase(memory=False, first="bypass"),
    "memory with bypass": InfiniCase(first="bypass"),
    "no gate": InfiniCase(gate=False, scale=0.2),
    "sixteen tokens": InfiniCase(T=16, Hq=6),
    "the last ones": InfiniCase(T=5, open_len=295),
    "seven heads a group": InfiniCase(Hq=14, T=3),
    "many heads a group": InfiniCase(Hq=71, Hkv=1, B=1),
    "head size 80": InfiniCase(D=80, T=2),
    "head size 128": InfiniCase(D=128, Hq=32, Hkv=8, B=1, segment_len=2048, open_len=1500),
    "head size 256": InfiniCase(D=256, T=2, B=1),
    "one head": InfiniCase(Hq=1, Hkv=1, B=1, segment_len=5000, open_len=4444),
}


def at(case, **changes):
    return replace(case, **changes)


@functools.cache
def dense_errors(D, keys, dtype, device):
    """Errors of PyTorch's own attention, dense, over so many keys."""
    q, k, v = (random_tensor(1, 4, n, D, dtype=dtype, seed=n).to(device) for n in (256, keys, keys))
    exact = functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return errors(functional.scaled_dot_product_attention(q, k, v), exact)


def check(case, out, lse, exact, keys):
    """Within the contract, measured by dense attention over as many keys."""
    measure = dense_errors(case.D, keys, out.dtype, out.device.type)
    assert out.is_contiguous()
    assert_close_to_reference("out", out, exact[0], measure)
    torch.testing.assert_close(lse.double(), exact[1], **LSE_TOLERANCE)
