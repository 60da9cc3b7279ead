"""AITER's calls against a stand-in that checks shapes, dtypes and layouts, and raises as the library does.

It shows that the calls are the ones that were read, and that what is around them is right; nothing of the library ran.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import qhal
from qhal.requests import GemmRequest, NumericsClass
from qhal_conformance import datasets
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_portable.prepared import PreparedWeight
from qhal_rocm import aiter_calls, fnuz, products
from qhal_rocm.ops import RocmOps
from qhal_rocm.targets import target

ALL = frozenset(call.name for call in aiter_calls.CALLS)
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
seen: list[str] = []


def the_chip() -> str:
    """Set by each test: the library asks its driver."""
    return seen[0]


def gemm_a8w8(XQ, WQ, x_scale, w_scale, bias=None, dtype=torch.bfloat16, splitK=None):  # type: ignore[no-untyped-def]
    seen.append("gemm_a8w8")
    own = torch.float8_e4m3fnuz if the_chip() == "gfx942" else torch.float8_e4m3fn
    (m, k), n = XQ.shape, WQ.shape[0]
    if dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError("Unsupported output dtype")
    assert XQ.dtype == WQ.dtype and XQ.dtype in (torch.int8, own), f"{XQ.dtype} on {the_chip()}"
    assert WQ.shape == (n, k) and n % 16 == 0 and k % 16 == 0 and XQ.is_contiguous() and WQ.is_contiguous()
    assert x_scale.shape == (m, 1) and w_scale.shape == (1, n) and x_scale.is_contiguous() and w_scale.is_contiguous()
    assert x_scale.dtype == w_scale.dtype == torch.float32 and bias is None and splitK == 0
    total = XQ.double() @ WQ.double().T
    return (total.float() * x_scale * w_scale).to(dtype)


def gemm_a8w8_blockscale(XQ, WQ, x_scale, w_scale, dtype=torch.bfloat16, isBpreshuffled=False):  # type: ignore[no-untyped-def]
    seen.append("gemm_a8w8_blockscale")
    own = torch.float8_e4m3fnuz if the_chip() == "gfx942" else torch.float8_e4m3fn
    (m, k), n = XQ.shape, WQ.shape[0]
    assert dtype in (torch.bfloat16, torch.float16) and not isBpreshuffled
    assert XQ.dtype == WQ.dtype == own and x_scale.dtype == w_scale.dtype == torch.float32
    assert x_scale.shape == (m, k // 128) and w_scale.shape == (n // 128, k // 128) and n % 128 == k % 128 == 0
    x = XQ.double() * x_scale.double().repeat_interleave(128, 1)
    w = WQ.double() * w_scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (x @ w.T).to(dtype)


def gemm_afp4wfp4(x, w, x_scales, w_scales, dtype=torch.bfloat16, y=None, config=None):  # type: ignore[no-untyped-def]
    seen.append("gemm_afp4wfp4")
    assert the_chip() in ("gfx950", "gfx1250"), "MXFP4 is not supported on this device"
    assert dtype in (torch.bfloat16, torch.float16)
    assert x.dtype == w.dtype == x_scales.dtype == w_scales.dtype == torch.uint8 and x.is_contiguous()
    assert x_scales.shape == (x.shape[0], x.shape[1] // 16) and w_scales.shape == (w.shape[0], w.shape[1] // 16)

    def value(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
        number = FP4[codes & 7].double() * (1.0 - 2.0 * (codes >> 3))
        power = torch.ldexp(torch.ones(scales.shape, dtype=torch.float64), scales.int() - 127)
        return number * torch.where(scales == 255, torch.nan, power).repeat_interleave(32, 1)

    return (value(x, x_scales) @ value(w, w_scales).T).to(dtype)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen[:] = ["gfx942"]
    found = {
        name: types.ModuleType(name) for name in ("aiter", "aiter.ops", "aiter.ops.triton", aiter_calls.MXFP4.module)
    }
    found["aiter"].gemm_a8w8 = gemm_a8w8  # type: ignore[attr-defined]
    found["aiter"].gemm_a8w8_blockscale = gemm_a8w8_blockscale  # type: ignore[attr-defined]
    found[aiter_calls.MXFP4.module].gemm_afp4wfp4 = gemm_afp4wfp4  # type: ignore[attr-defined]
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(aiter_calls, "version", lambda package: "0.1.7")


def request_of(w: str, x: str, **more: object) -> GemmRequest:
    made = GemmRequest(w=qhal.Format.parse(w), n=256, k=256, x=(qhal.Format.parse(x),))
    return replace(made, **more)  # type: ignore[arg-type]


def taken() -> Iterator[tuple[str, Case]]:
    for arch in ("gfx942", "gfx950"):
        for case in catalogue(0):
            request = OPERATIONS[case.operation].request(case)
            if isinstance(request, GemmRequest) and products.choose(request, target(arch), ALL) is not None:
                yield arch, case


TAKEN = list(taken())


@pytest.mark.parametrize(("arch", "case"), TAKEN, ids=[f"{arch}-{case.id}" for arch, case in TAKEN])
def test_the_suite_through_the_calls(arch: str, case: Case) -> None:
    seen[:] = [arch]
    record = run_case(case, RocmOps(arch, "cpu", ALL))
    assert record.outcome.status is Status.PASS, record.outcome.reason


def product(arch: str, w: str, x: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(through the call, the float64 product of the same codes) of a bf16 input."""
    seen[:] = [arch]
    ops, f, g = RocmOps(arch, "cpu", ALL), qhal.Format.parse(w), qhal.Format.parse(x)
    weight = datasets.weight("aiter", "w", f, 256, 256, "normal")
    prepared = ops.prepare(weight, request_of(w, x), inputs=[qhal.Operand(g)])
    rows = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = ops.quantize(rows, g).dequantize().double() @ weight.dequantize().double().T
    return ops.gemm(rows, prepared), exact


