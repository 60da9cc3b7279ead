"""What a backend must keep beside its numbers: total answers, claims and refusals that hold, foreign objects, shapes,
refits in place, untouched global state, batch invariance where it is declared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from qhal.caches import Limits
from qhal.errors import QhalError, UnsupportedError
from qhal.formats import Format
from qhal.interface import Codec, QuantOps
from qhal.prepared import Prepared
from qhal.requests import CommRequest, GemmRequest, NumericsClass, QuantizeRequest, Request, Support
from qhal.specs import Operand
from qhal.tensors import QTensor, same_bits
from qhal_conformance import datasets
from qhal_conformance.cases import Case
from qhal_conformance.decode import to_numpy
from qhal_conformance.generator import fingerprint
from qhal_conformance.outcome import FailKind, Outcome, Status
from qhal_conformance.problem import Fault, first_line

_FORMATS = ("int4.g32*bf16", "int8.row*fp32", "e4m3fn.row*fp32", "bf16")
_ODD = ("int3.g48*bf16", "lut4.row*fp16", "q4_k", "mxfp4_dual", "e5m2fnuz.col*bf16", "uint8-uint8.head*fp16", "e8m0")


def cases(level: int) -> list[Case]:
    """One case per rule."""
    shape = (("m", 16), ("n", 64), ("k", 256))
    return [Case("contract", name, shape, "bf16", "normal") for name in RULES]


def request_of(case: Case) -> Request | None:
    """Several requests are made."""
    return None


def sha(case: Case) -> str:
    """Hash of the weights that the rules share."""
    arrays = {}
    for name in _FORMATS:
        arrays.update({f"{name}.{k}": to_numpy(t) for k, t in _weight(case, name).planes().items()})
    return fingerprint(arrays)


def run(case: Case, ops: QuantOps) -> Outcome:
    """Run one rule; it returns how many things it checked, 0 if nothing of it is claimed."""
    checked = RULES[case.subject](case, ops)
    if checked == 0:
        return Outcome(Status.UNSUPPORTED, reason="nothing that this rule is about is claimed")
    return Outcome(Status.PASS, numerics=NumericsClass.EXACT.label, headroom=0.0, elements=checked)


def _weight(case: Case, name: str, tag: str = "w") -> QTensor:
    return datasets.weight(case.id, f"{name}.{tag}", Format.parse(name), case.size("n"), case.size("k"), "normal")


def _request(case: Case, name: str, **changes: object) -> GemmRequest:
    made = GemmRequest(w=Format.parse(name), n=case.size("n"), k=case.size("k"), x=(Format.parse("bf16"),), m=(0, 64))
    return replace(made, **changes)  # type: ignore[arg-type]


def _x(case: Case, ops: QuantOps, rows: int = 16) -> torch.Tensor:
    x = datasets.activation(case.id, rows, case.size("k"), "normal", "bf16")
    return torch.from_numpy(x).bfloat16().to(ops.device)


def _odd_requests(case: Case) -> list[Request]:
    odd: list[Request] = [_request(case, name) for name in _ODD]
    odd += [QuantizeRequest(x=torch.bfloat16, format=Format.parse(name)) for name in _ODD]
    odd += [_request(case, "int4.g32*bf16", graph=True), _request(case, "int4.g32*bf16", k=31, n=1)]
    odd += [
        _request(case, "int4.g32*bf16", out=torch.int32),
        QuantizeRequest(x=torch.int64, format=Format.parse("int8")),
    ]
    codec = Codec(Format.parse("int8.g128*fp16"))
    return [
        *odd,
        CommRequest(collective="all_reduce", codec=codec, world=8, x=torch.half, numel=7),
    ]


def _supports_is_total(case: Case, ops: QuantOps) -> int:
    """supports answers every request, the same twice, and never raises; a refusal has a reason."""
    requests = _odd_requests(case)
    for request in requests:
        try:
            first, second = ops.supports(request), ops.supports(request)
        except Exception as error:
            raise Fault(FailKind.CLAIM, f"supports({request}) raised {type(error).__name__}") from error
        if not isinstance(first, Support) or first != second:
            raise Fault(FailKind.CLAIM, f"supports({request}) answered {first} and then {second}")
        if not first and not first.reason:
            raise Fault(FailKind.CLAIM, f"supports refuses {request} without a reason")
    return len(requests)


def _claims_both_ways(case: Case, ops: QuantOps) -> int:
    """What supports claims is executed; what it refuses raises UnsupportedError: nothing falls back."""
    checked = 0
    for request in _odd_requests(case):
        if isinstance(request, CommRequest):
            continue
        call: Callable[[], object]
        if isinstance(request, QuantizeRequest):
            if not request.x.is_floating_point:
                continue
            to, x = request.format, torch.ones(48, 64, dtype=request.x, device=ops.device)
            call = _bound(ops.quantize, x, to)
        else:
            assert isinstance(request, GemmRequest) and isinstance(request.w, Format)
            w = datasets.weight(case.id, "odd", request.w, request.n, request.k, "normal").to(ops.device)
            call = _bound(ops.prepare, w, request)
        checked += 1
        if not ops.supports(request):
            _must_raise(call, UnsupportedError, f"{request} is refused by supports, but the call")
            continue
        try:
            call()
        except Exception as error:
            text = f"{request} is claimed, but the call raised {type(error).__name__}: {first_line(error)}"
            raise Fault(FailKind.CLAIM, text) from error
    return checked


def _foreign_objects_refused(case: Case, ops: QuantOps) -> int:
    """A weight that another backend prepared is refused with one clear error."""
    foreign = Prepared("another backend", _request(case, "bf16"), Support("full"))
    _must_raise(_bound(ops.gemm, _x(case, ops), foreign), QhalError, "gemm with a weight of another backend")
    return 1


def _bad_shapes_refused(case: Case, ops: QuantOps) -> int:
    """x with another K, a wrong dtype or a wrong out= is an error, not a result."""
    checked = 0
    for name in _FORMATS:
        request = _request(case, name)
        if not ops.supports(request):
            continue
        prepared = ops.prepare(_weight(case, name).to(ops.device), request)
        x = _x(case, ops)
        small = torch.empty(x.shape[0] - 1, case.size("n"), dtype=x.dtype, device=x.device)
        for what, call in (
            ("gemm with x of K - 1 features", _bound(ops.gemm, x[:, :-1], prepared)),
            ("gemm with integer x", _bound(ops.gemm, x.to(torch.int32), prepared)),
            ("gemm with out= of another shape", lambda p=prepared, x=x, o=small: ops.gemm(x, p, out=o)),
        ):
            _must_raise(call, Exception, f"{name}: {what}")
            checked += 1
    return checked


def _refit_keeps_addresses(case: Case, ops: QuantOps) -> int:
    """prepare(into=) puts new values at the old addresses, and the old object computes with them."""
    checked = 0
    for name in _FORMATS:
        request = _request(case, name)
        if not ops.supports(request):
            continue
        old, new = (_weight(case, name, tag).to(ops.device) for tag in ("w", "refit"))
        prepared = ops.prepare(old, request)
        addresses = {key: t.data_ptr() for key, t in prepared.tensors().items()}
        x = _x(case, ops)
        wanted = ops.gemm(x, ops.prepare(new, request)).clone()
        again = ops.prepare(new, request, into=prepared)
        if {key: t.data_ptr() for key, t in again.tensors().items()} != addresses:
            raise Fault(
                FailKind.EXACT, f"{name}: prepare(into=) moved a tensor; a captured graph would read the old one"
            )
        if not same_bits(ops.gemm(x, prepared).clone(), wanted):
            raise Fault(FailKind.EXACT, f"{name}: after prepare(into=) the old object does not compute the new values")
        checked += len(addresses)
    return checked


def _global_state_kept(case: Case, ops: QuantOps) -> int:
    """An operation changes no global setting of torch."""
    before, checked = _global_state(), 0
    steps: list[tuple[str, Callable[[], object]]] = []
    for name in _FORMATS:
        request = _request(case, name)
        if ops.supports(request):
            prepared = ops.prepare(_weight(case, name).to(ops.device), request)
            steps += [
                (f"prepare of {name}", lambda: None),
                (f"gemm of {name}", _bound(ops.gemm, _x(case, ops), prepared)),
            ]
    if ops.supports(QuantizeRequest(x=torch.bfloat16, format=Format.parse("int8.row*fp32"))):
        steps.append(("quantize", _bound(ops.quantize, _x(case, ops), Format.parse("int8.row*fp32"))))
    for what, call in steps:
        call()
        after = _global_state()
        changed = [key for key in before if before[key] != after[key]]
        if changed:
            raise Fault(FailKind.INPUT_MUTATED, f"{what} changed global settings of torch: {', '.join(changed)}")
        checked += len(before)
    return checked


def _global_state() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "random state": torch.get_rng_state().numpy().tobytes(),
    }


def _batch_invariance(case: Case, ops: QuantOps) -> int:
    """Where it is declared, a row alone gives the bits that it gives in a batch."""
    checked = 0
    for name in _FORMATS:
        request = _request(case, name, batch_invariant=True)
        support = ops.supports(request)
        if not support or not support.batch_invariant:
            continue
        prepared = ops.prepare(_weight(case, name).to(ops.device), request)
        x = _x(case, ops)
        whole = ops.gemm(x, prepared).clone()
        for row in (0, 7, 15):
            if not same_bits(ops.gemm(x[row : row + 1], prepared).clone(), whole[row : row + 1].clone()):
                raise Fault(FailKind.EXACT, f"{name}: row {row} alone has other bits than in a batch of 16")
            checked += 1
    return checked


def _inputs_by_index(case: Case, ops: QuantOps) -> int:
    """A weight prepared for two inputs quantizes x by the one that `input=` names, with the bits of `quantize`."""
    eight, sixteen = Format.parse("int8.row*fp32"), Format.parse("int8.tensor*fp32")
    request = _request(case, "int8.row*fp32", x=(eight, sixteen), out=torch.bfloat16)
    if not ops.supports(request):
        return 0
    prepared = ops.prepare(
        _weight(case, "int8.row*fp32").to(ops.device), request, inputs=(Operand(eight), Operand(sixteen))
    )
    x = _x(case, ops)
    for index, f in enumerate((eight, sixteen)):
        plain = ops.gemm(x, prepared, input=index).clone()
        if not same_bits(plain, ops.gemm(ops.quantize(x, f, for_=prepared), prepared).clone()):
            raise Fault(FailKind.EXACT, f"gemm(x, input={index}) differs from gemm(quantize(x, {f}))")
    return 2 * x.numel()


def _limits_hold(case: Case, ops: QuantOps) -> int:
    """A step that exceeds what the batch was made for is an error before anything is written."""
    from qhal_conformance.attention_check import request_of as attention_request

    shape = (("l", 0), ("h", 4), ("g", 2), ("d", 64), ("p", 16))
    request = attention_request(Case("attention", "bf16", shape, "bf16", "normal"))
    if not ops.supports(request):
        return 0
    batch = ops.attention_batch(request, Limits(2, 2, 2))
    lens = [torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.int32)]
    table = torch.zeros(3, 2, dtype=torch.int32, device=ops.device)
    _must_raise(lambda: batch.plan(lens[0], lens[1], table), QhalError, "planning three sequences with limits for two")
    long = torch.tensor([1, 33], dtype=torch.int32)
    _must_raise(lambda: batch.plan(lens[0][:2], long, table[:2]), QhalError, "planning three pages with limits for two")
    return 2


def _bound(fn: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: fn(*args)


def _must_raise(call: Callable[[], object], kind: type[Exception], what: str) -> None:
    try:
        call()
    except kind:
        return
    except Exception as error:
        text = f"{what} raised {type(error).__name__} ({first_line(error)}), must raise {kind.__name__}"
        raise Fault(FailKind.ACCEPTED_INVALID, text) from error
    raise Fault(FailKind.ACCEPTED_INVALID, f"{what} was accepted, must raise {kind.__name__}")


RULES: dict[str, Callable[[Case, QuantOps], int]] = {
    "supports-is-total": _supports_is_total,
    "claims-both-ways": _claims_both_ways,
    "foreign-objects-refused": _foreign_objects_refused,
    "bad-shapes-refused": _bad_shapes_refused,
    "refit-keeps-addresses": _refit_keeps_addresses,
    "global-state-kept": _global_state_kept,
    "batch-invariance": _batch_invariance,
    "inputs-by-index": _inputs_by_index,
    "limits-hold": _limits_hold,
}
