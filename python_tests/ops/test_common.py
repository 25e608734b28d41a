"""What holds for every op of the CPU backend alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cpu_ops
import pytest
import torch
from cpu_ops import FAMILIES
from helpers import ALL_DTYPES, random_memory, random_qkv, random_tensor
from op_cases import label, replace
from torch.autograd import gradcheck

import lctx_kernels as lk

CASES = [
    pytest.param(family, case, id=f"{name} {label(case)}")
    for name, family in FAMILIES.items()
    for case in family.cases
]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("family", "case"), CASES)
def test_two_runs_are_bitwise_equal(family, case, dtype):
    first, second = (family.check(family.implementation, case, dtype) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize(("family", "case"), CASES)
def test_results_are_contiguous(family, case):
    results = family.check(family.implementation, replace(case, layout="packed"), torch.float64)
    for name, result in results.items():
        assert result.is_contiguous(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("family", "case"), CASES)
def test_number_of_threads_changes_rounding_only(family, case, dtype, one_thread):
    single = family.check(family.implementation, case, dtype)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        several = family.check(family.implementation, case, dtype)
        for name, result in single.items():
            torch.testing.assert_close(
                several[name], result, rtol=0, atol=100 * torch.finfo(dtype).eps, msg=name
            )


def test_more_threads_than_problems_of_unequal_cost(one_thread):
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 70, 2, 8, Hkv=1))
    bounds = torch.tensor([0, 5, 30, 70], dtype=torch.int32)  # shortest first: run in another order
    results = []
    for threads in (1, 16):
        torch.set_num_threads(threads)
        out = lk.flash_attention(q, k, v, cu_seqlens=bounds)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for single, several in zip(*results, strict=True):
        torch.testing.assert_close(several, single, rtol=0, atol=1e-13)


ISA_SCRIPT = """
import json, torch
from cpu_ops import FAMILIES
from helpers import ALL_DTYPES
for family in FAMILIES.values():
    for case in family.cases:
        for dtype in ALL_DTYPES:
            family.check(family.implementation, case, dtype)
print(json.loads(torch.ops.lctx.build_info())["cpu"]["active_isa"])
"""


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set_meets_the_contract(isa):
    available = json.loads(torch.ops.lctx.build_info())["cpu"]["isa"]
    if isa not in available:
        pytest.skip(f"built for {', '.join(available)}")
    here = Path(__file__).parent.parent
    environment = os.environ | {
        "LCTX_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    active = done.stdout.split()[-1]
    if active != isa:
        pytest.skip(f"this processor runs {active} at most")


def expanded(x):
    return x[:1, :1].expand(x.shape) if x.dim() == 4 else x[..., :1].expand(x.shape)


def scalar(x):
    """Every stride 0, as the gradient of a sum has."""
    return x.new_ones(()).expand(x.shape)


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("view", [expanded, scalar, transposed])
@pytest.mark.parametrize("name", ["flash", "landmark", "dilated"])
def test_incoming_gradients_of_any_strides(name, view):
    options = {
        "flash": {},
        "landmark": {"block_size": 8},
        "dilated": {"segment_lengths": [16], "dilation_rates": [2]},
    }[name]
    qkv = [x.requires_grad_() for x in random_qkv(2, 30, 4, 8, Hkv=2)]
    out, lse = FAMILIES[name].implementation(*qkv, **options)
    grads = [view(torch.randn_like(out)), view(torch.randn_like(lse))]
    found = torch.autograd.grad((out, lse), qkv, grads, retain_graph=True)
    expected = torch.autograd.grad((out, lse), qkv, [x.contiguous() for x in grads])
    for ours, exact in zip(found, expected, strict=True):
        assert torch.equal(ours, exact)


def leaves(*tensors):
    return [x.requires_grad_() for x in tensors]


def finite(out, lse):
    return out, lse.masked_fill(lse.isinf(), 0)


def test_gradcheck_flash():
    qkv = leaves(*random_qkv(1, 5, 2, 3, Tk=7, Hkv=1, Dv=2))
    assert gradcheck(lambda *x: finite(*cpu_ops.flash(*x, window=4)), qkv)


def test_gradcheck_landmark():
    qkv = leaves(*random_qkv(1, 8, 2, 3, Hkv=1, Dv=2))
    assert gradcheck(lambda *x: finite(*cpu_ops.landmark(*x, block_size=3)), qkv)


def test_gradcheck_dilated():
    qkv = leaves(*random_qkv(1, 7, 2, 3, Hkv=1, Dv=2))
    assert gradcheck(lambda *x: finite(*cpu_ops.dilated(*x, [3, 8], [1, 2])), qkv)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_gradcheck_infini(update):
    q, k, v = leaves(*random_qkv(1, 7, 2, 3, Hkv=1, Dv=2))
    q_mem, k_mem, _ = leaves(*random_qkv(1, 7, 2, 3, Hkv=1, seed=1))
    gate, M, z = leaves(random_tensor(2), *random_memory(1, 1, 3, 2))

    def function(q, k, v, q_mem, k_mem, gate, M, z):
        options = {"gate": gate, "q_mem": q_mem, "k_mem": k_mem, "segment_len": 3, "update": update}
        out, mem = cpu_ops.infini(q, k, v, (M, z), **options)
        return out, *mem

    assert gradcheck(function, (q, k, v, q_mem, k_mem, gate, M, z))


def test_gradcheck_merge():
    out_a, out_b, _ = random_qkv(1, 4, 2, 3)
    lse_a, lse_b = random_tensor(2, 1, 2, 4).unbind()
    assert gradcheck(cpu_ops.merge, leaves(out_a, lse_a, out_b, lse_b))
