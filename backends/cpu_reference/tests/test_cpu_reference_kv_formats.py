"""Every cache format: quant_kv writes the bits of `encode`, row by row, and attention reads them as they decode."""

from __future__ import annotations

import math

import pytest
import torch

from qhal import Format, KVRequest, QTensor
from qhal.encoding import encode
from qhal.tensors import same_bits

STATIC = (
    "e4m3fn.tensor*fp32", "e4m3fnuz.tensor*fp32", "e5m2.tensor*fp32", "e5m2fnuz.tensor*bf16", "e4m3fn.tensor/fp32",
    "e4m3fn.head*fp32", "e4m3fn.head*bf16", "e4m3fnuz.head*fp32", "e5m2.head*bf16", "int8.tensor*fp32",
    "int8.head*fp32", "int8.col*fp32", "int8-fp32.col*fp32", "int8-int8.col*bf16", "int8-int8.head*fp32",
    "int8-int8.tensor*fp32", "uint8-uint8.head*fp32", "int4.head*fp32", "int4-int4.tensor*fp32", "e4m3fn.col*fp32",
)  # fmt: skip
COMPUTED = (
    "e4m3fn.row*fp32", "e4m3fnuz.row*fp32@qmax=224", "e5m2.row*fp32", "int8.row*fp32", "int8.row*bf16@qmax=127.5",
    "int8-int8.row*fp32@domain=minmax", "uint8-uint8.row*fp16@domain=minmax", "int8.row*fp32+fp32@domain=minmax",
    "int8.g32*fp16", "int4.row*fp16", "int4.g32*fp16", "uint4-fp16.row*fp16@domain=minmax", "e4m3fn.g16*fp32",
    "uint4-uint4.g16*bf16@domain=minmax", "uint4.g32*fp16+fp16@domain=minmax", "int8.g4*(e4m3fn.tensor*bf16)",
    "e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor/fp32)", "e2m1.g16*e8m0", "e2m1.g32*e8m0",
    "e2m1.g32*e8m0@e8m0=even", "e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0@e8m0=ceil", "e5m2.g32*e8m0", "nf4.g32*fp32",
    "e4m3fn.g16*(e8m0.tensor*fp32)",
)  # fmt: skip
PLAIN = ("bf16", "fp16", "fp32", "e4m3fn", "e5m2")
LENS, QUERIES, PAGE = [7, 4, 1], [3, 4, 1], 4


def requests(name: str) -> list[KVRequest]:
    """Heads of 40 and 24 features (short last blocks), and latent rows of 48 beside rope rows of 20."""
    f = Format.parse(name)
    return [
        KVRequest(kind="mha", k=f, v=f, heads=2, k_dim=40, v_dim=24, page=PAGE),
        KVRequest(kind="mla", k=f, v=f, heads=1, k_dim=48, v_dim=20, page=PAGE),
    ]


def encoded(f: Format, cache, name: str, row: torch.Tensor, head: int) -> QTensor:
    """One (token, head) row [D] by the definition, with the static numbers that stand in the cache's planes."""

    def number(plane: str):
        values = cache.planes[f"{name}.{plane}"].float()
        kind = f.block.kind if f.block is not None else ""
        if values.dim() > 1:  # col: [G, D], or [D] of a latent row
            return values[head]
        return values[head : head + 1] if kind == "head" else values

    static = f.block is not None and f.block.kind in ("tensor", "head", "col")
    nested = f.scale is not None and not f.scale.plain
    scale = number("scale") if static else number("scale.scale") if nested else None
    zero = number("zero") if static and f.zero is not None else None
    if static and f.block is not None and f.block.kind == "head":  # one row is all that this head has here
        f = Format.parse(str(f).replace(".head", ".row"))
    return encode(row[None], f, scale=scale, zero=zero)


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    low_high = (codes.to(torch.uint8) & 15).flatten().tolist() + [0] * (codes.numel() % 2)
    return torch.tensor([a + 16 * b for a, b in zip(low_high[0::2], low_high[1::2], strict=True)], dtype=torch.uint8)


@pytest.mark.parametrize("name", STATIC + COMPUTED + PLAIN)
def test_bits_and_attention(ops, attention_request, fill, plan, name):
    for kv in requests(name):
        request = attention_request(kv, scale=0.2, lse=True)
        assert ops.supports(kv) and ops.supports(request), ops.supports(request).reason
        cache, table, rows = fill(ops, kv, LENS)
        names = ("latent", "rope") if kv.kind == "mla" else ("k", "v")
        values = [[torch.zeros(0)] * 2 for _ in LENS]
        for b, pair in enumerate(rows):
            for which, (prefix, f, x) in enumerate(zip(names, (kv.k, kv.v), pair, strict=True)):
                heads = x.reshape(x.shape[0], -1, x.shape[-1])
                value = torch.zeros(heads.shape, dtype=torch.float64)
                for token in range(heads.shape[0]):
                    page, slot = int(table[b, token // PAGE]), token % PAGE
                    for head in range(heads.shape[1]):
                        q = encoded(f, cache, prefix, heads[token, head], head)
                        check_row(cache, prefix, f, page, slot, head, q)
                        value[token, head] = q.dequantize()[0]
                values[b][which] = value
        q = torch.randn(sum(QUERIES), 4, kv.k_dim + (kv.v_dim if kv.kind == "mla" else 0))
        lse = torch.empty(q.shape[:2])
        o = ops.attention(q, cache, plan(ops, request, QUERIES, LENS, table), lse=lse)
        at = 0
        for t, (k, v) in zip(QUERIES, values, strict=True):
            if kv.kind == "mla":
                k, v = torch.cat([k, v], -1), k
            for i in range(t):
                for h in range(4):
                    want, log = one_row(q[at + i, h].tolist(), k, v, k.shape[0] - t + i, h // (4 // k.shape[1]), 0.2)
                    assert torch.allclose(o[at + i, h].double(), want, rtol=2**-23, atol=2**-30)
                    assert math.isclose(lse[at + i, h].item(), log, rel_tol=2**-22, abs_tol=2**-22)
            at += t


def check_row(cache, prefix: str, f: Format, page: int, slot: int, head: int, q: QTensor) -> None:
    """The planes of one (token, head) row, bit for bit."""

    def here(plane: str) -> torch.Tensor:
        row = cache.planes[f"{prefix}.{plane}"][page, slot]
        return row if prefix in ("latent", "rope") else row[head]

    codes = here("codes")
    packed = codes.dtype == torch.uint8 and codes.numel() < q.codes.numel()
    assert same_bits(codes, nibbles(q.codes) if packed else q.codes[0])
    if f.block is not None and f.block.kind in ("row", "group"):
        for part in ("scale", "zero", "offset"):
            plane = getattr(q, part)
            if isinstance(plane, QTensor):
                assert same_bits(here(f"{part}.codes").flatten(), plane.codes.flatten())
            elif plane is not None:
                assert same_bits(here(part).flatten(), plane.flatten())


def one_row(q: list[float], k: torch.Tensor, v: torch.Tensor, last: int, group: int, scale: float):
    """softmax(scale q.k) v over keys 0 to `last`, by scalars."""
    keys, rows = k[: last + 1, group].tolist(), v[: last + 1, group].tolist()
    s = [scale * math.fsum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
    e = [math.exp(x - max(s)) for x in s]
    total = math.fsum(e)
    out = [math.fsum(w * row[d] for w, row in zip(e, rows, strict=True)) / total for d in range(v.shape[-1])]
    return torch.tensor(out, dtype=torch.float64), max(s) + math.log(total)
