"""What every test of this backend starts from: the operations, and random tensors of any format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qhal import AttentionBatch, AttentionRequest, Format, KVCache, KVRequest, Limits, QTensor
from qhal.elements import element, values
from qhal_cpu_reference.ops import CpuReference

PAGE = 4
WEIGHTS = (
    "int4.g32*bf16", "int4.g8*fp16", "int8.row*fp32", "int8.tensor*fp32", "int3.row*fp32", "int2.g16*bf16",
    "int5.g8*fp16", "int4-int4.g16*bf16", "uint4-uint4.g16*fp16", "uint4-fp16.g8*fp16", "uint2-uint2.g8*fp16",
    "int8-int8.tensor*fp32", "int8-fp32.row*fp32", "int8.row*(fp32.tensor/fp32)", "e4m3fn.tensor*fp32",
    "e4m3fn.row*bf16", "e5m2.row*fp32", "e4m3fnuz.row*fp32", "e4m3fn.16x16*fp32", "e4m3fn.16x16*e8m0", "e2m1.g32*e8m0",
    "e3m2.g32*e8m0", "e2m3.g32*e8m0", "e4m3fn.g32*e8m0", "e2m1.g16*(e4m3fn.tensor*fp32)",
    "e2m1.g16*(e4m3fn.tensor/fp32)", "e2m1.g8*(e8m0.g2*fp32)", "int4-int4.row*(bf16.tensor*bf16)", "nf4.flat64*fp32",
    "nf4.flat64*(lut8.flat256*fp32+fp32)", "lut4.flat64*fp32", "uint4.g32*fp16+fp16",
    "uint2.g16*(uint4.g16*fp16)-(uint4.g16*fp16)", "uint4.g8*(uint6.g4*fp16)-(uint6.g4*fp16)",
    "int6.g16*(int8.g16*fp16)", "e4m3fn.row*bf16%2:4", "int1.row*fp32", "bf16", "fp16", "fp32", "e4m3fn",
    "int8.col*fp32",
)  # fmt: skip
"""Every kind of weight that the canonical names have, with blocks that fit small matrices."""


def random_codes(name: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Any code of an element except NaN and Inf."""
    e = element(name)
    if e.wide:
        return torch.randn(shape, generator=g).to(e.storage)
    if e.integer:
        return torch.randint(int(e.smallest), int(e.largest) + 1, shape, generator=g).to(e.storage)
    if e.kind == "exponent":
        return torch.randint(120, 134, shape, generator=g).to(torch.uint8)
    if e.kind == "float":
        bits = torch.randint(0, 256, shape, generator=g).to(torch.uint8).view(e.storage)
        return torch.where(torch.isfinite(bits.float()), bits.float(), 0).to(e.storage)
    return torch.randint(0, 1 << e.bits, shape, generator=g).to(torch.uint8)


def random_tensor(fmt: Format | str, shape: tuple[int, ...], seed: int = 0, *, act_order: bool = False) -> QTensor:
    """A QTensor of `fmt` whose every plane is random; scales of wide types are positive and not all alike."""
    f = Format.parse(fmt) if isinstance(fmt, str) else fmt
    g = torch.Generator().manual_seed(seed)
    return _tensor(f, shape, g, act_order)


def _tensor(f: Format, shape: tuple[int, ...], g: torch.Generator, act_order: bool = False) -> QTensor:
    n, k = shape[-2:]
    lead = shape[:-2]
    grid = (1, 1) if f.block is None else f.block.grid(n, k)
    planes: dict[str, Any] = {}
    for part in ("scale", "zero", "offset"):
        inner: Format | None = getattr(f, part)
        if inner is None:
            continue
        plane = _tensor(inner, (*lead, *grid), g)
        if inner.plain:
            codes = plane.codes
            planes[part] = codes.abs() + 0.25 if part == "scale" and element(inner.element).wide else codes
        else:
            planes[part] = plane
    if element(f.element).kind == "lut" and values(f.element) is None:
        planes["table"] = torch.randn(1 << element(f.element).bits, generator=g)
    if act_order:
        planes["group_index"] = torch.randint(0, grid[1], (k,), generator=g).to(torch.int32)
    return QTensor(f, random_codes(f.element, (*lead, n, k), g), **planes)


@pytest.fixture(scope="session")
def ops() -> CpuReference:
    return CpuReference()


