"""quantize: the kernels' codes and scales are those of the definition, bit for bit, and the kernels are what runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_ops import DEVICE, HOPPER, Emulated, same

import qhal
from qhal.encoding import encode
from qhal.formats import Format
from qhal.requests import QuantizeRequest
from qhal.rules import Rule
from qhal.specs import Operand
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_triton import quantize
from qhal_triton.quantize import launch
from qhal_triton.quantize.config import config
from qhal_triton.tiles import tiles

OPS = Emulated()
CASES = [case for case in catalogue(0) if case.operation == "quantize"]


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not the kernel fails."""

    def portable(*_: object, **__: object) -> None:
        raise AssertionError("the portable operation was asked")

    monkeypatch.setattr("qhal_portable.quantize.encode", portable)


@pytest.fixture
def large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a program of 1000 elements as for one of 65536."""
    if DEVICE == "cpu":
        monkeypatch.setattr("qhal_triton.quantize.config.SHARES", (1 << 16,) * 4)
        monkeypatch.setattr(launch, "CHUNK", 1 << 15)
        monkeypatch.setattr(launch, "PARTS", 2)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_the_suite_passes_on_the_kernels(
    case: Case, monkeypatch: pytest.MonkeyPatch, kernels_only: None, large_programs: None
) -> None:
    request = OPERATIONS[case.operation].request(case)
    assert OPS.supports(request).executes.startswith("Triton")
    if case.size("m") == 0 and "tensor" in case.subject:
        monkeypatch.undo()  # a scale of nothing is not the kernel's
    record = run_case(case, OPS)
    assert record.outcome.status is Status.PASS, record.outcome.reason


def check(x: Tensor, o: Operand) -> None:
    """The kernel runs, and gives what `encode` gives."""
    request = QuantizeRequest(x=x.dtype, format=o.format, static=o.static)
    path = launch.choose(request, HOPPER)
    here = replace(o, **{n: p.to(DEVICE) for n in ("scale", "zero") if (p := getattr(o, n)) is not None})
    assert path is not None and quantize.fits(path, x.to(DEVICE), here, torch.device(DEVICE)), str(o.format)
    same(OPS.quantize(x.to(DEVICE), here), encode(x, o.format, scale=o.scale, zero=o.zero, clip=o.clip))


RULES = st.builds(
    Rule,
    domain=st.sampled_from(["amax", "amax", "minmax", "signed"]),
    clip=st.sampled_from(["scale", "range"]),
    scale=st.sampled_from(["div", "rcp"]),
    apply=st.sampled_from(["div", "rcp"]),
    arith=st.sampled_from(["fp32", "fp32", "bf16"]),
    empty=st.sampled_from(["one", "zero", "eps"]),
    special=st.sampled_from(["nan", "nan", "saturate"]),
    e8m0=st.sampled_from(["floor", "ceil", "even", "up1.75", "over1.75"]),
)
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)]
FLOATS = ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e2m1", "e2m3", "e3m2"]


@st.composite
def formats(draw: st.DrawFn) -> Format:
    """A format that a kernel is written for."""
    name = draw(st.sampled_from(INTEGERS + FLOATS))
    block = draw(st.sampled_from(["row", "tensor", "g16", "g32", "g48", "4x16"]))
    scale = draw(st.sampled_from(["fp32", "bf16", "fp16", "e8m0", "(e4m3fn.tensor*fp32)", "(e4m3fnuz.tensor/fp32)"]))
    rule = draw(RULES)
    zero = f"-{draw(st.sampled_from([name, 'fp16', 'fp32']))}" if name in INTEGERS and draw(st.booleans()) else ""
    op = draw(st.sampled_from(["*", "*", "*", "/"]))
    if not zero and rule.domain == "minmax" and not name.startswith("u"):
        rule = replace(rule, domain="amax")
    if name.startswith("u") and rule.domain == "signed":
        rule = replace(rule, domain="amax")
    if scale[0] in "(e":
        zero, op = "", "*"
    if scale[0] == "(":
        block, rule = "g16", replace(rule, domain="amax")
    if name in INTEGERS and draw(st.booleans()):
        rule = replace(rule, round="away")
    if op == "/":
        rule = replace(rule, empty="one")
    if name in INTEGERS:
        rule = replace(rule, e8m0="floor") if rule.e8m0 == "even" else rule
    return Format.parse(f"{name}{zero}.{block}{op}{scale}@{rule}".rstrip("@"))


def numbers(seed: int, m: int, k: int, dtype: torch.dtype, span: int, special: int) -> Tensor:
    """Rows of very different size, some values of them special."""
    g = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(m, k, generator=g)
        * torch.exp2(torch.randint(-span, span + 1, (m, k // 16 or 1), generator=g).float()).repeat_interleave(16, 1)[
            :, :k
        ]
    )
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan, 0.0, -0.0, 2.0**-149, 3e38, -(2.0**-126)])
    at = torch.randint(0, m * k, (special,), generator=g)
    x.view(-1)[at] = specials[torch.randint(0, len(specials), (special,), generator=g)]
    if special and k >= 16:
        x[0, :16] = -0.0
    return x.to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    f=formats(),
    seed=st.integers(0, 1 << 30),
    m=st.integers(1, 9),
    k=st.integers(1, 9).map(lambda n: 16 * n),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    span=st.sampled_from([0, 8, 60, 126]),
    special=st.sampled_from([0, 0, 1, 8]),
    clip=st.sampled_from([(1.0, 1.0), (1.0, 1.0), (0.75, 0.625)]),
)
def test_any_format_of_the_kernels(
    f: Format, seed: int, m: int, k: int, dtype: torch.dtype, span: int, special: int, clip: tuple[float, float]
) -> None:
    if not OPS.supports(QuantizeRequest(x=dtype, format=f)):
        return  # refused by the definition
    check(numbers(seed, m, k, dtype, span, special), Operand(f, clip=clip))


@pytest.mark.parametrize(
    ("name", "scale", "zero"),
    [
        ("e4m3fn.tensor*fp32", 0.03, None),
        ("int8.tensor*bf16", 0.03, None),
        ("int8-fp32.tensor*fp32", 0.03, -7.5),
        ("uint8-uint8.tensor*fp32@domain=minmax", 0.02, 113.0),
        ("e5m2.tensor/fp32", 300.0, None),
        ("e4m3fn.tensor*fp32", 0.0, None),
        ("e4m3fn.tensor*fp32@arith=bf16,apply=rcp", 0.07, None),
        ("e2m1.g16*(e4m3fn.tensor*fp32)", 0.002, None),
        ("e2m1.g16*(e4m3fn.tensor/fp32)", 700.0, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_given_scales(name: str, scale: float, zero: float | None, dtype: torch.dtype) -> None:
    given_zero = None if zero is None else torch.tensor([zero])
    check(numbers(3, 5, 64, dtype, 4, 6), Operand(Format.parse(name), torch.tensor([scale]), given_zero))


@pytest.mark.parametrize("name", ["e4m3fn.row*fp32", "int8-int8.row*fp32@domain=minmax", "e4m3fn.tensor*fp32"])
def test_rows_that_no_program_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LONGEST", 64)
    monkeypatch.setattr(launch, "CHUNK", 64)
    monkeypatch.setattr(launch, "PARTS", 4)
    x = numbers(5, 3, 1024, torch.bfloat16, 3, 1)
    check(x[:, :208], Operand(Format.parse(name)))  # rows apart
    check(x, Operand(Format.parse(name)))


WIDTHS = ("e4m3fn.row*fp32", "int8.g32*bf16", "int8-int8.tensor*fp32@domain=minmax", "e4m3fn.tensor*fp32")


@pytest.mark.parametrize("name", [*WIDTHS, "e2m1.g16*(e4m3fn.tensor*fp32)"])
@pytest.mark.parametrize("k", [1, 7, 17, 33, 101])
def test_widths_that_nothing_divides(name: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last columns of every kernel: rows one after the other and apart, whole and in chunks."""
    o = Operand(Format.parse(name))
    wide = numbers(11, 5, 112, torch.bfloat16, 3, 0)
    wide[:, k - 1] = 64.0 * torch.arange(1, 6)  # the last column decides every scale
    x = wide[:, :k]
    check(x.contiguous(), o)
    check(x, o)
    if ".g" not in name:  # groups are never cut into chunks
        monkeypatch.setattr(launch, "LONGEST", 16)
        monkeypatch.setattr(launch, "CHUNK", 16)
        check(x, o)


