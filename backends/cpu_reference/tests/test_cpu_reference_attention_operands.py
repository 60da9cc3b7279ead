"""Quantized Q and P: declared formats, static scales as planes of the cache, and what their definition says by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qhal import Format, FormatError, KVCache, KVRequest, UnsupportedError

Q = ("int8.row*fp32", "int8.g4*fp16", "e4m3fn.row*fp32", "int4.row*bf16", "e2m1.g4*e8m0", "e4m3fn.g4*e8m0",
     "uint8-uint8.row*fp32@domain=minmax", "e2m1.g4*(e4m3fn.tensor*fp32)", "int8.tensor*fp32", "int8.head*fp32",
     "e4m3fn.tensor*fp32", "e4m3fn.head*bf16", "int8-int8.head*fp32", "int8-fp32.tensor*fp32")  # fmt: skip
P = ("int8.tensor*fp32", "uint8.tensor*fp32", "e4m3fn.tensor*fp32", "e5m2.tensor*fp32", "e4m3fn.tensor/fp32",
     "int4.tensor*bf16", "bf16", "fp16", "e4m3fn")  # fmt: skip
LENS, QUERIES = [6, 9, 3], [6, 1, 2]


def by_hand(q: torch.Tensor, f: Format, cache: KVCache) -> torch.Tensor:
    """Q in the three steps of the contract for static integer and float scales, written out; float32 [T, H, D]."""
    scale = cache.planes["q.scale"].float().reshape(1, -1, 1)
    zero = cache.planes["q.zero"].float().reshape(1, -1, 1) if f.zero is not None else torch.zeros(1)
    y = q / scale + zero
    if f.element == "int8":
        return (y.round().clamp(-128, 127) - zero) * scale
    top = torch.finfo(torch.float8_e4m3fn).max
    return y.clamp(-top, top).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("name", Q)
def test_q_is_quantized_as_declared(ops, kv_request, attention_request, fill, plan, name):
    request = attention_request(kv_request(), q=Format.parse(name))
    assert ops.supports(request), ops.supports(request).reason
    cache, table, _ = fill(ops, request.kv, LENS, attention=[request])
    q = torch.randn(sum(QUERIES), 4, 8)
    o = ops.attention(q, cache, plan(ops, request, QUERIES, LENS, table))
    if name.split(".")[1].startswith(("tensor", "head")):
        held = by_hand(q, request.q, cache)
    else:  # every (token, head) row by itself
        outer = cache.planes.get("q.scale.scale")
        rows = [ops.quantize(row[None], _operand(request.q, outer)).dequantize()[0] for row in q.flatten(0, 1)]
        held = torch.stack(rows).reshape(q.shape)
    plain = attention_request(request.kv)
    assert torch.equal(o, ops.attention(held, cache, plan(ops, plain, QUERIES, LENS, table)))
    assert not torch.equal(o, ops.attention(q, cache, plan(ops, plain, QUERIES, LENS, table)))


def _operand(f: Format, scale):
    from qhal import Operand

    return Operand(f, scale)


@pytest.mark.parametrize("name", P)
def test_p_is_quantized_as_declared(ops, kv_request, attention_request, fill, plan, name):
    p = Format.parse(name)
    request = attention_request(kv_request(), p=p, softcap=3.0)
    assert ops.supports(request), ops.supports(request).reason
    cache, table, rows = fill(ops, request.kv, LENS, attention=[request])
    q = torch.randn(sum(QUERIES), 4, 8)
    o = ops.attention(q, cache, plan(ops, request, QUERIES, LENS, table))
    step = float(cache.planes["p.scale"]) if not p.plain else 1.0
    at = 0
    for t, (k, v) in zip(QUERIES, rows, strict=True):
        for i in range(t):
            n = k.shape[0] - t + i + 1
            for h in range(4):
                s = [3 * math.tanh(float(q[at + i, h].double() @ k[j, h // 2].double()) * 0.35 / 3) for j in range(n)]
                e = torch.tensor([math.exp(x - max(s)) for x in s], dtype=torch.float64)
                held = _rounded(e.float(), p, step).double()
                want = (held[:, None] * v[:n, h // 2].double()).sum(0) / e.sum()
                # einsum and this loop may differ in the last bits of float64: one step of P where a tie is that near
                assert torch.allclose(o[at + i, h].double(), want, rtol=2**-22, atol=2**-22), (h, i)
        at += t


def _rounded(e: torch.Tensor, p: Format, scale: float) -> torch.Tensor:
    if p.element in ("int8", "uint8", "int4"):
        return (e / scale).round().clamp(max={"int8": 127, "uint8": 255, "int4": 7}[p.element]) * scale
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "e5m2": torch.float8_e5m2}.get(p.element)
    dtype = dtype or torch.float8_e4m3fn
    if p.plain:
        return e.to(dtype).float()
    y = e * scale if p.op == "/" else e / scale
    y = y.clamp(max=torch.finfo(dtype).max).to(dtype).float()
    return y / scale if p.op == "/" else y * scale


def test_the_scale_of_p_starts_where_one_is_the_largest_code(ops, kv_request, attention_request):
    for name, value in (("int8.tensor*fp32", 1 / 127), ("uint8.tensor*fp32", 1 / 255), ("e4m3fn.tensor*fp32", 1 / 448),
                        ("e4m3fn.tensor/fp32", 448.0), ("int8.tensor*bf16", 1 / 127)):  # fmt: skip
        request = attention_request(kv_request(), p=Format.parse(name))
        planes = ops.kv_planes(request.kv, attention=[request])[1]
        plane = next(p for p in planes if p.name == "p.scale")
        assert not plane.paged and plane.shape == (1,)
        cache = KVCache.allocate(request.kv, 1, "cpu", planes=planes)
        assert torch.equal(cache.planes["p.scale"], torch.tensor([value], dtype=plane.dtype))
        assert cache.host["p.scale"] == float(cache.planes["p.scale"])


def test_a_smaller_scale_of_p_saturates(ops, kv_request, attention_request, fill, plan):
    request = attention_request(kv_request(), p=Format.parse("int8.tensor*fp32"))
    cache, table, rows = fill(ops, request.kv, [1], attention=[request])
    cache.set_static("p.scale", torch.tensor(0.5 / 127))
    o = ops.attention(torch.randn(1, 4, 8), cache, plan(ops, request, [1], [1], table))
    half = torch.tensor(0.5 / 127) * 127
    assert torch.equal(o[0], (rows[0][1][0] * half).repeat_interleave(2, 0))


@pytest.mark.parametrize("p", ["int8.tensor*fp32", "e4m3fn.tensor*fp32", "e4m3fn"])
@pytest.mark.parametrize("q", ["int8.row*fp32", "e4m3fn.head*fp32", "int8.head*fp32", "bf16"])
def test_no_rows_and_nan(ops, kv_request, attention_request, fill, plan, q, p):
    """Zero tokens are legal; a NaN of Q reaches its head's row, but under a static integer scale it is code 0."""
    request = attention_request(kv_request(), q=Format.parse(q), p=Format.parse(p))
    cache, table, _ = fill(ops, request.kv, [3], attention=[request])
    for queries, lens in (([], []), ([0], [3]), ([0], [0])):
        assert ops.attention(torch.zeros(0, 4, 8), cache, plan(ops, request, queries, lens, table)).shape == (0, 4, 8)
    x = torch.randn(1, 4, 8)
    x[0, 1, 2] = torch.nan
    found = ops.attention(x, cache, plan(ops, request, [1], [3], table)).isnan()
    assert found[0, 1].all().item() == (q != "int8.head*fp32") and not found[0, [0, 2, 3]].any()


