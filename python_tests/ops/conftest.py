"""Everything in this folder runs with poisoned memory: an element that is never written is NaN."""

import pytest


@pytest.fixture(autouse=True)
def poison(poisoned_memory):
    yield
