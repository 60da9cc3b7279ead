"""Weights of compressed-tensors: which tensors each file format stores for a module, and how they become a QTensor.

Layouts were checked against checkpoints written by compressed-tensors 0.13 and 0.19. Of 3-, 5-, 6- and 7-bit codes two
packings share one name: whole codes in every word up to version 0.17.1, one dense bit stream from 0.18; the width of
the packed tensor tells them apart, and the version where both widths are equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from qhal.elements import element
from qhal.formats import Format
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.ct_config import FLOAT, INT, MXFP4, MXFP6, MXFP8, NAIVE, NVFP4, PACKED, Group, weight_format
from qhal_schemes.lanes import transpose
from qhal_schemes.packing import unpack, unpack_bits, unpack_nibbles, unpack_six, words
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.source import WIDE, TensorIndex

_SCALES = tuple(WIDE)


@dataclass(frozen=True)
class Stored:
    """What one module's tensors are, from the index: shape, format and the names to read."""

    n: int
    k: int
    format: Format
    names: tuple[str, ...]
    group_index: bool = False
    aligned: bool = False


def locate(index: TensorIndex, module: str, group: Group, version: str, sparse: bool) -> Stored:
    """Find and check a module's weight tensors by names, dtypes and shapes."""
    a, fmt = group.weights, _kind(group)
    if sparse:
        return _locate_sparse(index, module, group)
    if fmt == PACKED:
        return _locate_packed(index, module, group, version)
    if fmt in (INT, FLOAT, MXFP8):
        n, k = index.expect(f"{module}.weight", ("I8",) if fmt == INT else ("F8_E4M3",), (None, None)).shape
        codes = "weight"
    else:
        n, width = index.expect(f"{module}.weight_packed", ("U8",), (None, None)).shape
        k, codes = (width * 4 // 3 if fmt == MXFP6 else width * 2), "weight_packed"
        if fmt == MXFP6 and width % 3:
            raise index.bad(f"{module}.weight_packed", "a width of 3 bytes for 4 codes", f"{width} bytes")
    scale, names = _scale(index, module, group, n, k), [f"{module}.{codes}", f"{module}.weight_scale"]
    if fmt == NVFP4:
        index.expect(f"{module}.weight_global_scale", ("F32",), (1,))
        names.append(f"{module}.weight_global_scale")
    names += _zero_names(index, module, group, n, k, None)
    return Stored(n, k, weight_format(fmt, a, scale), tuple(names))


def read(index: TensorIndex, module: str, group: Group, stored: Stored, tensors: dict[str, Tensor]) -> QTensor:
    """The weight from its tensors; every scale, index and code is checked."""
    a, fmt, n, k = group.weights, _kind(group), stored.n, stored.k
    t = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    if "weight_shape" in t:
        shape = tuple(int(v) for v in t["weight_shape"].flatten())
        if shape != (n, k):
            raise index.bad(f"{module}.weight_shape", f"{[n, k]}", f"{list(shape)}")
    scale_name = f"{module}.weight_scale"
    checks.scales(index, scale_name, t["weight_scale"], zero_ok=fmt == NVFP4)
    grid = stored.format.block.grid(n, k) if stored.format.block is not None else (1, 1)
    scale: Tensor | QTensor = t["weight_scale"].reshape(grid)
    if fmt == NVFP4:
        checks.scales(index, f"{module}.weight_global_scale", t["weight_global_scale"], positive=True)
        assert stored.format.scale is not None
        scale = QTensor(stored.format.scale, t["weight_scale"], t["weight_global_scale"].reshape(1, 1))
    group_index = t.get("weight_g_idx") if stored.group_index else None
    if "weight_g_idx" in t:
        group_index = _group_index(index, module, t["weight_g_idx"], grid[1], a.group_size, stored.group_index)
    return QTensor(
        format=stored.format,
        codes=_codes(index, module, group, stored, t),
        scale=scale,
        zero=_zero(index, module, group, stored, t, grid),
        group_index=group_index,
    )


def _codes(index: TensorIndex, module: str, group: Group, stored: Stored, t: dict[str, Tensor]) -> Tensor:
    a, fmt = group.weights, _kind(group)
    if fmt == PACKED and "compressed" not in t:
        packed, k = t["weight_packed"], stored.k
        capacity = packed.shape[1] * (32 // a.bits) if stored.aligned else packed.shape[1] * 32 // a.bits
        codes = unpack(packed, a.bits, capacity, aligned=stored.aligned, negative=True)
        if bool((codes[:, k:] != -(1 << (a.bits - 1))).any()):  # where no grid says K, a wrong shape shows only here
            raise index.bad(f"{module}.weight_packed", f"zeros behind the {k} columns of weight_shape", "other codes")
        return codes[:, :k].contiguous()
    if fmt in (NVFP4, MXFP4):
        return unpack_nibbles(t["weight_packed"])
    if fmt == MXFP6:
        return unpack_six(t["weight_packed"])
    leaf = "compressed" if "compressed" in t else "weight"
    if fmt == INT:
        checks.code_range(index, f"{module}.{leaf}", t[leaf], a.bits)
    else:
        checks.float8_codes(index, f"{module}.{leaf}", t[leaf])
    return _scatter(index, module, stored, t) if leaf == "compressed" else t[leaf]


def _zero(
    index: TensorIndex, module: str, group: Group, stored: Stored, t: dict[str, Tensor], grid: tuple[int, int]
) -> Tensor | None:
    """Zero points on the scale's grid. Old versions store zeros for symmetric weights too: checked, then dropped."""
    zero = t.get("weight_zero_point")
    if zero is None:
        return None
    a, name = group.weights, f"{module}.weight_zero_point"
    if a.symmetric:
        if bool((zero.view(torch.uint8) if zero.dtype.itemsize == 1 else zero).ne(0).any()):
            raise index.bad(name, "zeros, as symmetric is true", "other values")
        return None
    if zero.dtype == torch.int32:
        return transpose(unpack(transpose(zero), a.bits, stored.n, aligned=stored.aligned, negative=True))
    checks.code_range(index, name, zero, a.bits)
    return zero.reshape(grid)


def _locate_packed(index: TensorIndex, module: str, group: Group, version: str) -> Stored:
    a = group.weights
    n, width = index.expect(f"{module}.weight_packed", ("I32",), (None, None)).shape
    index.expect(f"{module}.weight_shape", ("I64", "I32"), (2,))
    if a.strategy == "group":  # the grid says K; elsewhere only the stored shape does
        grid = index.expect(f"{module}.weight_scale", _SCALES, (n, None)).shape
        k = grid[1] * a.group_size
    else:
        k = index.read_ints(f"{module}.weight_shape")[1]
    dense, aligned = words(k, a.bits), words(k, a.bits, aligned=True)
    if width not in (dense, aligned) or k < 1:
        expected = f"{dense} words for K={k}" + (f" (or {aligned}, older packing)" if aligned != dense else "")
        if a.strategy == "group":
            expected += f", which {grid[1]} groups of {a.group_size} columns make"
        raise index.bad(f"{module}.weight_packed", expected, f"{width} words")
    old = width == aligned and (dense != aligned or _is_old(version))
    scale = _scale(index, module, group, n, k)
    names = [f"{module}.weight_packed", f"{module}.weight_scale", f"{module}.weight_shape"]
    names += _zero_names(index, module, group, n, k, old)
    ordered = f"{module}.weight_g_idx" in index
    if ordered:
        if not a.actorder:
            raise index.bad(f"{module}.weight_g_idx", 'no such tensor, as actorder is not "group"', "a group index")
        index.expect(f"{module}.weight_g_idx", ("I32",), (k,))
        names.append(f"{module}.weight_g_idx")
    elif a.actorder:
        index.expect(f"{module}.weight_g_idx", ("I32",), (k,))
    return Stored(n, k, weight_format(PACKED, a, scale), tuple(names), ordered and k > a.group_size, old)


def _locate_sparse(index: TensorIndex, module: str, group: Group) -> Stored:
    """2:4 sparse: half of the codes of every row, and a mask with one bit per column."""
    fmt = _kind(group)
    n, half = index.expect(f"{module}.compressed", ("I8",) if fmt == INT else ("F8_E4M3",), (None, None)).shape
    k = half * 2
    index.expect(f"{module}.bitmask", ("U8",), (n, -(-k // 8)))
    shape = index.entries.get(f"{module}.shape")
    index.expect(f"{module}.shape", ("I64",), (2, 1) if shape is not None and len(shape.shape) == 2 else (2,))
    if k % 4 or index.read_ints(f"{module}.shape") != (n, k):
        raise index.bad(f"{module}.shape", f"{[n, k]}", f"{list(index.read_ints(f'{module}.shape'))}")
    scale = _scale(index, module, group, n, k)
    names = [f"{module}.{part}" for part in ("compressed", "bitmask", "shape", "weight_scale")]
    names += _zero_names(index, module, group, n, k, None)
    return Stored(n, k, weight_format(fmt, group.weights, scale, "%2:4"), tuple(names))


def _scatter(index: TensorIndex, module: str, stored: Stored, t: dict[str, Tensor]) -> Tensor:
    mask = unpack_bits(t["bitmask"], stored.k)
    runs = mask.unflatten(-1, (-1, 4)).sum(-1)
    if bool((runs != 2).any()):
        raise index.bad(f"{module}.bitmask", "two kept columns of every four", f"{int((runs != 2).sum())} other runs")
    dtype = element(stored.format.element).storage
    codes = torch.zeros(stored.n, stored.k, dtype=torch.uint8)
    codes[mask] = t["compressed"].contiguous().view(torch.uint8).flatten()
    return codes.view(dtype)


def _scale(index: TensorIndex, module: str, group: Group, n: int, k: int) -> str:
    """Check the scale's shape and dtype; the element name of its dtype."""
    a, fmt, name = group.weights, _kind(group), f"{module}.weight_scale"
    dtypes: tuple[str, ...] = _SCALES
    if fmt in (MXFP4, MXFP6, MXFP8):
        dtypes = ("U8", "F8_E8M0")
    elif fmt == NVFP4:
        dtypes = ("F8_E4M3",)
    if a.strategy == "tensor":
        scalar = name in index and index[name].shape == ()
        return ELEMENT_OF[index.expect(name, dtypes, () if scalar else (1,)).dtype]
    if a.strategy == "channel":
        return ELEMENT_OF[index.expect(name, dtypes, (n, 1)).dtype]
    rows, cols = (1, a.group_size) if a.strategy != "block" else a.block
    if a.strategy != "block" and k % cols:
        raise index.bad(name, f"columns that divide into groups of {cols}", f"{k} columns (K) in {module}")
    return ELEMENT_OF[index.expect(name, dtypes, (-(-n // rows), -(-k // cols))).dtype]


def _zero_names(index: TensorIndex, module: str, group: Group, n: int, k: int, aligned: bool | None) -> list[str]:
    """The zero point's name, checked; `aligned` is the packing of codes along N, None for unpacked zero points."""
    a, name = group.weights, f"{module}.weight_zero_point"
    if a.symmetric and name not in index:
        return []
    scale = index[f"{module}.weight_scale"].shape
    if a.symmetric:
        index.expect(name, ("I8", "I32", "F8_E4M3", "U8", *_SCALES), (None,) * len(index[name].shape))
    elif aligned is None:
        index.expect(name, ("I8",), scale)
    else:
        index.expect(name, ("I32",), (words(n, a.bits, aligned=aligned), scale[-1] if scale else 1))
    return [name]


def _group_index(
    index: TensorIndex, module: str, values: Tensor, groups: int, size: int, ordered: bool
) -> Tensor | None:
    name = f"{module}.weight_g_idx"
    if bool((values == -1).all()):  # written where calibration never set an order
        values = (torch.arange(values.numel()) // size).to(torch.int32)
    checks.group_index(index, name, values, groups)
    checks.equal_groups(index, name, values, groups, size)
    return values.contiguous() if ordered else None


def _kind(group: Group) -> str:
    if group.format == NAIVE:
        return INT if group.weights.kind == "int" else FLOAT
    return group.format


def _is_old(version: str) -> bool:
    """Whether a version of compressed-tensors packs whole codes in every word (up to 0.17.1)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < (0, 18)
