"""A quantized paged cache: every plane it has, writing a prompt, decoding over it, and what int8 costs in bytes.

Grouped-query attention, 4 query heads on 2 key-value heads of 64, pages of 16 slots in any order.
"""

import torch

import qhal
from qhal import AttentionRequest, Format, KVCache, KVRequest, Limits

INT8 = Format.parse("int8.row*fp32")  # one scale per (token, head), computed when the token is written
BF16 = Format("bf16")


def main() -> None:
    ops = qhal.select("cpu_reference")
    kv = KVRequest(kind="mha", k=INT8, v=INT8, heads=2, k_dim=64, v_dim=64, page=16)
    read = AttentionRequest(
        kv=kv, heads=4, scale=64**-0.5, phase="decode", q=BF16, p=Format("fp32"), out=torch.bfloat16
    )
    print(f"asked: {read}\nanswer: {ops.supports(read).level}, {ops.supports(read).executes}")

    # 1. the planes, before anything is allocated: an engine that moves pages moves all of these
    layout, planes = ops.kv_planes(kv, attention=[read])
    cache = KVCache.allocate(kv, pages=4, device=ops.device, planes=planes, layout=layout)
    for plane in planes:
        print(f"  {plane.name:9} {plane.dtype!s:13} {plane.shaped(4)}")
    plain = 2 * 4 * 16 * 2 * 64 * 2  # k and v, pages, slots, heads, features, bytes
    print(f"{cache.nbytes} bytes, in bf16 they would be {plain}")

    # 2. twenty tokens go to pages 3 and 1; slot = page * 16 + position, -1 writes nowhere (padding)
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 21, 2, 64, generator=g).bfloat16()
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    at = torch.arange(20)
    slots = torch.cat([table[0, at // 16].long() * 16 + at % 16, torch.tensor([-1])])
    ops.quant_kv(k, v, cache, slots)
    assert bool((cache.planes["k.codes"][[0, 2]] == 0).all())  # nothing but those pages was touched

    # 3. one token attends to all twenty
    batch = ops.attention_batch(read, Limits(batch=1, tokens=1, pages=2))
    one, twenty = torch.tensor([1], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    batch.plan(query_lens=one, kv_lens=twenty, page_table=table)
    q, lse = torch.randn(1, 4, 64, generator=g).bfloat16(), torch.empty(1, 4)
    o = ops.attention(q, cache, batch, lse=lse)

    # by definition: softmax over the dequantized keys, the dequantized values, one rounding; head h reads h // 2
    for h in range(4):
        keys = ops.quantize(k[:20, h // 2], INT8).dequantize().double()
        values = ops.quantize(v[:20, h // 2], INT8).dequantize().double()
        s = keys @ q[0, h].double() * read.scale
        assert torch.equal(o[0, h], (torch.softmax(s, -1) @ values).bfloat16())
        assert torch.equal(lse[0, h], torch.logsumexp(s, -1).float())
    print("attention over the cache equals its definition:", tuple(o.shape), o.dtype)


if __name__ == "__main__":
    main()
