"""The checks that an implementation of an attention must pass.

Every check takes the implementation as a function with the signature of its definition in
`lctx_kernels.reference`, so that the same checks judge the kernels, the planted bugs and whatever
comes next. Outputs and all gradients are compared by the numerical contract of `helpers` and
returned by name.
"""

import functools
from dataclasses import replace

import torch
from helpers import (
    assert_close_to_reference,
    definition_errors,
    random_landmarks,
    random_memory,
    random_tensor,
    run,
    sdpa_errors,
    stat_dtype,
    worse,
)
from op_cases import LAYOUTS, Case

from lctx_kernels import reference


def cotangents(shapes, seed=40):
    """Multiples of 1/8 below 4: exact in every dtype, so that all dtypes see the same gradient.

    That of lse is 4 times smaller: about as large as the delta = dout . out that it is added to.
    """
    values = {n: random_tensor(*s, seed=seed + i) for i, (n, s) in enumerate(shapes.items())}
    eighths = {n: (8 * x).round().clamp(-31, 31) for n, x in values.items()}
    return {n: x / (32 if n == "lse" else 8) for n, x in eighths.items()}


def double(tensors):
    return {n: None if x is None else x.double() for n, x in tensors.items()}


def visible_keys(definition, options, q, k):
    """(B, Hq, Tq, Tk) bool: where the definition gives a weight to a key."""
    Tk = k.shape[1]
    v = torch.eye(Tk, dtype=torch.float64)[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
    return definition(0 * q.double(), 0 * k.double(), v, **options)[0].transpose(1, 2) > 0


def sdpa_measured(q, k, v, **options):
    dout = cotangents({"out": (*q.shape[:3], v.shape[-1])})["out"]
    return sdpa_errors(q, k, v, dout, **options)


@functools.cache
def self_attention_errors(T, Hq, Hkv, D, magnitude, dtype, causal, scale):
    """SDPA's errors for dense self-attention.

    The largest of few errors is an accident: short sequences are measured on more batch rows.
    """
    case = Case(B=max(2, 1024 // T), T=T, Hq=Hq, Hkv=Hkv, Dk=D, magnitude=magnitude)
    return sdpa_measured(**case.qkv(dtype), causal=causal, scale=scale)


def dense_errors(case, tensors, dtype, visible=None):
    """SDPA's errors for dense attention of this size, or on these very tensors if those are worse.

    At least 64 tokens (a handful of numbers is no measure), and Dv = Dk (so that PyTorch's flash
    kernel runs). visible: SDPA restricted to these keys counts too.
    """
    if dtype == torch.float64:
        return {}
    causal, scale = case.options.get("causal", True), case.options.get("scale")
    options = {"causal": causal, "scale": abs(scale) if scale else None}  # SDPA: NaN for scale <= 0
    T, Hkv = max(case.T, case.num_keys, 64), case.Hkv or case.Hq
    baseline = self_attention_errors(
        T, case.Hq, Hkv, case.Dk, case.magnitude, dtype, *options.values()
    )
    if case.B and case.T and case.num_keys:
        qkv = [tensors[n] for n in "qkv"]
        baseline = worse(baseline, sdpa_measured(*qkv, **options))
        if visible is not None:
            baseline = worse(baseline, sdpa_measured(*qkv, **options, visible=visible))
    return baseline


def compare(implementation, definition, tensors, grads, baseline, *, or_definition=False):
    """Run both and compare every output and gradient; returns what the implementation gave.

    or_definition: errors of the definition, run by PyTorch in this dtype, are allowed too.
    """
    ours = run(implementation, tensors, grads)
    exact = run(definition, double(tensors), grads)
    if or_definition:
        baseline = worse(baseline, definition_errors(definition, tensors, grads, exact))
    for name, expected in exact.items():
        assert_close_to_reference(name, ours[name], expected, baseline.get(name))
    return ours


def named(function, *names, **options):
    """function as keyword tensors -> name -> output."""
    return lambda **x: dict(zip(names, function(**x, **options), strict=True))


def call_options(case, device="cpu"):
    """Keyword arguments of the call that a case stands for."""
    options = dict(case.options)
    for name in {"cu_seqlens", "seqlens"} & options.keys():
        options[name] = torch.tensor(options[name], dtype=torch.int32, device=device)
    if "density" in options:
        landmarks = random_landmarks(case.B, case.num_keys, options.pop("density"), seed=3)
        options["is_landmark"] = landmarks.to(device)
    if "branches" in options:
        options["segment_lengths"], options["dilation_rates"] = options.pop("branches")
    return options


def check_softmax_attention(implementation, case, dtype, definition):
    """out, lse, dq, dk, dv with gradients arriving through out, through lse, and through both."""
    tensors, options, visible = case.qkv(dtype), call_options(case), None
    if {"window", "cu_seqlens", "dilation_rates"} & options.keys() and case.T < 200:
        visible = visible_keys(definition, options, tensors["q"], tensors["k"])
    baseline = dense_errors(case, tensors, dtype, visible)
    ours = named(implementation, "out", "lse", **options)
    exact = named(definition, "out", "lse", **options)
    (B, T, H, _), Dv = tensors["q"].shape, tensors["v"].shape[-1]
    grads = cotangents({"out": (B, T, H, Dv), "lse": (B, H, T)})
    # With scores of hundreds the rounding of lse decides, and the other methods use more than one.
    sharp = case.magnitude > 1 and definition is not reference.flash_attention
    compare(ours, exact, tensors, {"out": grads["out"]}, baseline, or_definition=sharp)
    if dtype == torch.float64:
        compare(ours, exact, tensors, {"lse": grads["lse"]}, baseline)
    results = compare(ours, exact, tensors, grads, baseline, or_definition=True)
    assert results["out"].dtype == dtype and results["lse"].dtype == stat_dtype(dtype)
    return results


check_flash = functools.partial(check_softmax_attention, definition=reference.flash_attention)
check_landmark = functools.partial(check_softmax_attention, definition=reference.landmark_attention)
check_dilated = functools.partial(check_softmax_attention, definition=reference.dilated_attention)


def relative(errors):
    """The same errors for a tensor that has another size than the one they were measured on."""
    return errors._replace(norm=0.0)


def infini_tensors(case, dtype, given, device="cpu", seed=0):
    tensors = case.qkv(dtype, device, seed)
    Hkv, Dv = case.Hkv or case.Hq, case.Dv or case.Dk
    stat = stat_dtype(dtype)
    shapes = (tensors[n].shape for n in "qk")
    apart = [random_tensor(*s, dtype=dtype, seed=21 + i) for i, s in enumerate(shapes)]
    M, z = random_memory(case.B, Hkv, case.Dk, Dv, dtype)
    optional = {
        "gate": torch.linspace(-2, 2, case.Hq, dtype=stat, device=device),
        "q_mem": LAYOUTS[case.layout](apart[0].to(device)),
        "k_mem": LAYOUTS[case.layout](apart[1].to(device)),
        "M": M.to(device),
        "z": z.to(device),
    }
    names = set(given) | ({"M", "z"} if "mem" in given else set())
    return tensors | {n: x for n, x in optional.items() if n in names}


def infini_named(function, **options):
    def call(M=None, z=None, **tensors):
        out, (M, z) = function(**tensors, mem=None if M is None else (M, z), **options)
        return {"out": out, "M": M, "z": z}

    return call


def check_infini(implementation, case, dtype):
    """out, M, z and the gradients of everything given.

    The delta rule amplifies rounding, so that the error may be that of the definition run by
    PyTorch in the same dtype. States have no counterpart in SDPA: M and z may have the relative
    error of its out in fp32, their gradients that of its dq in fp32, dgate that of its dq.
    """
    options = dict(case.options)
    tensors = infini_tensors(case, dtype, options.pop("given", ("gate",)))
    ours = infini_named(implementation, **options)
    exact = infini_named(reference.infini_attention, **options)
    Hkv, Dv = case.Hkv or case.Hq, case.Dv or case.Dk
    grads = cotangents({
        "out": (case.B, case.T, case.Hq, Dv),
        "M": (case.B, Hkv, case.Dk, Dv),
        "z": (case.B, Hkv, case.Dk),
    })  # fmt: skip
    segment = torch.arange(case.T) // case.options.get("segment_len", 2048)
    local = (segment[:, None] == segment).tril()
    baseline = dense_errors(case, tensors, dtype, local if case.T < 200 else None)
    if baseline:
        stat = stat_dtype(dtype)
        state = dense_errors(case, {n: tensors[n].to(stat) for n in "qkv"}, stat)
        baseline |= {"dq_mem": baseline["dq"], "dk_mem": baseline["dk"]}
        baseline |= {"dgate": relative(baseline["dq"])}
        baseline |= {n: relative(state["out"]) for n in ("M", "z")}
        baseline |= {n: relative(state["dq"]) for n in ("dM", "dz")}
    compare(ours, exact, tensors, {"out": grads["out"]}, baseline, or_definition=True)
    results = compare(ours, exact, tensors, grads, baseline, or_definition=True)
    assert results["out"].dtype == dtype
    assert results["M"].dtype == results["z"].dtype == stat_dtype(dtype)
    return results


def check_merge(implementation, case, dtype):
    """Both outs, both lses, and rows that are empty on either side or on both.

    Merging has no counterpart in SDPA; the sums of its backward are those of SDPA's dq.
    """
    stat, (B, T, H, D) = stat_dtype(dtype), (case.B, case.T, case.Hq, case.Dk)
    lse_a, lse_b = (random_tensor(B, H, T, dtype=stat, seed=s, scale=3.0) for s in (5, 6))
    lse_a[:, :, T // 4 : T // 2], lse_b[:, :, T // 3 : 3 * T // 4] = -torch.inf, -torch.inf
    layout = LAYOUTS[case.layout]
    out_a, out_b = (layout(random_tensor(B, T, H, D, dtype=dtype, seed=s)) for s in (3, 4))
    tensors = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    ours = named(implementation, "out", "lse")
    exact = named(reference.merge_attention, "out", "lse")
    grads = cotangents({"out": (B, T, H, D), "lse": (B, H, T)})
    baseline = dense_errors(replace(case, B=0), {}, dtype)
    if baseline:
        baseline |= {f"dout_{side}": relative(baseline["dv"]) for side in "ab"}
        baseline |= {f"dlse_{side}": relative(baseline["dq"]) for side in "ab"}
    compare(ours, exact, tensors, {"out": grads["out"]}, baseline, or_definition=True)
    results = compare(ours, exact, tensors, grads, baseline, or_definition=True)
    assert results["out"].dtype == dtype and results["lse"].dtype == stat
    return results


def check_ring(implementation, case, dtype):
    """Shards of any layout, put back in order, equal attention over the whole sequence."""
    options = dict(case.options)
    positions = [torch.tensor(p, dtype=torch.int64) for p in options.pop("positions")]
    order = torch.cat(positions).argsort()

    def ring(q, k, v):
        shards = ([x[:, p] for p in positions] for x in (q, k, v))
        outs, lses = implementation(*shards, positions, **options)
        return {"out": torch.cat(outs, 1)[:, order], "lse": torch.cat(lses, 2)[:, :, order]}

    tensors = case.qkv(dtype)
    exact = named(reference.flash_attention, "out", "lse", **options)
    grads = cotangents({"out": (*tensors["q"].shape[:3], tensors["v"].shape[-1])})
    return compare(ring, exact, tensors, grads, dense_errors(case, tensors, dtype))
