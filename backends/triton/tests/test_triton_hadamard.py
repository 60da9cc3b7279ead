"""hadamard: the rotation kernel is in its class, keeps transforms apart, and quantizes as the two steps do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_ops import CDNA, DEVICE, HOPPER, Emulated, same

from qhal.encoding import encode
from qhal.formats import Format
from qhal.requests import HadamardRequest
from qhal.rotations import Diagonal, Hadamard, Rotation, hadamard_for, kinds
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_triton.hadamard import launch
from qhal_triton.hadamard.config import Chip, plan
from qhal_triton.target import Target

OPS = Emulated()


def asked() -> list[Case]:
    """Cases that the kernel takes; of the largest one the interpreter would take long."""
    return [
        case
        for case in catalogue(0)
        if case.operation == "hadamard"
        and (DEVICE != "cpu" or case.size("m") * case.size("n") < 1 << 16)
        and launch.choose(OPERATIONS["hadamard"].request(case), HOPPER) is not None  # type: ignore[arg-type]
    ]


CASES = asked()


def test_what_the_kernel_takes() -> None:
    assert len(CASES) > 25
    for order in (2, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384):
        assert launch.choose(request([Hadamard(order)], order), HOPPER) is not None
    for n in (1536, 5120, 6144, 7168, 11008, 12288, 13824, 14336):
        assert launch.choose(request([hadamard_for(n)], n), HOPPER) is not None
    assert launch.rotated(request([Hadamard(64)], 64, torch.float32), HOPPER) is None
    assert all(launch.choose(r, HOPPER) is not None for c in CASES if (r := OPERATIONS["hadamard"].request(c)))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_the_suite_passes_on_the_kernel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.size("m"):
        monkeypatch.setattr("qhal_portable.hadamard.rotate", None)  # the kernel is what runs
    record = run_case(case, OPS)
    assert record.outcome.status is Status.PASS, record.outcome.reason


def request(chain: list[Rotation], n: int, x: torch.dtype = torch.bfloat16, to: str | None = None) -> HadamardRequest:
    return HadamardRequest(kinds=kinds(chain), n=n, x=x, quantize=None if to is None else Format.parse(to))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])).bfloat16().to(DEVICE)


@pytest.mark.parametrize("n", [4096, 8192, 5120, 1536, 192])
def test_large_orders_and_tables_against_the_definition(n: int) -> None:
    turn, x = hadamard_for(n), normal(3, n)
    want = x.double().cpu() @ turn.matrix(n)
    got = OPS.hadamard(x, [turn])
    assert isinstance(got, torch.Tensor)
    error = (got.cpu().double() - want).abs()
    assert bool((error <= 2.0**-8 * want.abs() + 16 * 2.0**-24 * n**0.5 * x.cpu().double().abs().max()).all())


@pytest.mark.parametrize("order", [64, 512, 24])
def test_a_transform_with_nan_or_inf_touches_no_other(order: int) -> None:
    turn = Hadamard(order, 12, "quarot-12") if order == 24 else Hadamard(order)
    x = normal(9, 2 * order)
    x[2, 3], x[5, order + 1] = torch.nan, torch.inf
    clean = OPS.hadamard(torch.nan_to_num(x, 0.0, 0.0), [turn])
    got = OPS.hadamard(x, [turn])
    assert isinstance(got, torch.Tensor) and isinstance(clean, torch.Tensor)
    lost = torch.zeros_like(x, dtype=torch.bool)
    lost[2, :order] = lost[5, order:] = True
    assert bool(torch.isnan(got[lost]).all()) and torch.equal(got[~lost], clean[~lost])


@pytest.mark.parametrize("exponent", [-130, -60, 90, 120])
def test_sizes_of_rows_do_not_mix(exponent: int) -> None:
    x = normal(4, 512)
    x[1] *= 2.0**exponent
    alone, together = OPS.hadamard(x[1:2].contiguous(), [Hadamard(512)]), OPS.hadamard(x, [Hadamard(512)])
    assert torch.equal(alone[0], together[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("to", "order", "n", "fused"),
    [
        ("e4m3fn.row*fp32", 256, 256, True),
        ("int8-int8.row*fp32@domain=minmax", 64, 64, True),
        ("e2m1.g32*e8m0", 128, 512, True),
        ("int8.g128*bf16", 64, 512, True),
        ("int8.row*fp32", 128, 512, True),
        ("int8.row*fp32", 64, 8192, False),
        ("e2m1.g16*(e4m3fn.tensor*fp32)", 64, 128, False),
        ("int8.tensor*fp32", 64, 128, False),
    ],
)
def test_one_pass_is_the_two_steps(to: str, order: int, n: int, fused: bool) -> None:
    x, chain = normal(7, n), [Diagonal(torch.linspace(-2, 2, n, device=DEVICE)), Hadamard(order)]
    path = launch.choose(request(list(chain), n, to=to), HOPPER)
    assert path is not None and (path.recipe is not None) == fused
    y = OPS.hadamard(x, chain)
    q = OPS.hadamard(x, chain, quantize=Operand(Format.parse(to)))
    assert isinstance(y, torch.Tensor) and isinstance(q, QTensor)
    same(q, encode(y.cpu(), Format.parse(to)))


@pytest.mark.parametrize("target", [HOPPER, CDNA, replace(CDNA, warp=32)])
@pytest.mark.parametrize("before", [False, True])
def test_a_plan_covers_its_transform(target: Target, before: bool) -> None:
    chip = Chip.of(target)
    for order, k in ((2, 1), (128, 1), (1024, 1), (8192, 1), (192, 12), (5120, 20), (7168, 28), (11008, 172)):
        p = plan(order, k, before, chip)
        if p is None:
            continue
        assert p.group * p.width == order and p.used % p.group == 0 and p.used <= p.rows and p.width <= p.columns
        assert p.rows & (p.rows - 1) == 0 and p.columns & (p.columns - 1) == 0 and min(p.rows, p.columns) >= 16
        assert p.shared(before) <= target.shared and p.columns <= chip.columns
