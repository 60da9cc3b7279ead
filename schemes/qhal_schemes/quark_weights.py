"""Weights of Quark: which tensors a record stores for a module, and how they become a QTensor.

    fp8      e4m3fn or e5m2 [N, K], scale [], [N], [N, K/g] or one for every tile; e8m0: uint8 exponents
    int8     [N, K], scale [] or [N]; per group both transposed, [K, N] and [K/g, N]
    int4     eight codes in an int32: [N, K/8] with scale [] or [N], per group transposed, [K, N/8] and [K/g, N]
    fp4, fp6 two codes in a byte, four in three, [N, K/2] or [N, 3K/4], scale uint8 [N, K/g]
    two stages, [fp8 per tensor or channel, int4]: weight_scale_2 is the int4 scale, weight_scale multiplies it

Zero points have the type and the packing of the codes; symmetric weights carry zeros. W = (code - zero) * scale.
Layouts were compared with files of amd-quark 0.13, except e5m2, tiles, e4m3fn with exponents and groups in two stages,
which follow its source (export/nn/modules/realquantizer.py, utils/pack.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.lanes import transpose, unpack_columns, unpack_order
from qhal_schemes.packing import unpack, unpack_int4, unpack_nibbles, unpack_six
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.quark_config import INTEGERS, MX, Record, TensorSpec
from qhal_schemes.source import WIDE, TensorIndex

STORED = {"fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8"} | dict.fromkeys(MX, "U8")
"""The dtype in the file of codes that have one or more bytes each, or share bytes."""
_WIDE = tuple(sorted(WIDE))


@dataclass(frozen=True)
class Stored:
    """What a module's weight tensors are. names: part (weight, scale, zero, outer) -> name in the file."""

    n: int
    k: int
    format: Format
    names: Mapping[str, str]
    spec: TensorSpec

    @property
    def transposed(self) -> bool:
        """Whether codes, scales and zero points are stored [K, N]."""
        return self.spec.dtype in INTEGERS and self.spec.qscheme == "per_group"

    @property
    def nibbles(self) -> bool:
        """Whether eight codes share an int32."""
        return self.spec.dtype in ("int4", "uint4")


def locate(index: TensorIndex, module: str, record: Record, leaves: Mapping[str, str]) -> Stored:
    """Find and check a module's weight tensors. leaves: canonical last part -> name in the file."""
    stages = record.weight
    spec = stages[-1]
    if len(stages) > 1 and not _two_stages(stages):
        raise CheckpointError(
            f"unsupported: {index.folder}: {record.path}.weight: {' then '.join(map(str, stages))}; two stages can be "
            "fp8 per tensor or channel, then int4"
        )
    if (spec.qscheme == "per_channel" and spec.axis != 0) or (spec.qscheme == "per_group" and spec.axis != 1):
        raise CheckpointError(
            f"unsupported: {index.folder}: {record.path}.weight.ch_axis {spec.axis} with {spec.qscheme}; scales of "
            "output channels and of groups along the inputs can be read"
        )
    suffix = "_2" if len(stages) > 1 else ""

    def name(leaf: str) -> str:
        return leaves.get(leaf, f"{module}.{leaf}")

    names = {"weight": f"{module}.weight", "scale": name(f"weight_scale{suffix}")}
    n, k = _shape(index, spec, names)
    scale = _scale(index, spec, names["scale"], n, k)
    zero = name(f"weight_zero_point{suffix}")
    if spec.dtype in INTEGERS and (zero in index or not spec.symmetric):
        names["zero"] = zero
        _expect_zero(index, spec, zero, n, k)
    outer = ""
    if len(stages) > 1:
        names["outer"] = name("weight_scale")
        rows = stages[0].qscheme == "per_channel"
        shape = _flat(index, names["outer"], n if rows else 1)
        outer = f"{'row' if rows else 'tensor'}*{ELEMENT_OF[index.expect(names['outer'], _WIDE, shape).dtype]}"
    return Stored(n, k, weight_format(spec, scale, outer), names, spec)


