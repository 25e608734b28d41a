"""Ring attention over simulated ranks equals attention over the whole sequence, for any layout."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import RING_CASES, Case, label
from op_checks import check_ring

from lctx_kernels.reference import ring_attention


@pytest.mark.parametrize("case", RING_CASES, ids=label)
def test_equals_flash(case):
    check_ring(ring_attention, case, torch.float64)


@given(data=st.data(), T=st.integers(1, 16), world_size=st.integers(1, 5), causal=st.booleans())
def test_any_assignment_of_tokens_to_ranks(data, T, world_size, causal):
    order = data.draw(st.permutations(range(T)))
    cuts = st.lists(st.integers(0, T), min_size=world_size - 1, max_size=world_size - 1)
    edges = [0, *sorted(data.draw(cuts)), T]
    positions = [order[a:b] for a, b in itertools.pairwise(edges)]
    case = Case(T=T, Hkv=2, options={"positions": positions, "causal": causal})
    check_ring(ring_attention, case, torch.float64)
