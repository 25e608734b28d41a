"""Properties that hold whatever the implementation: limits, equalities, convexity."""

import itertools

import pytest
import torch
from helpers import assert_fp64_equal, random_memory, random_qkv, run
from torch.nn import functional

from lctx_kernels.reference import (
    dilated_attention,
    flash_attention,
    infini_attention,
    landmark_attention,
    merge_attention,
)

T, HEADS, GROUP = 24, 4, 2


@pytest.fixture
def qkv():
    return dict(zip("qkv", random_qkv(2, T, HEADS, 6, Hkv=HEADS // GROUP), strict=True))


def pair(function, **options):
    """function as name -> tensor for `run`."""
    return lambda **x: dict(zip(("out", "lse"), function(**x, **options), strict=True))


def assert_same(actual, expected):
    """Outputs and all gradients."""
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_fp64_equal(name, actual[name], expected[name])


def flash(**options):
    return pair(flash_attention, **options)


def test_flash_is_scaled_dot_product_attention(qkv):
    def sdpa(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return {"out": out.transpose(1, 2)}

    cotangents = {"out": torch.randn(2, T, HEADS, 6, dtype=torch.float64)}
    ours = run(flash(), qkv, cotangents)
    del ours["lse"]
    assert_same(ours, run(sdpa, qkv, cotangents))


def test_window_over_everything_is_no_window(qkv):
    assert_same(run(flash(window=T), qkv), run(flash(), qkv))


def test_window_of_one_copies_the_values(qkv):
    out, _ = flash_attention(**qkv, window=1)
    assert_fp64_equal("out", out, qkv["v"].repeat_interleave(GROUP, dim=2))


def test_documents_equal_separate_calls():
    q, k, v = random_qkv(1, T, HEADS, 6)
    starts = torch.tensor([0, 5, 5, 17, T], dtype=torch.int32)
    out, lse = flash_attention(q, k, v, cu_seqlens=starts)
    for a, b in itertools.pairwise(starts):
        piece_out, piece_lse = flash_attention(q[:, a:b], k[:, a:b], v[:, a:b])
        assert_fp64_equal("out", out[:, a:b], piece_out)
        assert_fp64_equal("lse", lse[:, :, a:b], piece_lse)


@pytest.mark.parametrize("cut", [0, 1, 10, T])
def test_merge_of_two_halves_is_the_whole(qkv, cut):
    def halves(q, k, v):
        left = flash_attention(q, k[:, :cut], v[:, :cut], causal=False)
        right = flash_attention(q, k[:, cut:], v[:, cut:], causal=False)
        return dict(zip(("out", "lse"), merge_attention(*left, *right), strict=True))

    assert_same(run(halves, qkv), run(flash(causal=False), qkv))


def infini(**options):
    def function(mem=None, **x):
        out, (M, z) = infini_attention(x.pop("q"), x.pop("k"), x.pop("v"), mem, **x, **options)
        return {"out": out, "M": M, "z": z}

    return function


@pytest.mark.parametrize("segment_len", [T, 100])
def test_one_infini_segment_is_causal_attention(qkv, segment_len):
    causal, _ = flash_attention(**qkv)
    gate = torch.linspace(-3, 3, HEADS, dtype=torch.float64)
    out, _ = infini_attention(**qkv, gate=gate, segment_len=segment_len)
    assert_fp64_equal("gate", out, (1 - gate.sigmoid())[:, None] * causal)
    out, _ = infini_attention(**qkv, gate=gate, segment_len=segment_len, first="bypass")
    assert_fp64_equal("bypass", out, causal)


def test_bypass_gives_the_gate_no_gradient_from_segment_zero(qkv):
    gate = torch.zeros(HEADS, dtype=torch.float64)
    options = {"segment_len": T, "first": "bypass"}
    assert (run(infini(**options), {**qkv, "gate": gate})["dgate"] == 0).all()
    mem = random_memory(2, HEADS // GROUP, 6, 6)
    out = infini_attention(**qkv, mem=mem, segment_len=T, first="bypass")[0]
    assert_fp64_equal("with memory", out, infini_attention(**qkv, mem=mem, segment_len=T)[0])


def retrieved(q, k, v, segment_len):
    """The memory part alone: g = 1."""
    gate = torch.full((q.shape[2],), 50.0, dtype=q.dtype)
    return infini_attention(q, k, v, gate=gate, segment_len=segment_len)[0]


def test_linear_memory_rows_are_convex_combinations_of_past_values(qkv):
    out = retrieved(qkv["q"], qkv["k"], torch.ones_like(qkv["v"]), 8)[:, 8:]
    assert_fp64_equal("rows sum to 1", out, torch.ones_like(out), bound=1e-11)
    out = retrieved(**qkv, segment_len=8)[:, 8:16]
    past = qkv["v"][:, :8].repeat_interleave(GROUP, dim=2)
    assert (out <= past.amax(1, keepdim=True) + 1e-9).all()
    assert (out >= past.amin(1, keepdim=True) - 1e-9).all()


def test_linear_memory_is_linear_attention_over_earlier_segments(qkv):
    out = retrieved(**qkv, segment_len=8)[:, 16:]
    k, v = (qkv[n][:, :16].repeat_interleave(GROUP, dim=2) for n in "kv")
    weights = torch.einsum(
        "bihd,bjhd->bhij", functional.elu(qkv["q"][:, 16:]) + 1, functional.elu(k) + 1
    )
    expected = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
    assert_fp64_equal("out", out, expected, bound=1e-11)


@pytest.mark.parametrize("factor", [1e-4, 1e6])
def test_scaling_the_memory_leaves_the_retrieval_alone(qkv, factor):
    M, z = random_memory(2, HEADS // GROUP, 6, 6)
    gate = torch.full((HEADS,), 50.0, dtype=torch.float64)
    for update in ("linear", "delta"):
        options = {"gate": gate, "segment_len": T, "update": update}
        one = infini_attention(**qkv, mem=(M, z), **options)[0]
        other = infini_attention(**qkv, mem=(factor * M, factor * z), **options)[0]
        assert_fp64_equal(update, other, one, bound=1e-11)


def test_delta_rule_does_not_store_again_what_is_retrieved(qkv):
    """One key repeated: its value is already there, the second write adds nothing to M."""
    k = qkv["k"][:, :1].expand(-1, 2, -1, -1)
    v = qkv["v"][:, :1].expand(-1, 2, -1, -1)
    _, (M1, _) = infini_attention(qkv["q"][:, :1], k[:, :1], v[:, :1], segment_len=1)
    _, (M2, _) = infini_attention(qkv["q"][:, :2], k, v, segment_len=1, update="delta")
    assert_fp64_equal("M", M2, M1)


def test_first_delta_write_is_linear(qkv):
    linear = infini_attention(**qkv, segment_len=T)
    delta = infini_attention(**qkv, segment_len=T, update="delta")
    assert_fp64_equal("M", delta[1][0], linear[1][0])


def landmark(**options):
    return pair(landmark_attention, **options)


def test_no_landmark_is_causal_attention(qkv):
    assert_same(run(landmark(block_size=T + 1), qkv), run(flash(), qkv))
    nowhere = torch.zeros(2, T, dtype=torch.bool)
    assert_same(run(landmark(is_landmark=nowhere), qkv), run(flash(), qkv))


def test_rows_before_the_first_landmark_are_causal_attention(qkv):
    assert_fp64_equal(
        "out", landmark_attention(**qkv, block_size=8)[0][:, :7], flash_attention(**qkv)[0][:, :7]
    )


@pytest.mark.parametrize("block_size", [2, 5, 8])
def test_landmark_rows_sum_to_one_and_landmark_values_are_not_read(qkv, block_size):
    ones = {**qkv, "v": torch.ones_like(qkv["v"])}
    out, _ = landmark_attention(**ones, block_size=block_size)
    assert_fp64_equal("rows sum to 1", out, torch.ones_like(out))
    dv = run(landmark(block_size=block_size), qkv)["dv"]
    assert (dv[:, block_size - 1 :: block_size] == 0).all()
    assert (dv[:, 0] != 0).all()


def test_regular_landmarks_equal_their_flags(qkv):
    flags = (torch.arange(T) % 5 == 4).expand(2, T)
    assert_same(run(landmark(block_size=5), qkv), run(landmark(is_landmark=flags), qkv))


def test_landmark_equals_softmax_with_shifted_logits(qkv):
    """One softmax over s_ij - LSE_ib + s_{i, l_b} for the keys j of earlier blocks b."""
    L, q = 6, qkv["q"]
    k, v = (qkv[n].repeat_interleave(GROUP, dim=2) for n in "kv")
    s = torch.einsum("bihd,bjhd->bhij", q, k) * 6**-0.5
    j = torch.arange(T)
    i = j[:, None]
    for b in range(T // L):
        inside = s[..., b * L : b * L + L - 1]
        shifted = inside - inside.logsumexp(-1, keepdim=True) + s[..., b * L + L - 1, None]
        later = i[b * L + L :, 0]
        s[:, :, later, b * L : b * L + L - 1] = shifted[:, :, later]
    s = s.masked_fill((j > i) | (j % L == L - 1), -torch.inf)
    out, lse = landmark_attention(**qkv, block_size=L)
    assert_fp64_equal("out", out, torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v))
    assert_fp64_equal("lse", lse, s.logsumexp(-1))


def test_decoding_landmark_equals_the_last_rows(qkv):
    whole, whole_lse = landmark_attention(**qkv, block_size=5)
    for Tq in (1, 4, 11):
        out, lse = landmark_attention(qkv["q"][:, -Tq:], qkv["k"], qkv["v"], block_size=5)
        assert_fp64_equal("out", out, whole[:, -Tq:])
        assert_fp64_equal("lse", lse, whole_lse[:, :, -Tq:])


def dilated(*branches, **options):
    w, r = zip(*branches, strict=True)
    return pair(dilated_attention, segment_lengths=w, dilation_rates=r, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("w", [T, 10 * T])
def test_single_full_branch_is_dense_attention(qkv, w, causal):
    assert_same(run(dilated((w, 1), causal=causal), qkv), run(flash(causal=causal), qkv))


@pytest.mark.parametrize("mix_grad", ["exact", "detached"])
def test_two_identical_branches_are_one(qkv, mix_grad):
    cotangents = {"out": torch.randn(2, T, HEADS, 6, dtype=torch.float64)}
    twice = run(dilated((T, 1), (T, 1), mix_grad=mix_grad), qkv, cotangents)
    once = run(flash(), qkv, cotangents)
    once["lse"] = once["lse"] + torch.tensor(2.0, dtype=torch.float64).log()
    assert_same(twice, once)


def test_short_segments_are_documents():
    qkv = dict(zip("qkv", random_qkv(1, T, HEADS, 6), strict=True))
    starts = torch.arange(0, T + 1, 6, dtype=torch.int32)
    assert_same(run(dilated((6, 1)), qkv), run(flash(cu_seqlens=starts), qkv))


def test_branches_merge(qkv):
    branches = [(6, 1), (12, 2), (T, 4)]
    out, lse = dilated_attention(**qkv, segment_lengths=[6], dilation_rates=[1])
    for w, r in branches[1:]:
        other = dilated_attention(**qkv, segment_lengths=[w], dilation_rates=[r])
        out, lse = merge_attention(out, lse, *other)
    w, r = zip(*branches, strict=True)
    expected_out, expected_lse = dilated_attention(**qkv, segment_lengths=w, dilation_rates=r)
    assert_fp64_equal("out", out, expected_out)
    assert_fp64_equal("lse", lse, expected_lse)


def test_detached_mixing_changes_dq_and_dk_only(qkv):
    exact = run(dilated((6, 1), (T, 3)), qkv)
    detached = run(dilated((6, 1), (T, 3), mix_grad="detached"), qkv)
    for name in ("out", "lse", "dv"):
        assert_fp64_equal(name, detached[name], exact[name])
    assert (detached["dq"] - exact["dq"]).abs().max() > 1e-3
    assert (detached["dk"] - exact["dk"]).abs().max() > 1e-3


def test_lse_gradient_survives_detached_mixing(qkv):
    cotangents = {"lse": torch.randn(2, HEADS, T, dtype=torch.float64)}
    exact = run(dilated((6, 1), (T, 3)), qkv, cotangents)
    assert_same(run(dilated((6, 1), (T, 3), mix_grad="detached"), qkv, cotangents), exact)


def test_dilated_pads_have_no_influence(qkv):
    lengths = torch.tensor([10, T], dtype=torch.int32)
    options = {
        "segment_lengths": [8, T],
        "dilation_rates": [1, 2],
        "causal": False,
        "seqlens": lengths,
    }
    out, lse = dilated_attention(**qkv, **options)
    other = {n: x.clone() for n, x in qkv.items()}
    for x in other.values():
        x[0, 10:] = 1e3
    other_out, other_lse = dilated_attention(**other, **options)
    assert torch.equal(out, other_out) and torch.equal(lse, other_lse)
    assert (out[0, 10:] == 0).all() and (lse[0, :, 10:] == -torch.inf).all()


def test_head_offsets_are_the_same_up_to_a_permutation_of_heads(qkv):
    """4 heads, r = 2: "mod" gives offsets 0 1 0 1, "block" gives 0 0 1 1."""
    q, k, v = (x.repeat_interleave(HEADS // x.shape[2], dim=2) for x in qkv.values())
    order = torch.tensor([0, 2, 1, 3])
    block = dilated_attention(q, k, v, [T], [2], head_offset="block")[0]
    mod = dilated_attention(*(x[:, :, order.argsort()] for x in (q, k, v)), [T], [2])[0]
    assert_fp64_equal("out", mod[:, :, order], block)
