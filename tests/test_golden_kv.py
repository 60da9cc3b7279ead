"""Caches of golden checkpoints: their scales in a KVCache, the tool's own rows through quant_kv and back, bit for bit.

Three tools give rows before and after; the scales of the others are checked against the tool's arithmetic written out.
With QHAL_GOLDEN every case must be there; without, the two that come with the tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qhal import AttentionRequest, Format, KVCache, KVSpec, Limits, Operand, QTensor, select
from qhal.elements import element
from qhal.layers import attention_request, kv_request, set_static

OURS = Path(__file__).parent / "golden"
FULL = "QHAL_GOLDEN" in os.environ
PAGE, LAYER = 4, "model.layers.0.self_attn"
full_only = pytest.mark.skipif(not FULL, reason="only in the full set of golden checkpoints: set QHAL_GOLDEN")


@pytest.fixture(scope="module")
def ops():
    return select("cpu_reference")


def tensors(golden: Path, case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(stored, expected) tensors of a case; a missing case is an error, not a skip."""
    stored: dict[str, Tensor] = {}
    for file in sorted((golden / case / "checkpoint").glob("*.safetensors")):
        stored |= load_file(file)
    return stored, load_file(golden / case / "expected.safetensors")


def rows(x: Tensor) -> Tensor:
    """[1, heads, tokens, dim] as the tools keep it -> [tokens, heads, dim]."""
    return x[0].transpose(0, 1).contiguous()


def through(ops, spec: KVSpec, k: Tensor, v: Tensor) -> tuple[KVCache, list[Tensor]]:
    """Write rows to scattered slots of a cache with the spec's statics; the cache, and both rows as they decode."""
    kv = kv_request(spec.format, page=PAGE)
    cache = KVCache.allocate(kv, 5, ops.device, planes=ops.kv_planes(kv)[1])
    set_static(cache, spec)
    slots = torch.randperm(5 * PAGE, generator=torch.Generator().manual_seed(1))[: k.shape[0]]
    ops.quant_kv(k, v, cache, slots)
    back = ops.restore(cache)
    return cache, [decoded(back, name, f)[slots] for name, f in (("k", kv.k), ("v", kv.v))]


def decoded(cache: KVCache, name: str, f: Format) -> Tensor:
    """float32 [L * S, G, D]: what the planes of a cache mean, by QTensor alone."""
    codes = cache.planes[f"{name}.codes"].flatten(0, 1)
    tokens, heads = codes.shape[:2]
    if element(f.element).bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    dim = codes.shape[-1]
    kind = f.block.kind if f.block is not None else ""
    if kind == "group":
        inner = cache.planes[f"{name}.scale.codes"].reshape(tokens, heads, -1)
        scale = QTensor(f.scale, inner, cache.planes[f"{name}.scale.scale"].reshape(1, 1, 1))
        return QTensor(f, codes, scale).dequantize()
    shape = {"tensor": (1, 1, 1), "head": (1, heads, 1), "col": (1, 1, heads * dim)}[kind]
    zero = None if f.zero is None else cache.planes[f"{name}.zero"].reshape(shape)
    seen = codes.reshape(tokens, 1, heads * dim) if kind == "col" else codes
    q = QTensor(f, seen, cache.planes[f"{name}.scale"].reshape(shape), zero)
    return q.dequantize().reshape(tokens, heads, dim)


def test_compressed_tensors_fp8(ops, golden: Path) -> None:
    """The tool divides and multiplies in bf16 (arith=bf16); its cache scale is a bf16 number."""
    stored, expected = tensors(golden, "compressed_tensors/fp8_tensor_kv_fp8")
    f = Format.parse("e4m3fn.tensor*bf16@arith=bf16")
    k, v = (Operand(f, stored[f"{LAYER}.{p}_scale"]) for p in "kv")
    x = [rows(expected[f"{LAYER}.{p}_scale.input"]) for p in "kv"]
    spec = KVSpec(k, v, heads=x[0].shape[1], k_dim=64, v_dim=64)
    for dtype in (torch.bfloat16, torch.float32):
        cache, back = through(ops, spec, *(r.to(dtype) for r in x))
        for p, value in zip("kv", back, strict=True):
            assert torch.equal(cache.planes[f"{p}.scale"], stored[f"{LAYER}.{p}_scale"])
            assert torch.equal(value.bfloat16().float(), rows(expected[f"{LAYER}.{p}_scale.output"])), p


def test_modelslim_c8(ops, golden: Path) -> None:
    """int8 per channel with offsets: round(x / s + o), (q - o) * s, in fp32."""
    stored, expected = tensors(golden, "modelslim/w8a8_c8_kv")
    f = Format.parse("int8-fp32.col*fp32")
    operands = [
        Operand(f, stored[f"{LAYER}.{p}.kv_cache_scale"], stored[f"{LAYER}.{p}.kv_cache_offset"])
        for p in ("k_proj", "v_proj")
    ]
    assert operands[0].zero is not None and bool(operands[0].zero.ne(0).any())
    x = [rows(expected[f"{LAYER}.{p}_states.input"]) for p in ("key", "value")]
    spec = KVSpec(*operands, heads=2, k_dim=32, v_dim=32)
    cache, back = through(ops, spec, *x)
    assert torch.equal(cache.planes["k.zero"].flatten(), stored[f"{LAYER}.k_proj.kv_cache_offset"])
    for p, value in zip(("key", "value"), back, strict=True):
        assert torch.equal(value, rows(expected[f"{LAYER}.{p}_states.output"])), p


