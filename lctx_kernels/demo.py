"""`lctx demo`: the four attentions on a real document, checked and timed against SDPA."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from . import dilated_attention, infini_attention, landmark_attention
from ._measure import peak_extra_bytes, relative_rms, write_json
from ._rowcheck import definition_gradients, definition_rows, reference, sample_rows
from ._version import __version__
from .data.text import Document, TextError, default_document, embed, read_document
from .info import collect

HEADS, HEAD_DIM = 4, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)
QUICK_LENGTHS = (256, 512, 1024)
GRADIENT_LENGTH = 500  # whole gradients are compared here, with every option divided by eight
RING_RANKS, RING_LENGTH = 4, 512
# Rounding differs from method to method; more than this many times SDPA's own error is a defect.
ERROR_FACTOR, ERROR_FLOOR = 1.5, 1e-6
SAMPLE_SECONDS = 0.2

Tensors = tuple[torch.Tensor, ...]
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """q, k, v and the gradient of out, all (1, T, HEADS, HEAD_DIM)."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    dout: torch.Tensor

    @classmethod
    def of(cls, document: Document, length: int) -> "Problem":
        """The first `length` bytes of a document."""
        q, k, v = embed(document.data[:length], HEADS, HEAD_DIM)
        generator = torch.Generator().manual_seed(1)
        return cls((q, k, v), torch.randn(q.shape, generator=generator))

    def forward_backward(self, call: Call) -> Tensors:
        """(out, dq, dk, dv)."""
        q, k, v = (x.detach().requires_grad_() for x in self.tensors)
        out = call(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), self.dout))

    def gradient_error(self, call: Call, op: str, options: dict[str, Any]) -> float:
        """The worst error of out, dq, dk, dv against the dense definition."""
        expected = definition_gradients(op, *self.tensors, self.dout, **options)
        return max(map(relative_rms, self.forward_backward(call), expected))


@dataclass(frozen=True)
class Method:
    """A line of the table: the operation and its options, which grow with the unit length `n`."""

    name: str
    op: str
    function: Callable[..., Any]
    options: Callable[[int], dict[str, Any]]

    def call(self, unit: int, backend: str) -> Call:
        """The attention as a function of q, k, v alone."""
        extra = self.options(unit) | ({} if self.function is _sdpa else {"backend": backend})

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            result = self.function(q, k, v, **extra)
            out: torch.Tensor = result[0] if isinstance(result, tuple) else result
            return out

        return attention


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _branches(n: int) -> dict[str, Any]:
    return {"segment_lengths": [2 * n, 4 * n, 8 * n, 16 * n], "dilation_rates": [1, 2, 4, 8]}


METHODS = (
    Method("sdpa", "flash", _sdpa, lambda n: {}),
    Method("infini", "infini", infini_attention, lambda n: {"segment_len": n}),
    Method("dilated", "dilated", dilated_attention, _branches),
    Method("landmark", "landmark", landmark_attention, lambda n: {"block_size": 64}),
)


@dataclass
class Result:
    """One line of the table. Errors are RMS relative to the fp64 definition."""

    length: int
    method: str
    seconds: float | None = None  # forward + backward
    extra_bytes: int | None = None  # peak beyond inputs and outputs
    speedup: float | None = None  # over SDPA on the same tensors
    error: float | None = None  # sampled rows of out
    gradient_error: float | None = None  # the worst of the gradients, at a short length
    failures: list[str] = field(default_factory=list)


