"""Which products humming takes. Read in its kernels, so what is refused here is refused for its numbers.

It decodes a code exactly, multiplies it with the group's scale in the type of x with one rounding (class dequant-16),
sums in float32, and rounds to the type of x. Not taken, because the result would be rounded more than once:

* its split sums ("stream-K", its default): partial results are added in 16 bits, in the order in which blocks finish.
  We ask for `use_batch_invariant`, which sums a tile's whole K in one block; few rows then leave many SMs idle.
* a scale per channel, and a bias: applied to the 16-bit result. A row's scale is given to it once per group instead.
* int8 activations with group scales: scales are rounded to 11 bits of the largest. Grouped products with an activation
  or weights of tokens: the product is rounded before either.
* e5m2 weights: their Inf and NaN codes decode to numbers. e4m3fn has two NaN codes; a weight with one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qhal.elements import WIDE, element
from qhal.formats import Format
from qhal.requests import GemmRequest, NumericsClass, minimum_class
from qhal_triton.paths import Path

ARCH = (9, 0)
"""The only architecture whose kernels and layout were read."""
LAYOUT = "humming"
_HALVES = ("bf16", "fp16")
_N, _K = 128, 64
_GROUPS = (32, 64, 128)
_WIDE = tuple(Format(name) for name in WIDE)
_FLOATS = {"e2m1": "float4e2m1", "e3m2": "float6e3m2", "e2m3": "float6e2m3", "e4m3fn": "float8e4m3"}


@dataclass(frozen=True)
class Kind:
    """A weight format in the library's words.

    x         its name of the activation's type, which the result has too
    weight    its name of the weight's codes
    bits      of a code
    scale     its name of the scale's type
    group     columns that share a scale there; a row's scale is repeated
    zero      whether there are integer zero points
    two       whether a scale of the whole tensor stands above the group's
    """

    x: str
    weight: str
    bits: int
    scale: str
    group: int
    zero: bool = False
    two: bool = False


_NAMES = {"bf16": "bfloat16", "fp16": "float16"}


def choose(r: GemmRequest, capability: tuple[int, int]) -> Path | None:
    """The path for a request whose formats are known to be executable; None: another one's."""
    if capability != ARCH or kind(r) is None or minimum_class(r) < NumericsClass.DEQUANT_16:
        return None
    if r.operand is not None or r.bias or r.group_index or r.batch_invariant or r.n % _N or r.k % _K:
        return None
    bits, x = element(r.w.element).bits if isinstance(r.w, Format) else 0, r.x[0].element
    words = f"W{bits}A16: humming, codes times scale rounded to {x} once, fp32 sums of whole columns, one rounding"
    return Path(kernel="humming", executes=words, numerics=NumericsClass.DEQUANT_16, layouts=(LAYOUT,))


def kind(r: GemmRequest) -> Kind | None:
    """The request's formats as the library names them; None where it has no exact way."""
    names = {f.element if f.plain else "" for f in r.x}
    if len(names) != 1 or not names <= set(_HALVES) or not isinstance(r.w, Format):
        return None
    x = names.pop()
    if r.out not in (None, element(x).storage):
        return None
    w = r.w
    if w.scale is None or w.block is None or w.op != "*" or w.offset is not None or w.sparsity is not None:
        return None
    if w.block.kind == "row":
        group = 128 if r.k % 128 == 0 else 64
    elif w.block.kind == "group" and w.block.rows == 1 and r.k % w.block.cols == 0:
        group = w.block.cols
    else:
        return None
    return _floats(w, x, group) if w.element == "e2m1" and not _same(w, x) else _plain(w, x, group)


def _same(w: Format, x: str) -> bool:
    """Whether the scale is a plain number of the activation's type: it is multiplied as it is."""
    return w.scale is not None and w.scale.plain and w.scale.element == x


def _plain(w: Format, x: str, group: int) -> Kind | None:
    e = element(w.element)
    if not _same(w, x) or group not in _GROUPS or not 2 <= e.bits <= 8:
        return None
    if w.element in _FLOATS:
        return None if w.zero is not None else Kind(_NAMES[x], _FLOATS[w.element], e.bits, _NAMES[x], group)
    if e.kind == "int" and w.zero is None:
        return Kind(_NAMES[x], f"uint{e.bits}", e.bits, _NAMES[x], group)
    # in bf16 the difference of two codes is exact, and their own codes up to 6 bits
    if e.kind == "uint" and w.zero == Format(w.element) and e.bits <= 6:
        return Kind(_NAMES[x], f"uint{e.bits}", e.bits, _NAMES[x], group, zero=True)
    return None


def _floats(w: Format, x: str, group: int) -> Kind | None:
    """MXFP4 and NVFP4: decoded exactly in bf16, which has the range of an e8m0 scale."""
    assert w.scale is not None
    if x != "bf16" or w.zero is not None:
        return None
    if w.scale.plain and w.scale.element == "e8m0" and group == 32:
        return Kind("bfloat16", "float4e2m1", 4, "float8e8m0", group)
    inner, outer = w.scale, w.scale.scale
    tensor = inner.block is not None and inner.block.kind == "tensor" and inner.zero is None and inner.offset is None
    if inner.element == "e4m3fn" and tensor and inner.op == "*" and group == 16 and outer in _WIDE:
        return Kind("bfloat16", "float4e2m1", 4, "float8e4m3", group, two=True)
    return None


def torch_dtype(k: Kind) -> torch.dtype:
    """The type of x and of the result."""
    return torch.bfloat16 if k.x == "bfloat16" else torch.float16
