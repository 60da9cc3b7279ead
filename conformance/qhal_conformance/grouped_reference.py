"""What a grouped product must be, row by row, and how far it may be from it.

A pair's product has gemm's reference and bound. What follows passes the bound without the rounding of the result
("inner") on, and rounds once:

    act(gate) * up   |act'| <= 1.13 (relu squared: 2 |gate|), each factor's bound times the other factor, 2^-20 of the
                     result and 2^-22 |gate up| for the function: gelu cancels for negative gates
    sum of weights   the weighted sum of the bounds, and a float32 rounding per term
    quantized        half a step under the result's own scale; that scale within what its largest value may err
"""

from __future__ import annotations

from dataclasses import dataclass
from math import erf, pi, sqrt

import numpy as np

from qhal.layer_formats import Activation
from qhal.requests import NumericsClass
from qhal.tensors import QTensor
from qhal_conformance import elements
from qhal_conformance.decode import decode, numbers
from qhal_conformance.generator import F32, F64, I64
from qhal_conformance.outcome import FailKind
from qhal_conformance.reference import Product
from qhal_conformance.tolerance import Verdict, compare, error_bound, ulp


@dataclass(frozen=True)
class Rows:
    """Reference [rows, n] in float64, and the bound of everything but the last rounding."""

    ref: F64
    inner: F64

    def bound(self, out: str) -> F64:
        """With the rounding to the result's type; 0 where nothing may differ."""
        half = 0.5 * ulp(out, self.ref) * (1 + 2.0**-7)
        return np.where((self.ref == 0) & (self.inner == 0), 0.0, half + self.inner)


def pairs(products: tuple[Product, ...], experts: I64, rows: I64, n: int, numerics: NumericsClass, out: str) -> Rows:
    """One row per (token, expert) pair; zeros where the expert is -1."""
    ref, inner = np.zeros((len(experts), n)), np.zeros((len(experts), n))
    for e, product in enumerate(products):
        mine = np.flatnonzero(experts == e)
        expected = product.expected(numerics)
        ref[mine] = expected.ref[rows[mine]]
        half = 0.5 * ulp(out, expected.ref)
        inner[mine] = np.maximum(error_bound(expected, numerics, out) - half, 0.0)[rows[mine]]
    return Rows(ref, inner)


def activated(y: Rows, a: Activation) -> Rows:
    """act(gate) * up, or act(up)."""
    n = y.ref.shape[1] // (2 if a.gated else 1)
    gate, d_gate = y.ref[:, :n], y.inner[:, :n]
    up = y.ref[:, n:] if a.gated else np.ones_like(gate)
    d_up = y.inner[:, n:] if a.gated else np.zeros_like(gate)
    if a.name == "swiglu":
        limit = np.inf if a.limit is None else a.limit
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + a.shift
    acted = _function(a, gate)
    slope = 2 * np.abs(gate) + d_gate if a.name == "relu2" else 1.13
    inner = slope * d_gate * (np.abs(up) + d_up) + np.abs(acted) * d_up
    inner = inner + 2.0**-20 * np.abs(acted * up) + 2.0**-22 * np.abs(gate * up)
    nowhere = ((y.ref == 0) & (y.inner == 0)).all(axis=1, keepdims=True)  # no expert, or an input of zeros without bias
    return Rows(np.where(nowhere, 0.0, acted * up), np.where(nowhere, 0.0, inner))


def _function(a: Activation, g: F64) -> F64:
    with np.errstate(over="ignore"):
        if a.name == "gelu":
            return np.asarray(0.5 * g * (1 + np.vectorize(erf, otypes=[np.float64])(g / sqrt(2))))
        if a.name == "gelu_tanh":
            return np.asarray(0.5 * g * (1 + np.tanh(sqrt(2 / pi) * (g + 0.044715 * g**3))))
        if a.name == "relu2":
            return np.maximum(g, 0.0) ** 2
        return np.asarray(g / (1 + np.exp(-(a.alpha if a.name == "swiglu" else 1.0) * g)))


def summed(y: Rows, weights: F32, experts: I64) -> Rows:
    """[T, n]: the sum of a token's pairs times their weights [T, top_k]; an expert -1 contributes nothing."""
    tokens, top_k = weights.shape
    share = np.where(experts.reshape(tokens, top_k) < 0, 0.0, weights.astype(np.float64))[..., None]
    ref, inner = (part.reshape(tokens, top_k, -1) for part in (y.ref, y.inner))
    size = (np.abs(share) * np.abs(ref)).sum(1)
    return Rows((share * ref).sum(1), (np.abs(share) * inner).sum(1) + (top_k + 1) * 2.0**-24 * size)


def judge_quantized(q: QTensor, y: Rows, out: str) -> Verdict:
    """A result with row scales: its scales by the reference's largest value, its numbers by its own scales."""
    element = q.format.element
    scale = numbers(q.scale).astype(np.float64).reshape(-1, 1)  # type: ignore[arg-type]
    bound = y.bound(out)
    top = elements.largest(element)
    peak = np.abs(y.ref).max(axis=1, keepdims=True)
    room = bound.max(axis=1, keepdims=True) / top + 2.0**-22 * peak / top
    must = np.where(peak == 0, 1.0, peak / top)
    off = (np.abs(scale - must) > room) & (peak + room > 0)
    if off.any():
        row = int(np.argmax(off))
        detail = f"the scale of row {row} is {scale[row, 0]:.9g}, its largest value asks for {must[row, 0]:.9g}"
        return Verdict(FailKind.NUMERIC, detail, None, float("inf"))
    if elements.is_integer(element):
        step = np.ones_like(y.ref)
    else:
        grid = np.unique(np.abs(elements.table(element)[elements.finite_codes(element)]))
        index = np.clip(np.searchsorted(grid, (np.abs(y.ref) + bound) / scale, side="right"), 1, len(grid) - 1)
        step = grid[index] - grid[index - 1]
    return compare(decode(q).value.astype(np.float64), y.ref, bound + 0.5 * step * scale * (1 + 2.0**-7), "fp32")
