"""Two processes take the steps of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from hf import fsdp_on_ranks
from processes import run_ranks_well

TESTS = Path(__file__).resolve().parent.parent


def run(launcher, folder):
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [*launcher, str(TESTS / "hf" / "train_on_ranks.py"), str(folder)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    (line,) = (x for x in result.stdout.splitlines() if x.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path):
    alone = run([sys.executable], tmp_path)
    ranks = run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                 "--standalone"], tmp_path)  # fmt: skip
    for name in ("Trainer", "SegmentTrainer"):
        for part in ("losses", "gates"):
            torch.testing.assert_close(
                torch.tensor(ranks[name][part]), torch.tensor(alone[name][part]),
                rtol=1e-5, atol=1e-6,
            )  # fmt: skip


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("method", ["infini", "landmark", "dilated"])
def test_sharded_parameters(method):
    run_ranks_well(fsdp_on_ranks.gradients, 2, method)
    run_ranks_well(fsdp_on_ranks.mixed_precision, 2, method)
