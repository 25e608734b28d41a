"""A million tokens, and tensors of more than 2^31 elements, on a Hopper GPU.

Where the dense definition does not fit, results are known in closed form: keys of 0 give plain
means over the visible keys, and keys that are codes of their positions give single values.
"""

import pytest
import torch
from cuda_ops import Call, self_attention_errors
from gpu_checks import LSE_TOLERANCE
from helpers import RMS_FACTOR

from lctx_kernels._measure import relative_rms
from lctx_kernels._rowcheck import definition_rows, sample_rows

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
MILLION = 1 << 20
BLOCK, SEGMENT = 64, 2048
LENGTHS, RATES = [2048 << i for i in range(5)], [1 << i for i in range(5)]
OPTIONS = {
    "flash": {},
    "landmark": {"block_size": BLOCK},
    "dilated": {"segment_lengths": LENGTHS, "dilation_rates": RATES},
    "infini": {"segment_len": SEGMENT},
}
EVERY_OP = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture(autouse=True)
def whole_memory():
    torch.use_deterministic_algorithms(False)  # filling gigabytes costs more than the kernels
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def normal(*shape, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def call_of(name, q, k, v, **more):
    call = Call(name, {"q": q, "k": k, "v": v, **more}, OPTIONS[name])
    call.skip_if_not_built()
    return call


def by_segment(x, w):
    """Segments of w positions of (T, D), on an axis of their own."""
    return x.reshape(-1, w, x.shape[-1])


def mean_flash(v, h):
    count = torch.arange(1, len(v) + 1, device=v.device)
    return v.cumsum(0), count


def mean_landmark(v, h):
    """Own block's ordinary keys and the means of earlier blocks, all of equal weight."""
    position = torch.arange(len(v), device=v.device)
    blocks = by_segment(v, BLOCK).clone()
    blocks[:, -1] = 0  # values of landmarks are never read
    means = blocks.sum(1) / (BLOCK - 1)
    earlier = means.cumsum(0) - means
    count = position // BLOCK + (position % BLOCK + 1).clamp(max=BLOCK - 1)
    return (blocks.cumsum(1) + earlier[:, None]).flatten(0, 1), count


def mean_dilated(v, h):
    position = torch.arange(len(v), device=v.device)
    total, count = torch.zeros_like(v), torch.zeros_like(position)
    for w, r in zip(LENGTHS, RATES, strict=True):
        selected = position % w % r == h % r
        seen = by_segment(v * selected[:, None], w).cumsum(1).flatten(0, 1)
        number = by_segment(selected[:, None].long(), w).cumsum(1).flatten()
        total += seen * selected[:, None]
        count += number * selected
    return total, count


@EVERY_OP
def test_keys_of_zero_give_means(name):
    """lse is the logarithm of the number of visible keys: one missing tile of keys shows."""
    ramp = torch.arange(MILLION, device="cuda") / MILLION
    v = (ramp[:, None] + torch.linspace(0, 1, 64, device="cuda")).bfloat16()
    call = call_of(name, normal(1, MILLION, 2, 64, seed=1), torch.zeros_like(v)[None, :, None],
                   v[None, :, None])  # fmt: skip
    ours, v = call.ours(), v.double()
    for h in range(2):
        if name == "infini":
            segments = by_segment(v, SEGMENT)
            local = segments.cumsum(1) / torch.arange(1, SEGMENT + 1, device="cuda")[:, None]
            before = segments.sum(1).cumsum(0).roll(1, 0)
            before[0] = 0
            started = SEGMENT * torch.arange(len(segments), device="cuda").clamp(min=1)
            want = (local / 2 + (before / started[:, None])[:, None] / 2).flatten(0, 1)
        else:
            total, count = {"flash": mean_flash, "landmark": mean_landmark,
                            "dilated": mean_dilated}[name](v, h)  # fmt: skip
            want = total / count[:, None]
            lse = ours["lse"][0, h].double()
            torch.testing.assert_close(lse, count.double().log(), **LSE_TOLERANCE)
        torch.testing.assert_close(ours["out"][0, :, h].double(), want, rtol=1e-2, atol=1e-3)
    if name == "infini":
        torch.testing.assert_close(ours["M"][0, 0, 5].double(), v.sum(0), rtol=1e-3, atol=0)
        assert (ours["z"] == MILLION).all()


def up_to(limit, seed):
    """A random integer from 0 to limit, position by position."""
    generator = torch.Generator("cuda").manual_seed(seed)
    share = torch.rand(limit.shape, generator=generator, device="cuda", dtype=torch.float64)
    return (share * (limit + 1)).long()


def targets(name, h):
    """For every position one key that it sees."""
    i = torch.arange(MILLION, device="cuda")
    if name == "flash":
        return up_to(i, seed=h)
    if name == "infini":
        return i - i % SEGMENT + up_to(i % SEGMENT, seed=h)
    if name == "landmark":
        block = up_to(i // BLOCK, seed=h)
        last = torch.where(block == i // BLOCK, i % BLOCK, BLOCK - 1).clamp(max=BLOCK - 2)
        return block * BLOCK + up_to(last, seed=h + 10)
    target, best = torch.zeros_like(i), torch.full(i.shape, -1.0, device="cuda")
    for n, (w, r) in enumerate(zip(LENGTHS, RATES, strict=True)):
        inside, offset = i % w, h % r
        seen = inside - inside % r + offset  # the last selected key, where i is selected itself
        key = i - inside + offset + r * up_to((seen - offset) // r, seed=10 * h + n)
        wish = torch.rand(i.shape, device="cuda").masked_fill(inside % r != offset, -1)
        target = torch.where(wish > best, key, target)
        best = torch.maximum(wish, best)
    return target


@EVERY_OP
def test_every_position_finds_the_one_key_it_looks_for(name):
    """Keys are random signs, a query those of its target; landmarks have dimensions to themselves.

    Scores of the target stand above the best of 10^12 others by 18 or more.
    """
    D, sharpness, heads = 128, 16, 2
    codes = torch.where(normal(MILLION, D, seed=3) > 0, 1, -1).bfloat16()
    i = torch.arange(MILLION, device="cuda")
    if name == "landmark":
        is_landmark = i % BLOCK == BLOCK - 1
        codes[is_landmark, D // 2 :] = 0
        codes[~is_landmark, : D // 2] = 0
    v, queries, wanted = normal(MILLION, D, seed=4), [], []
    for h in range(heads):
        target = targets(name, h)
        code = codes[target]
        if name == "landmark":
            landmark = target // BLOCK * BLOCK + BLOCK - 1
            code = code + codes[landmark] * (landmark < i - i % BLOCK)[:, None]
        queries.append(sharpness * code)
        wanted.append(v[target])
    more = {"gate": torch.full((heads,), -30.0, device="cuda")} if name == "infini" else {}
    q = torch.stack(queries, 1)[None]
    ours = call_of(name, q, codes[None, :, None], v[None, :, None], **more).ours()
    for h in range(heads):
        worst = (ours["out"][0, :, h].float() - wanted[h].float()).abs().amax(1)
        wrong = (worst > 0.02).nonzero().flatten()
        assert len(wrong) == 0, f"head {h}: {len(wrong)} positions, first {wrong[:5].tolist()}"


def check_rows(name, q, k, v, rows, heads):
    """Sampled rows against the definition in fp64."""
    call = call_of(name, q, k, v)
    out = call.ours()["out"][:, rows][:, :, heads]
    want = definition_rows(name, q, k, v, rows, heads, **OPTIONS[name])
    allowed = RMS_FACTOR * self_attention_errors(1024, 2, 1, q.shape[-1], 1.0, q.dtype, None).rms
    assert relative_rms(out, want) <= allowed


@EVERY_OP
def test_rows_of_a_million_tokens(name):
    q, k, v = (normal(1, MILLION, n, 128, seed=s) for s, n in enumerate((2, 1, 1)))
    check_rows(name, q, k, v, sample_rows(MILLION), [0, 1])


@EVERY_OP
def test_more_than_two_to_the_31_elements(name):
    T, Hq, Hkv, D = 8200, 2056, 8, 128
    q, k, v = (normal(1, T, n, D, seed=s) for s, n in enumerate((Hq, Hkv, Hkv)))
    assert q.numel() > 2**31
    check_rows(name, q, k, v, sample_rows(T), [0, Hq // 2, Hq - 1])
