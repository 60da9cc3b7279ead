"""Which products the kernels take, and how each is computed: pure functions of the request and the target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

from qhal.elements import element
from qhal.flavours import FNUZ
from qhal.formats import Format
from qhal.requests import GemmRequest, NumericsClass, minimum_class
from qhal_portable.prepared import ORDER
from qhal_portable.storage import SORTED, packing
from qhal_triton.gemm.kernels.eights import POWERS
from qhal_triton.gemm.sides import WIDE_KIND, Side, side
from qhal_triton.paths import Path
from qhal_triton.target import Target

DENSE_FROM = (192, 512)
"""Rows from which decoding the whole weight once and multiplying 16-bit floats is faster than decoding it per tile;
the second number where tiles of many rows have one sum for the whole of K (H200)."""
MANY_FROM = (65, 33)
"""Rows from which rounded weights, summed by the matrix instruction alone, are faster than scaling the sums of groups
(H200); the second number where a step has four or more groups."""
SHORT_FROM = 129
"""Rows from which steps of 64 columns are faster than those of 128: larger tiles need the memory. The edge of a tile;
measured at 64 and at 256 rows (H200, H100)."""
_PROMOTED = 128
"""Columns whose fp8 products the matrix instruction may sum by itself."""
_RUNS = (128, 64, 32, 16)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One way to compute a product; `kernels/product.py` says what type and mode mean."""

    w: Side
    x: Side
    type: str
    mode: str
    chunk: int
    apart: int
    parts: int
    indexed: bool
    numerics: NumericsClass
    packed: bool = False
    """weights are decoded and scaled two at a time, in 16 bits: scales are of x's type, so that rounds as fp32 would"""
    foreign: bool = False
    """OCP's 8-bit floats on a chip that multiplies the fnuz ones"""

    @property
    def span(self) -> int:
        """Columns of a step."""
        return self.chunk * self.parts

    @property
    def unit(self) -> int:
        """Neighbouring columns of a step that have the same scales; fp8 sums are added in fp32 after every unit."""
        if self.apart == 1:
            return self.chunk
        same = gcd(self.span, 0 if self.indexed else self.w.group, self.x.group)
        return min(same, _PROMOTED) if self.native else same

    @property
    def long(self) -> bool:
        """Whether 16-bit x meets steps of 128 columns, which pay at few rows alone."""
        return self.x.kind == WIDE_KIND and self.chunk == 128

    @property
    def native(self) -> bool:
        """Whether fp8 codes are multiplied, of x as they are."""
        return self.type == "fp8"

    @property
    def expanded(self) -> bool:
        """Whether the weight's codes of four bits become such in registers."""
        return self.native and self.w.bits <= 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a request becomes: a Spec for each format of x, the weight's layout, and the ways of many rows.

    many   instead of the first Spec, from `many_from` rows: rounded weights, or shorter steps
    dense  rows from which the weight is decoded as a whole; 0: never
    """

    specs: tuple[Spec, ...]
    many: Spec | None
    many_from: int
    layout: str
    dense: int
    numerics: NumericsClass

    @property
    def packed(self) -> bool:
        """Whether many rows meet rounded weights."""
        return self.many is not None and self.many.packed


def choose(request: GemmRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    made = plan(request, target)
    if made is None:
        return None
    if made.specs[0].w.kind == WIDE_KIND and target.kind == "cuda" and made.specs[0].type != "fp32":
        return None  # torch multiplies 16-bit floats there and leaves the sums in fp32; fp32 it may round to fewer bits
    found, moved = path(request, made), by_group(request, target)
    if moved is None:
        return found
    sorted_ = plan(moved, target)
    assert sorted_ is not None
    return _sorted(path(moved, sorted_), found)


def by_group(request: GemmRequest, target: Target) -> GemmRequest | None:
    """The product of an act-order weight whose columns are kept in the order of their groups, as `storage` sorts them:
    one of a weight without an index. None: they stay where they are, and every one reads its scale by its index."""
    w = request.w
    moved = isinstance(w, Format) and w.block is not None and w.block.kind == "group" and request.operand is None
    if not (request.group_index and moved and all(f.plain for f in request.x)):
        return None
    sorted_, indexed = plan(replace(request, group_index=False), target), plan(request, target)
    fits = sorted_ is not None and indexed is not None and sorted_.layout == indexed.layout
    return replace(request, group_index=False) if fits else None


def _sorted(one: Path, indexed: Path) -> Path:
    """The path of a weight that is sorted if its groups have equal sizes, which is known when it is prepared."""
    words = f"columns by group, x gathered to them: {one.executes}; where groups have other sizes: {indexed.executes}"
    return replace(
        one,
        executes=words,
        numerics=max(one.numerics, indexed.numerics),
        layouts=tuple(layout + SORTED for layout in one.layouts),
        made=(*one.made, ORDER),
    )


def path(request: GemmRequest, made: Plan) -> Path:
    """The plan in the words of `supports`."""
    whole = all(s.type == "int8" for s in made.specs)
    return Path(
        kernel="product",
        executes=_words(made),
        numerics=made.numerics,
        accumulate="int32" if whole and not any(s.w.group or s.x.group for s in made.specs) else "fp32",
        invariant=request.batch_invariant,
        layouts=(made.layout,),
        rounded=element(request.x[0].element).storage if made.dense or made.packed else None,
        made=made.specs[0].w.made,
    )


@lru_cache(maxsize=4096)
def plan(request: GemmRequest, target: Target) -> Plan | None:
    """How the kernels compute the request; None where they cannot within its class."""
    multiplied = request.operand or request.w
    if not isinstance(multiplied, Format):
        return None
    w = side(multiplied, request.k, activation=False)
    xs = [side(f, request.k, activation=True) for f in request.x]
    known = [x for x in xs if x is not None]
    if w is None or not known or len(known) < len(xs):
        return None
    indexed = request.group_index and request.operand is None
    allowed = minimum_class(request)
    # bytes are what makes fp8 of nibbles, and words what makes 16 bits: a weight that meets both is kept in words
    expand = target.kind == "cuda" and all(x.kind == "e4m3fn" for x in known)
    found = [
        _spec(w, x, (multiplied.element, f.element), request.k, indexed, allowed, target, expand)
        for x, f in zip(known, request.x, strict=True)
    ]
    specs = [s for s in found if s is not None]
    if len(specs) < len(found):
        return None
    layout = _layout(specs, request.k, target)
    laid = [_laid(s, layout, target) for s in specs]
    if any(s.chunk == 0 for s in laid):
        return None
    rounding = (
        allowed == NumericsClass.DEQUANT_16
        and not request.batch_invariant
        and target.kind == "cuda"
        and len(laid) == 1
        and laid[0].x.kind == WIDE_KIND
        and laid[0].type in ("bf16", "fp16")
    )
    least = MANY_FROM[laid[0].mode == "step" and laid[0].span // laid[0].unit >= 4]
    fits = rounding and target.from_memory and request.m[1] >= least  # elsewhere sums and both operands spill
    many = _packed(laid[0], multiplied) if fits else None
    if many is None and laid[0].long and not request.batch_invariant and request.m[1] >= SHORT_FROM:
        many, least = replace(laid[0], chunk=64), SHORT_FROM
    rounded = many is not None and many.packed
    whole = rounded or (laid[0].mode == "late" and laid[0].w.bits > 4)
    dense = DENSE_FROM[whole and target.from_memory] if rounding else 0
    dense = dense if request.m[1] >= dense else 0
    worst = NumericsClass.DEQUANT_16 if dense or rounded else max(s.numerics for s in laid)
    return Plan(specs=tuple(laid), many=many, many_from=least, layout=layout, dense=dense, numerics=worst)


def _packed(s: Spec, w: Format) -> Spec | None:
    """The Spec of many rows: one product of rounded weights, whose sums stay in the matrix instruction.

    None where a scale is no 16-bit number of x's type, or the codes are not those of four bits in words.
    """
    plain = w.scale is not None and w.scale.plain and w.scale.element in (s.type, "e8m0")
    fits = s.mode == "step" and s.parts == 8 and not s.w.made and not s.w.offset
    if not (plain and fits) or (s.w.scale == "e8m0" and s.type != "bf16"):
        return None
    return replace(s, mode="early", packed=True, numerics=NumericsClass.DEQUANT_16)


def _spec(
    w: Side,
    x: Side,
    names: tuple[str, str],
    k: int,
    indexed: bool,
    allowed: NumericsClass,
    target: Target,
    expand: bool,
) -> Spec | None:
    """Type and mode for one format of x, of the best class and the fastest within what is allowed.

    expand: codes of four bits may become fp8 ones
    """
    early = (indexed or not w.exact) and w.kind != WIDE_KIND
    kind = "" if x.kind != WIDE_KIND else names[1]
    numerics = NumericsClass.FP32_ACC
    foreign = {w.kind, x.kind} <= FNUZ.keys() and not {w.kind, x.kind} <= target.fp8
    if kind:
        rounds = early or (w.kind == WIDE_KIND and names[0] != kind)
        numerics = NumericsClass.DEQUANT_16 if rounds and kind != "fp32" else numerics
    elif not (x.exact or x.shifted) or w.kind == WIDE_KIND:
        return None
    elif (
        not early
        and w.integer
        and (x.integer or x.shifted)
        and k <= (1 << 15 if _zeros(w, x) else 1 << 16)
        and _wide(w, x)
    ):
        kind = "int8"
    elif x.shifted:
        return None
    elif (
        not early
        and _eight(w, x, foreign, expand) <= target.fp8
        and allowed >= NumericsClass.REDUCED_ACC
        and _wide(w, x)
    ):
        kind, numerics = "fp8", NumericsClass.REDUCED_ACC
    else:
        kind = "bf16"
        numerics = NumericsClass.DEQUANT_16 if early else numerics
    if numerics > allowed:
        return None
    mode = "early" if early else ("step" if w.group else "late")
    return Spec(
        w=w,
        x=x,
        type=kind,
        mode=mode,
        chunk=0,
        apart=0,
        parts=1,
        indexed=indexed,
        numerics=numerics,
        foreign=foreign and kind == "fp8",
    )


def _eight(w: Side, x: Side, foreign: bool, expand: bool) -> set[str]:
    """The elements as an instruction would read them.

    foreign  OCP's 8-bit floats as fnuz of the same bytes
    expand   codes of four bits as e4m3fn, which holds them
    """
    if expand and w.bits <= 4 and w.kind in POWERS and not w.zero:
        return {"e4m3fn", x.kind}
    return {FNUZ.get(kind, kind) if foreign else kind for kind in (w.kind, x.kind)}


def _zeros(w: Side, x: Side) -> bool:
    return bool(w.zero or x.zero) or "uint" in (w.kind, x.kind)


def _wide(w: Side, x: Side) -> bool:
    """Whether scales leave runs that are long enough for instructions of 8-bit operands."""
    return all(s.group % 32 == 0 for s in (w, x))


def _layout(specs: list[Spec], k: int, target: Target) -> str:
    """How `prepare` keeps the codes: eight in a word or two in a byte, as far apart as scales let them be."""
    if specs[0].w.bits > 4:
        return "canonical"
    for layout in ("word32", "word16", "nibble128", "nibble64", "nibble32", "nibble16", "nibble"):
        apart, size = packing(layout)
        if k % (2 * size * apart) == 0 and all(_laid(s, layout, target).chunk for s in specs):
            return layout
    return "canonical"


def _laid(s: Spec, layout: str, target: Target) -> Spec:
    """The Spec with the columns of a step: the longest run without a change of scale; 0 if there is none."""
    apart, size = packing(layout)
    if s.expanded and size > 1:
        return s
    groups = [g for g in (0 if s.indexed else s.w.group, s.x.group) if g]
    shortest = 32 if s.type in ("int8", "fp8") else 16
    rows = s.w.bits > 4 and s.mode == "late" and s.x.kind == WIDE_KIND and s.type != "fp32"
    longest = 128 if s.type in ("int8", "fp8") or (rows and target.from_memory) else 64
    reach = 2 if apart == 1 else 1
    fitting = [c for c in _RUNS if shortest <= c <= longest and all(g % (c * reach) == 0 for g in groups)]
    if apart > 1:
        fitting = [c for c in fitting if c == apart]
    return replace(s, chunk=fitting[0] if fitting else 0, apart=apart, parts=2 * size if apart else 1)


def _words(made: Plan) -> str:
    many = ""
    if made.many is not None and made.packed:
        many = f"; from {made.many_from} rows: weights rounded to {made.many.type} in registers"
    dense = f"; from {made.dense} rows: the weight decoded to 16 bits once per call, torch.mm, fp32 sums, one rounding"
    return " | ".join(dict.fromkeys(_word(s) for s in made.specs)) + many + dense * bool(made.dense)


def _word(s: Spec) -> str:
    if s.w.kind == WIDE_KIND and s.x.kind == WIDE_KIND:
        rounded = ", the weight rounded to it" * (s.numerics == NumericsClass.DEQUANT_16)
        return f"W{s.w.bits}A{s.x.bits}: Triton, exact products of {s.type}{rounded}, fp32"
    sums = {"int8": "exact int32 sums", "fp8": "fp8 matrix instructions promoted every 128 columns"}
    where = {
        "early": f"weights decoded in fp32 and rounded to {s.type}",
        "step": f"scales times the {'' if s.native else 'exact '}sums of a group",
        "late": "scales times the sums of a row",
    }
    read = ", bytes read as fnuz" * s.foreign
    product = "4-bit codes as e4m3, exact, in registers, " * s.expanded
    product += sums.get(s.type, f"exact products of {s.type}")
    made = f", {' and '.join(f'{name}s' for name in s.w.made)} decoded to fp32 when prepared" if s.w.made else ""
    made += ", scales of x decoded to fp32" * bool(s.x.made)
    return f"W{s.w.bits}A{s.x.bits}: Triton, {product}{read}, {where[s.mode]}, fp32{made}"
