"""What holds for every op on a Hopper GPU alike; an op without a kernel is skipped."""

import pytest
import torch
from cuda_ops import EVERY_CASE, NAMES, Call, check, prepare, standard
from gpu_checks import HALF
from op_cases import LAYOUTS

import lctx_kernels
from lctx_kernels._measure import peak_extra_bytes

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("name", "case"), EVERY_CASE)
def test_equals_definition(name, case, dtype):
    check(name, case, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "contiguous"])
@pytest.mark.parametrize("name", NAMES)
def test_strided_views(name, layout, dtype):
    """The same bits as from contiguous tensors, or a refusal that names the strides."""
    contiguous = prepare(name, standard(name), dtype)
    view = LAYOUTS[layout]
    tensors = {n: view(x) if x.dim() == 4 and n not in "Mz" else x
               for n, x in contiguous.tensors.items()}  # fmt: skip
    strided = Call(name, tensors, contiguous.options)
    if reasons := strided.reasons():
        assert layout in ("packed", "one batch for all") and "strides" in reasons[0]
        with pytest.raises(NotImplementedError, match="strides"):
            strided.ours()
        return
    if layout == "one batch for all":
        contiguous = Call(name, {n: x.contiguous() for n, x in tensors.items()}, strided.options)
    for result, expected in zip(strided.ours().values(), contiguous.ours().values(), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_two_runs_are_bitwise_equal(name, D, dtype):
    call = prepare(name, standard(name, B=3, Dk=D), dtype)
    first = call.ours()
    for _ in range(5):
        for key, result in call.ours().items():
            different = (result != first[key]).sum().item()  # NaN, too, differs from itself
            assert not different, f"{key}: {different} of {result.numel()} elements"


def fill_free_memory_with_nan():
    """Leave blocks of all sizes in the allocator's cache that are NaN in every dtype."""
    torch.use_deterministic_algorithms(False)  # else empty tensors are filled by PyTorch
    torch.cuda.empty_cache()
    sizes = [1 << n for n in range(9, 26)]
    blocks = [
        torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
        for size in sizes
        for _ in range(8)
    ]
    assert blocks[0].view(torch.float32).isnan().all()


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_every_element_is_written(name, D):
    """Scratch and outputs come with NaN in them."""
    prepare(name, standard(name, Dk=D))
    for T in (1, 200, 1111):
        fill_free_memory_with_nan()
        check(name, standard(name, T=T, Dk=D))


def warmed_up(call):
    """Results after a call on a side stream, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.ours()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("name", NAMES)
def test_replays_in_a_cuda_graph_with_new_inputs(name):
    call, other = (prepare(name, standard(name), seed=seed) for seed in (0, 7))
    expected = other.ours()
    warmed_up(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.ours()
    for tensor, new in zip(call.tensors.values(), other.tensors.values(), strict=True):
        tensor.copy_(new)
    for _ in range(3):
        for result in results.values():
            result.fill_(torch.nan)
        graph.replay()
        for key, result in results.items():
            assert torch.equal(result, expected[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_current_stream(name):
    """On another stream than that it would read the inputs before they are there."""
    source = prepare(name, standard(name))
    expected = source.ours()
    call = Call(name, {n: torch.empty_like(x) for n, x in source.tensors.items()}, source.options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms
        for n, x in source.tensors.items():
            call.tensors[n].copy_(x)
        results = call.ours()
    stream.synchronize()
    for key, result in results.items():
        assert torch.equal(result, expected[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_compiles(name):
    call = prepare(name, standard(name, T=300))
    tensors = dict(call.tensors)
    if "M" in tensors:
        tensors["mem"] = tensors.pop("M"), tensors.pop("z")
    function = getattr(lctx_kernels, f"{name}_attention")

    def attention(tensors):
        return function(**tensors, **call.options)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tensors), attention(tensors), rtol=0, atol=0)


# What a forward may allocate beyond its results, by op: multiples of the bytes of out (the carried
# fp32 rows of dilated attention, the local result of infini), of lse, and of the states.
MEMORY = {"flash": (0, 1, 0), "landmark": (0, 3, 0), "dilated": (2, 2, 0), "infini": (1, 3, 3)}
SLACK = 2 << 20


@pytest.mark.parametrize("T", [16384, 65536])
@pytest.mark.parametrize("name", NAMES)
def test_memory_is_linear_and_inputs_are_not_copied(name, T):
    torch.use_deterministic_algorithms(False)
    Hq, Hkv, D, S = 16, 2, 128, 2048
    options = {"landmark": {"block_size": 64}, "infini": {"segment_len": S, "update": "delta"}}
    options["dilated"] = {"segment_lengths": [2048, 8192], "dilation_rates": [1, 4]}
    q = torch.randn(1, T, Hq, D, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, T, Hkv, D, device="cuda", dtype=torch.bfloat16)
    call = Call(name, {"q": q, "k": k, "v": v}, options.get(name, {}))
    call.skip_if_not_built()
    function = getattr(lctx_kernels, f"{name}_attention")

    def run():
        with torch.no_grad():
            return function(q, k, v, **call.options)

    run()
    extra = peak_extra_bytes(run, "cuda")
    outs, lses, states = MEMORY[name]
    state_bytes = T // S * Hkv * D * (D + 1) * 4
    limit = outs * q.numel() * 2 + lses * Hq * T * 4 + states * state_bytes + SLACK
    assert extra <= limit, f"{extra / 2**20:.1f} MiB, allowed {limit / 2**20:.1f}"
