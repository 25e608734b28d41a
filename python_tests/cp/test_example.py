"""examples/train_ring.py: any split of the ranks learns the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.dist
ROOT = Path(__file__).resolve().parents[2]


def losses(processes, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(ROOT / "examples" / "train_ring.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [*command, *options, "--steps", "6"], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.tensor([float(x) for x in result.stdout.split()])


def test_every_split_of_the_ranks_learns_the_same():
    alone = losses(1)
    assert len(alone) == 6 and alone[-1] < alone[0] - 0.5
    torch.testing.assert_close(losses(4, "--dp", "2", "--cp", "2"), alone, atol=1e-3, rtol=0)
    torch.testing.assert_close(losses(4, "--cp", "2", "--tp", "2"), alone, atol=1e-3, rtol=0)
    torch.testing.assert_close(losses(4, "--dp", "2", "--fsdp", "2"), alone, atol=1e-3, rtol=0)
    torch.testing.assert_close(losses(4, "--fsdp", "2", "--cp", "2"), alone, atol=1e-3, rtol=0)
