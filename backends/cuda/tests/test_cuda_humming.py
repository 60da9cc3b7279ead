"""humming without a GPU: its layout against its own words, and every call against a double that reads the layout.

The double decodes the words that it is given, checks types and shapes as the library's launcher does, and computes as
its kernels do: code times scale rounded to 16 bits, sums in fp32, one rounding (level L2).
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qhal
from qhal.elements import values
from qhal.formats import Format
from qhal.requests import GemmRequest, HadamardRequest, NumericsClass
from qhal.rotations import Diagonal, kinds
from qhal.tensors import QTensor
from qhal_conformance import datasets
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_cuda import humming
from qhal_cuda.humming import layout
from qhal_cuda.ops import CudaOps

WORDS = {
    2: "07d69703b2643d6d", 3: "bbdf46e16196ca72", 4: "1dc67327f6f3d149", 5: "9c598e668a146919",
    6: "c39d7b659c9acb5b", 7: "772e13041678a6b5", 8: "1af219a627b6ebd9",
}  # fmt: skip
"""SHA-256 of what `weight_repack_nk` of humming 0.1.19 makes of the codes below, its source run on a processor."""
FORMATS = (
    *(f"int{b}.g128*bf16" for b in range(2, 9)), "int4.g32*fp16", "int8.row*bf16", "int8.g64*fp16", "e2m1.g32*e8m0",
    "e2m1.g16*(e4m3fn.tensor*fp32)", "e3m2.g128*bf16", "e2m3.g32*bf16", "e2m1.g32*fp16", "uint2-uint2.g128*bf16",
    "uint4-uint4.g32*bf16", "uint4-uint4.g64*fp16", "uint6-uint6.g128*bf16", "e4m3fn.row*bf16", "e4m3fn.g128*fp16",
    "uint4-uint4.row*bf16",
)  # fmt: skip


@dataclass(kw_only=True)
class LayerConfig:
    """The fields that we give, and no others."""

    sm_version: int
    shape_n: int
    shape_k: int
    a_dtype: str
    b_dtype: str
    c_dtype: str
    bs_dtype: str
    weight_scale_group_size: int
    weight_scale_type: str
    weight_scale_2_type: str | None
    has_zero_point: bool


def forward(
    *,
    config: LayerConfig,
    inputs: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    weight_scale_2: Tensor | None,
    outputs: Tensor,
    compute_config: str,
) -> Tensor:
    """As the kernels read and compute."""
    n, k, group = config.shape_n, config.shape_k, config.weight_scale_group_size
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}[config.a_dtype]
    bits = int("".join(c for c in config.b_dtype.split("e")[0] if c.isdigit()))
    assert config.sm_version == 90 and config.c_dtype == config.a_dtype and config.weight_scale_type == "group"
    assert (
        n % 128 == 0
        and k % 64 == 0
        and k % group == 0
        and group >= 16
        and '"use_batch_invariant": true' in compute_config
    )
    assert inputs.dtype == outputs.dtype == half and inputs.shape == (outputs.shape[0], k) and outputs.shape[1] == n
    assert outputs.is_contiguous() and weight.is_contiguous() and weight_scale.is_contiguous()
    assert weight.dtype == torch.int32 and weight.shape == (k // 16, n * 16 * bits // 32)
    kinds = {config.a_dtype: half, "float8e8m0": torch.float8_e8m0fnu, "float8e4m3": torch.float8_e4m3fn}
    assert weight_scale.dtype == kinds[config.bs_dtype] and weight_scale.shape == (k // group, n)
    assert (weight_scale_2 is None) == (config.weight_scale_2_type is None)
    scale = layout.ungrid(weight_scale.view(torch.uint8) if config.bs_dtype == "float8e8m0" else weight_scale)
    number = torch.exp2(scale.float() - 127) if config.bs_dtype == "float8e8m0" else scale.float()
    codes = layout.unpack(weight, bits).int()
    if config.b_dtype.startswith("float"):
        table = values({"4": "e2m1", "6": config.b_dtype[6:], "8": "e2m1"}[config.b_dtype[5]])
        eight = codes.to(torch.uint8).view(torch.float8_e4m3fn).float() if bits == 8 else None
        assert table is not None
        value = table[codes.long()] if eight is None else eight
    elif config.has_zero_point:
        assert zero_point is not None and zero_point.dtype == torch.int32
        assert zero_point.shape == (k // group, n * (4 if bits <= 4 else 8) // 32)
        value = (codes - layout.unzeros(zero_point, bits).int().repeat_interleave(group, 1)).float()
    elif bits == 8 and half == torch.bfloat16:
        value = torch.where(codes < 128, codes, 127 - codes).float()
    else:
        value = (codes - (1 << (bits - 1))).float()
    decoded = (value.to(half).float() * number.repeat_interleave(group, 1)).to(half).float()
    y = inputs.float() @ decoded.T
    return outputs.copy_(y if weight_scale_2 is None else y * weight_scale_2)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, content in (("humming", {}), ("humming.config", {"LayerConfig": LayerConfig}),
                          ("humming.forward", {"humming_forward": forward})):  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    yield


class Emulated(CudaOps):
    """The same code on the processor, with the double."""

    interface: ClassVar[tuple[int, int]] = (1, 0)

    def synchronize(self) -> None:
        """Nothing runs beside."""

    def _path(self, request: Any) -> None:
        """No shared kernel, so that the library is what is tested."""


OPS = Emulated("sm_90", "cpu", {"humming"})


def request_of(w: str, x: str = "bf16", n: int = 128, k: int = 256, **more: Any) -> GemmRequest:
    return GemmRequest(w=Format.parse(w), n=n, k=k, x=(Format.parse(x),), **more)


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half_of(w: str) -> str:
    return "fp16" if w.endswith("fp16") else "bf16"


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_words_are_the_library_s(bits: int) -> None:
    row, column = torch.arange(128)[:, None], torch.arange(128)[None, :]
    codes = ((row * 31 + column * 17 + row * column) % (1 << bits)).to(torch.uint8)
    assert hashlib.sha256(layout.pack(codes, bits).numpy().tobytes()).hexdigest().startswith(WORDS[bits])


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 8), n=st.integers(1, 4), k=st.integers(1, 9), seed=st.integers(0, 99))
def test_packing_is_undone_bit_for_bit(bits: int, n: int, k: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (64 * n, 16 * k), generator=chance, dtype=torch.uint8)
    assert torch.equal(layout.unpack(layout.pack(codes, bits), bits), codes)
    assert torch.equal(layout.ungrid(layout.grid(codes)), codes)
    assert torch.equal(layout.unzeros(layout.zeros(codes, bits), bits), codes)


def test_packing_goes_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 16, (256, 64), dtype=torch.uint8)
    whole = layout.pack(codes, 4)
    monkeypatch.setattr(layout, "_PART", 1)
    assert torch.equal(layout.pack(codes, 4), whole) and torch.equal(layout.unpack(whole, 4), codes)


@pytest.mark.parametrize("w", FORMATS)
def test_a_weight_is_multiplied_given_back_and_refitted(w: str) -> None:
    request = request_of(w, half_of(w))
    assert OPS.supports(request).layouts == ("humming",)
    old, new = (datasets.weight("humming", name, request.w, 128, 256, "normal") for name in ("old", "new"))
    prepared = OPS.prepare(old, request)
    assert isinstance(prepared, humming.HummingWeight)
    back = OPS.restore(prepared)
    assert isinstance(back, QTensor) and back.equal(old)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(HALVES[half_of(w)])
    exact = x.double() @ old.dequantize().double().T
    assert (OPS.gemm(x, prepared).double() - exact).abs().max() <= 2**-6 * exact.abs().max()
    addresses = {name: t.data_ptr() for name, t in prepared.tensors().items()}
    held = prepared.run
    OPS.prepare(new, request, into=prepared)
    assert addresses == {name: t.data_ptr() for name, t in prepared.tensors().items()}
    again = OPS.restore(prepared)
    assert isinstance(again, QTensor) and again.equal(new)
    assert held is not None and torch.equal(held(x, 0, None), OPS.gemm(x, OPS.prepare(new, request)))


def cases() -> list[Case]:
    """What the suite asks up to level 1, the small products."""
    found = []
    for case in catalogue(1):
        r = OPERATIONS[case.operation].request(case)
        if isinstance(r, GemmRequest) and humming.choose(r, (9, 0)) and case.size("m") * r.n * r.k <= 1 << 20:
            found.append(case)
    return found


CASES = cases()


def test_the_suite_asks_humming() -> None:
    assert len(CASES) >= 10


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_the_arithmetic_is_in_its_class(case: Case) -> None:
    record = run_case(case, OPS)
    assert record.outcome.status is Status.PASS, record.outcome.reason


@pytest.mark.parametrize(
    "refused",
    [
        request_of("int4.g128*bf16", "fp16"),  # the scale is multiplied in the type of x
        request_of("int4.g128*fp32"),
        request_of("int4.g128*bf16", bias=True),
        request_of("int4.g128*bf16", group_index=True),
        request_of("int4.g128*bf16", batch_invariant=True),
        request_of("int4.g128*bf16", out=torch.float32),
        request_of("int4.g128*bf16", n=64),
        request_of("int4.g128*bf16", k=96),
        request_of("int4.g128*bf16", numerics=NumericsClass.FP32_ACC),
        request_of("e5m2.g128*bf16"),
        request_of("uint8-uint8.g128*bf16"),
        request_of("e2m1.g32*e8m0", "fp16"),
        request_of("int8.row*fp32", "int8.row*fp32"),
        request_of("nf4.g64*bf16"),
    ],
    ids=str,
)  # fmt: skip
def test_what_it_would_not_do_exactly_is_not_asked_of_it(refused: GemmRequest) -> None:
    assert humming.choose(refused, (9, 0)) is None
    assert "humming" not in OPS.supports(refused).executes


def test_it_is_asked_only_where_it_was_read_and_is_installed() -> None:
    request = request_of("int4.g128*bf16")
    assert (
        humming.choose(request, (9, 0)) and not humming.choose(request, (8, 0)) and not humming.choose(request, (10, 0))
    )
    assert "humming" not in CudaOps("sm_90", "meta").supports(request).executes


def test_bad_weights_and_inputs_are_one_error() -> None:
    mx = request_of("e2m1.g32*e8m0")
    w = datasets.weight("humming", "nan", mx.w, 128, 256, "normal")
    assert isinstance(w.scale, Tensor)
    scale = w.scale.view(torch.uint8).clone()
    scale[3, 2] = 255
    with pytest.raises(qhal.FormatError, match="1 scales are NaN"):
        OPS.prepare(replace(w, scale=scale), mx)
    eight = request_of("e4m3fn.g128*bf16")
    w = datasets.weight("humming", "nan", eight.w, 128, 256, "normal")
    codes = w.codes.clone()
    codes[5, 7] = float("nan")
    with pytest.raises(qhal.FormatError, match="has NaN codes"):
        OPS.prepare(replace(w, codes=codes), eight)
    request = request_of("int4.g128*bf16")
    w = datasets.weight("humming", "w", request.w, 128, 256, "normal")
    with pytest.raises(qhal.FormatError, match="are no numbers of that type"):
        OPS.prepare(replace(w, scale=torch.full((128, 2), 0.1)), request)
    prepared = OPS.prepare(w, request)
    with pytest.raises(qhal.FormatError, match="x arrives as"):
        OPS.gemm(torch.zeros(1, 256, dtype=torch.float16), prepared)
    other = request_of("int4.g128*bf16", n=256)
    with pytest.raises(qhal.FormatError, match="prepare a new weight"):
        OPS.prepare(datasets.weight("humming", "w", other.w, 256, 256, "normal"), other, into=prepared)
    huge = replace(datasets.weight("humming", "w", Format.parse("int4.g128*fp16"), 128, 256, "limits"),
                   scale=torch.full((128, 2), 6e4, dtype=torch.float16))  # fmt: skip
    with pytest.raises(qhal.FormatError, match="overflows fp16"):
        OPS.prepare(huge, request_of("int4.g128*fp16", "fp16"))


def test_a_scale_held_wider_comes_back_as_it_was() -> None:
    request = request_of("int4.g128*bf16")
    w = datasets.weight("humming", "w", request.w, 128, 256, "normal")
    assert isinstance(w.scale, Tensor)
    wide = replace(w, scale=w.scale.float())
    back = OPS.restore(OPS.prepare(wide, request))
    assert isinstance(back, QTensor) and back.equal(wide) and isinstance(back.scale, Tensor)
    assert back.scale.dtype == torch.float32


def test_many_rows_are_its_where_a_shared_kernel_takes_few() -> None:
    class Shared(Emulated):
        interface: ClassVar[tuple[int, int]] = (1, 0)

        def _path(self, request: Any) -> Any:
            return object()

    ops = Shared("sm_90", "cpu", {"humming"})
    assert ops._humming(request_of("int4.g128*bf16", m=(1, 8192))) is None
    assert ops._humming(request_of("int4.g128*bf16", m=(512, 8192))) is not None


def test_what_is_no_weight_of_its_own_is_refitted_as_before() -> None:
    chain = [Diagonal(torch.full((64,), 2.0))]
    request = HadamardRequest(kinds=kinds(chain), n=64, x=torch.bfloat16)
    turned = OPS.prepare(chain, request)
    assert OPS.prepare([Diagonal(torch.full((64,), 3.0))], request, into=turned) is turned
    wide = request_of("int4.g128*fp32")
    w = datasets.weight("humming", "w", wide.w, 128, 256, "normal")
    other = OPS.prepare(w, wide)
    assert not isinstance(other, humming.HummingWeight) and OPS.prepare(w, wide, into=other) is other
    with pytest.raises(qhal.FormatError, match="prepare a new weight"):
        OPS.prepare(
            datasets.weight("humming", "w", Format.parse("int4.g128*bf16"), 128, 256, "normal"),
            request_of("int4.g128*bf16"),
            into=other,
        )


def test_a_kernel_that_cannot_be_made_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(**given: Any) -> None:
        raise RuntimeError("NVRTC is not there")

    monkeypatch.setattr(sys.modules["humming.forward"], "humming_forward", nothing)
    request = request_of("int4.g128*bf16")
    with pytest.raises(qhal.BackendError, match=r"humming-kernels .* could not make its kernel .*NVRTC is not there"):
        OPS.prepare(datasets.weight("humming", "w", request.w, 128, 256, "normal"), request)
