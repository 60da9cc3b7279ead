"""The class-definition check: a backend that does not fit the interface fails when its class is defined."""

from __future__ import annotations

import pytest
import torch

import qhal
from qhal.caches import canonical_planes
from qhal.interface import QuantOps


class Minimal(QuantOps):
    name, interface = "minimal", (1, 0)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def supports(self, request: qhal.Request) -> qhal.Support:
        return qhal.Support("unsupported", "nothing")


def test_an_unknown_public_name_is_one_readable_error() -> None:
    with pytest.raises(qhal.InterfaceError, match="did you mean 'gemm'"):

        class Typo(Minimal):
            def gem(self, x: torch.Tensor) -> torch.Tensor:
                return x


def test_helpers_start_with_an_underscore() -> None:
    class Fine(Minimal):
        def _helper(self) -> int:
            return 1

    with pytest.raises(qhal.InterfaceError, match="underscore"):

        class Leaky(Minimal):
            def zzz_compile_everything(self) -> None: ...


def test_every_fault_is_listed_at_once() -> None:
    with pytest.raises(TypeError) as error:

        class Wrong(Minimal):
            def gemm(self, x, w):  # type: ignore[no-untyped-def,override]
                return x

            def hadamard(self, x, rotation, *, quantize=True, for_=None, out=None):  # type: ignore[no-untyped-def]
                return x

            device = "cpu"  # type: ignore[assignment]

    text = str(error.value)
    assert "gemm: has the parameters (self, x, w), must have (self, x, w, *, input, out)" in text
    assert "parameter 'quantize' has the default True, must have None" in text


def test_operations_without_a_body_refuse() -> None:
    ops = Minimal()
    with pytest.raises(qhal.UnsupportedError) as error:
        ops.attention(torch.zeros(1), None, None)  # type: ignore[arg-type]
    assert error.value.support.level == "not_implemented"
    assert "minimal has no attention" in str(error.value)
    with pytest.raises(qhal.UnsupportedError, match="no graph capture"):
        ops.capture(lambda: None)


def test_the_default_planes_are_the_canonical_ones() -> None:
    request = qhal.KVRequest(
        kind="mha",
        k=qhal.Format.parse("int8.row*fp32"),
        v=qhal.Format.parse("fp8"),
        heads=2,
        k_dim=64,
        v_dim=32,
        page=16,
    )
    planes = canonical_planes(request)
    shapes = {p.name: (p.dtype, p.shaped(5), p.paged) for p in planes}
    assert shapes == {
        "k.codes": (torch.int8, (5, 16, 2, 64), True),
        "k.scale": (torch.float32, (5, 16, 2), True),
        "v.codes": (torch.float8_e4m3fn, (5, 16, 2, 32), True),
        "v.scale": (torch.float32, (1,), False),
    }
    assert planes[0].stride() == (2048, 128, 64, 1)
    assert planes[0].nbytes(5) == 5 * 2048


@pytest.mark.parametrize(
    ("name", "planes"),
    [
        (
            "e2m1.g16*(e4m3fn.tensor*fp32)",
            {"k.codes": (3, 8, 2, 32), "k.scale.codes": (3, 8, 2, 4), "k.scale.scale": (1,)},
        ),
        ("int8-fp32.col*fp32", {"k.codes": (3, 8, 2, 64), "k.scale": (2, 64), "k.zero": (2, 64)}),
        ("int8-int8.head*fp32", {"k.codes": (3, 8, 2, 64), "k.scale": (2,), "k.zero": (2,)}),
        ("uint4-fp16.row*fp16", {"k.codes": (3, 8, 2, 32), "k.scale": (3, 8, 2), "k.zero": (3, 8, 2)}),
        ("bf16", {"k.codes": (3, 8, 2, 64)}),
    ],
)
def test_every_plane_of_a_cache_is_listed(name: str, planes: dict[str, tuple[int, ...]]) -> None:
    f = qhal.Format.parse(name)
    request = qhal.KVRequest(kind="mha", k=f, v=qhal.Format.parse("bf16"), heads=2, k_dim=64, v_dim=64, page=8)
    cache = qhal.KVCache.allocate(request, 3, "cpu")
    assert {n: tuple(t.shape) for n, t in cache.planes.items() if n.startswith("k.")} == planes
    assert cache.pages == 3


def test_a_cache_format_whose_blocks_span_tokens_is_refused() -> None:
    request = qhal.KVRequest(
        kind="mha", k=qhal.Format.parse("e4m3fn.128x128*fp32"), v=qhal.Format.parse("bf16"),
        heads=1, k_dim=8, v_dim=8, page=8,
    )  # fmt: skip
    with pytest.raises(qhal.FormatError, match="span tokens"):
        canonical_planes(request)


def test_planes_of_a_cache_that_is_refused_are_refused() -> None:
    row = qhal.Format.parse("int8.row*fp32")
    request = qhal.KVRequest(kind="mha", k=row, v=row, heads=1, k_dim=8, v_dim=8, page=8)
    with pytest.raises(qhal.UnsupportedError, match="nothing"):
        Minimal().kv_planes(request)


def test_a_latent_cache_has_no_head_axis() -> None:
    f = qhal.Format.parse("e4m3fn.tensor*fp32")
    request = qhal.KVRequest(kind="mla", k=f, v=qhal.Format.parse("bf16"), heads=1, k_dim=512, v_dim=64, page=64)
    shapes = {p.name: p.shaped(2) for p in canonical_planes(request)}
    assert shapes == {"latent.codes": (2, 64, 512), "latent.scale": (1,), "rope.codes": (2, 64, 64)}