@pytest.mark.parametrize(
    ("arch", "w", "x", "call"),
    [
        ("gfx942", "int8.row*fp32", "int8.row*fp32", "gemm_a8w8"),
        ("gfx942", "e4m3fn.row*fp32", "e4m3fn.row*fp32", "gemm_a8w8"),
        ("gfx942", "e4m3fnuz.row*fp32", "e4m3fnuz.row*fp32@qmax=224", "gemm_a8w8"),
        ("gfx950", "e4m3fn.tensor*fp32", "e4m3fn.row*fp32", "gemm_a8w8"),
        ("gfx942", "e4m3fn.128x128*fp32", "e4m3fn.g128*fp32", "gemm_a8w8_blockscale"),
        ("gfx950", "e4m3fn.128x128*bf16", "e4m3fn.g128*fp32", "gemm_a8w8_blockscale"),
        ("gfx950", "e2m1.g32*e8m0", "e2m1.g32*e8m0@e8m0=even", "gemm_afp4wfp4"),
    ],
)
def test_each_call_is_made_and_right(arch: str, w: str, x: str, call: str) -> None:
    got, exact = product(arch, w, x)
    assert set(seen[1:]) == {call} and got.dtype == torch.bfloat16
    assert torch.allclose(got.double(), exact, rtol=2**-7, atol=1e-5 * float(exact.abs().max()))
    answer = RocmOps(arch, "meta", ALL).supports(request_of(w, x))
    assert (
        answer and call in answer.executes and ("fnuz flavour" in answer.executes) == ("fn." in w and arch == "gfx942")
    )


@pytest.mark.parametrize(
    ("arch", "request_"),
    [
        ("gfx950", request_of("int8.row*fp32", "int8.row*fp32", n=264)),
        ("gfx950", request_of("int8.row*fp32", "int8.row*fp32", k=248)),
        ("gfx950", request_of("int8.row*fp32", "int8.row*fp32", bias=True)),
        ("gfx950", request_of("int8.row*fp32", "int8.row*fp32", out=torch.float32)),
        ("gfx950", request_of("int8.row*fp32", "int8.row*fp32", k=1 << 17)),
        ("gfx950", request_of("int8.row*fp32", "int8.row*fp32", batch_invariant=True)),
        ("gfx950", request_of("e4m3fn.row*fp32", "e4m3fn.row*fp32", numerics=NumericsClass.EXACT)),
        ("gfx950", request_of("e4m3fnuz.row*fp32", "e4m3fnuz.row*fp32")),
        ("gfx950", request_of("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32", n=192)),
        ("gfx950", request_of("e4m3fn.64x64*fp32", "e4m3fn.g64*fp32")),
        ("gfx950", request_of("e2m1.g32*e8m0", "e2m1.g32*e8m0", k=128)),
        ("gfx942", request_of("e2m1.g32*e8m0", "e2m1.g32*e8m0")),
        ("gfx1201", request_of("e2m1.g32*e8m0", "e2m1.g32*e8m0")),
        ("gfx1100", request_of("e4m3fn.row*fp32", "e4m3fn.row*fp32")),
        ("gfx950", request_of("int4.g32*bf16", "bf16")),
    ],
)
def test_what_breaks_a_rule_is_not_the_librarys(arch: str, request_: GemmRequest) -> None:
    assert products.choose(request_, target(arch), ALL) is None
    assert "aiter" not in RocmOps(arch, "meta", ALL).supports(request_).executes


