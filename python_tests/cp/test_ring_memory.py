"""The ring's memory: counted tensor by tensor, against the forecast, against the formula."""

import gc

import pytest
import torch
from cp_plans import LAYOUTS, tensors

import lctx_kernels as lk
from lctx_kernels import cp
from lctx_kernels.cp import transport


def live_bytes(known):
    """Bytes of the tensors that were made after gc.freeze() and are alive, but for `known`."""
    storages = (x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor)
    sizes = {s.data_ptr(): s.nbytes() for s in storages}
    return sum(sizes.values()) - sum(sizes.get(x.data_ptr(), 0) for x in known)


def check_formula(layout, n, forecast, rows=64, query_row=4 * 16, key_row=2 * 2 * 16):
    """The documented bytes of a rank, by hand.

    In a zigzag the last chunk of all leaves nobody; of two ranks one sends half. Contiguous ranks
    keep keys for themselves, and own sums come home there while others pass.
    """
    own = rows // 2 if (layout, n) == ("zigzag", 2) else rows
    keys = (min(2, n - 1) * rows + own) * key_row * 2  # two slots, and the own, packed
    forward = rows * query_row * 4 + keys
    sums, constants = rows * key_row * 4, 2 * rows * 4 * 4
    backward = rows * query_row * 4 + sums + constants + keys + 2 * sums
    found = forecast.forward.memory, forecast.backward.memory
    if layout == "contiguous":
        assert found[0] <= forward and found[1] <= backward + sums
    else:
        assert found == (forward, backward)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_that_of_the_forecast(layout, n, monkeypatch):
    """Two slots for keys and two for gradients, however many ranks there are."""
    plan = cp.make_plan(64 * n, n, layout=layout)
    x = tensors(64 * n, Hkv=2, G=2, Dk=16, Dv=16, dtype=torch.bfloat16)
    shape = {"query_heads": 4, "key_heads": 2, "head_dim": 16}
    forecast = cp.forecast(plan, **shape)
    check_formula(layout, n, forecast)
    census = []
    post = transport.SimulatedRank.post

    def counting(self, hop):
        census.append(live_bytes(known))
        return post(self, hop)

    monkeypatch.setattr(transport.SimulatedRank, "post", counting)
    parts = [cp.shard(plan, t, 1, None).requires_grad_() for t in x.values()]
    dout = torch.ones_like(parts[0])
    known = [*parts, dout]
    gc.freeze()
    out = lk.ring_attention(*parts, plan=plan, transport="sim")
    forward = max(census)
    lse_bytes = 4 * 4 * 64 * n
    assert forward <= n * forecast.forward.memory + lse_bytes + out.nbytes  # and the results
    assert forward >= 0.6 * n * forecast.forward.memory  # the census sees what there is
    census.clear()
    known.append(out)
    gc.freeze()
    torch.autograd.grad(out, parts, dout)
    backward = max(census)
    gc.unfreeze()
    results = sum(x.nbytes for x in parts)
    assert backward <= n * forecast.backward.memory + 2 * lse_bytes + results
    assert backward >= 0.6 * n * forecast.backward.memory
