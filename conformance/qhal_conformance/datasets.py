"""The data sets: each exists because it shows a fault that the others hide.

Weights are built from codes and scales, never by quantizing numbers, so that every code and every scale is chosen.
Activations are numbers on the grid of their type, or (`codes`) quantized tensors built the same way.
"""

from __future__ import annotations

import numpy as np
import torch

from qhal.elements import WIDE, element
from qhal.formats import Format
from qhal.tensors import QTensor
from qhal_conformance import elements
from qhal_conformance.decode import block_index
from qhal_conformance.generator import BELL, F32, F64, I64, Stream

DATASETS: dict[str, str] = {
    "normal": "near-normal numbers: the statistics see small errors that are everywhere (coarse sums, rounded scales)",
    "codes": "both operands built from every code of their format: a wrong table entry, a flushed subnormal code, a "
    "lost sign bit or a clipped extreme code is in the data, where quantized normal numbers never reach it",
    "onehot": "one nonzero per row of x: every result is one weight, so layout, nibble, scale-index and permutation "
    "faults are exact comparisons that no other term hides",
    "zero": "zero rows, columns and codes: results that must be exactly 0, scales of empty blocks, stale accumulators",
    "signed_range": "magnitudes over sixteen powers of two, both signs: narrow exponents in sums and scales",
    "outlier": "features 64 times larger and rows of very different size: scales shared by too many values (per tensor "
    "for per token), clipping",
    "tiny_columns": "some outputs 2^-13 as large as the others: faults there vanish in any norm over the whole result",
    "positive": "nothing cancels, |ref| = S: sums that lose their low bits, and lost terms, err to one side",
    "small_onto_large": "one large product first, then many small ones: running sums kept in too few bits",
    "limits": "rows of x over the range of their type, fp16 subnormals and results that overflow included: a detour "
    "through a narrower type, a running sum that overflows, an overflow that saturates",
    "wide": "scales of very different size and of both signs: exponents that are clamped, scales taken as magnitudes",
    "special": "NaN and Inf in some rows of x: they reach every result that depends on them, and no other",
}
_NO_STATISTICS = {"onehot", "zero", "special"}


def has_statistics(data: str) -> bool:
    """Whether results are sums of many different terms, so that the rms and bias tests have a meaning."""
    return data not in _NO_STATISTICS


def activation(case_id: str, m: int, k: int, data: str, kind: str) -> F32:
    """x [m, k], float32 numbers that the type `kind` (fp32, fp16, bf16) holds exactly."""
    g = Stream(case_id, "x")
    x = g.normal((m, k))
    rows, cols = np.arange(m)[:, None], np.arange(k)[None, :]
    if data == "onehot":
        hot = _positions(m, k, Stream(case_id, "x.hot"))
        value = g.signs((m,)) * (2 * g.integers(0, 4, (m,)) + 1)  # 3, 5 and 7 make ties of 8-bit significands
        x = np.zeros((m, k), dtype=np.float32)
        x[np.arange(m), hot] = value
    elif data == "zero":
        x = np.where((rows % 4 == 1) | (cols % 7 == 2) | (g.integers(0, 2, (m, k)) == 1), np.float32(0), x)
    elif data == "signed_range":
        x = np.ldexp(x, g.integers(-8, 9, (m, k)).astype(np.int32))
    elif data == "outlier":
        size = np.ldexp(np.float32(1), ((rows * 5) % 13 - 6).astype(np.int32))
        x = x * size * np.where(cols % 17 == 5, np.float32(64), np.float32(1))
    elif data == "positive":
        x = np.abs(x) + np.float32(2.0**-4)
    elif data == "small_onto_large":
        x = np.where(cols == 0, 64 + 16 * g.mantissas(7, (m, 1)), x * np.float32(2.0**-6))
    elif data == "limits":
        low, high = (-22, 14) if kind == "fp16" else (-60, 61)
        x = np.ldexp(x, g.integers(low, high, (m, 1)).astype(np.int32))
    elif data == "special":
        hot = g.integers(0, max(k, 1), (m,))
        value = np.array([0.0, np.nan, np.inf, -np.inf], dtype=np.float32)[np.arange(m) % 4]
        x = np.where((cols == hot[:, None]) & (rows % 4 > 0), value[:, None], x)
    return elements.round_wide(kind, x.astype(np.float32))


def _positions(m: int, k: int, g: Stream) -> I64:
    """The hot feature of every row: all of them if there are enough rows, else the edges of tiles and blocks first."""
    order = g.permutation(k)
    if m >= k:
        return np.resize(order, m)
    edges = [0, k - 1, *(e for b in (16, 32, 64, 128) for e in (b - 1, b, k - b) if 0 <= e < k)]
    ranked = list(dict.fromkeys([*edges, *order.tolist()]))
    return np.array(ranked[:m], dtype=np.int64)


