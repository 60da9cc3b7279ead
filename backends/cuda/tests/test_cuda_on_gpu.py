"""The libraries themselves, where a GPU of sm_90 and their pinned versions are (level L3); skipped elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qhal.caches import KVCache, Limits
from qhal.formats import Format
from qhal.requests import AttentionRequest, GemmRequest, KVRequest
from qhal.tensors import QTensor
from qhal_conformance import datasets
from qhal_cuda import flashinfer, humming, libraries
from qhal_cuda.humming import choice, launch, weight
from qhal_cuda.ops import CudaOps

USABLE = (
    libraries.usable() if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) else frozenset()
)
FORMATS = (
    "int4.g128*bf16", "int3.g32*bf16", "int8.g128*bf16", "int8.row*bf16", "int8.g64*fp16", "uint4-uint4.g64*bf16",
    "uint6-uint6.g128*bf16", "e2m1.g32*e8m0", "e2m1.g16*(e4m3fn.tensor*fp32)", "e3m2.g128*bf16", "e4m3fn.row*bf16",
)  # fmt: skip


def ops() -> CudaOps:
    return CudaOps("sm_90", "cuda:0", USABLE)


def bits_of(codes: Tensor, bits: int) -> Tensor:
    """int32 [N, K * bits / 32], codes of a row one after the other from the lowest bit."""
    n, k = codes.shape
    single = (codes.to(torch.int64)[..., None] >> torch.arange(bits, device=codes.device)) & 1
    words = single.reshape(n, k * bits // 32, 32) << torch.arange(32, device=codes.device)
    return words.sum(-1).to(torch.int32)


@pytest.mark.skipif("humming" not in USABLE, reason="humming-kernels as pinned and a GPU of sm_90")
@pytest.mark.parametrize("w", FORMATS)
def test_humming_lays_and_multiplies_as_we_read_it(w: str) -> None:
    from humming.transform import transform_humming_tensors

    x = "fp16" if w.endswith("fp16") else "bf16"
    request = GemmRequest(w=Format.parse(w), n=256, k=512, x=(Format(x),), m=(64, 512), graph=True)
    k = choice.kind(request)
    assert k is not None
    plain = datasets.weight("gpu", w, request.w, 256, 512, "normal").to("cuda:0")
    unsigned = weight._unsigned(plain.codes, plain.format, choice.Kind(**{**vars(k), "x": "float16"}))
    groups = 512 // k.group
    inner = plain.scale.codes if isinstance(plain.scale, QTensor) else plain.scale
    assert isinstance(inner, Tensor)
    tensors: dict[str, Any] = {
        "weight": bits_of(unsigned, k.bits),
        "weight_scale": inner.expand(256, groups).contiguous(),
    }
    if k.scale == "float8e8m0":
        tensors["weight_scale"] = inner.view(torch.float8_e8m0fnu)
    if isinstance(plain.zero, Tensor):
        tensors["zero_point"] = bits_of(plain.zero.expand(256, groups).t().contiguous(), k.bits).t().contiguous()
    if isinstance(plain.scale, QTensor):
        assert isinstance(plain.scale.scale, Tensor)
        tensors["weight_scale_2"] = plain.scale.scale.float().reshape(1)
    theirs = transform_humming_tensors(launch.config(request, k), tensors)
    ours = weight._planes(plain, k)
    scale = ours.scale.codes if isinstance(ours.scale, QTensor) else ours.scale
    assert isinstance(scale, Tensor) and torch.equal(theirs["weight"], ours.codes)
    assert torch.equal(theirs["weight_scale"].view(torch.uint8), scale.view(torch.uint8))
    assert ours.zero is None or torch.equal(theirs["zero_point"], ours.zero)  # type: ignore[arg-type]
    device = ops()
    prepared = device.prepare(plain, request)
    assert isinstance(prepared, humming.HummingWeight)
    rows = torch.randn(96, 512, device="cuda:0").to(choice.torch_dtype(k))
    y, again = device.gemm(rows, prepared), device.gemm(rows, prepared)
    decoded = plain.dequantize().to(rows.dtype)
    exact = rows.double() @ decoded.double().T
    size = rows.double().abs() @ decoded.double().abs().T
    unit = 2.0**-9 if x == "bf16" else 2.0**-12
    assert ((y.double() - exact).abs() <= unit * exact.abs() * 1.02 + 2.0**-12 * size).all() and torch.equal(y, again)
    replay = device.capture(lambda: device.gemm(rows, prepared))
    assert torch.equal(replay(), y)


@pytest.mark.skipif("flashinfer" not in USABLE, reason="flashinfer-python as pinned and a GPU of sm_90")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 20.0)])
def test_flashinfer_attends_as_we_read_it(window: int | None, softcap: float | None) -> None:
    f = Format("bf16")
    kv = KVRequest(kind="mha", k=f, v=f, heads=2, k_dim=128, v_dim=128, page=16)
    request = AttentionRequest(
        kv=kv, heads=8, scale=0.09, phase="prefill", q=f, p=f, out=torch.bfloat16, lse=True, window=window,
        softcap=softcap,
    )  # fmt: skip
    device, plain = ops(), CudaOps("sm_90", "cuda:0")
    cache, chance = KVCache.allocate(kv, 64, "cuda:0"), torch.Generator("cuda:0").manual_seed(0)
    for t in cache.planes.values():
        t.copy_(torch.randn(t.shape, generator=chance, device="cuda:0"))
    lens = (torch.tensor([129, 7, 4, 3]), torch.tensor([250, 7, 2, 0]))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).int().reshape(4, 16)
    table = torch.cat([order, torch.full((4, 3), 9999)], 1).int().cuda()  # nothing past a length is read
    for b, length in enumerate(lens[1].tolist()):
        for i, page in enumerate(order[b].tolist()):
            for t in cache.planes.values():
                t[page, max(length - 16 * i, 0) :] = float("nan")
    q = torch.randn(143, 8, 128, generator=chance, device="cuda:0").bfloat16()
    found = []
    for which in (device, plain):
        batch = which.attention_batch(request, Limits(4, 256, 19))
        batch.plan(*lens, table)
        lse = torch.empty(143, 8, device="cuda:0")
        found.append((which.attention(q, cache, batch, lse=lse).float(), lse))
        assert isinstance(batch, flashinfer.FlashBatch) == (which is device)
    (y, lse), (expected, logs) = found
    assert (y - expected).abs().max() <= 2.0**-6 * expected.abs().max()
    seen = torch.isfinite(logs)
    assert torch.equal(seen, torch.isfinite(lse)) and (lse[seen] - logs[seen]).abs().max() <= 1e-3
