"""blockwise_feedforward and blockwise_cross_entropy against the same computation in one piece."""

import pytest
import torch
from api.op_calls import CallLog, rand
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import lctx_kernels as lk

F64 = torch.float64
N, D, V = 37, 16, 101


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def mlp(dtype=F64, dropout=0.0):
    torch.manual_seed(1)
    layers = (torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Dropout(dropout))
    return torch.nn.Sequential(*layers, torch.nn.Linear(32, 5)).to(dtype)


def tokens(dtype=F64, shape=(N,), D=D, V=V):
    labels = torch.randint(V, shape, generator=torch.Generator().manual_seed(3))
    labels[..., ::5] = -100
    hidden = rand(*shape, D, dtype=dtype, seed=1).requires_grad_()
    return hidden, rand(V, D, dtype=dtype, seed=2).requires_grad_(), labels


def dense_loss(hidden, weight, labels, **options):
    logits = (hidden @ weight.T).flatten(0, -2)
    loss = cross_entropy(logits, labels.flatten(), **options)
    return loss.reshape(labels.shape) if loss.dim() else loss


# Feedforward


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 7, 20, 100])
@pytest.mark.parametrize("shape", [(2, 20, 8), (20, 8), (2, 3, 20, 8), (2, 0, 8)])
def test_feedforward_equals_fn(shape, chunk_size, remat):
    fn, x = mlp(), rand(*shape, dtype=F64).requires_grad_()
    inputs = (x, *fn.parameters())
    y = lk.blockwise_feedforward(fn, x, chunk_size, remat=remat)
    torch.testing.assert_close(y, fn(x))
    dy = rand(*y.shape, dtype=F64, seed=5)
    found = torch.autograd.grad(y, inputs, dy)
    torch.testing.assert_close(found, torch.autograd.grad(fn(x), inputs, dy))


def test_feedforward_keeps_activations_of_one_chunk():
    fn, x = mlp(), rand(1, 64, 8, dtype=F64).requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lk.blockwise_feedforward(fn, x, 8)
        rematerialised, _ = sum(saved), saved.clear()
        lk.blockwise_feedforward(fn, x, 8, remat=False)
    assert rematerialised <= x.numel() + 8 * 8 * 5
    assert sum(saved) > 4 * rematerialised


def test_feedforward_repeats_dropout_in_the_backward():
    fn, x = mlp(dropout=0.5), rand(1, 16, 8, dtype=F64).requires_grad_()
    torch.manual_seed(7)
    y = lk.blockwise_feedforward(fn, x, 4)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.manual_seed(7)
    (expected,) = torch.autograd.grad(lk.blockwise_feedforward(fn, x, 4, remat=False).sum(), x)
    torch.testing.assert_close(found, expected)


def test_feedforward_compiles():
    torch._dynamo.reset()
    fn, x = mlp(), rand(2, 20, 8, dtype=F64).requires_grad_()
    compiled = torch.compile(
        lambda x: lk.blockwise_feedforward(fn, x, 7), fullgraph=True, backend="aot_eager"
    )
    (found,) = torch.autograd.grad(compiled(x).cos().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(fn(x).cos().sum(), x)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3, rand(4, 8), 2), TypeError, "fn is 3; expected a callable"),
        ((torch.sin, [1.0], 2), TypeError, r"x is \[1.0\]; expected a tensor of float32"),
        ((torch.sin, torch.ones(4, 8).int(), 2), TypeError, "x is int32 .*; expected a tensor of"),
        ((torch.sin, rand(8), 2), ValueError, "expected at least 2 dimensions"),
        ((torch.sin, rand(4, 8), 0), ValueError, "chunk_size is 0; expected an int >= 1"),
        ((torch.sin, rand(4, 8), True), TypeError, "chunk_size is True; expected an int >= 1"),
        ((lambda x: x[..., :1, :], rand(4, 8), 2), ValueError, "fn mapped .* expected it to keep"),
    ],
)
def test_feedforward_refuses(arguments, error, text):
    with pytest.raises(error, match=f"blockwise_feedforward: .*{text}"):
        lk.blockwise_feedforward(*arguments)


