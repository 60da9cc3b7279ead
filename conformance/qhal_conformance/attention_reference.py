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

Class dequant-16 rounds every k and v to the type of q, where one step is d(k), d(v); sums are fp32. With o' and lse' of
the rounded ones it adds

    to o    |o' - ref| + 6 * 0.29 * sqrt(sum p^2 ((scale^2 sum q^2 d(k)^2) (v - ref)^2 + d(v)^2))
    to lse  |lse' - lse| + 6 * 0.29 * sqrt(sum p^2 scale^2 sum q^2 d(k)^2)

The first is known from the inputs: what equal codes, and one key's part in many results, lose together. The second is
what independent roundings move, to first order: a score moves o by p (v - o) and lse by p. It is there because a kernel
may round a number on its way (code, offset, scale) and end at the other neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qhal.formats import Format
from qhal.requests import AttentionRequest, NumericsClass
from qhal_conformance import elements
from qhal_conformance.decode import decode
from qhal_conformance.elements import round_wide
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


@dataclass(frozen=True)
class _Head:
    """One head of one sequence, float64: scores [t, L], exp(s - max), the weights p, sum of e [t, 1], o, lse [t]."""

    s: F64
    e: F64
    p: F64
    total: F64
    o: F64
    lse: F64


def _head(q: F64, k: F64, v: F64, seen: Tree, r: AttentionRequest, sink: float | None, p_scale: F32 | None) -> _Head:
    """q [t, D], k [L, D], v [L, Dv]."""
    s = q @ k.T * r.scale
    if r.softcap is not None:
        s = r.softcap * np.tanh(s / r.softcap)
    s = np.where(seen, s, -np.inf)
    top = s.max(axis=1, keepdims=True)
    if sink is not None:
        top = np.maximum(top, sink)
    top = np.where(np.isfinite(top), top, 0.0)
    e = np.exp(s - top)
    total = e.sum(axis=1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - top)
    if p_scale is not None:
        e = np.minimum(e, float(p_scale[0]) * elements.largest(r.p.element))
    p = e / np.where(total > 0, total, 1.0)
    some: npt.NDArray[np.bool_] = np.asarray(seen.any(axis=1))
    with np.errstate(divide="ignore"):
        lse = np.where(some, (top + np.log(total))[:, 0], -np.inf)
    return _Head(s, e, p, total, np.where(some[:, None], p @ v, 0.0), lse)


def _dequantized(
    h: _Head, q: F64, k: F64, v: F64, seen: Tree, r: AttentionRequest, sink: float | None
) -> tuple[F64, F64]:
    """What rounding every k and v to the type of q may change of o [t, Dv] and of lse [t]."""
    kind = r.q.element
    k16, v16 = (round_wide(kind, t.astype(np.float32)).astype(np.float64) for t in (k, v))
    near = _head(q, k16, v16, seen, r, sink, None)
    step_s = np.square(h.p) * (q**2 @ (ulp(kind, k) ** 2).T) * r.scale**2  # variance of p * s, less the 0.29
    about = step_s @ v**2 - 2 * h.o * (step_s @ v) + h.o**2 * step_s.sum(axis=1, keepdims=True)  # of (v - o)^2
    spread = np.maximum(about, 0.0) + h.p**2 @ ulp(kind, v) ** 2
    with np.errstate(invalid="ignore"):  # rows that see no key
        moved = np.where(seen.any(axis=1), np.abs(near.lse - h.lse), 0.0)
    return np.abs(near.o - h.o) + 6 * 0.29 * np.sqrt(spread), moved + 6 * 0.29 * np.sqrt(step_s.sum(axis=1))


def _one(
    q: F64,
    k: F64,
    v: F64,
    seen: Tree,
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
    wide = numerics != NumericsClass.REDUCED_ACC
    mla = r.kv.kind == "mla"  # keys are latent and rope together, values the latent rows
    steps = max(decoding_steps(f) for f in (r.kv.k, *((r.kv.v,) if mla else ())))
    values = r.kv.k if mla else r.kv.v
    gamma = 2 * dim**0.5 * 2.0**-24 if wide else 2.0**-12
    gamma_v = (2 * keys**0.5 + decoding_steps(values)) * 2.0**-24 if wide else 2.0**-12
    u_p = _UNIT_P[r.p.element] if r.p.plain else 0.0
    some: npt.NDArray[np.bool_] = np.asarray(seen.any(axis=1))
    for h in range(heads):
        kh, vh = k[:, group[h]], v[:, group[h]]
        sink = None if sinks is None else float(sinks[h])
        found = _head(q[:, h], kh, vh, seen, r, sink, p_scale)
        o[:, h], lse[:, h] = found.o, found.lse
        size = np.abs(q[:, h]) @ np.abs(kh).T * abs(r.scale)
        largest = np.where(seen, size, 0.0).max(axis=1)
        reach = np.where(seen, np.abs(found.s), 0.0).max(axis=1)
        ds = (gamma + steps * 2.0**-24) * largest + 2.0**-22 * reach
        if r.softcap is not None:
            ds = ds + (2.0**-22 * r.softcap if wide else 2.0**-11 * reach)
        spread = (2 * ds + gamma_v)[:, None] * (found.p @ np.abs(vh))
        rounding = 6 * 0.42 * u_p * np.sqrt(found.p**2 @ vh**2) + u_p * np.abs(found.o)
        if p_scale is not None:
            rounding = _p_error(found.e, vh, seen, r.p, p_scale) / np.where(found.total > 0, found.total, 1.0)
        if numerics == NumericsClass.DEQUANT_16:
            of_o, of_lse = _dequantized(found, q[:, h], kh, vh, seen, r, sink)
            rounding, ds = rounding + of_o, ds + of_lse
        half = 0.5 * ulp(out, found.o) * (1 + 2.0**-6)
        o_bound[:, h] = np.where(some[:, None], half + spread + rounding, 0.0)
        finite = np.abs(np.where(some, found.lse, 0.0))
        lse_bound[:, h] = np.where(some, ds + 2.0**-20 + 2 * UNIT["fp32"] * finite, 0.0)
    return Attended(o, o_bound, lse, lse_bound)
