"""quantize: codes and scales bit for bit against the suite's second implementation of the rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import NumericsClass, QuantizeRequest
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance import elements, encode, guards
from qhal_conformance.cases import Case
from qhal_conformance.decode import decode, to_numpy
from qhal_conformance.generator import F32, fingerprint
from qhal_conformance.outcome import FailKind, Outcome, Status, Worst
from qhal_conformance.problem import DTYPES, Fault, claim, refusal
from qhal_conformance.quantize_data import QUANTIZE_DATA, numbers_for
from qhal_conformance.remembering import remembered

FORMATS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("core-int8", "int8.row*fp32", ()),
    ("core-int8", "int8.tensor*fp32", ()),
    ("core-int8", "int8.tensor*fp32", ("static",)),
    ("core-int8", "int8.g128*bf16", ()),
    ("weight-int4", "int4.g32*bf16", ()),
    ("weight-int4", "int4.row*fp32", ()),
    ("weight-int4", "uint4-uint4.g32*bf16@domain=minmax", ()),
    ("core-fp8", "e4m3fn.row*fp32", ()),
    ("core-fp8", "e4m3fn.tensor*fp32", ()),
    ("core-fp8", "e4m3fn.tensor*fp32", ("static",)),
    ("core-fp8", "e4m3fn.g128*fp32", ()),
    ("core-fp8", "e4m3fn.128x128*fp32", ()),
    ("core-fp8", "e5m2.row*fp32", ()),
    ("mx", "e4m3fn.g32*e8m0", ()),
    ("mx", "e2m1.g32*e8m0", ()),
    ("mx", "e2m3.g32*e8m0", ()),
    ("nvfp4", "e2m1.g16*(e4m3fn.tensor*fp32)", ()),
)
"""(profile, format, options): weights and activations that engines quantize."""


_FAR = {"grid": (64, 512), "normal": (515, 96), "ties": (3, 4128)}
"""Data sets that bring their own shape: grids need many values; rows and columns past what kernels loop over."""


@dataclass(frozen=True)
class Problem:
    """The numbers, how they are quantized, and the codes and scales that must come out."""

    request: QuantizeRequest
    x: F32
    operand: Operand
    expected: QTensor
    inputs_sha: str


def cases(level: int) -> list[Case]:
    """Every data set for every format; level 1 adds shapes and input types."""
    found = []
    shapes = ((33, 512), (7, 160), (64, 256), (1, 384), (129, 320))
    kinds = ("fp32", "bf16", "fp16")
    for number, (profile, name, options) in enumerate(FORMATS):
        for i, data in enumerate(QUANTIZE_DATA):
            if level == 0 and data in ("zero", "range") and (i + number) % 2:
                continue  # each format has one of the two
            storage = guards.STORAGES[(i + number) % 3]
            kind = "bf16" if data in ("grid", "ties") else kinds[(i + number) % 3]
            shape = _FAR.get(data, shapes[(i + number) % len(shapes)])
            leads = ("stacked",) if data == "zero" and _by_row(name) else ()
            kind = kind if data != "normal" else "fp32"
            found.append(
                _case(profile, name, options + leads, shape, kind, data, storage if not leads else "contiguous")
            )
            if level >= 1:
                for j, wide in enumerate(((3, 4096), (257, 288), (128, 2048))):
                    turn = kinds[(i + j + number) % 3]
                    found.append(_case(profile, name, options, wide, turn, data, guards.STORAGES[j], level=1))
        if number % 3 == 0:
            found.append(_case(profile, name, options, (0, 256), "bf16", "normal", "contiguous"))
    return list({case.id: case for case in found}.values())


def _case(
    profile: str,
    name: str,
    options: tuple[str, ...],
    shape: tuple[int, int],
    kind: str,
    data: str,
    storage: str,
    level: int = 0,
) -> Case:
    m, k = shape
    return Case(
        "quantize", name, (("m", m), ("k", k)), kind, data, 0, storage, options, profile, level, required=kind != "fp32"
    )


def request_of(case: Case) -> QuantizeRequest:
    """What is asked of `supports`."""
    return QuantizeRequest(x=DTYPES[case.out], format=Format.parse(case.subject), static=case.has("static"))


@remembered
def build(case: Case) -> Problem:
    """Numbers and expected codes; both follow from the case's id."""
    request = request_of(case)
    x = numbers_for(case.id, request.format, case.size("m"), case.size("k"), case.data, case.out)
    scale = None
    if request.static:
        top = np.float32(elements.largest(request.format.element))
        scale = np.array([2.5 / top if case.data not in ("ties", "codes") else 1.0], dtype=np.float32)
    expected = encode.quantize(x, request.format, scale=scale)
    operand = Operand(request.format, None if scale is None else torch.from_numpy(scale))
    arrays = {"x": x} if scale is None else {"x": x, "scale": scale}
    return Problem(request, x, operand, expected, fingerprint(arrays))


