"""Codes and scales chosen from data: every rule against exact rationals, and against what the tools wrote."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qhal import Format, FormatError, QTensor
from qhal.elements import decode, element
from qhal.encoding import encode
from qhal.tensors import same_bits

GOLDEN = Path(os.environ.get("QHAL_GOLDEN", Path(__file__).parent / "golden"))
# significand bits with the hidden one, and the exponent of the smallest normal number
SHAPES = {
    "fp32": (24, -126), "bf16": (8, -126), "fp16": (11, -14), "e4m3fn": (4, -6), "e4m3fnuz": (4, -7), "e5m2": (3, -14),
    "e5m2fnuz": (3, -15), "e3m2": (3, -2), "e2m3": (4, 0), "e2m1": (2, 0),
}  # fmt: skip


# ---------------------------------------------------------------- rules: exact rationals


def binary_exponent(x: Fraction) -> int:
    """floor(log2(x)) of a positive rational, exactly."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


def round_even(x: Fraction) -> int:
    return round(x)  # Python's round of a Fraction is half to even


def round_away(x: Fraction) -> int:
    whole = int(abs(x) + Fraction(1, 2))
    return whole if x >= 0 else -whole


def nearest(x: Fraction, name: str, how: Callable[[Fraction], int] = round_even, saturate: bool = True) -> Fraction:
    """The number of type `name` next to x; no overflow is expected of wide types."""
    e = element(name)
    if e.integer:
        return Fraction(min(max(how(x), int(e.smallest)), int(e.largest)))
    if x == 0:
        return x
    digits, lowest = SHAPES[name]
    step = Fraction(2) ** (max(binary_exponent(abs(x)), lowest) - (digits - 1))
    rounded = how(x / step) * step
    return min(max(rounded, Fraction(e.smallest)), Fraction(e.largest)) if saturate else rounded


def exact_exponent(peak: Fraction, f: Format) -> int:
    """The power of two that a block of this peak gets, before it is clamped to 2^-127 .. 2^127."""
    top = binary_exponent(Fraction(element(f.element).largest))
    power = binary_exponent(peak)
    mantissa = peak / Fraction(2) ** power
    if f.rule.e8m0 == "floor":
        return power - top
    if f.rule.e8m0 == "ceil":
        ratio = peak / Fraction(f.qmax)
        low = binary_exponent(ratio)
        return low if ratio == Fraction(2) ** low else low + 1
    if f.rule.e8m0 == "up1.75":
        return power + (mantissa >= Fraction(7, 4)) - top
    if f.rule.e8m0 == "even":
        digits = SHAPES[f.element][0] - 1
        return power + (round_away(mantissa * 2**digits) >= 2 ** (digits + 1)) - top
    return binary_exponent(peak * Fraction(8, 7) + Fraction(9.6e-7)) - top


def exact_blocks(x: list[float], f: Format) -> tuple[Fraction, list[Fraction]]:
    """Scale and code values of one block of a single-level symmetric format, from its docstring in rationals."""
    assert f.scale is not None
    arith = "bf16" if f.rule.arith == "bf16" else "fp32"
    how = round_even if f.rule.round == "even" else round_away
    numbers = [nearest(Fraction(v), arith) for v in x]
    largest, smallest = max(*numbers, Fraction(0)), min(*numbers, Fraction(0))
    if f.rule.domain == "signed":
        peak = largest if largest > -smallest else smallest
        divisor = Fraction(element(f.element).smallest)
    else:
        peak, divisor = max(largest, -smallest), Fraction(f.qmax)
    if f.scale.element == "e8m0":
        scale = Fraction(2) ** min(max(exact_exponent(peak, f), -127), 127) if peak else Fraction(1)
    elif peak == 0:
        scale = {"one": Fraction(1), "zero": Fraction(0), "eps": Fraction(2) ** -23}[f.rule.empty]
        scale = nearest(scale, f.scale.element)
    else:
        inverse = nearest(1 / nearest(divisor, "fp32"), "fp32")
        raw = peak / nearest(divisor, "fp32") if f.rule.scale == "div" else peak * inverse
        scale = nearest(nearest(nearest(raw, "fp32"), arith), f.scale.element)
    if scale == 0:
        return scale, [Fraction(0)] * len(x)
    if f.rule.apply == "div":
        quotients = [nearest(nearest(v / scale, "fp32"), arith) for v in numbers]
    else:
        quotients = [nearest(nearest(v * nearest(1 / scale, "fp32"), "fp32"), arith) for v in numbers]
    return scale, [nearest(q, f.element, how) for q in quotients]