def weight(case_id: str, name: str, f: Format, n: int, k: int, data: str, *, group_index: bool = False) -> QTensor:
    """A quantized [n, k] tensor whose values are mostly within +-1, from codes and scales that the data set chooses."""
    e = f.element
    g = Stream(case_id, f"{name}.codes")
    if f.plain and e in WIDE:
        values = elements.round_wide(e, _plain_values(g, n, k, data))
        return QTensor(f, torch.from_numpy(values).to(WIDE[e]))
    centre = _zero_codes(f, n, k, data, Stream(case_id, f"{name}.zero"))
    codes = _codes(g, f, n, k, data, centre)
    tiny = (np.arange(n) % 5 == 3) if data == "tiny_columns" else np.zeros(n, dtype=bool)
    if tiny.any() and not _row_local(f):
        codes = np.where(tiny[:, None], _small_codes(f, g, n, k), codes)
    table = None
    top = 1.0
    if e.startswith("lut"):
        lut = np.sort(Stream(case_id, f"{name}.table").normal((1 << element(e).bits,)))
        table = torch.from_numpy(lut.astype(np.float32))
    elif element(e).kind != "lut":
        top = max(elements.largest(e), -elements.smallest(e))
    grid = f.block.grid(n, k) if f.block is not None else (1, 1)
    gains = _gains(f, grid, n, data, Stream(case_id, f"{name}.gain"))
    target = 2.0 ** -np.ceil(np.log2(top)) if top > 1 else 1.0
    scale = None if f.scale is None else _plane(case_id, f"{name}.scale", f.scale, grid, target * gains)
    zero = None if f.zero is None or centre is None else _store(f.zero, centre[0])
    offset = None
    if f.offset is not None:
        offset = _plane(case_id, f"{name}.offset", f.offset, grid, 0.25 * gains)
    index = None
    if group_index and f.block is not None:
        groups = np.arange(k) // f.block.cols
        index = torch.from_numpy(groups[Stream(case_id, f"{name}.order").permutation(k)].astype(np.int32))
    return QTensor(f, _codes_tensor(e, codes), scale, zero, offset, table, index)


def _plain_values(g: Stream, n: int, k: int, data: str) -> F32:
    w: F32 = g.normal((n, k)) * np.float32(2.0**-2)
    if data == "positive":
        w = np.abs(w) + np.float32(2.0**-6)
    if data == "tiny_columns":
        w = np.where((np.arange(n) % 5 == 3)[:, None], w * np.float32(2.0**-13), w)
    if data == "zero":
        w = np.where(g.integers(0, 3, (n, k)) == 0, np.float32(0), w)
    if data == "wide":
        w = np.ldexp(w, g.integers(-40, 41, (n, 1)).astype(np.int32))
    return np.asarray(w, dtype=np.float32)


