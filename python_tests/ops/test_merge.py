"""lctx_kernels.merge_attention on the CPU against its definition."""

import pytest
from helpers import ALL_DTYPES
from op_cases import MERGE_CASES, label
from op_checks import check_merge

from lctx_kernels import merge_attention


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", MERGE_CASES, ids=label)
def test_equals_definition(case, dtype):
    check_merge(merge_attention, case, dtype)