@pytest.mark.parametrize(
    "name", ["e4m3fn.row*fp32", "int8.g32*bf16", "e4m3fn.4x32*fp32", "e2m1.g16*(e4m3fn.tensor*fp32)"]
)
def test_leading_axes(name: str) -> None:
    x = numbers(7, 24, 96, torch.bfloat16, 3, 0)
    check(x.reshape(2, 3, 4, 96), Operand(Format.parse(name)))


def test_results_go_where_they_are_wanted() -> None:
    o = Operand(Format.parse("int8.tensor*fp32"), torch.tensor([0.03], device=DEVICE))
    x = numbers(9, 4, 32, torch.bfloat16, 0, 0)
    out = encode(torch.zeros_like(x), o.format, scale=torch.ones(1)).to(DEVICE)
    out = replace(out, scale=torch.full_like(out.scale, 7.0))  # type: ignore[arg-type]
    assert OPS.quantize(x.to(DEVICE), o, out=out) is out
    same(out, encode(x, o.format, scale=torch.tensor([0.03])))
    wrong = replace(out, codes=torch.zeros(5, 32, dtype=torch.int8, device=DEVICE))
    with pytest.raises(qhal.FormatError, match=r"out\.codes is torch\.int8 "):
        OPS.quantize(x.to(DEVICE), o, out=wrong)


@pytest.mark.parametrize("elements", [1, 2, 16, 24, 128, 8192, 20000])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 100000])
def test_a_thread_has_more_than_one_number(elements: int, count: int) -> None:
    """Of one fp8 number alone Triton 3.6 makes a wrong code."""
    size = config(elements, count)
    assert size.elements >= elements and size.blocks * size.elements >= 4 * 32 * size.warps


def test_other_rules_are_left_to_the_portable_operation() -> None:
    for name in ("nf4.flat64*fp32", "e4m3fn.g32*e8m0@round=away", "int8.col*fp32", "int8.row*fp32@special=error"):
        f = Format.parse(name)
        assert launch.choose(QuantizeRequest(x=torch.bfloat16, format=f), HOPPER) is None
        same(OPS.quantize(torch.ones(2, 64, device=DEVICE), f), encode(torch.ones(2, 64), f))


def test_every_kernel_is_compiled_somewhere() -> None:
    names = [tile.name for tile in tiles(HOPPER) if tile.name.startswith("quantize")]
    assert len(names) == len(set(names)) > 40
    assert {n.split("[")[0] for n in names} == {
        f"quantize.{kernel}_kernel" for kernel in ("block", "long", "part", "tensor")
    }