def read(index: TensorIndex, stored: Stored, reorder: bool) -> QTensor:
    """The weight from its tensors; scales, zero points and codes are checked."""
    s, names = stored.spec, stored.names
    t = index.read_all(list(names.values()))
    for part in ("scale", "outer"):
        if part in names:
            checks.scales(index, names[part], t[names[part]])
    codes = _codes(index, stored, t[names["weight"]], reorder)
    block = stored.format.block
    assert block is not None
    grid = block.grid(stored.n, stored.k)
    plane = t[names["scale"]]
    plane = transpose(plane) if stored.transposed else plane.reshape(grid)
    scale: Tensor | QTensor = plane
    if "outer" in names:
        assert stored.format.scale is not None
        scale = QTensor(stored.format.scale, plane, t[names["outer"]].reshape(-1, 1))
    zero = None
    if "zero" in names:
        zero = _zero(index, stored, t[names["zero"]], grid, reorder)
    return QTensor(stored.format, codes, scale, None if s.symmetric else zero)


def _two_stages(stages: tuple[TensorSpec, ...]) -> bool:
    first, second = stages[0], stages[-1]
    outer = (
        first.dtype.startswith("fp8") and first.qscheme in ("per_tensor", "per_channel") and not first.exponent_scale
    )
    return len(stages) == 2 and outer and second.dtype == "int4"


