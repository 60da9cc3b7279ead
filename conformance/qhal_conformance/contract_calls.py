"""One small, ready problem of every operation: what the rules of the contract are tried on, whatever its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qhal.caches import Limits
from qhal.codebooks import CodebookSegment, CodebookTensor
from qhal.formats import Format
from qhal.groups import Indexed, Masked, Offsets
from qhal.interface import QuantOps
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, GroupedRequest, HadamardRequest, QuantizeRequest, Request, Support, VQRequest
from qhal.rotations import Hadamard, kinds
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance import attention_check, datasets
from qhal_conformance.cases import Case
from qhal_conformance.generator import F32, Stream
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import Fault, first_line

FORMATS = ("int4.g32*bf16", "int8.row*fp32", "e4m3fn.row*fp32", "bf16")
BF16 = Format.parse("bf16")
ROWS, EXPERTS = 16, 3
ATTENTION_SHAPE = (("l", 0), ("h", 4), ("g", 2), ("d", 64), ("p", 16))


@dataclass(frozen=True)
class Call:
    """An operation that the backend claims, with everything but x and out fixed.

    run      run(x, out): the operation; x has the shape of `x`, out may be None
    x, other two inputs of one shape, so that results differ; for vq_decode they only say which weight is decoded
    shape    of the result (codes of a quantized one), which has `format` if it is a QTensor
    fixed    the other inputs, by name
    prepare  make another weight of the same request, and use it once
    row      whether one row of x can be asked alone, and gives one row
    """

    name: str
    request: Request
    support: Support
    run: Callable[[Tensor, Any], Any]
    x: Tensor
    other: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: Format | None = None
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    prepare: Callable[[], object] = lambda: None
    row: bool = False

    @property
    def reads_x(self) -> bool:
        """Whether the numbers of x are operands."""
        return not isinstance(self.request, VQRequest)


def weight(case: Case, name: str, tag: str = "w") -> QTensor:
    """A weight [n, k] of a format, in memory of its own; other tags are other numbers. All rules share them."""
    return _fresh(_weight(case.seed, name, case.size("n"), case.size("k"), tag))


@lru_cache(maxsize=256)
def _weight(seed: int, name: str, n: int, k: int, tag: str) -> QTensor:
    return datasets.weight(f"contract/{seed}", f"{name}.{tag}", Format.parse(name), n, k, "normal")


def _fresh(q: QTensor) -> QTensor:
    names = ("codes", "scale", "zero", "offset", "table", "group_index")
    found = {name: plane for name in names if (plane := getattr(q, name)) is not None}
    copies: dict[str, Any] = {n: _fresh(p) if isinstance(p, QTensor) else p.clone() for n, p in found.items()}
    return replace(q, **copies)


def gemm_request(case: Case, name: str, **changes: object) -> GemmRequest:
    """A product of a bf16 x with that weight."""
    made = GemmRequest(w=Format.parse(name), n=case.size("n"), k=case.size("k"), x=(BF16,), m=(0, 64))
    return replace(made, **changes)  # type: ignore[arg-type]


def activation(case: Case, ops: QuantOps, rows: int = ROWS, tag: str = "") -> Tensor:
    """bf16 [rows, k]; other tags are other numbers."""
    return torch.from_numpy(_activation(case.seed, rows, case.size("k"), tag)).bfloat16().to(ops.device)


@lru_cache(maxsize=16)
def _activation(seed: int, rows: int, k: int, tag: str) -> F32:
    return datasets.activation(f"contract/{seed}/{tag}", rows, k, "normal", "bf16")


def calls(case: Case, ops: QuantOps, *, graph: bool = False, batch_invariant: bool = False) -> Iterator[Call]:
    """Every operation and form that the backend claims. graph, batch_invariant: asked for where requests have them."""
    flags = {"graph": graph, "batch_invariant": batch_invariant}
    for make in (_gemms, _quantizes, _hadamards, _groupeds, _attentions, _codebooks):
        yield from make(case, ops, flags)


def _gemms(case: Case, ops: QuantOps, flags: dict[str, bool]) -> Iterator[Call]:
    for name in FORMATS:
        quantized = name == "int8.row*fp32"
        inputs = (Operand(Format.parse(name)),) if quantized else ()
        request = gemm_request(case, name, x=(inputs[0].format if inputs else BF16,), out=torch.bfloat16, **flags)
        support = ops.supports(request)
        if not support:
            continue
        w, later = (weight(case, name, tag).to(ops.device) for tag in ("w", "later"))
        prepared = ops.prepare(w, request, inputs=inputs)

        def run(x: Tensor, out: Any, prepared: Prepared = prepared) -> Any:
            return ops.gemm(x, prepared, out=out)

        def again(later: QTensor = later, request: GemmRequest = request, inputs: Any = inputs) -> object:
            return ops.gemm(activation(case, ops, tag="later"), ops.prepare(later, request, inputs=inputs))

        yield _rows(f"gemm of {name}", case, ops, request, support, run, case.size("n"), again, row=True)


def _rows(
    name: str,
    case: Case,
    ops: QuantOps,
    request: Request,
    support: Support,
    run: Callable[[Tensor, Any], Any],
    width: int,
    again: Callable[[], object],
    **more: Any,
) -> Call:
    x, other = activation(case, ops), activation(case, ops, tag="other")
    return Call(name, request, support, run, x, other, (ROWS, width), x.dtype, prepare=again, **more)


def _quantizes(case: Case, ops: QuantOps, flags: dict[str, bool]) -> Iterator[Call]:
    for name in ("int8.row*fp32", "e4m3fn.g128*fp32"):
        f = Format.parse(name)
        request = QuantizeRequest(x=torch.bfloat16, format=f)
        support = ops.supports(request)
        if support:

            def run(x: Tensor, out: Any, f: Format = f) -> Any:
                return ops.quantize(x, f, out=out)

            again = bound(ops.quantize, activation(case, ops, tag="later"), f)
            call = _rows(f"quantize to {name}", case, ops, request, support, run, case.size("k"), again, row=True)
            yield replace(call, format=f)


def _hadamards(case: Case, ops: QuantOps, flags: dict[str, bool]) -> Iterator[Call]:
    chain = [Hadamard(64)]
    request = HadamardRequest(kinds=kinds(chain), n=case.size("k"), x=torch.bfloat16)
    support = ops.supports(request)
    if support:
        prepared = ops.prepare(chain, request)

        def run(x: Tensor, out: Any) -> Any:
            return ops.hadamard(x, prepared, out=out)

        again = bound(ops.hadamard, activation(case, ops, tag="later"), chain)
        yield _rows("hadamard", case, ops, request, support, run, case.size("k"), again, row=True)


def _groupeds(case: Case, ops: QuantOps, flags: dict[str, bool]) -> Iterator[Call]:
    n, device = case.size("n"), ops.device
    for name, form in (("int8.row*fp32", "offsets"), ("int4.g32*bf16", "masked"), ("int4.g32*bf16", "indexed")):
        gemm = gemm_request(case, name, **flags)
        request = GroupedRequest(gemm=gemm, experts=EXPERTS, groups=form)  # type: ignore[arg-type]
        support = ops.supports(request)
        if not support:
            continue
        first, later = (
            QTensor.stack([weight(case, name, f"{tag}{e}") for e in range(EXPERTS)]).to(device)
            for tag in ("w", "later")
        )
        prepared = ops.prepare(first, request)
        x, other = activation(case, ops), activation(case, ops, tag="other")
        shape: tuple[int, ...] = (ROWS, n)
        if form == "offsets":
            step = support.row_multiple
            ends = torch.tensor([0, step * (5 // step), step * (5 // step), ROWS], dtype=torch.int32, device=device)
            groups: Any = Offsets(ends)
        elif form == "masked":
            groups = Masked(torch.full((EXPERTS,), ROWS // 2, dtype=torch.int32, device=device))
            x, other = (torch.stack([t[: ROWS // 2]] * EXPERTS) for t in (x, other))
            shape = (EXPERTS, ROWS // 2, n)
        else:
            ids = torch.arange(ROWS, device=device, dtype=torch.int32) % EXPERTS
            groups = Indexed(ids.reshape(-1, 1))

        def run(x: Tensor, out: Any, prepared: Prepared = prepared, groups: Any = groups) -> Any:
            return ops.grouped_gemm(x, prepared, groups, out=out)

        def again(later: QTensor = later, request: Any = request, x: Tensor = other, groups: Any = groups) -> object:
            return ops.grouped_gemm(x, ops.prepare(later, request), groups)

        yield Call(f"grouped_gemm[{form}] of {name}", request, support, run, x, other, shape, x.dtype, prepare=again)


def _attentions(case: Case, ops: QuantOps, flags: dict[str, bool]) -> Iterator[Call]:
    for subject in ("bf16", "int8.row*fp32"):
        inner = Case("attention", subject, ATTENTION_SHAPE, "bf16", "normal")
        p = attention_check.build(inner)
        request = replace(p.request, graph=flags["graph"], batch_invariant=flags["batch_invariant"])
        support = ops.supports(request)
        if not support:
            continue
        cache = attention_check.filled(ops, p, inner)
        lens = [torch.tensor(n, dtype=torch.int32) for n in (p.query_lens, p.pages.lens)]
        table = torch.from_numpy(p.pages.table).to(ops.device)
        batch = ops.attention_batch(request, Limits(len(p.query_lens), sum(p.query_lens), table.shape[1]))
        batch.plan(lens[0], lens[1], table)
        x = torch.from_numpy(p.q).bfloat16().to(ops.device)

        def run(x: Tensor, out: Any, cache: Any = cache, batch: Any = batch) -> Any:
            return ops.attention(x, cache, batch, out=out)

        yield Call(
            f"attention over {subject}", request, support, run, x, x.flip(0).neg().contiguous(), tuple(x.shape),
            x.dtype, fixed=cache.planes,
        )  # fmt: skip


def codebook_weight(case: Case, device: torch.device, tag: str = "w") -> CodebookTensor:
    """[16, 64]: sums of two stored codebooks of 32 vectors of 8 columns."""
    g = Stream(case.id, f"codebooks.{tag}")
    codes = torch.from_numpy(g.integers(0, 32, (16, 8, 2))).to(device, torch.int32)
    tables = tuple(torch.from_numpy(g.normal((32, 1, 8))).to(device, torch.float16) for _ in range(2))
    return CodebookTensor((16, 64), (CodebookSegment(codes, tables),))


def _codebooks(case: Case, ops: QuantOps, flags: dict[str, bool]) -> Iterator[Call]:
    first, second = (codebook_weight(case, ops.device, tag) for tag in ("w", "other"))
    request = VQRequest(w=first.format, n=16, k=64, out=torch.bfloat16)
    support = ops.supports(request)
    if support:
        prepared, other = ops.prepare(first, request), ops.prepare(second, request)
        marks = torch.zeros(1, device=ops.device), torch.ones(1, device=ops.device)

        def run(x: Tensor, out: Any) -> Any:
            return ops.vq_decode(other if x is marks[1] else prepared, out=out)

        again = bound(run, marks[1], None)
        yield Call("vq_decode", request, support, run, *marks, (16, 64), torch.bfloat16, prepare=again)


def parts(y: Any) -> dict[str, Tensor]:
    """Every tensor of a result by name."""
    return y.planes() if isinstance(y, QTensor) else {"result": y}


def copied(y: Any) -> dict[str, Tensor]:
    """The bits of a result, in memory of their own."""
    return {name: t.clone() for name, t in parts(y).items()}


def answer(call: Call, ops: QuantOps, x: Tensor) -> dict[str, Tensor]:
    """The bits of one result, waited for."""
    y = call.run(x, None)
    ops.synchronize()
    return copied(y)


def bound(fn: Callable[..., object], *args: object) -> Callable[[], object]:
    """The call with these arguments, to be made later."""
    return lambda: fn(*args)


def must_raise(call: Callable[[], object], kind: type[Exception], what: str) -> None:
    """Fault if the call returns, or raises something else."""
    try:
        call()
    except kind:
        return
    except Exception as error:
        text = f"{what} raised {type(error).__name__} ({first_line(error)}), must raise {kind.__name__}"
        raise Fault(FailKind.ACCEPTED_INVALID, text) from error
    raise Fault(FailKind.ACCEPTED_INVALID, f"{what} was accepted, must raise {kind.__name__}")
