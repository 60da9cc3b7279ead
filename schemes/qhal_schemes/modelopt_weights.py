"""Weights of ModelOpt: which tensors an algorithm stores for a module, and how they become a QTensor.

Everything hangs on `weight`, whose dtype and width follow from the element of the codes; `weight_scale` has the grid of
the format's block, and `weight_scale_2` is the outer level of a two-level scale. All scales multiply.
  e4m3fn  F8_E4M3 [N, K]    int8  I8 [N, K]
  e2m1    U8 [N, K/2], even column in the low nibble    int4  U8 [N/2, K], even row in the low nibble
The tensors were checked against files of ModelOpt 0.47, except those of FP8_PER_CHANNEL_PER_TOKEN, NVFP4_SVD,
W4A16_NVFP4, W4A8_NVFP4_FP8, W4A8_MXFP4_FP8 and W8A16, which follow its exporter's source.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qhal.blocks import Block
from qhal.formats import Format
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.modelopt_algorithms import Algorithm
from qhal_schemes.modelopt_config import Layer
from qhal_schemes.packing import unpack_int4, unpack_nibbles
from qhal_schemes.source import WIDE, TensorIndex

CODES = ("F8_E4M3", "I8", "U8")
"""Dtypes of a quantized `weight`."""

_LORA = ("svdquant_lora_{}", "weight_quantizer.svdquant_lora_{}", "weight_quantizer._svdquant_lora_{}")
"""Names of the low-rank factors: those of the current exporter, and of those before it."""


@dataclass(frozen=True)
class Stored:
    """What one module's tensors are, from the index: shape, formats and the names to read."""

    algorithm: Algorithm
    n: int
    k: int
    format: Format
    input: Format | None
    names: tuple[str, ...]
    low_rank: tuple[str, str] | None = None
    rank: int = 0
    bias: bool = False
    pre_scale: bool = False


def locate(index: TensorIndex, module: str, layer: Layer) -> Stored:
    """Find and check a module's tensors by names, dtypes and shapes."""
    a = layer.algorithm
    element, block = a.format().element, a.format().block
    assert block is not None
    dtype = {"e4m3fn": "F8_E4M3", "int8": "I8"}.get(element, "U8")
    n, k = index.expect(f"{module}.weight", (dtype,), (None, None)).shape
    n, k = (n * 2 if element == "int4" else n), (k * 2 if element == "e2m1" else k)
    group = _scale(index, module, layer, block, n, k)
    names = [f"{module}.weight", f"{module}.weight_scale"]
    for leaf, wanted in (("weight_scale_2", _two_scales(a)), ("input_scale", a.static)):
        if wanted:
            index.expect(f"{module}.{leaf}", ("F32",), _one_value(index, f"{module}.{leaf}"))
            names.append(f"{module}.{leaf}")
    parts = {leaf: f"{module}.{leaf}" in index for leaf in ("pre_quant_scale", "bias")}
    for leaf, size in (("pre_quant_scale", k), ("bias", n)):
        if parts[leaf]:
            index.expect(f"{module}.{leaf}", tuple(WIDE), (size,))
            names.append(f"{module}.{leaf}")
    low_rank, rank = _low_rank(index, module, n, k) if a.low_rank else (None, 0)
    fmt, inputs = a.format(group), a.input_format(group)
    return Stored(
        a, n, k, fmt, inputs, (*names, *(low_rank or ())), low_rank, rank, parts["bias"], parts["pre_quant_scale"]
    )


def weight(index: TensorIndex, module: str, stored: Stored, t: dict[str, Tensor]) -> QTensor:
    """The weight from its tensors; every code and scale is checked."""
    fmt, codes, name = stored.format, t[f"{module}.weight"], f"{module}.weight_scale"
    assert fmt.block is not None and fmt.scale is not None
    if fmt.element == "e4m3fn":
        checks.float8_codes(index, f"{module}.weight", codes)
    elif fmt.element != "int8":
        codes = unpack_nibbles(codes) if fmt.element == "e2m1" else unpack_int4(codes, 0)
    nested = not fmt.scale.plain
    checks.scales(index, name, t[name], zero_ok=nested, positive=not nested)
    scale: Tensor | QTensor = t[name].reshape(fmt.block.grid(stored.n, stored.k))
    if nested:
        assert isinstance(scale, Tensor)
        scale = QTensor(fmt.scale, scale, _positive(index, f"{module}.weight_scale_2", t).reshape(1, 1))
    return QTensor(fmt, codes, scale)


def operands(
    index: TensorIndex, module: str, stored: Stored, t: dict[str, Tensor]
) -> tuple[Operand | None, Operand | None]:
    """How the input is quantized, and what the weight is rounded to before the product."""
    a, given, operand = stored.algorithm, None, None
    if stored.input is not None:
        scale = _positive(index, f"{module}.input_scale", t).reshape(1) if a.static else None
        given = Operand(stored.input, scale)
    if a.operand_format is not None:
        operand = Operand(a.operand_format, _positive(index, f"{module}.weight_scale_2", t).reshape(1))
    return given, operand


def _two_scales(a: Algorithm) -> bool:
    scale = a.format().scale
    return bool(a.operand) or (scale is not None and not scale.plain)


def _scale(index: TensorIndex, module: str, layer: Layer, block: Block, n: int, k: int) -> int:
    """Check the scale's dtype and shape; the size of its groups, 0 for blocks without one."""
    name, a = f"{module}.weight_scale", layer.algorithm
    inner = a.format().scale
    assert inner is not None
    dtypes = {"e8m0": ("U8", "F8_E8M0"), "e4m3fn": ("F8_E4M3",)}.get(inner.element, ("F32",))
    if block.kind == "tensor":
        index.expect(name, dtypes, _one_value(index, name))
        return 0
    if block.kind == "row":
        column = name in index and len(index[name].shape) == 2
        index.expect(name, dtypes, (n, 1) if column else (n,))
        return 0
    size = layer.group or a.group
    if block.kind == "tile":
        index.expect(name, dtypes, (-(-n // size), 1, -(-k // size), 1))
        return size
    groups = index.expect(name, dtypes, (n, None)).shape[1]
    if not size and groups:
        size = k // groups
    if size < 1 or groups * size != k:
        exact = f"{k // size} groups of {size} for" if size and k % size == 0 else "groups that fill"
        raise index.bad(name, f"{exact} {k} columns (K)", f"{groups} groups{f' of {size}' if size else ''}")
    return size


def _low_rank(index: TensorIndex, module: str, n: int, k: int) -> tuple[tuple[str, str], int]:
    """Names of lora_a [rank, K] and lora_b [N, rank], and the rank."""
    names = [[f"{module}.{form.format(part)}" for part in "ab"] for form in _LORA]
    down, up = next((pair for pair in names if pair[0] in index or pair[1] in index), names[0])
    rank = index.expect(down, tuple(WIDE), (None, k)).shape[0]
    index.expect(up, tuple(WIDE), (n, rank))
    return (down, up), rank


def _one_value(index: TensorIndex, name: str) -> tuple[int, ...]:
    """The shape of one value: [], or [1] if the file has that."""
    return (1,) if name in index and index[name].shape == (1,) else ()


def _positive(index: TensorIndex, name: str, t: dict[str, Tensor]) -> Tensor:
    checks.scales(index, name, t[name], positive=True)
    return t[name]
