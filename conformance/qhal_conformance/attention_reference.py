"""Paged attention in float64 from codes and scales, and how far a result may be from it.

With s = scale * q.k and p = softmax(s):

    |ds|    <= (gamma + d * 2^-24) * max_j scale * sum |q||k| + 2^-22 * max |s|   (+ a soft-cap's tanh)
    |o-ref| <= 1/2 ulp_out (1 + 2^-6) + (2 |ds| + gamma_v) * sum p|v| + 6 * 0.42 * u_P * sqrt(sum p^2 v^2) + u_P |ref|
    |lse-ref| <= |ds| + 2^-20 + 2^-23 |ref|

gamma is 2 sqrt(D) * 2^-24 for sums in fp32 and 2^-12 for reduced sums, gamma_v the same with the number of keys; d
counts roundings of a decoded cache as for gemm; u_P is the unit roundoff of request.p, 0 for fp32. u_P |ref| allows P
to be rounded after it was normalized: then all equal weights err together. Codes are the input: what quantization lost
is no part of the tolerance; Q is quantized to the bit, so its codes are input too.

P under a static scale: with e = exp(s - max), saturated in the reference too, its held value h(e) and the step d(e) of
the codes there, the last two terms are |sum (h(e) - e) v| / sum e + 6 * 0.29 * sqrt(sum d^2 v^2) / sum e. The first is
known from the inputs: what small weights lose together. The second is there because a kernel that subtracts a running
maximum rounds other numbers, by no larger steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qhal.formats import Format
from qhal.requests import AttentionRequest, NumericsClass
from qhal_conformance import elements
from qhal_conformance.decode import decode
from qhal_conformance.encode import quantize
from qhal_conformance.generator import F32, F64
from qhal_conformance.reference import decoding_steps
from qhal_conformance.tolerance import UNIT, ulp

Tree = npt.NDArray[np.bool_]
Keys = tuple[int, F32, F32, Tree | None]
"""(query count, k [L, G, D], v [L, G, Dv] as decoded numbers, which new tokens see each other)"""

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
    sequences: list[Keys],
    request: AttentionRequest,
    numerics: NumericsClass,
    out: str,
    sinks: F32 | None = None,
    p_scale: F32 | None = None,
) -> Attended:
    """q [T, H, D] as request.q holds it; p_scale: the static scale of P."""
    parts = []
    at = 0
    for count, k, v, tree in sequences:
        part = q[at : at + count].astype(np.float64)
        seen = visible(count, len(k), request, tree)
        parts.append(
            _one(part, k.astype(np.float64), v.astype(np.float64), seen, request, numerics, out, sinks, p_scale)
        )
        at += count
    joined = [np.concatenate([getattr(p, name) for p in parts]) for name in ("o", "o_bound", "lse", "lse_bound")]
    return Attended(*joined)


def visible(queries: int, keys: int, request: AttentionRequest, tree: Tree | None = None) -> npt.NDArray[np.bool_]:
    """[queries, keys]: the last query stands at the last key; a window keeps the last w keys, its own included.

    With a tree: every key before the new tokens, and of the new ones those that the tree shows.
    """
    if tree is not None:
        earlier = np.ones((queries, max(keys - queries, 0)), dtype=np.bool_)
        return np.concatenate([earlier, tree], axis=1)[:, -keys:] if keys else np.zeros((queries, 0), dtype=np.bool_)
    i = np.arange(queries)[:, None] + (keys - queries)
    j = np.arange(keys)[None, :]
    seen: npt.NDArray[np.bool_] = np.asarray(j <= i) if request.causal else np.ones((queries, keys), dtype=np.bool_)
    return seen if request.window is None else seen & (j > i - request.window)


def _p_error(e: F64, v: F64, seen: npt.NDArray[np.bool_], p: Format, scale: F32) -> F64:
    """[t, Dv]: how far sum P v may be from sum e v, before it is divided by sum e."""
    held = decode(quantize(e.astype(np.float32), p, scale=scale)).value.astype(np.float64)
    unit = float(scale[0])
    if elements.is_integer(p.element):
        step = np.full_like(e, unit)
    else:  # codes lie as far apart as the largest at or below e and the next
        grid = np.unique(np.abs(elements.table(p.element)[elements.finite_codes(p.element)]))
        index = np.clip(np.searchsorted(grid, e / unit, side="right"), 1, len(grid) - 1)
        step = (grid[index] - grid[index - 1]) * unit
    step = np.where(seen, step, 0.0)
    return np.asarray(np.abs((held - e) @ v) + 6 * 0.29 * np.sqrt(step**2 @ v**2))


def _one(
    q: F64,
    k: F64,
    v: F64,
    seen: npt.NDArray[np.bool_],
    r: AttentionRequest,
    numerics: NumericsClass,
    out: str,
    sinks: F32 | None,
    p_scale: F32 | None,
) -> Attended:
    (t, heads, dim), keys = q.shape, k.shape[0]
    group = np.arange(heads) // (heads // r.kv.heads)
    o, lse = np.zeros((t, heads, v.shape[-1])), np.full((t, heads), -np.inf)
    o_bound, lse_bound = np.zeros_like(o), np.zeros_like(lse)
    if keys == 0:
        return Attended(o, o_bound, lse, lse_bound)
    wide = numerics <= NumericsClass.FP32_ACC
    mla = r.kv.kind == "mla"  # keys are latent and rope together, values the latent rows
    steps = max(decoding_steps(f) for f in (r.kv.k, *((r.kv.v,) if mla else ())))
    values = r.kv.k if mla else r.kv.v
    gamma = 2 * dim**0.5 * 2.0**-24 if wide else 2.0**-12
    gamma_v = (2 * keys**0.5 + decoding_steps(values)) * 2.0**-24 if wide else 2.0**-12
    u_p = _UNIT_P[r.p.element] if r.p.plain else 0.0
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
        if p_scale is not None:
            e = np.minimum(e, float(p_scale[0]) * elements.largest(r.p.element))
        p = e / np.where(total > 0, total, 1.0)
        largest = np.where(seen, size, 0.0).max(axis=1)
        reach = np.where(seen, np.abs(s), 0.0).max(axis=1)
        ds = (gamma + steps * 2.0**-24) * largest + 2.0**-22 * reach
        if r.softcap is not None:
            ds = ds + (2.0**-22 * r.softcap if wide else 2.0**-11 * reach)
        o[:, h] = np.where(some[:, None], p @ vh, 0.0)
        spread = (2 * ds + gamma_v)[:, None] * (p @ np.abs(vh))
        rounding = 6 * 0.42 * u_p * np.sqrt(p**2 @ vh**2) + u_p * np.abs(o[:, h])
        if p_scale is not None:
            rounding = _p_error(e, vh, seen, r.p, p_scale) / np.where(total > 0, total, 1.0)
        half = 0.5 * ulp(out, o[:, h]) * (1 + 2.0**-6)
        o_bound[:, h] = np.where(some[:, None], half + spread + rounding, 0.0)
        with np.errstate(divide="ignore"):
            lse[:, h] = np.where(some, (top + np.log(total))[:, 0], -np.inf)
        lse_bound[:, h] = np.where(some, ds + 2.0**-20 + 2 * UNIT["fp32"] * np.abs(np.where(some, lse[:, h], 0)), 0.0)
    return Attended(o, o_bound, lse, lse_bound)