def _codes(g: Stream, f: Format, n: int, k: int, data: str, centre: tuple[I64, I64] | None) -> I64:
    e = f.element
    every = elements.finite_codes(e) if not e.startswith("lut") else np.arange(1 << element(e).bits, dtype=np.int64)
    if data in ("codes", "onehot"):
        order = g.permutations(-(-n * k // len(every)), len(every)).reshape(-1)
        return np.asarray(every[order[: n * k]].reshape(n, k))
    if e.startswith("lut"):
        return g.integers(0, len(every), (n, k))
    top, low = elements.largest(e), elements.smallest(e)
    middle: F64 | float = 0.0 if low < 0 else (top + 1) / 2
    if centre is not None:
        middle = elements.table(e)[centre[1]] if elements.is_integer(e) else 0.0
    reach = min(top, -low) if low < 0 else (top + 1) / 2
    steps = g.steps((n, k))
    if data == "small_onto_large":
        steps[:, 0] = np.where(steps[:, 0] < len(BELL) // 2, 0, len(BELL) - 1)
    away = (np.abs(BELL) if data == "positive" else BELL) * (reach / 3.0)
    if data == "positive":
        away = np.maximum(away, reach / 8.0)
    if centre is None:  # one code for each step
        codes = elements.nearest_code(e, middle + away)[steps]
    else:
        codes = elements.nearest_code(e, middle + away[steps])
    if data == "zero":
        empty = (g.integers(0, 2, (n, k)) == 0) | (np.arange(n) % 6 == 2)[:, None]
        codes = np.where(empty, elements.nearest_code(e, np.asarray(middle, np.float64)), codes)
    return codes


def _small_codes(f: Format, g: Stream, n: int, k: int) -> I64:
    """The nonzero codes of smallest magnitude, both signs."""
    codes = elements.finite_codes(f.element)
    values = elements.table(f.element)[codes]
    order = np.argsort(np.where(values == 0, np.inf, np.abs(values)), kind="stable")
    return np.asarray(codes[order[:4]][g.integers(0, 4, (n, k))])


def _zero_codes(f: Format, n: int, k: int, data: str, g: Stream) -> tuple[I64, I64] | None:
    """Zero points as codes: per block of the grid, and spread to every element."""
    if f.zero is None or f.block is None:
        return None
    bits = element(f.element).bits
    span = 1 << (bits - 1)
    low = 0 if f.element.startswith("uint") else -span
    grid = f.block.grid(n, k)
    inner = (low, low + max(span // 4, 1)) if data == "positive" else (low + span // 2, low + span + span // 2)
    if data in ("codes", "onehot"):
        inner = (low, low + 2 * span)
    per_block = g.integers(*inner, grid)
    return per_block, per_block.reshape(-1)[block_index(f.block, (n, k), None)] & 0xFF


def _row_local(f: Format) -> bool:
    return f.block is not None and (f.block.kind == "row" or (f.block.kind == "group"))


def _gains(f: Format, grid: tuple[int, int], n: int, data: str, g: Stream) -> F64:
    """What each block's scale is multiplied by."""
    gains = np.ones(grid)
    if data == "signed_range" and f.block is not None and f.block.kind != "tensor":
        gains = np.ldexp(gains, g.integers(-4, 5, grid).astype(np.int32))
    if data == "tiny_columns" and _row_local(f):
        gains = np.where((np.arange(grid[0]) % 5 == 3)[:, None], gains * 2.0**-13, gains)
    if data == "wide" and f.scale is not None:
        low, high = _REACH.get(f.scale.element, (-8, 9))
        gains = np.ldexp(gains, g.integers(low, high, (grid[0], 1)).astype(np.int32))
        if f.scale.plain and f.scale.element in WIDE:
            gains = gains * g.signs(grid)
    return gains


_REACH = {"e8m0": (-100, 101), "fp32": (-40, 41), "bf16": (-40, 41), "fp16": (-14, 11)}
"""Powers of two of `wide` scales: of fp16 down to subnormal ones."""


def _plane(case_id: str, name: str, f: Format, grid: tuple[int, int], target: F64) -> torch.Tensor | QTensor:
    """Values near `target`, all different where the type allows it: a wrong index is then a wrong number."""
    g = Stream(case_id, name)
    target = np.broadcast_to(target, grid)
    spread = np.ldexp(g.mantissas(23, grid).astype(np.float64), g.integers(-1, 1, grid).astype(np.int32))
    if not f.plain:
        assert f.scale is not None and f.block is not None
        if element(f.element).kind == "lut":
            return _table_plane(case_id, name, f, grid, target)
        if f.element in WIDE:
            unit = _plane(case_id, f"{name}.outer", f.scale, f.block.grid(*grid), np.array(1.0))
            inner = elements.round_wide(f.element, (spread * target).astype(np.float32))
            return QTensor(f, torch.from_numpy(inner).to(WIDE[f.element]), unit)
        top = elements.largest(f.element) if f.element != "e8m0" else 1.0
        outer = _plane(case_id, f"{name}.outer", f.scale, f.block.grid(*grid), np.array(_outer(f, target, top)))
        wanted = spread * target / np.abs(target).max() * top / 2 if top > 1 else spread * target / np.abs(target).max()
        codes = (
            _exponents(wanted) if f.element == "e8m0" else elements.nearest_code(f.element, np.maximum(wanted, 2.0**-9))
        )
        if elements.is_integer(f.element):
            codes = np.maximum(codes, 1)
        return QTensor(f, _codes_tensor(f.element, codes), outer)
    if f.element == "e8m0":
        return torch.from_numpy(_exponents(spread * target).astype(np.uint8))
    return torch.from_numpy(elements.round_wide(f.element, (spread * target).astype(np.float32))).to(WIDE[f.element])


def _table_plane(case_id: str, name: str, f: Format, grid: tuple[int, int], target: F64) -> QTensor:
    """A scale plane of table codes: positive table entries, an outer scale, an offset if the format has one."""
    assert f.scale is not None and f.block is not None
    size = 1 << element(f.element).bits
    codes = Stream(case_id, name).integers(0, size, grid)
    table = np.sort(Stream(case_id, f"{name}.table").mantissas(23, (size,)) * np.float32(0.5))
    blocks = f.block.grid(*grid)
    outer = _plane(case_id, f"{name}.outer", f.scale, blocks, np.array(float(target.max())))
    offset = None
    if f.offset is not None:
        offset = _plane(case_id, f"{name}.offset", f.offset, blocks, np.array(0.5 * float(target.max())))
    lut = torch.from_numpy(table) if f.element.startswith("lut") else None
    return QTensor(f, _codes_tensor(f.element, codes), outer, None, offset, lut)


def _outer(f: Format, target: F64, top: float) -> float:
    largest = float(np.abs(target).max()) / (top / 2 if top > 1 else 1.0)
    return largest if f.op == "*" else 1.0 / largest


def _exponents(value: F64) -> I64:
    return np.clip(np.frexp(np.abs(value))[1].astype(np.int64) - 1 + 127, 0, 254)


def _store(f: Format, codes: I64) -> torch.Tensor:
    """A zero-point plane: integers as codes, floats as numbers."""
    if f.element in WIDE:
        return torch.from_numpy(codes.astype(np.float32)).to(WIDE[f.element])
    return _codes_tensor(f.element, codes & 0xFF)


def _codes_tensor(name: str, codes: I64) -> torch.Tensor:
    return torch.from_numpy((codes & 0xFF).astype(np.uint8)).view(element(name).storage)
