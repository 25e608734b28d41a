"""Both ranks of a ring on one GPU: what is measured, and how it is shown."""

import pytest
import torch
from gpu_checks import needs_kernel

from bench.registry import Shape
from bench.results import Document, Row
from bench.ring_tables import SOLO, ring_solo_table

on_gpu, is_built = needs_kernel("ring_bwd")


def test_table():
    shape = {"T": 16384, "B": 1, "Hq": 32, "Hkv": 8, "D": 128, "dtype": "bf16"}
    rows = [
        Row("flash", "flash", "fwd", shape, "ok", median_s=3e-3, group=1),
        Row(SOLO, "flash", "fwd", shape, "ok", median_s=1.6e-3, group=1, gpus_s=[1.5e-3, 1.6e-3]),
    ]
    lines = ring_solo_table(Document("ring_solo", {}, rows=rows))
    assert lines[2:] == ["| 16k | 32 / 8 | forward | 3.00 | 1.50 | 1.60 | **1.88x** |"]


@on_gpu
@is_built
@pytest.mark.parametrize("pass_", ["fwd", "fwd_bwd"])
def test_measures_both_ranks(pass_):
    from bench.ring_solo import SoloTransport, run_case

    transport = SoloTransport(torch.device("cuda", torch.cuda.current_device()))
    shape = Shape(4096, Hq=4, Hkv=2, D=128, dtype="bf16")
    flash, ring = run_case(shape, pass_, transport, 0.1)
    assert flash.candidate == "flash" and flash.median_s > 0
    assert ring.candidate == SOLO and len(ring.gpus_s) == 2
    assert ring.median_s == max(ring.gpus_s) and min(ring.gpus_s) > 0
