"""supports: total over anything, checked both ways, and what the package promises to its environment."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qhal
from qhal import (
    Activation,
    AttentionRequest,
    Codec,
    CommRequest,
    Format,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    KVCache,
    KVRequest,
    Limits,
    NumericsClass,
    Operand,
    QuantizeRequest,
    Support,
    UnsupportedError,
)
from qhal.elements import ELEMENTS, dtype_name
from qhal.grammar import ALIASES
from qhal.requests import Arithmetic, minimum_class

NAMES = [
    *ALIASES, *ELEMENTS, "int8.row*bf16@qmax=127.5", "int4-int4.row*(bf16.tensor*bf16)", "int8.head*fp32",
    "int8.col*fp32", "e4m3fn.row*bf16%2:4", "uint4-uint4.g8*fp16@domain=minmax", "int8.row*e8m0@e8m0=even",
    "int8.g4*(int8.row*int4)",
    "int4.row*fp32@special=error", "uint4-(uint4.row*fp32).g8*fp16", "int8.16x16*(e4m3fn.4x4*fp32)", "e8m0.row*fp32",
]  # fmt: skip
formats = st.sampled_from(NAMES).map(Format.parse)
sizes = st.sampled_from([-1, 0, 1, 7, 8, 16])
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, None])
kv_requests = st.builds(
    KVRequest, kind=st.sampled_from(["mha", "mla", "other"]), k=formats, v=formats, heads=sizes, k_dim=sizes,
    v_dim=sizes, page=sizes,
)  # fmt: skip
gemm_requests = st.builds(
    GemmRequest, w=formats, n=sizes, k=sizes, x=st.lists(formats, max_size=2).map(tuple), m=st.tuples(sizes, sizes),
    out=dtypes, operand=st.none() | formats, bias=st.booleans(), group_index=st.booleans(), graph=st.booleans(),
    batch_invariant=st.booleans(), numerics=st.none() | st.sampled_from(NumericsClass),
)  # fmt: skip
anything = st.one_of(
    gemm_requests,
    st.builds(
        GroupedRequest, gemm=gemm_requests, experts=sizes, top_k=sizes, quantize=st.none() | formats,
        groups=st.sampled_from(["offsets", "masked", "indexed", "x"]),
        activation=st.none() | st.builds(Activation, name=st.sampled_from(["silu", "mish"]), gated=st.booleans()),
    ),
    kv_requests,
    st.builds(
        AttentionRequest, kv=kv_requests, heads=sizes, scale=st.floats(), q=formats, p=formats, out=dtypes,
        phase=st.sampled_from(["prefill", "decode", ""]), window=st.none() | sizes, softcap=st.none() | st.floats(),
        graph=st.booleans(),
    ),
    st.builds(
        QuantizeRequest, x=dtypes, format=formats, static=st.booleans(), layout=st.sampled_from(["canonical", "x"])
    ),
    st.builds(
        HadamardRequest, n=sizes, x=dtypes, quantize=st.none() | formats,
        kinds=st.lists(
            st.tuples(st.sampled_from(["hadamard", "diagonal", "dense", "kronecker", "x"]), sizes, sizes), max_size=2
        ).map(tuple),
    ),
    st.builds(
        CommRequest, collective=st.sampled_from(["all_reduce", "all_gather", "x"]), world=sizes, x=dtypes, numel=sizes,
        codec=st.builds(Codec, formats, order=st.sampled_from(["sequential", "parity"]), spikes=st.integers(0, 1)),
        decode=st.booleans(),
    ),
    st.sampled_from([None, 3, "gemm", [], GemmRequest(w=None, n="a", k=None, x=([],))]),  # type: ignore[arg-type]
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(anything)
def test_supports_is_total_pure_and_says_why(ops, request_):
    answer = ops.supports(request_)
    assert isinstance(answer, Support) and answer == ops.supports(request_)
    if answer:
        assert answer.level == "full" and answer.executes and answer.numerics is not None
        assert answer.numerics <= minimum_class(request_) or isinstance(request_, HadamardRequest)
        asked = Arithmetic.of(request_)
        assert (answer.arithmetic is None) == (asked is None)
        if asked is not None:
            assert (answer.arithmetic.x, answer.arithmetic.w) == (asked.x, asked.w)
    else:
        assert answer.reason and answer.level in ("unsupported", "not_implemented")
    if answer.nearest is not None:
        assert ops.supports(answer.nearest).level == "full"


@settings(max_examples=400, deadline=None)
@given(x=formats, static=st.booleans(), dtype=dtypes)
def test_quantize_is_honest_both_ways(ops, x, static, dtype):
    r = QuantizeRequest(x=dtype, format=x, static=static)
    answer = ops.supports(r)
    if dtype is None:
        assert not answer
        return
    data = torch.zeros(2, 16).to(dtype)
    if x.sparsity is None:
        data = torch.linspace(-1, 1, 32).reshape(2, 16).to(dtype)
    o = Operand(x, scale=torch.ones(1) if static else None, zero=torch.zeros(1) if static and x.zero else None)
    if answer:
        q = ops.quantize(data, o)
        assert q.shape == (2, 16) and torch.isfinite(q.dequantize()).all()
    else:
        with pytest.raises(UnsupportedError) as refused:
            ops.quantize(data, o)
        assert refused.value.support == answer


@settings(max_examples=250, deadline=None)
@given(r=gemm_requests, sane=st.booleans())
def test_gemm_is_honest_both_ways(ops, make, r, sane):
    r = replace(r, group_index=False)
    if sane:  # otherwise nearly every example is refused for its sizes
        r = replace(r, n=8, k=16, m=(1, 9), out=torch.bfloat16, graph=False, x=r.x or (Format("bf16"),))
    answer = ops.supports(r)
    shape = (max(r.n, 1), max(r.k, 1))
    plain = all(f.plain and f.element in ("fp32", "fp16", "bf16") for f in r.x)
    inputs = [] if plain else [Operand(f) for f in r.x]
    try:
        w = make(replace(r.w.storage, sparsity=None), shape)
    except qhal.FormatError:  # a plane that spans no block of so small a matrix
        return
    w = replace(w, format=r.w.storage)
    kw = {"inputs": inputs, "operand": None if r.operand is None else Operand(r.operand)}
    kw["bias"] = torch.zeros(shape[0]) if r.bias else None
    if not answer:
        with pytest.raises(UnsupportedError) as refused:
            ops.prepare(w, r, **kw)
        assert refused.value.support == answer
        return
    p = ops.prepare(w, r, **kw)
    y = ops.gemm(torch.zeros(2, r.k).bfloat16(), p)
    assert y.shape == (2, r.n) and y.dtype == (r.out or torch.bfloat16)
    assert ops.restore(p).equal(w)


@settings(max_examples=250, deadline=None)
@given(r=kv_requests, q=formats, p=formats, sane=st.booleans())
def test_attention_is_honest_both_ways(ops, r, q, p, sane):
    if sane:
        q, p = Format("bf16"), Format("fp32")
        r = replace(r, kind="mha" if r.kind == "other" else r.kind, heads=1, k_dim=16, v_dim=7, page=2)
    a = AttentionRequest(kv=r, heads=2 * r.heads, scale=1.0, phase="mixed", q=q, p=p, out=torch.float32)
    if not ops.supports(a):
        with pytest.raises(UnsupportedError):
            ops.attention_batch(a, Limits(1, 4, 4))
    if not ops.supports(r):
        with pytest.raises(UnsupportedError):
            ops.kv_planes(r)
        return
    layout, planes = ops.kv_planes(r, attention=[a] if ops.supports(a) else [])
    cache = KVCache.allocate(r, 4, "cpu", planes=planes, layout=layout)
    lead = () if r.kind == "mla" else (r.heads,)
    k, v = torch.randn(3, *lead, r.k_dim), torch.randn(3, *lead, r.v_dim)
    ops.quant_kv(k, v, cache, torch.arange(3))
    if ops.supports(a):
        batch = ops.attention_batch(a, Limits(1, 4, 4))
        pages = torch.arange(4, dtype=torch.int32)[None]
        batch.plan(torch.tensor([3]).int(), torch.tensor([3]).int(), pages)
        width = r.k_dim + (r.v_dim if r.kind == "mla" else 0)
        o = ops.attention(torch.randn(3, a.heads, width), cache, batch)
        assert o.shape == (3, a.heads, r.k_dim if r.kind == "mla" else r.v_dim)


def eye(n: int) -> torch.Tensor:
    return torch.eye(n)


CHAINS = [
    (qhal.Hadamard(16), True), (qhal.Hadamard(8), True), (qhal.Hadamard(32), False),
    (qhal.Hadamard(12, 3, "none"), False), (qhal.Diagonal(torch.ones(16)), True), (qhal.Diagonal(torch.ones(8)), False),
    (qhal.Dense(eye(4)), True), (qhal.Dense(eye(5)), False), (qhal.Kronecker(eye(4), eye(4)), True),
    (qhal.Kronecker(eye(2), eye(4)), False), (qhal.Kronecker(None, eye(4)), True),
    (qhal.Kronecker(eye(3), None), False),
]  # fmt: skip


@pytest.mark.parametrize(("rotation", "fits"), CHAINS, ids=lambda r: str(getattr(r, "kind", r)))
def test_hadamard_is_honest_both_ways(ops, rotation, fits):
    assert bool(ops.supports(HadamardRequest(kinds=(rotation.kind,), n=16, x=torch.float32))) == fits
    if fits:
        assert ops.hadamard(torch.ones(2, 16), (rotation,)).shape == (2, 16)
    else:
        with pytest.raises(UnsupportedError):
            ops.hadamard(torch.ones(2, 16), (rotation,))


def test_only_stored_weights_are_sparse(ops):
    sparse, plain = Format.parse("e4m3fn.row*bf16%2:4"), Format("bf16")
    usual = {"w": sparse, "n": 8, "k": 16, "x": (plain,)}
    kv = {"kind": "mha", "k": plain, "v": plain, "heads": 1, "k_dim": 8, "v_dim": 8, "page": 2}
    cache = KVRequest(**kv)
    attention = {"kv": cache, "heads": 1, "scale": 1.0, "phase": "mixed", "q": plain, "p": plain, "out": torch.float32}
    assert ops.supports(GemmRequest(**usual)) and ops.supports(cache) and ops.supports(AttentionRequest(**attention))
    for refused in (
        GemmRequest(**{**usual, "x": (sparse,)}),
        GemmRequest(**usual, operand=sparse),
        KVRequest(**{**kv, "v": sparse}),
        AttentionRequest(**{**attention, "q": sparse}),
    ):
        assert "only a stored weight is sparse" in ops.supports(refused).reason


@pytest.mark.parametrize("name", ["bf16.row*bf16", "fp32.row*fp32", "uint4.row*fp32@domain=signed"])
def test_scales_that_cannot_be_computed_are_not_claimed(ops, name):
    request = QuantizeRequest(x=torch.float32, format=Format.parse(name))
    assert not ops.supports(request) and ops.supports(replace(request, static=True))


def test_what_is_not_written_says_so(ops):
    with pytest.raises(UnsupportedError, match="graph capture"):
        ops.capture(lambda: None)


def test_device_verbs(ops):
    assert ops.device == torch.device("cpu")
    ops.synchronize()
    held = torch.ones(1 << 22)
    s = ops.memory_stats()
    assert s.total > s.used > held.nbytes and s.peak >= s.used


def test_selection_finds_it():
    ops = qhal.select("cpu_reference")
    assert type(ops).name == "cpu_reference" and qhal.select("cpu_reference:0").device.type == "cpu"
    info = qhal.backends()["cpu_reference"]
    assert info.order == 1000 and info.interface == qhal.INTERFACE_VERSION
    (device,) = info.probe().devices
    assert device.memory > 0 and device.arch and "torch" in device.facts
    offline = qhal.select("cpu_reference", arch="any")
    r = GemmRequest(w=Format.parse("int4_g32"), n=8, k=32, x=(Format(dtype_name(torch.bfloat16)),))
    assert offline.supports(r) == ops.supports(r)


def test_importing_the_package_imports_nothing():
    code = "import sys, qhal_cpu_reference; print([m for m in ('torch', 'qhal', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
