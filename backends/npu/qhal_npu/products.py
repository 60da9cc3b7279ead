"""Which product takes which operator: a request's kind, the demands of that kind, the path, or why there is none.

One rule. A product runs on the operator that the table names for its kind. A product of quantized activations that
breaks a demand is refused, with the demand and the nearest request. A product of plain activations that breaks one
keeps its weight decoded in their type, and says so: `conditional`, with the memory of an unquantized weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from qhal.blocks import Block
from qhal.elements import WIDE, element
from qhal.formats import Format
from qhal.requests import GemmRequest, NumericsClass, minimum_class
from qhal_npu.table import DEMANDS, operator

HALVES = ("bf16", "fp16")
_WIDENED = ("scale-bias", "no-bias", "int4-eights", "int4-out", "generation")
"""Demands of int4 codes that int8 products do not make: codes are kept as int8 where one of these is broken."""
LIMIT = 65535
FULL_FRACTAL = (16, 32)
"""K and N of a whole int8 fractal."""
_CLASS = {
    "W8A8": NumericsClass.FP32_ACC,
    "W4A8": NumericsClass.REDUCED_ACC,
    "W4A4": NumericsClass.FP32_ACC,
    "W8A16": NumericsClass.DEQUANT_16,
    "W4A16": NumericsClass.DEQUANT_16,
    "FP8": NumericsClass.REDUCED_ACC,
    "MXFP8": NumericsClass.REDUCED_ACC,
    "MXFP4": NumericsClass.REDUCED_ACC,
    "MXFP4 x MXFP8": NumericsClass.REDUCED_ACC,
    "FP8 blocks": NumericsClass.REDUCED_ACC,
}


@dataclass(frozen=True)
class Path:
    """A way through the device. executes: for people, with the operator and its aclnn entry points.

    note  why not an operator made for this format, "" if it is one
    """

    kind: str
    numerics: NumericsClass
    executes: str
    layout: str
    accumulate: str = "fp32"
    note: str = ""

    @property
    def exact(self) -> bool:
        """Whether sums are integers, so that neither the order nor other rows change a bit."""
        return self.accumulate == "int32"


@dataclass(frozen=True)
class Refusal:
    """A demand that is broken, and the nearest request that breaks none (None: unknown)."""

    demand: str
    reason: str
    nearest: GemmRequest | None = None

    def __str__(self) -> str:
        return f"{self.reason} [{self.demand}: {DEMANDS[self.demand]}]" if self.demand in DEMANDS else self.reason


def choose(r: GemmRequest, arch: str) -> Path | Refusal:
    """The path of a well-formed request, or why there is none."""
    plain = bool(r.x) and all(f.plain and element(f.element).wide for f in r.x)
    kind = _kind(r, plain)
    if kind is None:
        why = "" if plain and _lossless(r) else f"no operator multiplies {r.w} with {'|'.join(map(str, r.x))}"
        return decoded(r, arch, why) if plain else Refusal("", why)
    broken = next(_broken(r, kind, arch), None)
    if broken is None:
        return _path(r, kind)
    if plain:
        return decoded(r, arch, str(broken))
    if kind in ("W4A8", "W4A4") and broken.demand in _WIDENED:
        wider = next(_broken(r, "W8A8", arch), None)
        return replace(_path(r, "W8A8"), note=f"{broken}; int4 codes are kept as int8") if wider is None else wider
    return broken


def _kind(r: GemmRequest, plain: bool) -> str | None:
    """The kind of product by its formats; None where the table has no line for it."""
    if not isinstance(r.w, Format) or r.operand is not None or not r.x:
        return None
    w, x = r.w.element, {f.element for f in r.x}
    if plain:
        return {"int8": "W8A16", "int4": "W4A16", "uint4": "W4A16"}.get(w) if r.w.scale is not None else None
    if len(x) > 1:
        return None
    pair = (w, x.pop())
    if any(f.scale is not None and f.scale.element == "e8m0" for f in (r.w, *r.x)):
        mx = all(_mx(f) for f in (r.w, *r.x))
        kinds = {("e4m3fn", "e4m3fn"): "MXFP8", ("e2m1", "e2m1"): "MXFP4", ("e2m1", "e4m3fn"): "MXFP4 x MXFP8"}
        return kinds.get(pair) if mx else None
    if pair == ("e4m3fn", "e4m3fn") and _tiled(r):
        return "FP8 blocks"
    return {
        ("int8", "int8"): "W8A8", ("int4", "int8"): "W4A8", ("int4", "int4"): "W4A4", ("e4m3fn", "e4m3fn"): "FP8",
    }.get(pair)  # fmt: skip


def _broken(r: GemmRequest, kind: str, arch: str) -> Iterator[Refusal]:
    """Every demand of its kind that a request breaks."""
    assert isinstance(r.w, Format)
    line = operator(kind)
    if arch not in line.on:
        yield Refusal("generation", f"{kind} on {line.op}: documented for {', '.join(line.on)}, this is {arch}")
    if r.group_index:
        yield Refusal("group-index", f"{kind}: the weight has a group_index", replace(r, group_index=False))
    if max(r.k, r.n) > LIMIT:
        yield Refusal("last-axis", f"{kind}: n={r.n}, k={r.k}", replace(r, n=min(r.n, LIMIT), k=min(r.k, LIMIT)))
    if kind.endswith("A16"):
        yield from _weight_only(r, kind)
    elif kind.startswith("MX"):
        if kind != "MXFP8" and r.k % 2:
            yield Refusal("mx-even", f"{kind}: k={r.k}", replace(r, k=r.k + 1))
    elif kind != "FP8 blocks":
        yield from _row_scaled(r, kind)
    if _CLASS[kind] > minimum_class(r):
        yield Refusal("", f"{kind} sums in class {_CLASS[kind].label}, the request accepts {minimum_class(r).label}")


def _row_scaled(r: GemmRequest, kind: str) -> Iterator[Refusal]:
    assert isinstance(r.w, Format)
    given = (*r.static, *(False for _ in r.x))
    for f, fixed in ((r.w, True), *zip(r.x, given, strict=False)):
        ok = f.block is not None and f.block.kind in ("row", "tensor") and f.op == "*" and f.offset is None
        zero = f.zero is not None and (f is r.w or not fixed or kind != "W8A8")
        if not ok or zero or f.sparsity is not None or (f is not r.w and not _plain_scale(f)):
            nearest = Format(f.element, Block("row"), Format("fp32"))
            swap = {"w": nearest} if f is r.w else {"x": tuple(nearest if o is f else o for o in r.x)}
            yield Refusal("one-scale-each", f"{kind}: {f}", replace(r, **swap))
    if kind in ("W4A4", "W4A8"):
        if r.n % 8 or (kind == "W4A4" and r.k % 8):
            eights = replace(r, n=r.n + -r.n % 8, k=r.k + (-r.k % 8 if kind == "W4A4" else 0))
            yield Refusal("int4-eights", f"{kind}: n={r.n}, k={r.k}", eights)
        if r.out == torch.float32:
            yield Refusal("int4-out", f"{kind}: out=fp32", replace(r, out=torch.bfloat16))
        if kind == "W4A4" and any(f.block is not None and f.block.kind != "row" for f in r.x):
            yield Refusal("one-scale-each", f"{kind}: x={r.x[0]} has one scale for all rows")
    if kind == "W4A4" and r.bias:
        yield Refusal("no-bias", f"{kind} with a bias", replace(r, bias=False))
    if kind == "W4A8" and r.bias:
        yield Refusal("scale-bias", f"{kind} with a bias", replace(r, bias=False))


def _weight_only(r: GemmRequest, kind: str) -> Iterator[Refusal]:
    w = r.w
    assert isinstance(w, Format) and w.block is not None and w.scale is not None
    x = r.x[0].element
    if w.block.kind not in ("row", "group") or w.op != "*" or w.offset is not None or w.sparsity is not None:
        yield Refusal("one-scale-each", f"{kind}: {w}; the operator takes one scale per row or group of a row")
        return
    same = x in HALVES and {f.element for f in r.x} == {x}
    if not same or not w.scale.plain or w.scale.element != x or not _whole_zero(w, x):
        near = replace(w, scale=Format(x if x in HALVES else "bf16"))
        nearest = replace(r, w=near, x=(Format(near.scale.element),)) if near.scale is not None else None
        yield Refusal("antiquant-scale-type", f"{kind}: scales {w.scale}, x {x}", nearest)
    if w.block.kind == "group" and w.block.cols < r.k:  # one group is a row
        size = w.block.cols
        if size % 32 or r.k % size:
            yield Refusal("antiquant-group", f"{kind}: group {size} of k={r.k}", _regrouped(r, w))
        elif kind == "W4A16" and size not in (32, 64, 128):
            yield Refusal("antiquant-int4-group", f"{kind}: group {size}", _regrouped(r, w))
    if kind == "W4A16" and r.n % 8:
        yield Refusal("int4-eights", f"{kind}: n={r.n}", replace(r, n=r.n + -r.n % 8))
    if r.bias and x == "fp16":
        yield Refusal("antiquant-bias", f"{kind}: fp16 with a bias", replace(r, bias=False))
    if r.out not in (None, WIDE.get(x)):
        yield Refusal("antiquant-out", f"{kind}: x {x}, out {r.out}", replace(r, out=None))


def _regrouped(r: GemmRequest, w: Format) -> GemmRequest:
    size = next((g for g in (128, 64, 32) if r.k % g == 0 and g < r.k), 32)
    return replace(r, w=replace(w, block=Block("group", cols=size)))


def _whole_zero(w: Format, x: str) -> bool:
    """Whether minus the zero point (and 8, for unsigned codes) is exact in the type of x."""
    z = w.zero
    if z is None:
        return True
    return z.plain and (element(z.element).integer or (z.element == x and element(w.element).kind == "int"))


def _plain_scale(f: Format) -> bool:
    return f.scale is not None and f.scale.plain and f.scale.element in WIDE


def _mx(f: Format) -> bool:
    block = f.block
    whole = f.scale is not None and f.scale.plain and f.scale.element == "e8m0" and f.op == "*"
    return whole and block is not None and block.kind == "group" and block.cols == 32 and f.sparsity is None


def _tiled(r: GemmRequest) -> bool:
    """Tiles of 128 x 128 and groups of 128, one fp32 scale each."""
    assert isinstance(r.w, Format)
    plain = all(_plain_scale(f) and f.op == "*" and f.zero is None and f.offset is None for f in (r.w, *r.x))
    return plain and r.w.block == Block("tile", 128, 128) and {f.block for f in r.x} == {Block("group", cols=128)}


def _lossless(r: GemmRequest) -> bool:
    return isinstance(r.w, Format) and r.w.plain and all(f.element in (r.w.element, "fp32") for f in r.x)


def _path(r: GemmRequest, kind: str) -> Path:
    line = operator(kind)
    layout, aclnn = line.layout, "/".join(line.aclnn)
    if kind == "W8A8":
        whole = r.k % FULL_FRACTAL[0] == 0 and r.n % FULL_FRACTAL[1] == 0
        layout, aclnn = ("[K, N] FRACTAL_NZ", line.aclnn[0]) if whole else ("[K, N]", line.aclnn[1])
    words = f"{kind}: {line.op} -> {aclnn}, weight {layout}; {line.scales}"
    return Path(kind, _CLASS[kind], words, layout, "int32" if kind in ("W8A8", "W4A4") else "fp32")


def decoded(r: GemmRequest, arch: str, why: str) -> Path | Refusal:
    """The product with a decoded copy of the weight; why: the reason that there is no operator for it."""
    names = {f.element for f in r.x}
    if r.operand is not None or len(names) != 1:
        return Refusal(
            "", why or f"no operator multiplies {r.w} rounded to {r.operand} with {', '.join(sorted(names))}"
        )
    x = names.pop()
    kind = "fp32" if x == "fp32" else "16 bits"
    numerics = NumericsClass.FP32_ACC if x == "fp32" or _lossless(r) else NumericsClass.DEQUANT_16
    if arch not in operator(kind).on or (arch == "310P" and x == "bf16"):
        return Refusal("generation", f"products in {x} are not documented for {arch}")
    if numerics > minimum_class(r):
        return Refusal("", f"class {numerics.label}, the request accepts {minimum_class(r).label}: no float64 here")
    kept = "weight as it is" if _lossless(r) else f"weight decoded to {x} once"
    words = f"{kept}, torch.nn.functional.linear in {x} with fp32 sums, one rounding"
    note = f"{why}; the weight is kept decoded: the memory of an unquantized one" if why else ""
    return Path(kind, numerics, words, "[N, K]", note=note)