@pytest.fixture(scope="session")
def make() -> Callable[..., QTensor]:
    """random_tensor(format, shape, seed, act_order=False)"""
    return random_tensor


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "weight_format" in metafunc.fixturenames:
        metafunc.parametrize("weight_format", WEIGHTS)


def _kv_request(k: str = "fp32", v: str | None = None, *, heads: int = 2, k_dim: int = 8, v_dim: int = 8) -> KVRequest:
    return KVRequest(
        kind="mha", k=Format.parse(k), v=Format.parse(v or k), heads=heads, k_dim=k_dim, v_dim=v_dim, page=PAGE
    )


def _attention_request(kv: KVRequest, **kw: Any) -> AttentionRequest:
    usual: dict[str, Any] = {
        "heads": 4,
        "scale": 0.35,
        "phase": "mixed",
        "q": Format("fp32"),
        "p": Format("fp32"),
        "out": torch.float32,
    }
    return AttentionRequest(kv=kv, **{**usual, **kw})


def _fill(
    ops: CpuReference,
    kv: KVRequest,
    lens: list[int],
    seed: int = 0,
    *,
    poison: bool = True,
    attention: Sequence[AttentionRequest] = (),
) -> tuple[KVCache, Tensor, list[tuple[Tensor, Tensor]]]:
    """A cache with every sequence's rows in shuffled pages; unused slots hold NaN where the format has one.

    Static scales are random (of Q too; p.scale keeps its start), static zero points small whole numbers.
    """
    g = torch.Generator().manual_seed(seed)
    need = [-(-n // PAGE) for n in lens]
    pages = sum(need) + 3
    cache = KVCache.allocate(kv, pages, "cpu", planes=ops.kv_planes(kv, attention=attention)[1])
    for name, t in cache.planes.items():
        if name in cache.static and name.endswith("scale") and not name.startswith("p."):
            cache.set_static(name, torch.rand(t.shape, generator=g) * 0.02 + 0.01)
        elif name in cache.static and name.endswith("zero"):
            cache.set_static(name, torch.randint(-5, 6, t.shape, generator=g).float())
        elif poison and t.dtype.is_floating_point and name not in cache.static:
            t.copy_(torch.full(t.shape, float("nan")).to(t.dtype))
    order = torch.randperm(pages, generator=g)
    table = torch.full((len(lens), max(need, default=0) + 1), 10_000, dtype=torch.int32)  # never read past a length
    at = 0
    for b, count in enumerate(need):
        table[b, :count] = order[at : at + count].int()
        at += count
    rows = []
    mla = kv.kind == "mla"
    for b, n in enumerate(lens):
        k = torch.randn(n, *(() if mla else (kv.heads,)), kv.k_dim, generator=g)
        v = torch.randn(n, *(() if mla else (kv.heads,)), kv.v_dim, generator=g)
        slots = table[b, torch.arange(n) // PAGE] * PAGE + torch.arange(n).int() % PAGE
        ops.quant_kv(k, v, cache, slots)
        rows.append((k, v))
    return cache, table, rows


def _plan(
    ops: CpuReference,
    request: AttentionRequest,
    queries: list[int],
    lens: list[int],
    table: Tensor,
    tree: Tensor | None = None,
) -> AttentionBatch:
    batch = ops.attention_batch(request, Limits(batch=8, tokens=64, pages=16))
    batch.plan(torch.tensor(queries, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32), table, tree=tree)
    return batch


@pytest.fixture(scope="session")
def kv_request() -> Callable[..., KVRequest]:
    """kv_request(k, v=k, heads=2, k_dim=8, v_dim=8): an mha cache in pages of 4."""
    return _kv_request


@pytest.fixture(scope="session")
def attention_request() -> Callable[..., AttentionRequest]:
    """attention_request(kv, **fields): 4 heads, everything in fp32."""
    return _attention_request


@pytest.fixture(scope="session")
def fill() -> Callable[..., tuple[KVCache, Tensor, list[tuple[Tensor, Tensor]]]]:
    """fill(ops, kv, lens) -> cache, page table, (k, v) rows of every sequence."""
    return _fill


@pytest.fixture(scope="session")
def plan() -> Callable[..., AttentionBatch]:
    """plan(ops, request, query lengths, key lengths, page table, tree=None)"""
    return _plan
