"""vq_decode: the kernel gives the bits of `CodebookTensor.dequantize`."""

from __future__ import annotations

import pytest
import torch
from triton_ops import DEVICE, HOPPER, Emulated, cases, matrix_product

import qhal
from qhal.codebooks import CodebookSegment, CodebookTensor
from qhal.formats import Format
from qhal.requests import GemmRequest, VQRequest
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_triton.vq import launch

OPS = Emulated()
CASES = [
    case
    for case in catalogue(0)
    if case.operation == "vq_decode" and (DEVICE != "cpu" or case.size("n") * case.size("k") < 1 << 17)
]


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_the_suite_passes_on_the_kernel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    request = OPERATIONS[case.operation].request(case)
    assert isinstance(request, VQRequest) and launch.choose(request, HOPPER) is not None
    monkeypatch.setattr("qhal_portable.gemm.vq_decode", None)  # the kernel is what runs
    record = run_case(case, OPS)
    assert record.outcome.status is Status.PASS, record.outcome.reason


PRODUCTS = cases("vq_gemm", OPS, 3)


@pytest.mark.parametrize("case", PRODUCTS, ids=[case.id for case in PRODUCTS])
def test_products_pass_the_suite(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix_product(monkeypatch)
    request = OPERATIONS[case.operation].request(case)
    assert OPS.supports(request).executes.startswith("Triton") and OPS.supports(request).graph
    record = run_case(case, OPS)
    assert record.outcome.status is Status.PASS, record.outcome.reason


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_few_rows_are_multiplied_as_they_are_gathered(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(1, 8, 2, full=False, divisors=(1.0, 3.45))
    w = CodebookTensor((29, 24), w.segments[:1], torch.linspace(0.5, 2, 29))
    monkeypatch.setattr(torch, "mm", None)
    request = GemmRequest(w=w.format, n=29, k=24, x=(Format("bf16"),), out=torch.float32, bias=True)
    bias = torch.linspace(-1, 1, 29)
    p = OPS.prepare(w, request, bias=bias)
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows)).bfloat16()[:, :24]
    got = OPS.gemm(x.to(DEVICE), p).cpu()
    torch.testing.assert_close(got, x.float() @ w.dequantize().T + bias, rtol=1e-5, atol=1e-5)


def weight(a: int, b: int, books: int, *, full: bool, divisors: tuple[float, ...] = ()) -> CodebookTensor:
    """[29, 52] of two segments; the last vectors reach past both ends."""
    g = torch.Generator().manual_seed(a * 10 + b)
    n, k = 29, 52
    rows, segments = -(-n // a), []
    for columns in (24, k + b - 24 - 1):
        tables = tuple(torch.randn(37, a, b, generator=g).half() for _ in range(books))
        codes = torch.randint(0, 37, (rows, columns // b, books), generator=g, dtype=torch.int32)
        segments.append(CodebookSegment(codes, tables, divisors))

    def vector(size: int) -> torch.Tensor | None:
        return torch.randn(size, generator=g) if full else None

    order = torch.randperm(k, generator=g) if full else None
    return CodebookTensor((n, k), tuple(segments), vector(rows), order, vector(k), vector(k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("a", "b", "books", "full", "divisors"),
    [
        (1, 8, 1, False, ()),
        (1, 8, 2, True, ()),
        (8, 1, 2, True, (1.0, 3.45)),
        (3, 4, 3, True, ()),
        (12, 1, 4, False, (1.0, 2.0, -0.3, 1.0)),
    ],
)
def test_bits_and_rows(a: int, b: int, books: int, full: bool, divisors: tuple[float, ...], dtype: torch.dtype) -> None:
    w = weight(a, b, books, full=full, divisors=divisors)
    want = w.dequantize(dtype)
    p = OPS.prepare(w, VQRequest(w=w.format, n=29, k=52, out=dtype))
    for rows in (None, slice(0, 29), slice(7, 16), slice(-3, None), slice(5, 5), slice(9, 2), slice(0, 29, 3)):
        got = OPS.vq_decode(p, rows=rows)
        assert torch.equal(got.cpu(), want if rows is None else want[rows]), rows
    out = torch.zeros(29, 60, dtype=dtype, device=DEVICE)
    assert OPS.vq_decode(p, out=out[:, :52]).data_ptr() == out.data_ptr()
    assert torch.equal(out[:, :52].cpu(), want) and not out[:, 52:].any()
    with pytest.raises(qhal.FormatError, match="the result is"):
        OPS.vq_decode(p, out=out)
