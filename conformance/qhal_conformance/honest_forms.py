"""Honest variants of attention, Hadamard transforms and grouped products: what kernels do, computed from a case's
inputs and judged by its reference, without a backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from qhal.requests import NumericsClass, minimum_class
from qhal_conformance import attention_check, grouped_cases, grouped_check, hadamard_check, mla_cases
from qhal_conformance.attention_reference import visible
from qhal_conformance.cases import Case
from qhal_conformance.decode import decode
from qhal_conformance.encode import quantize
from qhal_conformance.problem import DTYPES
from qhal_conformance.tolerance import Verdict, compare

Judged = Iterator[tuple[str, NumericsClass, Verdict]]
_FP32, _REDUCED, _DEQUANT = NumericsClass.FP32_ACC, NumericsClass.REDUCED_ACC, NumericsClass.DEQUANT_16


def attention(case: Case) -> Judged:
    """Softmax over tiles under a running maximum, in powers of two, in separate parts that are merged; keys and values
    as they are, or rounded to the type of q.
    """
    if mla_cases.is_mla(case):
        return
    p = attention_check.build(case)
    for name, numerics, tile, base2, parts in (
        ("attention-whole", _FP32, 1 << 20, False, 1),
        ("attention-tiles-16", _FP32, 16, False, 1),
        ("attention-tiles-64-exp2", _FP32, 64, True, 1),
        ("attention-split-3", _FP32, 32, False, 3),
        ("attention-dequantized", _DEQUANT, 1 << 20, False, 1),
        ("attention-dequantized-tiles", _DEQUANT, 64, True, 1),
    ):
        if numerics > minimum_class(p.request):
            continue
        expected = p.expected(numerics, case.out)
        o, lse = _attend(p, tile, base2, parts, DTYPES[p.request.q.element] if numerics == _DEQUANT else None)
        got = o.to(DTYPES[case.out]).double().numpy()
        verdict = compare(got, expected.o, expected.o_bound, case.out)
        if verdict.kind is None and p.request.lse:
            verdict = compare(lse.double().numpy(), expected.lse, expected.lse_bound, "fp32")
        yield name, numerics, verdict


def _attend(
    p: attention_check.Problem, tile: int, base2: bool, parts: int, narrow: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    r, out, logs, token, key = p.request, [], [], 0, 0
    for t, n, tree in zip(p.query_lens, p.pages.lens, p.trees, strict=True):
        q = torch.from_numpy(p.held[token : token + t])
        k, v = (torch.from_numpy(x.value[key : key + n]) for x in (p.k, p.v))
        if narrow is not None:
            k, v = k.to(narrow).float(), v.to(narrow).float()
        k, v = (x.repeat_interleave(r.heads // r.kv.heads, 1) for x in (k, v))
        seen = torch.from_numpy(visible(t, n, r, tree))
        size = max(-(-n // parts), 1)
        found = [_part(p, q, k[a : a + size], v[a : a + size], seen[:, a : a + size], tile, base2)
                 for a in range(0, max(n, 1), size)]  # fmt: skip
        top = torch.stack([part[0] for part in found]).amax(0)
        if p.sinks is not None:
            top = torch.maximum(top, torch.from_numpy(p.sinks)[None, :, None])
        safe = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
        shares = [torch.exp(part[0] - safe) for part in found]
        total = torch.stack([s * part[1] for s, part in zip(shares, found, strict=True)]).sum(0)
        o = torch.stack([s * part[2] for s, part in zip(shares, found, strict=True)]).sum(0)
        if p.sinks is not None:
            total = total + torch.exp(torch.from_numpy(p.sinks)[None, :, None] - safe)
        some = seen.any(-1)[:, None, None]
        out.append(torch.where(some, o / torch.where(total > 0, total, 1.0), torch.zeros_like(o)))
        logs.append(torch.where(some, safe + torch.log(total), -torch.inf)[..., 0])
        token, key = token + t, key + n
    return torch.cat(out), torch.cat(logs)


def _part(
    p: attention_check.Problem, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, tile: int, base2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, sum of e, sum of P v) of some keys, all float32; P is rounded under the maximum so far."""
    r = p.request
    top = torch.full((*q.shape[:2], 1), -torch.inf)
    total, o = torch.zeros(*q.shape[:2], 1), torch.zeros(*q.shape[:2], r.kv.v_dim)
    for first in range(0, k.shape[0], tile):
        s = torch.einsum("thd,lhd->thl", q, k[first : first + tile]) * r.scale
        if r.softcap is not None:
            s = r.softcap * torch.tanh(s / r.softcap)
        s = s.masked_fill(~seen[:, None, first : first + tile], -torch.inf)
        above = torch.maximum(top, s.amax(-1, keepdim=True))
        safe = torch.where(torch.isfinite(above), above, torch.zeros_like(above))
        e = torch.exp2((s - safe) * math.log2(math.e)) if base2 else torch.exp(s - safe)
        shrink = torch.exp(top - safe)
        total = total * shrink + e.sum(-1, keepdim=True)
        o = o * shrink + torch.einsum("thl,lhd->thd", _held(p, e), v[first : first + tile])
        top = above
    return top, total, o