def test_static_scales_have_a_host_copy() -> None:
    f = qhal.Format.parse("e4m3fn.tensor*fp32")
    request = qhal.KVRequest(kind="mha", k=f, v=f, heads=1, k_dim=8, v_dim=8, page=8)
    cache = qhal.KVCache.allocate(request, 1, "cpu")
    assert cache.host["k.scale"] == 1.0
    cache.set_static("k.scale", torch.tensor(0.25))
    assert cache.host["k.scale"] == 0.25
    assert cache.planes["k.scale"].item() == 0.25
    with pytest.raises(qhal.FormatError, match=r"no static plane 'q\.scale'"):
        cache.set_static("q.scale", torch.tensor(1.0))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({"name": 5}, "name: is 5"),
        ({"name": ""}, "name: is ''"),
        ({"interface": "1.0"}, "interface: is '1.0'"),
        ({"fusions": ["linear"]}, "fusions: is"),
        ({"fusions": frozenset({"banana"})}, "banana"),
        ({"linear": lambda self, x, layer, *, decode=False, out=None: x}, "must be declared"),
        ({"_refusal": lambda self, operation: None}, "must not be replaced"),
        ({"gemm": staticmethod(lambda x: x)}, "must be a method"),
        ({"device": "cpu"}, "device: must be a property"),
    ],
)
def test_values_and_bodies_that_others_rely_on_are_checked(body: dict[str, object], fault: str) -> None:
    with pytest.raises(qhal.InterfaceError, match=fault):
        type("Odd", (Minimal,), body)


def test_a_coroutine_is_no_operation() -> None:
    with pytest.raises(qhal.InterfaceError, match="plain method"):

        class Waits(Minimal):
            async def gemm(self, x, w, *, input=0, out=None):  # type: ignore[no-untyped-def,override]
                return x


def test_a_mixin_is_checked_too() -> None:
    class Mixin:
        def gemm(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(qhal.InterfaceError, match="gemm: has the parameters"):

        class Mixed(Mixin, Minimal):  # type: ignore[misc]
            name = "mixed"


def test_a_declared_fusion_is_accepted() -> None:
    class Fused(Minimal):
        name = "fused"
        fusions = frozenset({"linear"})

        def linear(self, x, layer, *, decode=False, out=None):  # type: ignore[no-untyped-def]
            return x

    assert Fused().fusions == {"linear"}


def cache_of(k: str, pages: int = 1) -> qhal.KVCache:
    request = qhal.KVRequest(
        kind="mha", k=qhal.Format.parse(k), v=qhal.Format.parse("bf16"), heads=1, k_dim=8, v_dim=8, page=8
    )
    return qhal.KVCache.allocate(request, pages, "cpu")


def test_static_planes_hold_codes_of_numbers() -> None:
    cache = cache_of("e4m3fn.tensor*e8m0")
    assert (cache.planes["k.scale"].item(), cache.host["k.scale"]) == (127, 1.0)
    cache.set_static("k.scale", torch.tensor(0.25))
    assert (cache.planes["k.scale"].item(), cache.host["k.scale"]) == (125, 0.25)
    with pytest.raises(qhal.FormatError, match="powers of two"):
        cache.set_static("k.scale", torch.tensor(0.3))
    shifted = cache_of("uint8.tensor*fp32+fp32")
    assert (shifted.planes["k.offset"].item(), shifted.host["k.offset"]) == (0.0, 0.0)
    shifted.set_static("k.offset", torch.tensor([0.0]))
    two = cache_of("e2m1.g4*(e4m3fn.tensor*e8m0)")
    assert two.planes["k.scale.scale"].item() == 127


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30])
def test_static_scales_are_finite_and_not_zero(value: float) -> None:
    cache = cache_of("e4m3fn.tensor*fp16")
    with pytest.raises(qhal.FormatError, match="must be finite and not 0"):
        cache.set_static("k.scale", torch.tensor(value))
    assert cache.planes["k.scale"].item() == 1.0


def test_paged_planes_are_not_static() -> None:
    cache = cache_of("int8.row*fp32")
    for name in ("k.codes", "k.scale"):
        with pytest.raises(qhal.FormatError, match="its pages are written by quant_kv"):
            cache.set_static(name, torch.ones(cache.planes[name].shape))


@pytest.mark.parametrize("pages", [0, -1, 1.5, True])
def test_a_cache_has_pages(pages: int) -> None:
    with pytest.raises(qhal.FormatError, match="at least 1 page"):
        cache_of("bf16", pages)


def test_groups_check_their_tensors() -> None:
    floats = torch.zeros(4, 2)
    for make in (
        lambda: qhal.Offsets([0, 1]),  # type: ignore[arg-type]
        lambda: qhal.Offsets(torch.zeros(3)),
        lambda: qhal.Masked(torch.zeros(3)),
        lambda: qhal.Indexed(floats),
        lambda: qhal.Indexed(torch.zeros(4, dtype=torch.int32)),
        lambda: qhal.Indexed(floats.int(), torch.zeros(4, 3)),
    ):
        with pytest.raises(qhal.BatchError, match=r"must be (int32|float32)"):
            make()
    assert qhal.Indexed(floats.int(), floats).ids.shape == (4, 2)
