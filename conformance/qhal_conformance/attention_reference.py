"""Paged attention in float64 from codes and scales, and how far a result may be from it.

With s = scale * q.k and p = softmax(s):

    |ds|    <= (gamma + d * 2^-24) * max_j scale * sum |q||k| + 2^-22 * max |s|   (+ a soft-cap's tanh)
    |o-ref| <= 1/2 ulp_out (1 + 2^-6) + (2 |ds| + gamma_v) * sum p|v| + 6 * 0.42 * u_P * sqrt(sum p^2 v^2) + u_P |ref|
    |lse-ref| <= |ds| + 2^-20 + 2^-23 |ref|

gamma is 2 sqrt(D) * 2^-24 for sums in fp32 and 2^-12 for reduced sums, gamma_v the same with the number of keys; d
counts roundings of a decoded cache as for gemm; u_P is the unit roundoff of request.p, 0 for fp32. u_P |ref| allows P
to be rounded after it was normalized: then all equal weights err together. Codes are the input: what quantization lost
is no part of the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qhal.requests import AttentionRequest, NumericsClass
from qhal_conformance.generator import F32, F64
from qhal_conformance.reference import decoding_steps
from qhal_conformance.tolerance import UNIT, ulp

_UNIT_P = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "e4m3fn": 2.0**-4}


@dataclass(frozen=True)
class Attended:
    """Reference result [T, H, D] and log-sum-exp [T, H], each with its bound, all float64."""

    o: F64
    o_bound: F64
    lse: F64
    lse_bound: F64


def attend(
    q: F32,
    sequences: list[tuple[int, F32, F32]],
    request: AttentionRequest,
    numerics: NumericsClass,
    out: str,
    sinks: F32 | None = None,
) -> Attended:
    """q [T, H, D]; per sequence: its query count, k [L, G, D] and v [L, G, Dv] as decoded numbers."""
    parts = []
    at = 0
    for count, k, v in sequences:
        part = q[at : at + count].astype(np.float64)
        parts.append(_one(part, k.astype(np.float64), v.astype(np.float64), request, numerics, out, sinks))
        at += count
    joined = [np.concatenate([getattr(p, name) for p in parts]) for name in ("o", "o_bound", "lse", "lse_bound")]
    return Attended(*joined)


def visible(queries: int, keys: int, request: AttentionRequest) -> npt.NDArray[np.bool_]:
    """[queries, keys]: the last query stands at the last key; a window keeps the last w keys, its own included."""
    i = np.arange(queries)[:, None] + (keys - queries)
    j = np.arange(keys)[None, :]
    seen: npt.NDArray[np.bool_] = np.asarray(j <= i) if request.causal else np.ones((queries, keys), dtype=np.bool_)
    return seen if request.window is None else seen & (j > i - request.window)


def _one(q: F64, k: F64, v: F64, r: AttentionRequest, numerics: NumericsClass, out: str, sinks: F32 | None) -> Attended:
    (t, heads, dim), keys = q.shape, k.shape[0]
    group = np.arange(heads) // (heads // r.kv.heads)
    o, lse = np.zeros((t, heads, v.shape[-1])), np.full((t, heads), -np.inf)
    o_bound, lse_bound = np.zeros_like(o), np.zeros_like(lse)
    if keys == 0:
        return Attended(o, o_bound, lse, lse_bound)
    wide = numerics <= NumericsClass.FP32_ACC
    gamma = 2 * dim**0.5 * 2.0**-24 if wide else 2.0**-12
    gamma_v = (2 * keys**0.5 + decoding_steps(r.kv.v)) * 2.0**-24 if wide else 2.0**-12
    seen = visible(t, keys, r)
    u_p = _UNIT_P[r.p.element]
    for h in range(heads):
        kh, vh = k[:, group[h]], v[:, group[h]]
        raw = q[:, h] @ kh.T * r.scale
        size = np.abs(q[:, h]) @ np.abs(kh).T * abs(r.scale)
        s = raw if r.softcap is None else r.softcap * np.tanh(raw / r.softcap)
        s = np.where(seen, s, -np.inf)
        top = s.max(axis=1, keepdims=True)
        if sinks is not None:
            top = np.maximum(top, float(sinks[h]))
        top = np.where(np.isfinite(top), top, 0.0)
        e = np.exp(s - top)
        total = e.sum(axis=1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(float(sinks[h]) - top)
        some: npt.NDArray[np.bool_] = np.asarray(seen.any(axis=1))
        p = e / np.where(total > 0, total, 1.0)
        largest = np.where(seen, size, 0.0).max(axis=1)
        reach = np.where(seen, np.abs(s), 0.0).max(axis=1)
        ds = (gamma + decoding_steps(r.kv.k) * 2.0**-24) * largest + 2.0**-22 * reach
        if r.softcap is not None:
            ds = ds + (2.0**-22 * r.softcap if wide else 2.0**-11 * reach)
        o[:, h] = np.where(some[:, None], p @ vh, 0.0)
        spread = (2 * ds + gamma_v)[:, None] * (p @ np.abs(vh))
        rounding = 6 * 0.42 * u_p * np.sqrt(p**2 @ vh**2) + u_p * np.abs(o[:, h])
        half = 0.5 * ulp(out, o[:, h]) * (1 + 2.0**-6)
        o_bound[:, h] = np.where(some[:, None], half + spread + rounding, 0.0)
        with np.errstate(divide="ignore"):
            lse[:, h] = np.where(some, (top + np.log(total))[:, 0], -np.inf)
        lse_bound[:, h] = np.where(some, ds + 2.0**-20 + 2 * UNIT["fp32"] * np.abs(np.where(some, lse[:, h], 0)), 0.0)
    return Attended(o, o_bound, lse, lse_bound)
