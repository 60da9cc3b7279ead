"""quant_kv and attention by the Triton kernels on this machine's GPU, replayed from a graph.

    python benchmarks/triton_attention.py [--quick] [--tune FORMAT ...]

us per call, the median of replays of graphs that go round 256 MiB of caches; GB/s of what a cache holds (quant_kv: of
what is read and written). err: largest difference to float32 over decoded rows of a short batch, of the largest value.
"torch" is scaled_dot_product_attention over contiguous bf16 keys. --tune times every candidate of
`qhal_triton.attention.config` for a format. Writes triton_attention.json to $OUT if that is set. Without a GPU nothing
is run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from qhal.caches import KVCache, Limits
from qhal.formats import Format
from qhal.requests import AttentionRequest, KVRequest
from qhal.selection import select
from qhal_portable.kv import read
from qhal_triton import attention, kv
from qhal_triton.attention import TritonBatch
from qhal_triton.attention.config import candidates, config
from qhal_triton.attention.paths import arithmetic
from qhal_triton.timing import microseconds

SHAPES = ((1, 32768), (16, 8192), (128, 2048))
LATENT = ((1, 32768), (32, 4096), (128, 4096))
FORMATS = ("bf16", "e4m3fn.tensor*fp32", "e4m3fn.row*fp32", "int8.row*fp32", "int4.row*fp32", "int4.g32*fp16",
           "e2m1.g16*(e4m3fn.tensor*fp32)")  # fmt: skip
LATENTS = ("bf16", "e4m3fn.tensor*fp32", "int8.row*fp32")
TOKENS = (1, 64, 1024, 16384)


def request_of(text: str, *, mla: bool = False, phase: Any = "decode") -> AttentionRequest:
    f = Format.parse(text)
    dims = (512, 64) if mla else (128, 128)
    cache = KVRequest(kind="mla" if mla else "mha", k=f, v=f, heads=1 if mla else 8, k_dim=dims[0], v_dim=dims[1],
                      page=64 if mla else 16)  # fmt: skip
    return AttentionRequest(
        kv=cache, heads=128 if mla else 32, scale=192**-0.5 if mla else 128**-0.5, phase=phase, q=Format("bf16"),
        p=Format("bf16"), out=torch.bfloat16, graph=True,
    )  # fmt: skip


def rows(request: KVRequest, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    lead = (tokens,) if request.kind == "mla" else (tokens, request.heads)
    return tuple(torch.randn(*lead, d, device=device, dtype=torch.bfloat16) for d in (request.k_dim, request.v_dim))  # type: ignore[return-value]


def filled(ops: Any, request: AttentionRequest, pages: int) -> KVCache:
    """Random rows in every slot, static scales of 1 / 64."""
    cache = KVCache.allocate(request.kv, pages, ops.device, planes=ops.kv_planes(request.kv, attention=[request])[1])
    for name in cache.static:
        cache.set_static(name, torch.full_like(cache.planes[name], 1 / 64).float())
    slots = pages * request.kv.page
    for start in range(0, slots, 32768):
        here = torch.arange(start, min(start + 32768, slots), device=ops.device)
        k, v = rows(request.kv, here.numel(), ops.device)
        kv.run(k, v, cache, here, ops.device, ops._target)
    return cache


def planned(ops: Any, request: AttentionRequest, batch: int, length: int, queries: int = 1, c: Any = None) -> Any:
    each = -(-length // request.kv.page)
    limits = Limits(batch, batch * queries, each)
    found = arithmetic(request)
    assert found is not None
    made = TritonBatch(
        request, limits, ops.device, ops._target, found, c or config(request, found, limits, ops._target)
    )
    order = torch.randperm(batch * each, generator=torch.Generator().manual_seed(0)).int().reshape(batch, each)
    lens = [torch.full((batch,), n, dtype=torch.int32) for n in (queries, length)]
    made.plan(*lens, order.to(ops.device))
    wide = request.kv.k_dim + request.kv.v_dim * (request.kv.kind == "mla")
    return made, torch.randn(batch * queries, request.heads, wide, device=ops.device, dtype=torch.bfloat16), order


def error(ops: Any, request: AttentionRequest, queries: int) -> float:
    """Of two sequences of 777 keys, all but the last queries of prefill included."""
    made, q, order = planned(ops, request, 2, 777, queries)
    cache = filled(ops, request, order.numel())
    got = attention.run(made, q, cache, None, None, None).float()
    worst = []
    for b in range(2):
        k, v = (read(cache, i, order[b].long().to(ops.device), 777) for i in (0, 1))
        k, v = (torch.cat([k, v], -1), k) if request.kv.kind == "mla" else (k, v)
        share = request.heads // request.kv.heads
        qs = q[b * queries : (b + 1) * queries].float()
        s = torch.einsum("thd,lhd->thl", qs, k.repeat_interleave(share, 1)) * request.scale
        hidden = (
            torch.arange(777, device=ops.device)[None] > torch.arange(777 - queries, 777, device=ops.device)[:, None]
        )
        p = s.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        o = torch.einsum("thl,lhd->thd", p, v.repeat_interleave(share, 1))
        worst.append(float((got[b * queries : (b + 1) * queries] - o).abs().max() / o.abs().max()))
    return max(worst)


def decode(ops: Any, request: AttentionRequest, batch: int, length: int, c: Any = None) -> tuple[float, float]:
    made, q, order = planned(ops, request, batch, length, c=c)
    first = filled(ops, request, order.numel())
    bytes_ = sum(p.numel() * p.element_size() for p in first.planes.values())
    caches = [first, *(filled(ops, request, order.numel()) for _ in range((256 << 20) // bytes_))]
    us = microseconds([partial(attention.run, made, q, cache, None, None, None) for cache in caches])
    return us, bytes_ / us / 1e3


def library(device: torch.device, batch: int, length: int) -> float:
    made = [torch.randn(2, batch, 8, length, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    q = torch.randn(batch, 32, 1, 128, device=device, dtype=torch.bfloat16)
    return microseconds([lambda t=t: scaled_dot_product_attention(q, t[0], t[1], enable_gqa=True) for t in made])


def writes(ops: Any, text: str, tokens: int) -> tuple[float, float]:
    request = request_of(text)
    copies = max((256 << 20) // (tokens * 8 * 128 * 4), 1) if tokens > 256 else 8
    caches = [filled(ops, request, -(-tokens // 16)) for _ in range(copies)]
    given = [rows(request.kv, tokens, ops.device) for _ in range(copies)]
    slots = torch.randperm(tokens, device=ops.device)
    us = microseconds(
        [partial(kv.run, *x, cache, slots, ops.device, ops._target) for x, cache in zip(given, caches, strict=True)]
    )
    moved = sum(t.numel() * 2 for t in given[0]) + tokens * 2 * 8 * 128 * request.kv.k.bits / 8
    return us, moved / us / 1e3


def tune(ops: Any, text: str, mla: bool) -> list[dict[str, Any]]:
    request, found = request_of(text, mla=mla), []
    for batch, length in (LATENT if mla else SHAPES)[1:2]:
        a = arithmetic(request)
        assert a is not None
        limits = Limits(batch, batch, -(-length // request.kv.page))
        for c in candidates(request, a, limits, ops._target):
            try:
                us = decode(ops, request, batch, length, c)[0]
            except Exception as fault:  # a tile that does not fit the chip
                us = float("inf")
                print(f"{c}: {str(fault)[:80]}", file=sys.stderr)
            found.append({"batch": batch, "tile": list(c), "us": us})
    return sorted(found, key=lambda row: float(row["us"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four formats")
    parser.add_argument("--tune", nargs="+", default=[], metavar="FORMAT", help="mla:FORMAT for latent rows")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: no GPU here", file=sys.stderr)
        return 0
    ops: Any = select("auto")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "decode": {},
        "mla": {},
        "quant_kv": {},
        "tune": {},
    }
    for name in arguments.tune:
        text = name.removeprefix("mla:")
        found["tune"][name] = tune(ops, text, text != name)
        print(f"{name} [m, n, together, splits, warps, stages]: "
              + ", ".join(f"{t['tile']} {t['us']:.1f}" for t in found["tune"][name][:6]))  # fmt: skip
    if not arguments.tune:
        print(
            f"{found['device']}; us (GB/s)\n{'decode, 32 / 8 heads of 128':34}"
            + "".join(f"{f'B{b} L{n}':>16}" for b, n in SHAPES)
            + f"{'err':>10}{'prefill err':>13}"
        )
        found["torch"] = [library(ops.device, b, n) for b, n in SHAPES]
        print(f"{'torch, contiguous bf16':34}" + "".join(f"{us:>9.1f}       " for us in found["torch"]))
        for mla, texts, shapes in (
            (False, FORMATS[:4] if arguments.quick else FORMATS, SHAPES),
            (True, LATENTS, LATENT),
        ):
            if mla:
                print(f"{'MLA, 128 heads, 512 + 64':34}" + "".join(f"{f'B{b} L{n}':>16}" for b, n in shapes))
            for text in texts:
                row = [decode(ops, request_of(text, mla=mla), b, n) for b, n in shapes]
                errors = [
                    error(ops, request_of(text, mla=mla), 1),
                    error(ops, request_of(text, mla=mla, phase="prefill"), 70),
                ]
                found["mla" if mla else "decode"][text] = {"us": [us for us, _ in row], "err": errors}
                print(
                    f"{text:34}"
                    + "".join(f"{us:>9.1f} ({rate:>4.0f})" for us, rate in row)
                    + "".join(f"{e:>10.1e}" for e in errors),
                    flush=True,
                )
        print(f"{'quant_kv, 8 heads of 128, T =':34}" + "".join(f"{t:>16}" for t in TOKENS))
        for text in FORMATS[:4] if arguments.quick else FORMATS:
            row = [writes(ops, text, t) for t in TOKENS]
            found["quant_kv"][text] = [us for us, _ in row]
            print(f"{text:34}" + "".join(f"{us:>9.1f} ({rate:>4.0f})" for us, rate in row))
    if out := os.environ.get("OUT"):
        Path(out, "triton_attention.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
