"""lctx_kernels.flash_attention on the CPU against its definition."""

from functools import partial

import pytest
from helpers import ALL_DTYPES
from op_cases import FLASH_CASES, label
from op_checks import check_flash

import lctx_kernels

cpu_flash = partial(lctx_kernels.flash_attention, backend="cpu", return_lse=True)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", FLASH_CASES, ids=label)
def test_equals_definition(case, dtype):
    check_flash(cpu_flash, case, dtype)
