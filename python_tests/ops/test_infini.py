"""lctx_kernels.infini_attention on the CPU against its definition."""

from functools import partial

import pytest
from helpers import ALL_DTYPES
from op_cases import INFINI_CASES, label
from op_checks import check_infini

import lctx_kernels

cpu_infini = partial(lctx_kernels.infini_attention, backend="cpu")


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", INFINI_CASES, ids=label)
def test_equals_definition(case, dtype):
    check_infini(cpu_infini, case, dtype)