def run(case: Case, ops: QuantOps) -> Outcome:
    """Quantize three times, other numbers between, the last time into `out`, and compare every plane."""
    p = build(case)
    device = ops.device
    guard = guards.place(torch.from_numpy(p.x).to(DTYPES[case.out]), case.storage, device)
    operand = replace(p.operand, scale=None if p.operand.scale is None else p.operand.scale.to(device))
    to: Operand | Format = operand if p.request.static else p.request.format
    granted = claim(ops, p.request)
    if granted is None:
        return refusal(ops, p.request, lambda: ops.quantize(guard.view, to))
    x = guard.view.unsqueeze(1) if case.has("stacked") else guard.view
    expected = p.expected
    if granted.support.rule is not None:  # the hardware fixes another rule and says so: hold it to that one
        ruled = replace(p.request.format, rule=granted.support.rule)
        expected = encode.quantize(p.x, ruled, scale=None if p.operand.scale is None else p.operand.scale.numpy())
    first = ops.quantize(x, to)
    ops.synchronize()
    kept = guards.snapshot(guards.planes(_canonical(ops, first), "q"))
    ops.quantize(x.flip(0).neg().contiguous(), to)
    ops.synchronize()
    if guards.differing(kept, guards.planes(_canonical(ops, first), "q")):
        raise Fault(FailKind.INPUT_MUTATED, "a later call changed the result of an earlier one")
    results = [first, ops.quantize(x, to)]
    if isinstance(first, QTensor) and first.layout == "canonical":
        target = guards.poisoned_like(first)
        results.append(ops.quantize(x, operand, out=target))
        if results[-1].codes.data_ptr() != target.codes.data_ptr():
            raise Fault(FailKind.OUT_IGNORED, "quantize must write out= and return it")
        results.append(target)
    ops.synchronize()
    verdict = next((v for q in results if (v := compare_planes(_flat(case, _canonical(ops, q)), expected))), None)
    if guard.changed():
        raise Fault(FailKind.INPUT_MUTATED, "quantize changed x, or memory beside it")
    if verdict is not None:
        return verdict
    size = p.x.size
    notes = ("empty",) if size == 0 else ()
    if granted.support.rule is not None:
        notes = (*notes, f"conditional: rule {granted.support.rule}")
    return Outcome(Status.PASS, numerics=NumericsClass.EXACT.label, headroom=0.0, elements=size, notes=notes)


def _by_row(name: str) -> bool:
    """Whether a row is quantized by itself, so that leading axes change nothing."""
    f = Format.parse(name)
    return f.block is not None and f.block.kind in ("row", "group") and f.scale is not None and f.scale.plain


def _flat(case: Case, q: QTensor) -> QTensor:
    """A stacked result [m, 1, k] as the matrix that it holds."""
    if not case.has("stacked"):
        return q
    m, k = case.size("m"), case.size("k")
    if tuple(q.codes.shape) != (m, 1, k):
        raise Fault(FailKind.SHAPE, f"codes have shape {tuple(q.codes.shape)} for x {(m, 1, k)}")
    scale, zero = ((p.squeeze(1) if isinstance(p, torch.Tensor) else p) for p in (q.scale, q.zero))
    return replace(q, codes=q.codes.squeeze(1), scale=scale, zero=zero)


def _canonical(ops: QuantOps, q: object) -> QTensor:
    if not isinstance(q, QTensor):
        raise Fault(FailKind.RETURN, f"quantize returned {type(q).__name__}, must be a QTensor")
    if q.layout == "canonical":
        return q
    back = ops.restore(q)
    if not isinstance(back, QTensor):
        raise Fault(FailKind.RETURN, f"restore returned {type(back).__name__}, must be a QTensor")
    return back


def compare_planes(got: QTensor, expected: QTensor) -> Outcome | None:
    """None if every plane is equal, bit for bit; scales first, because a wrong scale explains wrong codes."""
    if got.format.storage != expected.format.storage:
        return Outcome(Status.FAIL, FailKind.EXACT, f"the result is {got.format}, asked was {expected.format}")
    ours, theirs = guards.planes(expected, "q"), guards.planes(got, "q")
    if ours.keys() != theirs.keys():
        return Outcome(Status.FAIL, FailKind.EXACT, f"the result has {sorted(theirs)}, must have {sorted(ours)}")
    lost = np.isnan(decode(expected).value)
    for name in sorted(ours, key=lambda n: (n.endswith("codes") and n.count(".") == 1, n)):
        want, have = ours[name], theirs[name]
        if have.shape != want.shape:
            return Outcome(
                Status.FAIL, FailKind.SHAPE, f"{name} has shape {tuple(have.shape)}, must be {tuple(want.shape)}"
            )
        if have.dtype != want.dtype:
            return Outcome(Status.FAIL, FailKind.DTYPE, f"{name} is {have.dtype}, must be {want.dtype}")
        wrong = to_numpy(want) != to_numpy(have)
        if want.dtype.is_floating_point:
            wrong &= ~(torch.isnan(want.float()).numpy() & torch.isnan(have.cpu().float()).numpy())  # any NaN is NaN
        if name == "q.codes":
            wrong &= ~(lost & np.isnan(decode(got.to("cpu")).value))
        if wrong.any():
            return _difference(name, want, have, wrong, decode(expected).value, decode(got.to("cpu")).value)
    return None


def _difference(
    name: str, want: torch.Tensor, have: torch.Tensor, wrong: npt.NDArray[np.bool_], value: F32, found: F32
) -> Outcome:
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    a, b = to_numpy(want)[place], to_numpy(have)[place]
    count = int(wrong.sum())
    detail = f"{name}: {count} of {wrong.size} differ; first at {place}: got {b}, must be {a}"
    worst = None
    if name == "q.codes":
        ref, got = float(value[place]), float(found[place])
        worst = Worst(place, got, ref, abs(got - ref), 0.0)
    return Outcome(Status.FAIL, FailKind.EXACT, detail, NumericsClass.EXACT.label, worst, None, None, None, wrong.size)
