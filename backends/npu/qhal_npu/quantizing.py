"""quantize: by torch_npu's operator where its published formula has the bits of the format's rule, else by torch.

npu_dynamic_quant     int8 and e4m3fn by row: amax / 127 (448), x / scale, half to even. The formula divides 0 by 0
                      in a row of zeros; there the code 0 and the scale of the rule are put in its place.
npu_quantize          int8 under one static scale: round(x / scale + zero), half to even
npu_dynamic_mx_quant  e4m3fn and e2m1 in groups of 32: floor(log2 amax). Its e4m3fn codes round half to even, its
                      E2M1 codes as asked; another rule is answered with the rule that it follows. What the formula
                      says nothing of, blocks with NaN or Inf, and byte 0 for blocks of zeros, is put right after it
torch                 the definition (`qhal.encoding`) on the NPU's own operators, where it needs no float64
host                  the definition on the processor, where it does: tables, exponents, means
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qhal.elements import element
from qhal.encoding import encode
from qhal.formats import Format
from qhal.rules import Rule
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_npu import calls, layouts
from qhal_portable import storage

HALF_TYPES = (torch.bfloat16, torch.float16)
_ROWS = {"int8": calls.INT8, "e4m3fn": calls.E4M3FN}
_FP8 = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")


@dataclass(frozen=True)
class Quantizer:
    """How a format is made. rule: the one that is followed where it is not the format's."""

    op: str
    rule: Rule | None = None


def choose(f: Format, x: torch.dtype | None, static: bool, arch: str, *, clip: bool = False) -> Quantizer | str:
    """How x of that type (None: 16 bits) becomes f, or why it does not. f is known to be encodable."""
    levels = list(f.levels())
    if arch != "A5" and any(level.element in _FP8 for level in levels):
        return f"{arch} has no float8 type; an A5 has"
    if _mx(f):
        return _mx_quantizer(f, static, arch, clip)
    if any(element(level.element).kind in ("exponent", "lut") for level in levels) or f.rule.domain == "mean":
        return Quantizer("host")
    half = x is None or x in HALF_TYPES
    rows = f.block is not None and f.block.kind == "row" and f.element in _ROWS and _plain(f, Rule())
    if rows and half and not static and not clip and f.zero is None and (f.element == "int8" or arch == "A5"):
        return Quantizer("npu_dynamic_quant")
    one = f.block is not None and f.block.kind == "tensor" and f.element == "int8" and _plain(f, Rule())
    if one and static and not clip and arch != "310P" and (f.zero is None or f.zero.element == "fp32"):
        return Quantizer("npu_quantize")
    return Quantizer("torch")


def _plain(f: Format, rule: Rule) -> bool:
    """One fp32 scale that multiplies, and nothing else but perhaps a zero point."""
    whole = f.scale == Format("fp32") and f.op == "*" and f.offset is None and f.sparsity is None
    return whole and f.rule == rule


def _mx(f: Format) -> bool:
    block = f.block
    return f.scale == Format("e8m0") and block is not None and (block.kind, block.cols) == ("group", 32)


def _mx_quantizer(f: Format, static: bool, arch: str, clip: bool) -> Quantizer | str:
    if arch != "A5":
        return f"microscaling formats need an A5, this is {arch}"
    if f.element not in ("e4m3fn", "e2m1") or static or clip or f.op != "*" or f.sparsity is not None:
        return Quantizer("host")
    followed = Rule(round="even" if f.element == "e4m3fn" else f.rule.round)
    return Quantizer("npu_dynamic_mx_quant", None if followed == f.rule else followed)


def quantize(x: Tensor, o: Operand, arch: str) -> QTensor:
    """Codes and scales of x [..., K] in the canonical layout, by the operator that `choose` names."""
    f = o.format
    found = choose(f, x.dtype, o.static, arch, clip=o.clipped)
    assert isinstance(found, Quantizer)
    if found.op == "host":
        return _on_host(x, o)
    if found.op == "torch" or not x.numel():
        return encode(x, f, scale=o.scale, zero=o.zero, clip=o.clip)
    if found.op == "npu_quantize":
        assert o.scale is not None
        grid = [1] * x.dim()
        zero = None if o.zero is None else o.zero.reshape(grid)
        return QTensor(f, static_codes(x, o), o.scale.reshape(grid), zero)
    if found.op == "npu_dynamic_mx_quant":
        codes, pairs = mx_codes(x, f)
        whole = layouts.unpack_nibbles(codes) if f.element == "e2m1" else codes
        return QTensor(f, whole, layouts.from_mx_pairs(pairs, -(-x.shape[-1] // 32)))
    codes, scale = calls.dynamic_quant(x, _ROWS[f.element])
    empty = (scale == 0)[..., None]
    if f.element == "int8":
        codes = codes.masked_fill(empty, 0)
    else:  # float8 has no masked copies; every bit of 0 is 0
        codes = codes.view(torch.uint8).masked_fill(empty, 0).view(codes.dtype)
    return QTensor(f, codes, scale[..., None].masked_fill(empty, 1.0))


def _on_host(x: Tensor, o: Operand) -> QTensor:
    def host(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.cpu()

    made = encode(x.cpu(), o.format, scale=host(o.scale), zero=host(o.zero), clip=o.clip)
    back = storage.canonical(storage.keep(made, x.device))
    assert isinstance(back, QTensor)
    return back


def static_codes(x: Tensor, o: Operand) -> Tensor:
    """int8 codes of x under one static scale."""
    assert o.scale is not None
    zero = None if o.zero is None else o.zero.float().reshape(1)
    return calls.static_quant(x, o.scale.float().reshape(1), zero)


def mx_codes(x: Tensor, f: Format) -> tuple[Tensor, Tensor]:
    """Codes as the operator packs them, and E8M0 bytes in pairs."""
    fp4 = f.element == "e2m1"
    mode = "round" if fp4 and f.rule.round == "away" else "rint"
    codes, pairs = calls.dynamic_mx_quant(x, calls.E2M1 if fp4 else calls.E4M3FN, mode)
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 2, 32))
    peak = blocks.abs().amax(-1)
    return codes, pairs.masked_fill(peak == 0, 127).masked_fill(~torch.isfinite(peak), 255)
