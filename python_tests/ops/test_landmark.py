"""lctx_kernels.landmark_attention on the CPU against its definition."""

from functools import partial

import pytest
from helpers import ALL_DTYPES
from op_cases import LANDMARK_CASES, label
from op_checks import check_landmark

import lctx_kernels

cpu_landmark = partial(lctx_kernels.landmark_attention, backend="cpu", return_lse=True)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", LANDMARK_CASES, ids=label)
def test_equals_definition(case, dtype):
    check_landmark(cpu_landmark, case, dtype)
