"""The CPU backend as functions with the signatures of the definitions, and a few cases of each."""

from functools import partial
from typing import Any, NamedTuple

import op_checks
from op_cases import ALL_GIVEN, Case, replace

import lctx_kernels

flash = partial(lctx_kernels.flash_attention, backend="cpu", return_lse=True)
landmark = partial(lctx_kernels.landmark_attention, backend="cpu", return_lse=True)
dilated = partial(lctx_kernels.dilated_attention, backend="cpu", return_lse=True)
infini = partial(lctx_kernels.infini_attention, backend="cpu")
merge = lctx_kernels.merge_attention


class Family(NamedTuple):
    implementation: Any
    check: Any
    cases: tuple[Case, ...]


GQA = Case(T=150, B=1, Hkv=2, Dk=40)
FAMILIES = {
    "flash": Family(
        flash,
        op_checks.check_flash,
        (
            GQA,
            Case(T=33, Tk=200, Hkv=1, Dk=64, options={"window": 50}),
            Case(T=90, B=1, options={"cu_seqlens": [0, 7, 7, 90], "causal": False}),
        ),
    ),
    "landmark": Family(
        landmark,
        op_checks.check_landmark,
        (
            replace(GQA, options={"block_size": 51}),
            Case(T=33, Tk=200, Hkv=1, Dk=64, options={"density": 0.1}),
        ),
    ),
    "dilated": Family(
        dilated,
        op_checks.check_dilated,
        (
            replace(GQA, options={"branches": ([30, 70], [1, 3])}),
            Case(T=90, options={"branches": ([30, 90], [1, 2]), "mix_grad": "detached",
                                "causal": False, "seqlens": [90, 50]}),
        ),
    ),
    "infini": Family(
        infini,
        op_checks.check_infini,
        (
            replace(GQA, options={"segment_len": 40, "given": ALL_GIVEN}),
            Case(T=90, Hkv=2, options={"segment_len": 16, "update": "delta", "given": ALL_GIVEN,
                                       "detach_every": 3}),
        ),
    ),
    "merge": Family(merge, op_checks.check_merge, (Case(T=90, Dk=40),)),
}  # fmt: skip
