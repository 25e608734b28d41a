"""What holds for the gradients of every op on a Hopper GPU alike."""

import pytest
import torch
from cuda_ops import EVERY_CASE, NAMES, check_gradients, prepare, standard
from gpu_checks import HALF

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("name", "case"), EVERY_CASE)
def test_equal_those_of_the_definition(name, case, dtype):
    check_gradients(name, case, dtype)


@pytest.mark.parametrize(("name", "case"), EVERY_CASE)
def test_deterministic_ones_equal_those_of_the_definition(name, case):
    check_gradients(name, case, deterministic=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_deterministic_runs_are_bitwise_equal(name, D, dtype):
    case = standard(name, B=3, Dk=D, options={"deterministic": True})
    call = prepare(name, case, dtype)
    call.skip_if_not_built(needs_grad=True)
    first, _ = call.gradients()
    for _ in range(4):
        again, _ = call.gradients()
        assert all(torch.equal(x, first[n]) for n, x in again.items())