def _held(p: attention_check.Problem, e: Tensor) -> Tensor:
    """P as the request holds it."""
    if p.request.p.plain:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3fn": torch.float8_e4m3fn}.get(p.request.p.element)
        return e if kind is None else e.to(kind).float()
    flat = e.reshape(-1, e.shape[-1]).numpy()
    held = decode(quantize(flat, p.request.p, scale=p.static["p.scale"])).value
    return torch.from_numpy(np.ascontiguousarray(held)).reshape(e.shape)


def hadamard(case: Case) -> Judged:
    """Butterflies in float32, in bf16 between the stages, and one product with the matrix."""
    if not case.subject.startswith("sylvester") or case.data == "quantized":
        return
    p = hadamard_check.build(case)
    order, dtype = int(case.subject.removeprefix("sylvester")), DTYPES[case.out]
    exact = case.data == "integers" or (case.data == "impulse" and order.bit_length() % 2)
    for name, numerics, between in (
        ("butterflies-fp32", _FP32, torch.float32),
        ("butterflies-bf16", _REDUCED, torch.bfloat16),
    ):
        if exact and between == torch.bfloat16 and order > 256:
            continue  # sums of integers past 2^8 are rounded by bf16: not exact, and no such kernel is
        y = torch.from_numpy(p.x).reshape(-1, order)
        step = 1
        while step < order:
            a, b = y.reshape(-1, order // (2 * step), 2, step).unbind(2)
            y = torch.stack([a + b, a - b], 2).reshape(-1, order).to(between).float()
            step *= 2
        y = (y * order**-0.5).reshape(p.x.shape).to(dtype)
        bound = hadamard_check.bound_of(case, p, numerics, p.x)
        yield name, numerics, compare(y.double().numpy(), p.ref, bound, case.out)


def grouped_gemm(case: Case) -> Judged:
    """Each expert's rows in float32 or with 16-bit weights, the activation in float32, weighted sums in order."""
    if any(o.startswith("q=") for o in case.options):
        return
    p = grouped_check.build(case)
    dtype = DTYPES[case.out]
    for name, numerics in (("grouped-fp32", _FP32), ("grouped-dequantized", _DEQUANT)):
        if numerics == _DEQUANT and not p.request.gemm.x[0].plain:
            continue
        expected = p.expected(numerics, case.out)
        y = torch.zeros(len(p.experts), p.request.gemm.n)
        for e, product in enumerate(p.product):
            mine = np.flatnonzero(p.experts == e)
            w = torch.from_numpy(product.w.value)
            w = w.to(dtype).float() if numerics == _DEQUANT else w
            found = torch.from_numpy(product.x.value[p.rows[mine]]) @ w.T
            y[mine] = found if product.bias is None else found + torch.from_numpy(product.bias)
        if p.request.activation is not None:
            y = _activated(y, case)
            y[p.experts < 0] = 0
        if p.weights is not None:
            share = torch.from_numpy(p.weights)
            pairs, total = y.reshape(*share.shape, -1), torch.zeros(share.shape[0], y.shape[-1])
            for j in range(share.shape[1]):
                total += share[:, j, None] * pairs[:, j]
            y = total
        yield name, numerics, compare(y.to(dtype).double().numpy(), expected.ref, expected.bound(case.out), case.out)


def _activated(y: Tensor, case: Case) -> Tensor:
    a = next(a for name, a in grouped_cases.ACTIVATIONS.items() if case.has(name))
    gate, up = y.chunk(2, -1) if a.gated else (y, torch.ones_like(y))
    if a.name == "swiglu":
        limit = math.inf if a.limit is None else a.limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + a.shift
        return gate * torch.sigmoid(a.alpha * gate) * up
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
        "relu2": lambda g: torch.relu(g) ** 2,
    }
    return functions[a.name](gate) * up


FORMS: dict[str, Callable[[Case], Judged]] = {
    "attention": attention,
    "hadamard": hadamard,
    "grouped_gemm": grouped_gemm,
}
