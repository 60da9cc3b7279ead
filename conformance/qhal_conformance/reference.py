"""The suite's own product: float64, from codes and scales, with everything a tolerance is computed from.

It never calls the backend under test and never `QTensor.dequantize`: a fault that both would share stays visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qhal.formats import Format
from qhal.requests import NumericsClass
from qhal_conformance.decode import Decoded
from qhal_conformance.elements import round_wide
from qhal_conformance.generator import F32, F64, I64
from qhal_conformance.tolerance import Expected


@dataclass(frozen=True)
class Product:
    """y [T, N] = x [T, K] @ w [N, K].T + bias.

    decoding   float32 roundings in the definition of both operands' values
    x_plain    x is a 16-bit (or 32-bit) float already, so only the weight can be rounded to 16 bits
    kind16     the 16-bit type that a dequantizing kernel would use: the activation's
    """

    x: Decoded
    w: Decoded
    bias: F32 | None = None
    decoding: int = 0
    x_plain: bool = True
    kind16: str = "bf16"

    @cached_property
    def ref(self) -> F64:
        """The exact sum of exact products, up to float64."""
        y = self.x.value.astype(np.float64) @ self.w.value.astype(np.float64).T
        return np.asarray(y if self.bias is None else y + self.bias.astype(np.float64))

    @cached_property
    def s(self) -> F64:
        """The same over magnitudes."""
        y = self.x.magnitude @ self.w.magnitude.T
        return np.asarray(y if self.bias is None else y + np.abs(self.bias.astype(np.float64)))

    @cached_property
    def r(self) -> F64:
        """The root of the same over squares."""
        return np.asarray(np.sqrt(self.x.value.astype(np.float64) ** 2 @ (self.w.value.astype(np.float64) ** 2).T))

    @cached_property
    def rounded(self) -> F64:
        """R with each independent rounding error of an operand counted once."""
        x, w = self.x.value.astype(np.float64), self.w.value.astype(np.float64)
        total = _by_rounding(x, w, self.w) ** 2
        if not self.x_plain:
            total = total + _by_rounding(w, x, self.x).T ** 2
        return np.asarray(np.sqrt(total))

    @cached_property
    def rounding(self) -> F64:
        """The error of the product when its operands are rounded to the 16-bit type."""
        x, w = self.x.value, self.w.value
        error = x.astype(np.float64) @ (round_wide(self.kind16, w).astype(np.float64) - w).T
        if not self.x_plain:
            error = error + (round_wide(self.kind16, x).astype(np.float64) - x) @ w.astype(np.float64).T
        return np.asarray(error)

    @cached_property
    def aligned(self) -> tuple[F64, F64]:
        """What an instruction may lose that aligns terms to the largest and cuts 13 bits below it: (one-sided, random).

        It takes 32 products and the running sum of the 128 since the last promotion to float32. q = 2^-13 of the
        largest of the 128, or of the running sum where that is larger. A product loses at most min(|p|, q), on average
        half of that and towards zero: half the signed sum is one-sided, the rest random with deviation 0.42 of each,
        six deviations. The one-sided part is cut where even the sum of all losses is smaller.
        """
        x, w = self.x.value.astype(np.float64), self.w.value.astype(np.float64)
        shape = (x.shape[0], w.shape[0])
        one_sided, square, every = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for n in range(shape[1] if x.shape[1] else 0):
            for first in range(0, x.shape[1], 128):
                p = x[:, first : first + 128] * w[n, first : first + 128]
                sums = np.add.reduceat(p, np.arange(0, p.shape[1], 32), axis=1)  # of each instruction
                running = np.abs(np.cumsum(sums, axis=1) - sums).repeat(32, axis=1)[:, : p.shape[1]]
                largest = np.maximum(np.abs(p).max(axis=1, keepdims=True), running)
                lost = np.minimum(np.abs(p), largest * 2.0**-13)
                one_sided[:, n] += 0.5 * np.abs((np.sign(p) * lost).sum(axis=1))
                square[:, n] += (lost**2).sum(axis=1)
                every[:, n] += lost.sum(axis=1)
        spread = 0.42 * np.sqrt(square)
        return one_sided, np.minimum(spread, np.maximum(every - one_sided, 0.0) / 6.0)

    def settled(self, numerics: NumericsClass) -> npt.NDArray[np.bool_]:
        """Where one product is all there is and is exact in a class: in float32, in 14 bits if those are aligned.

        Only with exact decoding (powers of two as scales, or none); a class that rounds operands must have nothing to
        round.
        """
        ref = self.ref
        if self.bias is not None or self.decoding:
            return np.zeros(ref.shape, dtype=np.bool_)
        x, w = self.x.value != 0, self.w.value != 0
        one = x.astype(np.float32) @ w.astype(np.float32).T == 1
        bits = 14 if numerics == NumericsClass.REDUCED_ACC else 24
        significand = np.ldexp(np.frexp(np.where(np.isfinite(ref), ref, 0.5))[0], bits)
        one &= np.isfinite(ref) & (significand == np.round(significand)) & (np.abs(ref) > 2.0**-120)
        if numerics == NumericsClass.DEQUANT_16:
            changed = (round_wide(self.kind16, self.w.value) != self.w.value).astype(np.float32)
            one &= x.astype(np.float32) @ changed.T == 0
            if not self.x_plain:
                moved = (round_wide(self.kind16, self.x.value) != self.x.value).astype(np.float32)
                one &= moved @ w.astype(np.float32).T == 0
        return np.asarray(one)

    def expected(self, numerics: NumericsClass) -> Expected:
        """What `tolerance.judge` needs; the costly parts only for the class that uses them."""
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf in the inputs
            return self._expected(numerics)

    def _expected(self, numerics: NumericsClass) -> Expected:
        sixteen = numerics == NumericsClass.DEQUANT_16
        reduced = numerics == NumericsClass.REDUCED_ACC
        fp16 = self.kind16 == "fp16"
        deviation = np.sqrt((self.x.value.astype(np.float64) ** 2).sum(-1, keepdims=True)) * 2.0**-24 / 12**0.5
        subnormal = np.abs(self.x.value.astype(np.float64)).sum(-1, keepdims=True) * 2.0**-25
        return Expected(
            ref=self.ref,
            s=self.s,
            r=self.r,
            rounded=self.rounded if sixteen else np.zeros_like(self.ref),
            one_sided=self.aligned[0] if reduced else 0.0,
            spread=self.aligned[1] if reduced else 0.0,
            terms=self.x.value.shape[-1],
            decoding=self.decoding,
            operands=1 if self.x_plain else 2,
            unit16=2.0**-11 if fp16 else 2.0**-8,
            tiny=np.broadcast_to(subnormal, self.ref.shape) if fp16 else 0.0,
            rounding=self.rounding if sixteen else 0.0,
            tiny_spread=np.broadcast_to(deviation, self.ref.shape) if fp16 else 0.0,
            settled=self.settled(numerics),
        )


def _by_rounding(x: F64, w: F64, decoded: Decoded) -> F64:
    """sqrt(sum over (block, significand) of (sum of x * w of those elements)^2), [rows of x, rows of w]."""
    result = np.zeros((x.shape[0], w.shape[0]))
    if not result.size or not x.shape[1]:
        return result
    keys: I64 = decoded.block * (1 << 25) + decoded.significand
    for n in range(w.shape[0]):
        order = np.argsort(keys[n], kind="stable")
        ranked = keys[n][order]
        starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
        sums = np.add.reduceat((x * w[n])[:, order], starts, axis=1)
        result[:, n] = np.sqrt((sums**2).sum(axis=1))
    return result


def decoding_steps(f: Format) -> int:
    """How many float32 roundings define a value: one per scale that is no power of two, one per offset."""
    if f.plain or f.scale is None:
        return 0
    steps = 0 if f.scale.element == "e8m0" and f.scale.plain else 1
    if not f.scale.plain:
        steps += decoding_steps(f.scale)
    return steps + (1 if f.offset is not None else 0)