def test_planes_of_several_readers(ops, kv_request, attention_request):
    kv = kv_request("e4m3fn.tensor*fp32")
    q = attention_request(kv, q=Format.parse("e4m3fn.head*fp32"), phase="prefill")
    both = attention_request(kv, q=q.q, p=Format.parse("e4m3fn.tensor*fp32"), phase="decode")
    names = [p.name for p in ops.kv_planes(kv, attention=[q, both, attention_request(kv)])[1]]
    assert names == ["k.codes", "k.scale", "v.codes", "v.scale", "q.scale", "p.scale"]
    with pytest.raises(FormatError, match=r"q\.scale: these attentions"):
        ops.kv_planes(kv, attention=[q, replace(both, q=Format.parse("e4m3fn.tensor*fp32"))])


def test_a_cache_without_the_planes_is_refused(ops, kv_request, attention_request, fill, plan):
    for fields in ({"q": "int8.head*fp32"}, {"p": "int8.tensor*fp32"}, {"q": "e2m1.g4*(e4m3fn.tensor*fp32)"}):
        request = attention_request(kv_request(), **{k: Format.parse(v) for k, v in fields.items()})
        cache, table, _ = fill(ops, request.kv, [3])
        with pytest.raises(FormatError, match=r"no plane [qp]\.scale.*attention="):
            ops.attention(torch.randn(1, 4, 8), cache, plan(ops, request, [1], [3], table))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"q": "int8.col*fp32"}, "span tokens"),
        ({"q": "int8.16x16*fp32"}, "span tokens"),
        ({"q": "int8.head*e8m0"}, "static scale of Q is fp32"),
        ({"q": "e2m1.g4*(e4m3fn.row*fp32)"}, "one static outer float"),
        ({"q": "int8.head*fp32+fp32"}, "without offset"),
        ({"q": "e4m3fn.row*fp32%2:4"}, "sparse"),
        ({"q_rope": "bf16"}, "only the queries of mla"),
        ({"p": "int8.row*fp32"}, "one static float scale"),
        ({"p": "int8.head*fp32"}, "one static float scale"),
        ({"p": "int8-int8.tensor*fp32"}, "one static float scale"),
        ({"p": "e2m1.g16*e8m0"}, "one static float scale"),
        ({"p": "int8"}, "plain float type"),
        ({"p": "int1.tensor*fp32"}, "one static float scale"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(ops, kv_request, attention_request, fields, why):
    request = attention_request(kv_request(), **{k: Format.parse(v) for k, v in fields.items()})
    answer = ops.supports(request)
    assert not answer and why in answer.reason
    with pytest.raises(UnsupportedError):
        ops.kv_planes(request.kv, attention=[request])


def test_the_rope_part_of_q_may_keep_its_own_type(ops, attention_request, fill, plan):
    kv = KVRequest(kind="mla", k=Format.parse("int8.head*fp32"), v=Format("bf16"), heads=1, k_dim=16, v_dim=4, page=4)
    request = attention_request(kv, q=Format.parse("int8.head*fp32"), q_rope=Format("bf16"), out=torch.bfloat16)
    cache, table, _ = fill(ops, kv, [6], attention=[request])
    assert cache.planes["latent.scale"].shape == (1,) and cache.planes["q.scale"].shape == (4,)
    q = torch.randn(3, 4, 20)
    held = torch.cat([by_hand(q[..., :16], request.q, cache), q[..., 16:].bfloat16().float()], -1)
    want = ops.attention(held, cache, plan(ops, attention_request(kv, out=torch.bfloat16), [3], [6], table))
    assert torch.equal(ops.attention(q, cache, plan(ops, request, [3], [6], table)), want)
    together = replace(request, q_rope=None)
    held = by_hand(q, request.q, cache)
    want = ops.attention(held, cache, plan(ops, attention_request(kv, out=torch.bfloat16), [3], [6], table))
    assert torch.equal(ops.attention(q, cache, plan(ops, together, [3], [6], table)), want)
    assert not ops.supports(replace(request, q_rope=Format.parse("int8.head*fp32")))