def test_without_the_library_nothing_is_asked_of_it() -> None:
    request = request_of("int8.row*fp32", "int8.row*fp32")
    assert products.choose(request, target("gfx942"), frozenset()) is None
    assert "aiter" not in RocmOps("gfx942", "meta").supports(request).executes


def test_results_in_fp32_are_the_portable_product() -> None:
    ops, f = RocmOps("gfx942", "cpu", ALL), qhal.Format.parse("int8.row*fp32")
    w = datasets.weight("aiter", "fp32", f, 256, 256, "normal")
    prepared = ops.prepare(w, request_of(str(f), str(f)), inputs=[qhal.Operand(f)])
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    assert ops.gemm(x, prepared).dtype == torch.float32 and seen == ["gfx942"]


def test_nan_bytes_are_refused_before_anything_is_kept() -> None:
    f = qhal.Format.parse("e4m3fn.row*fp32")
    w = datasets.weight("aiter", "nan", f, 256, 256, "normal")
    ops, request = RocmOps("gfx942", "cpu", ALL), request_of(str(f), str(f))
    prepared = ops.prepare(w, request, inputs=[qhal.Operand(f)])
    assert isinstance(prepared, PreparedWeight)
    before = {name: t.clone() for name, t in prepared.tensors().items()}
    w.codes.view(torch.uint8)[7, 9] = 0x7F
    with pytest.raises(qhal.FormatError, match=r"the weight has NaN or Inf among its torch\.float8_e4m3fn codes"):
        ops.prepare(w, request, inputs=[qhal.Operand(f)], into=prepared)
    assert all(torch.equal(t.view(torch.uint8), before[n].view(torch.uint8)) for n, t in prepared.tensors().items())


def test_the_weight_comes_back_and_the_callers_is_not_touched() -> None:
    f = qhal.Format.parse("e4m3fn.row*fp32")
    w = datasets.weight("aiter", "back", f, 256, 256, "normal")
    w.codes.view(torch.uint8)[0, 0] = 0x80
    copy = w.codes.view(torch.uint8).clone()
    ops = RocmOps("gfx942", "cpu", ALL)
    back = ops.restore(ops.prepare(w, request_of(str(f), str(f)), inputs=[qhal.Operand(f)]))
    assert torch.equal(w.codes.view(torch.uint8), copy)
    assert isinstance(back, qhal.QTensor) and torch.equal(back.dequantize(), w.dequantize())
    changed = back.codes.view(torch.uint8) != copy
    assert set(copy[changed].tolist()) == {0x80} and set(back.codes.view(torch.uint8)[changed].tolist()) == {0}


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
def test_activations_of_every_code(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(qhal.elements.element(name).storage)
    got = fnuz.activation(codes, name).float() * fnuz.FACTOR
    finite = torch.isfinite(codes.float())
    assert torch.equal(got[finite], codes.float()[finite]) and bool(torch.isnan(got[~finite]).all())


def test_what_is_installed_is_what_was_read() -> None:
    assert aiter_calls.usable() == ALL


def test_other_arguments_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["aiter"], "gemm_a8w8", lambda XQ, WQ, w_scale, x_scale, dtype: None)
    with pytest.warns(RuntimeWarning, match="gemm_a8w8 is not used: its arguments are XQ, WQ, w_scale"):
        assert aiter_calls.usable() == ALL - {"gemm_a8w8"}


def test_an_import_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, aiter_calls.MXFP4.module, None)
    with pytest.warns(RuntimeWarning, match="gemm_afp4wfp4 is not used: its import failed"):
        assert aiter_calls.usable() == ALL - {"gemm_afp4wfp4"}


def test_the_other_project_of_that_name_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise aiter_calls.PackageNotFoundError(package)

    monkeypatch.setattr(aiter_calls, "version", missing)
    assert aiter_calls.installed() is None and aiter_calls.usable() == frozenset()
