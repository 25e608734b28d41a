"""The public signatures, word for word, and what every public docstring must say."""

import doctest
import importlib
import inspect

import pytest

import lctx_kernels as lk

SIGNATURES = {
    "flash_attention": (
        "(q, k, v, *, causal=True, scale=None, window=None, cu_seqlens=None, return_lse=False, "
        "deterministic=False, backend='auto')"
    ),
    "infini_attention": (
        "(q, k, v, mem=None, *, gate=None, q_mem=None, k_mem=None, segment_len=2048, "
        "update='linear', first='gate', detach_every=0, scale=None, deterministic=False, "
        "group=None, backend='auto')"
    ),
    "landmark_attention": (
        "(q, k, v, *, block_size=None, is_landmark=None, scale=None, return_lse=False, "
        "deterministic=False, group=None, plan=None, backend='auto')"
    ),
    "dilated_attention": (
        "(q, k, v, segment_lengths, dilation_rates, *, causal=True, scale=None, "
        "head_offset='mod', mix_grad='exact', seqlens=None, return_lse=False, "
        "deterministic=False, group=None, plan=None, backend='auto')"
    ),
    "ring_attention": (
        "(q, k, v, *, group=None, plan=None, layout='zigzag', causal=True, scale=None, "
        "window=None, cu_seqlens=None, deterministic=True, transport='auto', timeout=None, "
        "return_lse=False)"
    ),
    "merge_attention": "(out_a, lse_a, out_b, lse_b)",
    "blockwise_feedforward": "(fn, x, chunk_size, *, remat=True)",
    "blockwise_cross_entropy": (
        "(hidden, weight, labels, *, chunk_size, ignore_index=-100, reduction='mean')"
    ),
    "cp.make_plan": "(seq_len, world_size, *, layout='zigzag', cu_seqlens=None, positions=None)",
    "cp.shard": "(plan, x, dim, rank)",
    "cp.unshard": "(plan, x_local, dim, group)",
    "cp.shard_positions": "(plan, rank)",
    "cp.shift_labels": "(labels, *, dim=1, ignore_index=-100, cu_seqlens=None)",
    "cp.roll": "(plan, x_local, shifts, dim, group)",
    "hf.convert": "(model, method, *, layers=None, **options)",
    "hf.make_cache": "(model, **options)",
    "supports": "(op_name, *tensors, **options)",
    "fused_landmark_attention": "(q, k, v, is_mem, sm_scale=None, block_size=64)",
    "nn.DilatedAttention": (
        "(d_model, num_heads, dilation_rate, segment_size, dropout=0.0, causal=False, "
        "use_xpos=False, use_rel_pos_bias=False, qk_norm=False, *, casual=None, rope_base=None, "
        "xpos_base=512.0, num_kv_heads=None, head_dim=None, head_offset='mod', mix_grad='exact', "
        "bias=False)"
    ),
}
BUILT = [name for name in SIGNATURES if "." not in name]
MODULES = (
    "", ".flash", ".infini", ".landmark", ".dilated", ".ring", ".merge", ".blockwise",
    ".supports", ".checkpoint_policy", ".info", ".cp", ".cp.plan", ".cp.shard", ".cp.forecast",
    ".hf", ".nn.attention", ".nn.dilated", ".nn.gate", ".nn.llama", ".nn.longnet", ".nn.relative",
    ".nn.ring", ".nn.rotary", ".nn.sampling", ".cache.buffer", ".cache.dilated", ".cache.flash",
    ".cache.infini", ".cache.landmark", ".cache.rows", ".data.landmarks", ".data.corpus",
    ".data.tokens", ".eval.tasks", ".eval.score", ".hf.context",
)  # fmt: skip


def public(name):
    target = lk
    for part in name.split("."):
        target = getattr(target, part)
    return target


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(public(name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_infini_memory_is_a_named_tuple():
    assert issubclass(lk.InfiniMemory, tuple)
    assert lk.InfiniMemory._fields == ("M", "z")


@pytest.mark.parametrize("name", BUILT)
def test_docstring_says_what_it_must(name):
    text = inspect.getdoc(public(name))
    sections = ("Args:", "Returns:", "Raises:", "Source: ", "Equivalent to: ", ">>> ")
    assert [section for section in sections if section not in text] == []
    for parameter in inspect.signature(public(name)).parameters:
        assert f"{parameter}:" in text or f"{parameter}, " in text or f", {parameter}" in text
    assert text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    results = doctest.testmod(importlib.import_module(f"lctx_kernels{module}"))
    assert results.attempted > 0 and results.failed == 0
