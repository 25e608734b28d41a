"""Seed, skips and fixtures of the whole suite."""

import os
import sys

# Read when torch loads OpenMP: threads that wait for others sleep. Spinning ones make the suite
# several times slower as soon as another process wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# LCTX_TEST_GPUS=0,1: the processes of pytest -n take these GPUs in turn, and see no other.
if "LCTX_TEST_GPUS" in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
    gpus = os.environ["LCTX_TEST_GPUS"].split(",")
    process = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[process % len(gpus)]

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


MOST_KEPT = 1 << 30  # bytes of a GPU that a process keeps between tests


@pytest.fixture(autouse=True)
def room_for_others():
    """What a test had of a GPU's memory goes back: other processes run other tests there."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > MOST_KEPT:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def nothing_of_other_constants():
    """Rings remember what they made of shapes, by constants that tests may change."""
    if (keys := sys.modules.get("lctx_kernels.cp.keys")) is not None:
        keys.forget_shapes()


@pytest.fixture
def poisoned_memory():
    """Fill every tensor that is allocated without a value with NaN, in Python and in C++."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
