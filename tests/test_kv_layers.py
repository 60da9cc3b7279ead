"""From what a checkpoint says about a cache to requests, planes and their static values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qhal import Format, FormatError, KVCache, KVSpec, Operand, ShardError, resolve, select
from qhal.caches import canonical_planes
from qhal.layers import attention_request, kv_request, requests, set_static

BF16 = torch.bfloat16


def operand(name: str, *values: float, zero: tuple[float, ...] = ()) -> Operand:
    scale, shift = (torch.tensor(t, dtype=torch.float32) if t else None for t in (values, zero))
    return Operand(Format.parse(name), scale, shift)


def made(spec: KVSpec, *, heads: int = 4, readers: bool = True) -> KVCache:
    reader = attention_request(spec.format, BF16, page=8, heads=heads, scale=0.1, phase="decode")
    kv = kv_request(spec.format, page=8)
    return KVCache.allocate(kv, 2, "cpu", planes=canonical_planes(kv, [reader] if readers else []))


def test_requests_of_a_cache() -> None:
    fp8 = operand("e4m3fn.tensor*fp32", 0.5)
    f = KVSpec(fp8, fp8, heads=2, k_dim=64, v_dim=32).format
    (request,) = requests(f, BF16, page=32)
    assert request == kv_request(f, page=32) and request.page == 32
    (default,) = requests(f, BF16)
    assert default.page == 16
    asked = attention_request(f, BF16, page=32, heads=8, scale=0.125, phase="prefill")
    assert (asked.kv, asked.heads, asked.scale, asked.phase, asked.out) == (request, 8, 0.125, "prefill", BF16)
    assert asked.q == asked.p == Format("bf16") and asked.q_rope is None  # None in the spec is a promise
    quantized = replace(f, q=Format.parse("int8.head*fp32"), p=Format.parse("int8.tensor*fp32"))
    asked = attention_request(quantized, BF16, page=32, heads=8, scale=0.125, phase="prefill")
    assert (asked.q, asked.p, asked.q_rope) == (quantized.q, quantized.p, None)


def test_q_of_a_latent_cache() -> None:
    latent = KVSpec(
        operand("int8.head*fp32", 0.5), Operand(Format("bf16")), q=operand("int8.head*fp32", 1, 2), kind="mla"
    )
    asked = attention_request(latent.format, BF16, page=8, heads=2, scale=1, phase="decode")
    assert asked.q == Format.parse("int8.head*fp32") and asked.q_rope == Format("bf16")
    whole = replace(latent, v=operand("int8.head*fp32", 0.5))
    assert attention_request(whole.format, BF16, page=8, heads=2, scale=1, phase="decode").q_rope is None


def test_static_values_reach_their_planes() -> None:
    spec = KVSpec(
        operand("int8-int8.head*fp32", 0.25, 0.5, zero=(3, -4)),
        operand("e4m3fn.tensor*bf16", 0.125),
        q=operand("int8-int8.head*fp32", 1, 2, 3, 4, zero=(0,)),
        p=operand("uint8.tensor*fp32", 1 / 256),
        heads=2, k_dim=8, v_dim=8,
    )  # fmt: skip
    cache = made(spec)
    set_static(cache, spec)
    found = {name: cache.planes[name].float().tolist() for name in sorted(cache.static)}
    assert found == {
        "k.scale": [0.25, 0.5], "k.zero": [3, -4], "v.scale": [0.125], "q.scale": [1, 2, 3, 4], "q.zero": [0] * 4,
        "p.scale": [1 / 256],
    }  # fmt: skip
    assert cache.host == {"v.scale": 0.125, "p.scale": 1 / 256}
    assert cache.planes["q.zero"].dtype == torch.int8


def test_outer_levels_columns_and_starts() -> None:
    nested = "e2m1.g4*(e4m3fn.tensor*fp32)"
    spec = KVSpec(operand(nested, 0.5), operand("int8-fp32.col*fp32", *range(1, 17), zero=(7.5,)), q=operand(nested, 2),
                  p=operand("int8.tensor*fp32"), heads=2, k_dim=8, v_dim=8)  # fmt: skip
    cache = made(spec)
    set_static(cache, spec)
    assert cache.planes["k.scale.scale"].item() == 0.5 and cache.planes["q.scale.scale"].item() == 2
    assert torch.equal(cache.planes["v.scale"], torch.arange(1, 17.0).reshape(2, 8))
    assert torch.equal(cache.planes["v.zero"], torch.full((2, 8), 7.5))
    assert cache.host["p.scale"] == float(torch.tensor(1 / 127))  # its own start


def test_a_shard_keeps_the_values_of_its_heads() -> None:
    spec = KVSpec(operand("int8-fp32.col*fp32", *range(1, 33), zero=tuple(range(32))),
                  operand("e4m3fn.head*fp32", 1, 2, 3, 4), q=operand("int8-int8.head*fp32", *range(1, 9), zero=(0,)),
                  p=operand("int8.tensor*fp32", 0.01), heads=4, k_dim=8, v_dim=8, name="layer")  # fmt: skip
    parts = [spec.shard(rank, 2) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert part.format == replace(spec.format, heads=2)
        cache = made(part)
        set_static(cache, part)
        assert torch.equal(cache.planes["k.scale"], torch.arange(1, 33.0).reshape(4, 8)[2 * rank : 2 * rank + 2])
        assert torch.equal(cache.planes["k.zero"], torch.arange(32.0).reshape(4, 8)[2 * rank : 2 * rank + 2])
        assert cache.planes["v.scale"].tolist() == [1 + 2 * rank, 2 + 2 * rank]
        assert cache.planes["q.scale"].tolist() == [4 * rank + i for i in range(1, 5)]
    assert torch.equal(torch.cat([p.k.scale for p in parts if p.k.scale is not None]), torch.arange(1, 33.0))
    with pytest.raises(ShardError, match="layer: key-value heads: 4 does not divide into 3"):
        spec.shard(0, 3)
    latent = KVSpec(operand("int8.head*fp32", 0.5), Operand(Format("bf16")), q=operand("int8.head*fp32", 1, 2),
                    kind="mla", heads=1, k_dim=16, v_dim=4)  # fmt: skip
    half = latent.shard(1, 2)
    assert half.k is latent.k and half.heads == 1 and half.q is not None and half.q.scale is not None
    assert half.q.scale.tolist() == [2]
    with pytest.raises(ShardError, match="static values of int8"):
        latent.shard(0, 3)


def test_the_plan_asks_for_the_pages_of_the_engine() -> None:
    fp8 = operand("e4m3fn.tensor*fp32", 0.5)
    spec = KVSpec(fp8, fp8, heads=2, k_dim=64, v_dim=64, name="layer")
    for page in (16, 64):
        (entry,) = resolve([spec], select("cpu_reference"), page=page).entries
        assert entry.request == kv_request(spec.format, page=page) and entry.status == "ok"


def test_errors() -> None:
    fp8 = operand("e4m3fn.tensor*fp32", 0.5)
    spec = KVSpec(fp8, fp8, q=operand("int8.head*fp32", 1, 2, 3, 4), heads=2, k_dim=8, v_dim=8, name="layer")
    for broken, cache, words in (
        (
            spec,
            made(spec, readers=False),
            r"layer: the cache has no static plane q\.scale for int8\.head.*k\.scale, v\.scale",
        ),
        (replace(spec, k=operand("e4m3fn.tensor*fp32")), made(spec), r"layer: k\.scale of .* is static"),
        (replace(spec, q=operand("int8.head*fp32")), made(spec), r"layer: q\.scale of .* is static"),
        (replace(spec, k=operand("int8.tensor*fp32", 1)), made(spec), "the cache holds e4m3fn"),
        (replace(spec, k=Operand(fp8.format, fp8.scale, clip=(0.9, 0.9))), made(spec), "clips nothing"),
        (spec, made(spec, heads=3), r"no static plane 'q\.scale' of 4 values"),
        (replace(spec, q=operand("int8.head*fp32", 1, 2, 0, 4)), made(spec), "finite and not 0"),
    ):
        with pytest.raises(FormatError, match=words):
            set_static(cache, broken)