def run(
    document: Document, lengths: Sequence[int], backend: str, step: Callable[[str], None]
) -> list[Result]:
    """Every method at every length, then the ring; `step` is told what comes next."""
    unit = lengths[0]
    step("gradients")
    short = Problem.of(document, min(GRADIENT_LENGTH, unit))
    gradient_errors = {
        m.name: short.gradient_error(m.call(unit // 8, backend), m.op, m.options(unit // 8))
        for m in METHODS
    }
    results: list[Result] = []
    for length in lengths:
        problem = Problem.of(document, length)
        sdpa = None
        for method in METHODS:
            step(f"{method.name}, {length} tokens")
            result = measure(method, problem, unit, backend)
            sdpa = sdpa or result
            result.gradient_error = gradient_errors[method.name]
            if sdpa.seconds and result.seconds:
                result.speedup = sdpa.seconds / result.seconds
            if result is not sdpa:
                judge(result, sdpa)
            results.append(result)
    step(f"ring, {RING_RANKS} simulated ranks")
    results.append(ring_result(document, results[0]))
    return results


def measure(method: Method, problem: Problem, unit: int, backend: str) -> Result:
    """Memory, error of sampled rows, and time; the call under the memory meter warms up."""
    call = method.call(unit, backend)
    kept: list[torch.Tensor] = []
    result = Result(problem.dout.shape[1], method.name)

    def once() -> Tensors:
        kept[:] = problem.forward_backward(call)
        return tuple(kept)

    result.extra_bytes = peak_extra_bytes(once)
    out = kept[0] if kept else once()[0]
    rows = sample_rows(result.length)
    expected = definition_rows(method.op, *problem.tensors, rows, **method.options(unit))
    result.error = relative_rms(out[:, rows], expected)
    kept.clear()
    timer = Timer(
        "fn()",
        globals={"fn": lambda: problem.forward_backward(call)},
        num_threads=torch.get_num_threads(),
        timer=time.perf_counter,
    )
    result.seconds = timer.blocked_autorange(min_run_time=SAMPLE_SECONDS).median
    return result


def judge(result: Result, sdpa: Result) -> None:
    """Note a failure for every error beyond ERROR_FACTOR times SDPA's own; NaN always is."""
    for what, error, base in (
        ("rows of out", result.error, sdpa.error),
        ("gradients", result.gradient_error, sdpa.gradient_error),
    ):
        limit = max(ERROR_FACTOR * (base or 0.0), ERROR_FLOOR)
        if error is None or not error <= limit:
            result.failures.append(
                f"{result.method}, {result.length} tokens, {what}: error {error} > {limit:.1e}"
            )


def ring_result(document: Document, sdpa: Result) -> Result:
    """The ring's definition, on simulated ranks with zigzag shards, against dense attention.

    It shows the method, not its speed, so there is no time: the real one needs several GPUs.
    """
    problem = Problem.of(document, min(RING_LENGTH, len(document.data)))
    length = problem.dout.shape[1]
    pieces = torch.arange(length).tensor_split(2 * RING_RANKS)
    positions = [torch.cat([pieces[r], pieces[-1 - r]]) for r in range(RING_RANKS)]
    sequence = torch.cat(positions).argsort()

    def ring(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        qs, ks, vs = ([x[:, p] for p in positions] for x in (q, k, v))
        outs, _ = reference.ring_attention(qs, ks, vs, positions)
        return torch.cat(outs, dim=1)[:, sequence]

    result = Result(length, f"ring ({RING_RANKS} simulated ranks)")
    out = ring(*problem.tensors)
    result.error = relative_rms(out, definition_rows("flash", *problem.tensors, range(length)))
    result.gradient_error = problem.gradient_error(ring, "flash", {})
    judge(result, sdpa)
    return result


def usable_lengths(document: Document, quick: bool) -> tuple[int, ...]:
    """The lengths that the document is long enough for; TextError if there is none."""
    wanted = QUICK_LENGTHS if quick else LENGTHS
    lengths = tuple(n for n in wanted if n <= len(document.data))
    if not lengths:
        raise TextError(
            f"{document.name}: {len(document.data)} bytes, the demo needs at least {wanted[0]}"
        )
    return lengths


def report(document: Document, results: Sequence[Result], machine: str) -> dict[str, Any]:
    """What demo.json holds."""
    return {
        "lctx_kernels": __version__,
        "torch": torch.__version__,
        "machine": machine,
        "text": {"name": document.name, "bytes": len(document.data), "sha256": document.sha256},
        "shape": {"B": 1, "H": HEADS, "D": HEAD_DIM, "dtype": "float32"},
        "results": [asdict(result) for result in results],
        "failures": [line for result in results for line in result.failures],
    }


def machine_line() -> str:
    """Processor, threads and torch in one line."""
    cpu = collect()["cpu"]
    model = cpu["model"] if isinstance(cpu, dict) else "CPU"
    isa, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{model}, {isa}, {threads} threads, torch {torch.__version__}"


def main(text: Path | None, out: Path, quick: bool, backend: str = "auto") -> int:
    """Run the demo, print its table, write demo.json and demo.png; 1 if a check failed."""
    from .demo_show import Progress, say, show_table, write_plot

    try:
        document = read_document(text) if text is not None else default_document()
        lengths = usable_lengths(document, quick)
        out.mkdir(parents=True, exist_ok=True)
    except (TextError, OSError) as error:
        say(f"lctx demo: {error}", error=True)
        return 2
    say(f"text: {document.name}, {len(document.data)} bytes, sha256 {document.sha256[:16]}")
    say(f"machine: {machine_line()}; q, k, v: (1, T, {HEADS}, {HEAD_DIM}) fp32, forward + backward")
    started = time.perf_counter()
    with Progress(len(lengths) * len(METHODS) + 2) as progress:
        results = run(document, lengths, backend, progress.step)
    show_table(results)
    data = report(document, results, machine_line())
    write_json(out / "demo.json", data)
    say(f"wrote {out / 'demo.json'}")
    write_plot(results, out / "demo.png", machine_line())
    for line in data["failures"]:
        say(f"FAILED {line}", error=True)
    verdict = f"{len(data['failures'])} checks failed" if data["failures"] else "every check passed"
    say(f"{verdict}; {time.perf_counter() - started:.0f} s")
    return 1 if data["failures"] else 0