SINGLE_LEVEL = [
    "int4.g8*bf16", "int4.g8*bf16@qmax=7.5", "int8.g8*fp32", "int8.g8*fp32@scale=rcp", "int8.g8*fp32@apply=rcp",
    "int8.g8*fp32@scale=rcp,apply=rcp,round=away", "int8.g8*bf16@qmax=127.5,arith=bf16", "int3.g8*fp16",
    "int4.g8*fp16@domain=signed", "int8.g8*fp16@empty=zero", "int8.g8*fp32@empty=eps", "int2.g8*fp16",
    "e4m3fn.g8*fp32", "e4m3fn.g8*bf16@arith=bf16", "e4m3fnuz.g8*fp32@qmax=224", "e4m3fnuz.g8*fp32", "e5m2.g8*fp32",
    "e4m3fn.g8*fp32@round=away", "e4m3fn.g8*fp32@scale=rcp", "e2m1.g8*e8m0", "e2m1.g8*e8m0@e8m0=ceil",
    "e2m1.g8*e8m0@e8m0=even", "e2m1.g8*e8m0@e8m0=over1.75,round=away", "e4m3fn.g8*e8m0", "e4m3fn.g8*e8m0@e8m0=up1.75",
    "e4m3fn.g8*e8m0@e8m0=ceil", "e4m3fn.g8*e8m0@e8m0=even", "e3m2.g8*e8m0@e8m0=even", "e2m3.g8*e8m0",
    "e3m2.g8*e8m0@e8m0=ceil", "int8.g8*e8m0", "e2m1.g8*e4m3fn",
]  # fmt: skip
NUMBERS = st.one_of(
    st.floats(-512, 512, width=32),
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 1.75, 3.5, 1.7421875, 447.99, 448.0, 6.0, 7.0, 127.5, 1e-30, -(2.0**-126)]),
    st.integers(-1016, 1016).map(lambda i: i / 8),
)


@pytest.mark.parametrize("name", SINGLE_LEVEL)
def test_rules_against_exact_rationals(name: str) -> None:
    f = Format.parse(name)

    @settings(max_examples=30, derandomize=True, deadline=None)
    @given(st.lists(st.lists(NUMBERS, min_size=8, max_size=8), min_size=1, max_size=4))
    def check(rows: list[list[float]]) -> None:
        q = encode(torch.tensor(rows, dtype=torch.float32), f)
        assert f.scale is not None
        assert isinstance(q.scale, torch.Tensor)
        scales, codes = decode(f.scale.element, q.scale), decode(f.element, q.codes)
        for i, row in enumerate(rows):
            scale, code = exact_blocks(row, f)
            assert Fraction(scales[i, 0].item()) == scale
            assert [Fraction(c) for c in codes[i].tolist()] == code

    check()


@pytest.mark.parametrize("block", ["*", "/"])
def test_two_levels_against_exact_rationals(block: str) -> None:
    f = Format.parse(f"e2m1.g16*(e4m3fn.tensor{block}fp32)")
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-4, 3, 6)[:, None]
    x[2, :16] = 0
    x = x.bfloat16().float()
    q = encode(x, f)
    assert isinstance(q.scale, QTensor)
    assert isinstance(q.scale.scale, torch.Tensor)
    peak = Fraction(x.abs().max().item())
    outer = nearest(Fraction(2688) / peak if block == "/" else peak / 2688, "fp32")
    assert Fraction(q.scale.scale.item()) == outer
    inner, codes = q.scale.codes.float(), decode("e2m1", q.codes)
    for row in range(6):
        for g in range(4):
            run = [Fraction(v) for v in x[row, 16 * g : 16 * g + 16].tolist()]
            wanted = nearest(max(map(abs, run)) / 6, "fp32")
            units = nearest(wanted / outer if block == "*" else wanted * outer, "fp32")
            level = nearest(units, "e4m3fn")
            assert Fraction(inner[row, g].item()) == level
            scale = nearest(level * outer if block == "*" else level / outer, "fp32")
            expected = [nearest(nearest(v / scale, "fp32"), "e2m1") if scale else Fraction(0) for v in run]
            assert [Fraction(v) for v in codes[row, 16 * g : 16 * g + 16].tolist()] == expected
    assert bool((inner[2, 0] == 0) & (q.dequantize()[2, :16] == 0).all())


