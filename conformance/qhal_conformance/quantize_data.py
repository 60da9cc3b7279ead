"""Numbers to quantize: grids on which rounding, division and scale choice show, where random numbers hide them."""

from __future__ import annotations

import numpy as np

from qhal.elements import WIDE
from qhal.formats import Format
from qhal_conformance import elements
from qhal_conformance.decode import block_index
from qhal_conformance.generator import F32, F64, I64, Stream

QUANTIZE_DATA: dict[str, str] = {
    "normal": "fp32 numbers with full mantissas: amax * (1 / qmax) for amax / qmax changes over half of the scales",
    "grid": "numbers on a 16-bit grid under scales that are no power of two: x * (1 / s) for x / s flips codes here",
    "ties": "scales that are powers of two and values in the middle of neighbouring codes: half away for half to even",
    "codes": "values that are codes times a power of two: every code must come back, extremes and subnormals included",
    "zero": "all-zero blocks, minus zero and blocks with one nonzero: the empty scale, the sign of zero",
    "range": "blocks from 2^-110 to 2^120: narrow exponents, least scales, clamped power-of-two scales",
    "special": "NaN and Inf in some blocks: they must propagate, and stay in their block",
}


def numbers_for(case_id: str, f: Format, m: int, k: int, data: str, kind: str) -> F32:
    """x [m, k], float32 numbers that `kind` holds exactly."""
    g = Stream(case_id, "x")
    x = g.normal((m, k))
    block = _block_of(f, m, k)
    if data in ("ties", "codes"):
        x = _code_grid(f, g, block, m, k, ties=data == "ties", kind=kind)
    elif data == "range":
        low, high = (-110, 121) if kind != "fp16" else (-20, 13)
        power = g.integers(low, high, (int(block.max(initial=0)) + 1,))
        x = np.ldexp(x, power[block].astype(np.int32))
    elif data == "zero":
        empty = block % 3 == 1
        lonely = (block % 3 == 2) & (np.arange(k)[None, :] % 16 != 5)
        x = np.where(empty | lonely, np.copysign(np.float32(0), x), x)
    elif data == "special" and m:
        x[0, k // 2] = np.nan
        x[m // 2, k - 1] = np.inf
        x[m - 1, 0] = -np.inf
    return elements.round_wide("bf16" if data == "grid" and kind == "fp32" else kind, x.astype(np.float32))


def _block_of(f: Format, m: int, k: int) -> I64:
    return block_index(f.block, (m, k), None)


def _code_grid(f: Format, g: Stream, block: I64, m: int, k: int, *, ties: bool, kind: str) -> F32:
    """Codes (or middles of neighbouring codes) times a power of two per block, with the largest code in every block."""
    if f.element in WIDE:
        return g.normal((m, k))
    values = np.unique(elements.table(f.element)[elements.finite_codes(f.element)])
    if f.rule.domain == "minmax":
        values = values - values[0]
    elif values[0] == -values[-1] - 1 and len(values) > 2:
        values = values[1:]  # -128 never comes out of a symmetric scale
    choice: F64 = (values[1:] + values[:-1]) / 2 if ties else values
    if m * k == 0:
        return np.zeros((m, k), np.float32)
    x = choice[g.integers(0, len(choice), (m, k))]
    every = np.resize(choice, x[:, : len(choice)].shape[1])
    x[-1, : len(every)] = every
    _, first = np.unique(block, return_index=True)
    x.reshape(-1)[first] = f.rule.qmax if f.rule.qmax is not None else values[-1]
    if f.rule.domain == "minmax":
        _, again = np.unique(block[:, ::-1], return_index=True)
        # the minimum goes to the last element of every block
        rows, cols = np.unravel_index(again, block.shape)
        x[rows, block.shape[1] - 1 - cols] = 0.0
    span = (-3, 4) if kind != "fp16" else (-2, 1)
    power = g.integers(*span, (int(block.max()) + 1,))
    if f.scale is not None and not f.scale.plain:
        power = power * 0
    return np.ldexp(x, power[block].astype(np.int32)).astype(np.float32)