def _shape(index: TensorIndex, spec: TensorSpec, names: Mapping[str, str]) -> tuple[int, int]:
    """[N, K]. Eight codes that share an int32 may be padded: the scale's grid has the rows of a transposed weight."""
    name = names["weight"]
    if spec.dtype in ("int4", "uint4"):
        rows, packed = index.expect(name, ("I32",), (None, None)).shape
        if spec.qscheme != "per_group":
            return rows, packed * 8
        groups = -(-rows // spec.group_size)
        n = index.expect(names["scale"], _WIDE, (groups, None)).shape[1]
        if packed != -(-n // 8):
            raise index.bad(name, f"{-(-n // 8)} words for the {n} rows of {names['scale']}", f"{packed} words")
        return n, rows
    a, b = index.expect(name, (STORED[spec.dtype],), (None, None)).shape
    if spec.dtype in INTEGERS and spec.qscheme == "per_group":
        return b, a
    if spec.dtype == "fp4":
        return a, b * 2
    if spec.dtype in MX:
        if b % 3:
            raise index.bad(name, "a width of 3 bytes for 4 codes", f"{b} bytes")
        return a, b // 3 * 4
    return a, b


def _scale(index: TensorIndex, spec: TensorSpec, name: str, n: int, k: int) -> str:
    """Check the scale's shape and dtype; the element name of its dtype."""
    dtypes = ("U8", "F8_E8M0") if spec.exponent_scale else _WIDE
    shape: tuple[int, ...]
    if spec.qscheme in ("per_tensor", "per_channel"):
        shape = _flat(index, name, 1 if spec.qscheme == "per_tensor" else n)
    elif spec.qscheme == "per_block":
        shape = (-(-n // spec.block[0]), -(-k // spec.block[1]))
    else:
        if k % spec.group_size:
            raise index.bad(name, f"columns that divide into groups of {spec.group_size}", f"{k} columns (K)")
        shape = (n, k // spec.group_size)
        shape = shape[::-1] if spec.dtype in INTEGERS else shape
    return ELEMENT_OF[index.expect(name, dtypes, shape).dtype]


def _flat(index: TensorIndex, name: str, count: int) -> tuple[int, ...]:
    """The shape of one value ([] or [1]) or of one for every row ([N] or [N, 1]), as the file has it."""
    found = index[name].shape if name in index else None
    other = () if count == 1 else (count, 1)
    return other if found == other else (count,)


def _expect_zero(index: TensorIndex, spec: TensorSpec, name: str, n: int, k: int) -> None:
    if spec.dtype in ("int4", "uint4"):
        if spec.qscheme == "per_group":
            index.expect(name, ("I32",), (k // spec.group_size, -(-n // 8)))
        elif spec.qscheme == "per_channel":
            index.expect(name, ("I32",), (-(-n // 8),))
        else:
            index.expect(name, ("I32", "I8", "U8"), _flat(index, name, 1))
    else:
        flat = _flat(index, name, 1 if spec.qscheme == "per_tensor" else n)
        shape = (k // spec.group_size, n) if spec.qscheme == "per_group" else flat
        index.expect(name, (STORED[spec.dtype], "I32"), shape)


def _codes(index: TensorIndex, stored: Stored, weight: Tensor, reorder: bool) -> Tensor:
    s, name = stored.spec, stored.names["weight"]
    if stored.nibbles:
        return _nibbles(index, stored, name, weight, s.dtype == "int4", reorder)
    if s.dtype == "fp4":
        return unpack_nibbles(weight)
    if s.dtype in MX:
        return unpack_six(weight)
    if s.dtype == "fp8_e4m3":
        checks.float8_codes(index, name, weight)
    return transpose(weight) if stored.transposed else weight


def _nibbles(index: TensorIndex, stored: Stored, name: str, packed: Tensor, negative: bool, reorder: bool) -> Tensor:
    """Codes of 4 bits from [K or G, N/8] that are transposed, else [N, K/8] or [N/8]; what pads them must be zero."""
    count = stored.n if stored.transposed or packed.dim() == 1 else stored.k
    axis = 0 if stored.transposed else packed.dim() - 1
    if stored.transposed:
        codes = unpack_columns(packed, paired=reorder, negative=negative)
    elif reorder:
        codes = unpack_order(packed, negative=negative)
    else:
        codes = unpack_int4(packed.view(torch.uint8), -1) if negative else unpack(packed, 4, packed.shape[-1] * 8)
    if bool(codes.narrow(axis, count, codes.shape[axis] - count).any()):
        raise index.bad(name, f"zeros behind the {count} codes of a row", "other codes")
    return codes.narrow(axis, 0, count).contiguous()


def _zero(index: TensorIndex, stored: Stored, zero: Tensor, grid: tuple[int, int], reorder: bool) -> Tensor:
    """Zero points on the scale's grid; those of symmetric weights are zeros."""
    s, name = stored.spec, stored.names["zero"]
    if s.symmetric:
        if bool(zero.ne(0).any()):
            raise index.bad(name, "zeros, as symmetric is true", f"{int(zero.ne(0).sum())} other values")
        return zero
    if stored.nibbles and zero.dim() and zero.dtype == torch.int32 and s.qscheme != "per_tensor":
        return _nibbles(index, stored, name, zero, s.dtype == "int4", reorder).reshape(grid)
    if zero.dtype == torch.int32:
        low, high = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}[s.dtype]
        if bool(((zero < low) | (zero > high)).any()):
            raise index.bad(name, f"zero points {low}..{high}", f"{int(zero.min())}..{int(zero.max())}")
        zero = zero.to(torch.int8 if s.dtype.startswith("int") else torch.uint8)
    return transpose(zero) if stored.transposed else zero.reshape(grid)


@lru_cache(maxsize=256)
def weight_format(spec: TensorSpec, scale: str, outer: str) -> Format:
    """The format of a weight. scale, outer: element of its scales; block and element of the first stage, or ""."""
    block = {
        "per_tensor": "tensor",
        "per_channel": "row",
        "per_group": f"g{spec.group_size}",
        "per_block": f"{spec.block[0]}x{spec.block[1]}",
    }[spec.qscheme]
    zero = "" if spec.symmetric else f"-{spec.element}"
    plane = f"({scale}.{outer})" if outer else scale
    return Format.parse(f"{spec.element}{zero}.{block}*{plane}")