@pytest.mark.parametrize("zero", ["int4", "uint4", "fp32"])
def test_minmax_against_exact_rationals(zero: str) -> None:
    kind = "uint4" if zero == "uint4" else "int4"
    f = Format.parse(f"{kind}-{zero}.g8*fp32@domain=minmax")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(32, 8, generator=generator) + torch.linspace(-3, 3, 32)[:, None]
    x[0], x[1] = 0, x[1].abs()
    q = encode(x, f)
    assert isinstance(q.scale, torch.Tensor)
    assert isinstance(q.zero, torch.Tensor)
    smallest = int(element(kind).smallest)
    for i in range(32):
        run = [Fraction(v) for v in x[i].tolist()]
        low, high = min(*run, Fraction(0)), max(*run, Fraction(0))
        span = nearest(high - low, "fp32")
        scale = nearest(span / 15, "fp32") if span else Fraction(1)
        assert Fraction(q.scale[i, 0].item()) == scale
        ideal = nearest(smallest - nearest(low / scale, "fp32"), "fp32")
        z = nearest(ideal, zero)
        assert Fraction(float(q.zero[i, 0])) == z
        expected = [nearest(nearest(nearest(v / scale, "fp32") + z, "fp32"), kind) for v in run]
        assert [Fraction(v) for v in q.codes[i].float().tolist()] == expected
    assert bool((q.dequantize()[0] == 0).all())


def test_offset_formats_reach_both_ends() -> None:
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) * 3 + 5
    for name in ("q4_1", "q5_1", "q4_k"):
        f = Format.parse(f"{Format.parse(name)}@domain=minmax")
        q = encode(x[:, :32].repeat(1, 8), f)
        step = q.dequantize().diff().abs()
        assert float((q.dequantize() - x[:, :32].repeat(1, 8)).abs().max()) < 3 * 8 / (1 << element(f.element).bits)
        assert step.max() > 0
    with pytest.raises(FormatError, match="an offset is computed with domain=minmax or mean; amax has none"):
        encode(x, Format.parse("q4_1"))


# ---------------------------------------------------------------- special values, blocks, refusals

EVERY_SYMMETRIC = [
    "int4.g8*bf16", "int8.row*fp32", "e4m3fn.tensor*fp32", "e2m1.g32*e8m0", "nvfp4", "nvfp4_div", "e4m3fn.4x8*fp32",
    "nf4.flat8*fp32", "int8.col*fp32", "mxfp4_dual", "int8-int8.row*fp32@domain=minmax",
]  # fmt: skip


