"""lctx_kernels.dilated_attention on the CPU against its definition."""

from functools import partial

import pytest
from helpers import ALL_DTYPES
from op_cases import DILATED_CASES, label
from op_checks import check_dilated

import lctx_kernels

cpu_dilated = partial(lctx_kernels.dilated_attention, backend="cpu", return_lse=True)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", DILATED_CASES, ids=label)
def test_equals_definition(case, dtype):
    check_dilated(cpu_dilated, case, dtype)
