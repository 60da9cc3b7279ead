"""quant_kv: every format's planes, bit for bit those of the portable operation, and nothing else of the cache."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from triton_ops import DEVICE, Emulated

from qhal import BatchError, Format, FormatError, KVCache, KVRequest
from qhal_conformance.cases import Case
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_portable import kv as portable

CASES = [case for case in catalogue(0) if case.operation == "quant_kv"]
FORMATS = (
    ("bf16", "fp16"),
    ("fp32", "bf16"),
    ("e4m3fn.tensor*fp32", "e5m2.tensor*fp32"),
    ("e4m3fn.head*fp32", "e4m3fn.col*fp32"),
    ("e4m3fn.row*fp32", "e5m2.row*bf16"),
    ("e4m3fnuz.tensor*fp32", "e4m3fnuz.row*fp32"),
    ("int8.row*fp32", "int8.row*fp32@qmax=127.5"),
    ("int8-int8.tensor*fp32", "uint8-uint8.head*fp32"),
    ("int8.row/fp32", "int8.tensor/fp32"),
    ("int4.row*fp32", "int4.g32*fp16"),
    ("uint4-fp16.row*fp16@domain=minmax", "uint4-uint4.g16*bf16@domain=minmax"),
    ("uint8-uint8.row*fp32@domain=minmax", "int4-int4.head*fp32"),
    ("e4m3fn.g32*e8m0", "int8.g32*e8m0"),
    ("e2m1.g32*e8m0@e8m0=even", "e2m1.g32*e8m0"),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor*fp32)"),
)


OPS = Emulated()


def static(cache: KVCache) -> None:
    """Every static plane gets numbers of its own."""
    g = torch.Generator().manual_seed(len(cache.planes))
    for name in sorted(cache.static):
        plane = cache.planes[name]
        value = torch.rand(plane.shape, generator=g) / 64 + 1 / 128
        if name.endswith(".zero"):
            value = torch.randint(-3, 4, plane.shape, generator=g).abs().float()
        cache.set_static(name, value.to(plane.device))


def caches(request: KVRequest) -> tuple[KVCache, KVCache]:
    made = [KVCache.allocate(request, 5, device) for device in (DEVICE, "cpu")]
    for cache in made:
        static(cache)
    return made[0], made[1]


def rows(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[0] = 0
    x[1] *= 1e4
    x[2] *= 2.0**-20
    return x.to(dtype)


@pytest.mark.parametrize(("k", "v"), FORMATS, ids=[f"{k}~{v}" for k, v in FORMATS])
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_planes_have_the_bits_of_the_definition(kind: str, k: str, v: str) -> None:
    mla = kind == "mla"
    request = KVRequest(
        kind="mla" if mla else "mha", k=Format.parse(k), v=Format.parse(v), heads=1 if mla else 3,
        k_dim=64, v_dim=48, page=8,
    )  # fmt: skip
    path = OPS._path(request)
    assert path is not None and path.kernel == "write"
    ours, theirs = caches(request)
    slots = torch.tensor([3, -1, 39, 8, 0, 17, 21, -1, 30, 31])
    for turn, dtype in enumerate((torch.bfloat16, torch.float32)):
        lead = (slots.numel(),) if mla else (slots.numel(), request.heads)
        x, y = rows((*lead, 64), turn, dtype), rows((*lead, 48), turn + 7, dtype)
        OPS.quant_kv(x.to(DEVICE), y.to(DEVICE), ours, slots.to(DEVICE))
        portable.quant_kv(x, y, theirs, slots)
        for name, plane in theirs.planes.items():
            got, wanted = (t.cpu().contiguous().view(torch.uint8) for t in (ours.planes[name], plane))
            assert torch.equal(got, wanted), (name, dtype)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_cases_of_the_suite(case: Case) -> None:
    record = run_case(case, OPS)
    assert record.outcome.status is Status.PASS, record.outcome.reason


def test_strides_of_a_cache_may_be_any_but_within_a_row() -> None:
    k, v = Format.parse("int8.g32*fp16"), Format.parse("e4m3fn.row*fp32")
    request = KVRequest(kind="mha", k=k, v=v, heads=2, k_dim=64, v_dim=64, page=4)
    ours, theirs = caches(request)
    turned = {n: p if p.dim() < 3 else p.transpose(1, 2).contiguous().transpose(1, 2) for n, p in ours.planes.items()}
    x, y = rows((6, 2, 64), 1, torch.bfloat16), rows((6, 2, 64), 2, torch.bfloat16)
    slots = torch.tensor([5, 2, 19, 7, -1, 0], dtype=torch.int32)
    OPS.quant_kv(x.to(DEVICE), y.to(DEVICE), KVCache(request, turned, "canonical", ours.host), slots.to(DEVICE))
    portable.quant_kv(x, y, theirs, slots)
    for name, plane in theirs.planes.items():
        got, wanted = (t.cpu().contiguous().view(torch.uint8) for t in (turned[name], plane))
        assert torch.equal(got, wanted), name
    bad = dict(ours.planes) | {"k.codes": ours.planes["k.codes"].transpose(2, 3).contiguous().transpose(2, 3)}
    with pytest.raises(FormatError, match=r"k\.codes has stride 2 inside of a row"):
        OPS.quant_kv(x.to(DEVICE), y.to(DEVICE), KVCache(request, bad, "canonical", ours.host), slots.to(DEVICE))


def test_bad_arguments_write_nothing() -> None:
    k, v = Format.parse("int8.row*fp32"), Format.parse("bf16")
    request = KVRequest(kind="mha", k=k, v=v, heads=2, k_dim=16, v_dim=16, page=4)
    ours, _ = caches(request)
    before = {name: plane.clone() for name, plane in ours.planes.items()}
    x = rows((3, 2, 16), 1, torch.bfloat16).to(DEVICE)
    slots = torch.tensor([0, 1, 2])
    with pytest.raises(BatchError, match="slots reach from 0 to 20"):
        OPS.quant_kv(x, x, ours, torch.tensor([0, 1, 20]))
    with pytest.raises(FormatError, match="must be bf16, fp16 or fp32"):
        OPS.quant_kv(x[:, :1], x, ours, slots)
    with pytest.raises(FormatError, match="must be int32 or int64"):
        OPS.quant_kv(x, x, ours, slots.float())
    with pytest.raises(FormatError, match="on meta, must be on"):
        OPS.quant_kv(x.to("meta"), x, ours, slots)
    assert all(torch.equal(before[name], plane) for name, plane in ours.planes.items())
    OPS.quant_kv(x[:0], x[:0], ours, slots[:0])


def test_formats_without_a_kernel_stay_portable() -> None:
    for text in ("nf4.g32*fp16", "int8.g48*fp16", "uint8.row*fp32+fp32@domain=minmax", "bf16.tensor*fp32"):
        f = Format.parse(text)
        request = KVRequest(kind="mha", k=f, v=f, heads=2, k_dim=96, v_dim=96, page=4)
        assert OPS._path(request) is None, text
        answer = OPS.supports(request)
        assert not answer or answer.executes == "qhal.encoding.encode"


def test_a_plane_that_becomes_another_tensor_is_met_anew() -> None:
    f = Format.parse("int8.row*fp32")
    request = KVRequest(kind="mha", k=f, v=f, heads=2, k_dim=16, v_dim=16, page=4)
    cache = KVCache.allocate(request, 3, DEVICE)
    k, v = (rows((4, 2, 16), seed, torch.bfloat16).to(DEVICE) for seed in (0, 1))
    slots = torch.arange(4, device=DEVICE)
    for _ in range(2):
        OPS.quant_kv(k, v, cache, slots)
    old, wanted = cache.planes["k.codes"], cache.planes["k.codes"].clone()
    old.zero_()
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        OPS.quant_kv(k, v, twin, slots)
        assert torch.equal(twin.planes["k.codes"], wanted) and not old.any()
    cache.planes["k.codes"] = torch.zeros(3, 4, 2, 32, dtype=torch.int8, device=DEVICE)[..., :16]
    OPS.quant_kv(k, v, cache, slots)
    assert torch.equal(cache.planes["k.codes"], wanted) and not old.any()
    cache.planes["k.codes"] = old[:, :2]
    with pytest.raises(FormatError, match=r"the cache's k\.codes must be"):
        OPS.quant_kv(k, v, cache, slots)