@pytest.mark.parametrize("name", EVERY_SYMMETRIC)
def test_zero_stays_zero(name: str) -> None:
    q = encode(torch.zeros(8, 64), Format.parse(name))
    assert bool((q.dequantize() == 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", EVERY_SYMMETRIC)
def test_nan_and_inf_show_in_their_own_block(name: str, bad: float) -> None:
    f = Format.parse(name)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    good = encode(x, f).dequantize()
    x[5, 40] = bad
    value = encode(x, f).dequantize()
    assert not bool(torch.isfinite(value[5, 40]))
    if f.block is not None and f.scale is not None and f.scale.plain:  # a level above spreads further
        kept = torch.isfinite(value)
        assert torch.equal(value[kept], good[kept])
        assert f.block.kind == "tensor" or bool(kept.any())


def test_special_rules() -> None:
    x = torch.tensor([[1.0, float("nan"), float("inf"), -2.0]])
    with pytest.raises(FormatError, match="NaN or Inf and the rule says special=error"):
        encode(x, Format.parse("int8.row*fp32@special=error"))
    saturated = encode(x, Format.parse("e4m3fn.row*fp32@special=saturate"))
    assert saturated.codes.float().tolist() == [[0.0, 0.0, 448.0, 0.0]]
    assert float(saturated.planes()["scale"]) == pytest.approx(torch.finfo(torch.float32).max / 448)


@pytest.mark.parametrize("e8m0", ["floor", "ceil", "even", "up1.75", "over1.75"])
def test_exponents_at_both_ends_of_float32(e8m0: str) -> None:
    f = Format.parse(f"e4m3fn.g4*e8m0@e8m0={e8m0}")
    for peak in (torch.finfo(torch.float32).max, 1.5 * 2.0**127, 2.0**-140, 2.0**-126, 1.0):
        q = encode(torch.tensor([[peak, 0, 0, 0]]), f)
        assert isinstance(q.scale, torch.Tensor)
        power = exact_exponent(Fraction(torch.tensor(peak).item()), f)
        assert q.scale.item() == min(max(power + 127, 0), 254), peak


@pytest.mark.parametrize(
    "name", ["int8.row*fp32", "int4.g16*bf16", "e4m3fn.4x8*fp32", "nvfp4", "nf4.flat8*fp32", "mxfp4"]
)
def test_stacked_experts_equal_single_ones(name: str) -> None:
    f = Format.parse(name)
    x = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(2))
    whole = encode(x, f)
    assert whole.shape == (3, 8, 32)
    if name != "nvfp4":  # one global scale for the stack
        for e in range(3):
            assert whole.select(e, 1).dequantize()[0].equal(encode(x[e], f).dequantize())


def test_static_scales() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    q = encode(x, Format.parse("int8.tensor*fp32"), scale=torch.tensor(0.02))
    assert torch.equal(q.codes, torch.round(x / 0.02).clamp(-128, 127).to(torch.int8))
    static = encode(x, Format.parse("nvfp4"), scale=torch.tensor([0.001]))
    assert isinstance(static.scale, QTensor)
    assert static.planes()["scale.scale"].item() == pytest.approx(0.001)
    stacked = encode(x[None].repeat(2, 1, 1), Format.parse("nvfp4"), scale=torch.tensor([0.001]))
    assert torch.equal(stacked.dequantize()[1], static.dequantize())
    q = encode(
        x, Format.parse("int8-int8.tensor*fp32"), scale=torch.tensor(0.02), zero=torch.tensor(3, dtype=torch.int8)
    )
    assert torch.equal(q.codes, (torch.round(x / 0.02 + 3)).clamp(-128, 127).to(torch.int8))
    with pytest.raises(FormatError, match="a static scale of 3 values does not fill a grid of"):
        encode(x, Format.parse("int8.row*fp32"), scale=torch.ones(3))


def test_clip_shrinks_the_scale_or_the_range() -> None:
    x = torch.tensor([[-8.0, -1.0, 2.0, 7.0]])
    shrunk = encode(x, Format.parse("int4.row*fp32"), clip=(0.5, 0.5))
    assert float(shrunk.planes()["scale"]) == pytest.approx(4 / 7)
    assert shrunk.dequantize()[0, 0] == pytest.approx(-8 * 4 / 7)  # the most negative code is below -qmax
    ranged = encode(x, Format.parse("int4.row*fp32@clip=range"), clip=(0.5, 0.5))
    assert ranged.dequantize()[0, 0] == pytest.approx(-4)
    assert ranged.dequantize()[0, 3] == pytest.approx(3.5, abs=0.3)


def test_refusals() -> None:
    x = torch.ones(4, 8)
    for bad, f, text in [
        (x[0], "int8.row*fp32", "x is torch.float32 (8,), must be float [..., N, K]"),
        (x.int(), "int8.row*fp32", "x is torch.int32"),
        (x, "int8-int8", "a zero point without a scale"),
        (x, "int8.row*fp32%2:4", "more than 2 of 4 consecutive values are nonzero"),
        (x, "int8.g4*e8m0@e8m0=even", "int8 has none"),
        (x, "int1.row*fp32", "int1 has no positive code; use domain=signed"),
    ]:
        with pytest.raises(FormatError) as caught:
            encode(bad, Format.parse(f))
        assert text in str(caught.value), caught.value
    assert encode(x, Format.parse("int1.row*fp32@domain=signed")).dequantize().equal(x)


def test_sparse_input_is_kept() -> None:
    x = torch.tensor([[1.0, 0, -2, 0, 0, 0, 3, 4]])
    assert (
        encode(x, Format.parse("e4m3fn.row*fp32%2:4"))
        .dequantize()
        .equal(encode(x, Format.parse("e4m3fn.row*fp32")).dequantize())
    )


def test_empty_batches() -> None:
    for name in ("int8.row*fp32", "int4.g8*bf16", "mxfp4", "e4m3fn.tensor*fp32"):
        assert encode(torch.empty(0, 64), Format.parse(name)).shape == (0, 64)


# ---------------------------------------------------------------- the tools' own quantized activations

TOOLS = {
    "compressed_tensors/fp8_block_128x128": ("e4m3fn.g128*bf16@arith=bf16", torch.bfloat16),
    "compressed_tensors/fp8_channel_dynamic_token": ("e4m3fn.row*bf16@arith=bf16", torch.bfloat16),
    "compressed_tensors/fp8_tensor_kv_fp8": ("e4m3fn.tensor*bf16@arith=bf16", torch.bfloat16),
    "compressed_tensors/fp8_tensor_static": ("e4m3fn.tensor*bf16@arith=bf16", torch.bfloat16),
    "compressed_tensors/mixed_fp8_w4a16": ("e4m3fn.row*bf16@arith=bf16", torch.bfloat16),
    "compressed_tensors/moe_qwen3_fp8_dynamic": ("e4m3fn.row*bf16@arith=bf16", torch.bfloat16),
    "compressed_tensors/mxfp8_w8a8": ("e4m3fn.g32*e8m0@e8m0=up1.75", torch.float32),
    "compressed_tensors/nvfp4_w4a4": ("e2m1.g16*(e4m3fn.tensor/fp32)", torch.bfloat16),
    "compressed_tensors/sparse24_bitmask_fp8_ct013": ("e4m3fn.row*bf16@arith=bf16", torch.bfloat16),
    "compressed_tensors/sparse24_fp8_dense_storage": ("e4m3fn.row*bf16@arith=bf16", torch.bfloat16),
    "compressed_tensors/w4a8_int_g128": ("int8.row*bf16@qmax=127.5,arith=bf16", torch.bfloat16),
    "compressed_tensors/w4afp8_g128": ("e4m3fn.row*bf16@arith=bf16", torch.bfloat16),
    "compressed_tensors/w8a8_int8_dynamic_token": ("int8.row*bf16@qmax=127.5,arith=bf16", torch.bfloat16),
    "compressed_tensors/w8a8_int8_static_tensor": ("int8.tensor*bf16@arith=bf16", torch.bfloat16),
    "modelopt/fp8": ("e4m3fn.tensor*fp32", torch.float32),
    "modelopt/mxfp4": ("e2m1.g32*e8m0@e8m0=ceil", torch.float32),
    "modelopt/mxfp8": ("e4m3fn.g32*e8m0@e8m0=ceil", torch.float32),
    "modelopt/nvfp4": ("e2m1.g16*(e4m3fn.tensor*fp32)", torch.float32),
}
"""Case: the rule that the tool follows, and the dtype that its fake quantization computes the product in."""


@pytest.mark.parametrize("case", TOOLS)
def test_activations_as_the_tool_quantizes_them(case: str) -> None:
    folder = GOLDEN / case
    if not folder.is_dir():
        pytest.skip(f"no golden data in {GOLDEN} (set QHAL_GOLDEN)")
    name, product = TOOLS[case]
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("checkpoint/*.safetensors"):
        with safe_open(file, "pt") as f:
            for key in f.keys():  # noqa: SIM118 - a safetensors handle is no dict
                if key.endswith(("input_scale", "input_global_scale")):
                    stored[key] = f.get_tensor(key)
    with safe_open(folder / "expected.safetensors", "pt") as f:
        wanted = {key: f.get_tensor(key) for key in f.keys() if key.endswith((".input", ".input_qdq"))}  # noqa: SIM118
    modules = [key.removesuffix(".input_qdq") for key in wanted if key.endswith(".input_qdq")]
    assert modules
    for module in modules:
        scale = stored.get(f"{module}.input_scale", stored.get(f"{module}.input_global_scale"))
        q = encode(wanted[f"{module}.input"], Format.parse(name), scale=scale)
        assert same_bits(q.dequantize(product).float() + 0.0, wanted[f"{module}.input_qdq"] + 0.0), module