# Cross entropy


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", [1, 8, 37, 1000])
@pytest.mark.parametrize("shape", [(N,), (3, 11), (0,)])
def test_cross_entropy_equals_pytorch(shape, chunk_size, reduction):
    hidden, weight, labels = tokens(shape=shape)
    loss = lk.blockwise_cross_entropy(
        hidden, weight, labels, chunk_size=chunk_size, reduction=reduction
    )
    expected = dense_loss(hidden, weight, labels, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    dloss = rand(*loss.shape, dtype=F64)
    found = torch.autograd.grad(loss, (hidden, weight), dloss)
    expected = torch.autograd.grad(expected, (hidden, weight), dloss)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_cross_entropy_gradcheck():
    hidden, weight, labels = tokens(shape=(5,), D=3, V=7)
    assert torch.autograd.gradcheck(
        lambda h, w: lk.blockwise_cross_entropy(h, w, labels, chunk_size=2), (hidden, weight)
    )


def test_cross_entropy_with_other_ignore_index():
    hidden, weight, _ = tokens()
    labels = torch.arange(N) % 5
    options = {"ignore_index": 3}
    loss = lk.blockwise_cross_entropy(hidden, weight, labels, chunk_size=10, **options)
    torch.testing.assert_close(loss, dense_loss(hidden, weight, labels, **options))


def test_cross_entropy_of_ignored_tokens_alone():
    hidden, weight, labels = tokens()
    labels.fill_(-100)
    options = {"chunk_size": 10}
    assert lk.blockwise_cross_entropy(hidden, weight, labels, **options).isnan()
    total = lk.blockwise_cross_entropy(hidden, weight, labels, reduction="sum", **options)
    dhidden, dweight = torch.autograd.grad(total, (hidden, weight))
    assert total == 0 and not dhidden.any() and not dweight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_sums_in_fp32(dtype):
    """As exact as fp32 arithmetic on the rounded inputs: chunks do not add up rounding errors."""
    hidden, weight, labels = tokens(dtype, shape=(2000,))
    loss = lk.blockwise_cross_entropy(hidden, weight, labels, chunk_size=16)
    grads = torch.autograd.grad(loss, (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = dense_loss(*wide, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for found, exact in zip(grads, torch.autograd.grad(expected, wide), strict=True):
        assert found.dtype == dtype
        stored = (exact.to(dtype).double() - exact).square().mean()
        assert (found.double() - exact).square().mean() <= 1.1 * stored


def test_cross_entropy_never_holds_all_logits():
    hidden, weight, labels = tokens(shape=(512,), V=1000)
    with LargestTensor() as largest:
        lk.blockwise_cross_entropy(hidden, weight, labels, chunk_size=4).backward()
    assert largest.numel == weight.numel() < 512 * 1000


def test_cross_entropy_skips_the_gradient_that_nobody_wants():
    hidden, weight, labels = tokens()
    (alone,) = torch.autograd.grad(
        lk.blockwise_cross_entropy(hidden, weight.detach(), labels, chunk_size=8), hidden
    )
    with CallLog() as log:
        lk.blockwise_cross_entropy(hidden, weight.detach(), labels, chunk_size=8).backward()
    assert log.calls[-1][1][-2:] == (True, False)
    together = torch.autograd.grad(
        lk.blockwise_cross_entropy(hidden, weight, labels, chunk_size=8), hidden
    )
    assert torch.equal(alone, together[0])


def test_cross_entropy_under_autocast():
    hidden, weight, labels = tokens(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lk.blockwise_cross_entropy(hidden, weight, labels, chunk_size=8)
        mixed = lk.blockwise_cross_entropy(hidden.bfloat16(), weight, labels, chunk_size=8)
    expected = lk.blockwise_cross_entropy(
        hidden.bfloat16(), weight.bfloat16(), labels, chunk_size=8
    )
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected) and torch.equal(mixed, expected)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("dynamic", [False, True])
def test_cross_entropy_compiles(dynamic):
    torch._dynamo.reset()

    def loss(hidden, weight, labels):
        return lk.blockwise_cross_entropy(hidden.sin(), weight, labels, chunk_size=8)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((N,), (50,)):
        hidden, weight, labels = tokens(shape=shape)
        found = torch.autograd.grad(compiled(hidden, weight, labels), (hidden, weight))
        expected = torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("what", ["func.grad", "double backward"])
def test_cross_entropy_refuses_transforms(what):
    hidden, weight, labels = tokens()

    def loss(hidden):
        return lk.blockwise_cross_entropy(hidden, weight, labels, chunk_size=8)

    with pytest.raises(NotImplementedError, match=r"lctx::token_loss_.* not supported"):
        if what == "func.grad":
            torch.func.grad(loss)(hidden.detach())
        else:
            torch.autograd.grad(loss(hidden), hidden, create_graph=True)[0].sum().backward()


H, W, LABELS = (x.detach() for x in tokens(torch.float32))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"hidden": H.int()}, TypeError, "hidden is int32 .*; expected a tensor of float32"),
        ({"weight": W.tolist()}, TypeError, "weight is .*; expected a tensor of float32"),
        ({"weight": W.double()}, TypeError, "expected one dtype; try weight.to"),
        ({"weight": W[0]}, ValueError, r"expected 2 dimensions \(V, D\)"),
        ({"weight": W[None]}, ValueError, r"expected hidden \(..., D\) and weight \(V, D\)"),
        ({"weight": W[:, :8]}, ValueError, r"expected hidden \(..., D\) and weight \(V, D\)"),
        ({"weight": W.to("meta")}, ValueError, "expected one device"),
        ({"labels": LABELS.int()}, TypeError, "expected an int64 tensor"),
        ({"labels": LABELS[:-1]}, ValueError, r"expected labels of shape \(37,\)"),
        ({"labels": LABELS + 1}, ValueError, "labels hold -99 to .*; expected 0 to V - 1 = 100"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0; expected an int >= 1"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size is 2.0; expected an int >= 1"),
        ({"ignore_index": None}, TypeError, "ignore_index is None; expected an int"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'; expected mean, sum or none"),
        ({"reduction": None}, TypeError, "reduction is None; expected mean, sum or none"),
    ],
)
def test_cross_entropy_refuses(arguments, error, text):
    good = {"hidden": H, "weight": W, "labels": LABELS, "chunk_size": 8}
    with pytest.raises(error, match=f"blockwise_cross_entropy: .*{text}"):
        lk.blockwise_cross_entropy(**(good | arguments))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_on_a_gpu(dtype):
    hidden, weight, labels = (x.detach().cuda() for x in tokens(dtype, shape=(2000,), D=64, V=3000))
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    loss = lk.blockwise_cross_entropy(*inputs, labels, chunk_size=300)
    grads = torch.autograd.grad(loss, inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = dense_loss(*wide, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for found, exact in zip(grads, torch.autograd.grad(expected, wide), strict=True):
        error = (found.double() - exact).norm() / exact.norm()
        assert error < max(2 * torch.finfo(dtype).eps, 1e-5)