@full_only
def test_modelslim_fa_quant(ops, golden: Path) -> None:
    """int8 per head on all three sides: attention on the tool's inputs is attention on its outputs, bit for bit."""
    stored, expected = tensors(golden, "modelslim/w8a8_fa_quant")
    f = Format.parse("int8-int8.head*fp32")
    q, k, v = (Operand(f, stored[f"{LAYER}.fa_{p}.scale"], stored[f"{LAYER}.fa_{p}.offset"].float()) for p in "qkv")
    before, after = ([rows(expected[f"{LAYER}.fa_{p}.{side}"]) for p in "qkv"] for side in ("input", "output"))
    spec = KVSpec(k, v, q=q, heads=1, k_dim=32, v_dim=32)
    _, back = through(ops, KVSpec(k, v, heads=1, k_dim=32, v_dim=32), *before[1:])
    assert torch.equal(back[0], after[1]) and torch.equal(back[1], after[2])
    asked = attention_request(spec.format, torch.float32, page=PAGE, heads=4, scale=32**-0.5, phase="prefill")
    assert asked.q == f and ops.supports(asked)
    plain = KVSpec(Operand(Format("fp32")), Operand(Format("fp32")), heads=1, k_dim=32, v_dim=32)
    reader = attention_request(plain.format, torch.float32, page=PAGE, heads=4, scale=32**-0.5, phase="prefill")
    assert torch.equal(attended(ops, asked, spec, *before), attended(ops, reader, plain, *after))


def attended(ops, request: AttentionRequest, spec: KVSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cache = KVCache.allocate(request.kv, 1, ops.device, planes=ops.kv_planes(request.kv, attention=[request])[1])
    set_static(cache, spec)
    tokens = q.shape[0]
    ops.quant_kv(k, v, cache, torch.arange(tokens))
    batch = ops.attention_batch(request, Limits(1, tokens, 1))
    lens = torch.tensor([tokens], dtype=torch.int32)
    batch.plan(lens, lens, torch.zeros(1, 1, dtype=torch.int32))
    result: Tensor = ops.attention(q, cache, batch)
    return result


def fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x / s to the nearest e4m3 code within +-448, times s, in fp32."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """Blocks of 16: amax / 6 over the global scale as e4m3, elements to the nearest of the eight magnitudes."""
    blocks = x.reshape(-1, 16)
    inner = (blocks.abs().amax(-1, keepdim=True) / 6 / scale).to(torch.float8_e4m3fn).float() * scale
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    y = blocks / inner
    distance = (y.abs().clamp(max=6)[..., None] - grid).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    even = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0]).bool()  # a tie goes to the even mantissa
    index = torch.where(nearest.sum(-1) > 1, (nearest & even).int().argmax(-1), nearest.int().argmax(-1))
    return (torch.copysign(grid[index], y) * inner).reshape(x.shape)


@full_only
@pytest.mark.parametrize(
    ("case", "key", "name", "expected"),
    [
        ("modelopt/fp8_kv_fp8", "{p}_proj.{p}_scale", "e4m3fn.tensor*fp32", fp8),
        ("modelopt/nvfp4_kv_nvfp4", "{p}_proj.{p}_scale", "e2m1.g16*(e4m3fn.tensor*fp32)", nvfp4),
        ("quark/fp8_tensor_static_kv", "{p}_proj.output_scale", "e4m3fn.tensor*fp32", fp8),
    ],
)
def test_stored_scales_are_used_as_they_are(
    ops, golden: Path, case: str, key: str, name: str, expected: Callable[[Tensor, Tensor], Tensor]
) -> None:
    stored, _ = tensors(golden, case)
    f = Format.parse(name)
    scales = [stored[f"{LAYER}.{key.format(p=p)}"].float() for p in "kv"]
    spec = KVSpec(*(Operand(f, s) for s in scales), heads=2, k_dim=64, v_dim=64)
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(9, 2, 64, generator=g) * s * 200 for s in scales]
    _, back = through(ops, spec, *x)
    for value, row, scale in zip(back, x, scales, strict=True):
        assert torch.equal(value + 0.0, expected(row, scale) + 0.0)
        assert not torch.equal(value, row)


def test_every_case_of_the_full_set_is_present(golden: Path) -> None:
    cases = ["compressed_tensors/fp8_tensor_kv_fp8", "modelslim/w8a8_c8_kv"]
    if FULL:
        cases += [
            "modelslim/w8a8_fa_quant",
            "modelopt/fp8_kv_fp8",
            "modelopt/nvfp4_kv_nvfp4",
            "quark/fp8_tensor_static_kv",
        ]
    assert [c for c in cases if not (golden / c / "expected.safetensors").is_file()] == []
