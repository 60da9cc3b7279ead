"""recode: the same numbers in other words, or the name of what is in the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal import Format, FormatError, QTensor
from qhal.elements import decode, element
from qhal.encoding import encode
from qhal.flavours import FNUZ, relabelled
from qhal.recoding import recode


def weight(n: int = 8, k: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


SAME = [
    ("int4.g32*bf16", "uint4-uint4.g32*bf16"),
    ("int4.g32*bf16", "uint4-uint4.g16*fp32"),
    ("int4.g32*bf16", "int4-int4.g32*fp32"),
    ("int4.row*bf16", "uint4-uint4.g32*fp32"),
    ("int4.row*bf16", "int8.row*bf16"),
    ("int4.g32*bf16", "uint8-uint8.g32*fp32"),
    ("int4-int4.g32*bf16@domain=minmax", "uint4-uint4.g32*bf16"),
    ("uint4-uint4.g32*fp16@domain=minmax", "int4-int4.g32*fp32"),
    ("uint4-uint4.g32*fp16@domain=minmax", "uint4-fp32.g32*fp32"),
    ("uint4-uint4.row*bf16@domain=minmax", "uint4-uint4.g16*fp32"),
    ("int8.tensor*fp32", "int8.row*fp32"),
    ("e4m3fn.tensor*fp32", "e4m3fn.row*fp32"),
    ("e4m3fn.tensor*fp32", "e4m3fn.4x32*fp32"),
    ("e4m3fn.row*bf16", "e4m3fn.row*fp32"),
    ("e4m3fn.8x64*fp32", "e4m3fn.4x16*fp32"),
    ("e2m1.g32*e8m0", "e2m1.g16*fp32"),
    ("e2m1.g32*e8m0", "e2m1.g32/e8m0"),
    ("e4m3fn.g32*e8m0", "e4m3fn.g32*bf16"),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*fp32"),
    ("int4-int4.row*(bf16.tensor*bf16)", "int4-int4.row*fp32"),
    ("e4m3fn.row*fp32@qmax=240", "e4m3fnuz.row*fp32"),
    ("e4m3fn.row*fp32", "e4m3fnuz.g32*fp32"),
    ("e4m3fn.g32*e8m0", "e4m3fnuz.g32*e8m0"),
    ("e4m3fn.tensor/fp32", "e4m3fnuz.tensor/fp32"),
    ("e4m3fn.tensor/fp32", "e4m3fnuz.row/fp32@qmax=224"),
    ("e4m3fn.g16*(fp16.tensor*fp32)", "e4m3fnuz.g16*fp32"),
    ("e5m2.row*fp32", "e5m2fnuz.row*fp32"),
    ("e4m3fnuz.row*fp32@qmax=224", "e4m3fn.row*fp32"),
]


@pytest.mark.parametrize(("old", "new"), SAME)
def test_the_same_numbers_in_other_words(old: str, new: str) -> None:
    t = encode(weight(), Format.parse(old))
    made = recode(t, Format.parse(new))
    assert made.format == Format.parse(new)
    assert torch.equal(made.dequantize() + 0.0, t.dequantize() + 0.0)


REFUSED = [
    ("e4m3fnuz.row*fp32", "e4m3fn.row*fp32", "code 0x7F of e4m3fnuz has no counterpart in e4m3fn"),
    ("e4m3fn.row*fp32", "e5m2.row*fp32", "e4m3fn codes are not e5m2 codes"),
    ("e4m3fn.g16*(fp16.tensor*fp32)", "e4m3fnuz.g16*(fp16.tensor*fp32)", "the scales of two levels"),
    ("int4.g32*bf16", "int4.row*bf16", "row does not lie inside g32"),
    ("int4.g32*fp32", "uint4-uint4.g32*bf16", "which bf16 does not hold"),
    ("int4.g32*bf16", "e2m1.g32*bf16", "int4 codes are not e2m1 codes"),
    ("int4.g32*bf16", "uint4.g32*bf16", "signed codes need a zero point"),
    ("int8.g32*bf16", "int4.g32*bf16", "the codes, which reach from"),
    ("int4-int4.g32*bf16@domain=minmax", "int4.g32*bf16", "the zero points, which are not all 0"),
    ("uint4.g32*fp16+fp16@domain=minmax", "uint4-uint4.g32*fp16", "the offset"),
    ("e2m1.g16*fp32", "e2m1.g16*(e4m3fn.tensor*fp32)", "one level cannot be split into two"),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor/fp32)", "scale"),
    ("e4m3fn.tensor*fp32", "e4m3fn.tensor*e8m0", "e8m0"),
    ("nf4.flat64*fp32", "nf4.g64*fp32", "g64 does not lie inside flat64"),
    ("int4.g32*bf16", "int4.g32*bf16%2:4", "not pruned"),
]


@pytest.mark.parametrize(("old", "new", "why"), REFUSED)
def test_what_would_change_a_number_is_refused_by_name(old: str, new: str, why: str) -> None:
    with pytest.raises(FormatError, match=r"cannot be written as|type|powers of two") as caught:
        recode(encode(weight(), Format.parse(old)), Format.parse(new))
    assert why in str(caught.value)


def test_a_zero_point_in_the_middle_can_go() -> None:
    t = encode(weight(), Format.parse("uint4-uint4.g32*bf16@domain=amax"))
    assert bool((t.zero == 8).all())
    made = recode(t, Format.parse("int4.g32*bf16"))
    assert made.zero is None
    assert torch.equal(made.dequantize(), t.dequantize())


def test_columns_in_activation_order_keep_their_index() -> None:
    t = encode(weight(), Format.parse("int4.g32*bf16"))
    index = torch.arange(64, dtype=torch.int32).flip(0) // 32
    moved = QTensor(t.format, t.codes, t.scale, group_index=index)
    made = recode(moved, Format.parse("uint4-uint4.g32*fp32"))
    assert torch.equal(made.dequantize(), moved.dequantize())
    with pytest.raises(FormatError, match="activation order"):
        recode(moved, Format.parse("uint4-uint4.g16*fp32"))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(2, 8), st.sampled_from(["row", "g16", "g32", "tensor"]), st.booleans(), st.integers(0, 9))
def test_there_and_back(bits: int, block: str, zero: bool, seed: int) -> None:
    signed = f"int{bits}-int{bits}.{block}*bf16@domain=minmax" if zero else f"int{bits}.{block}*bf16"
    t = encode(weight(seed=seed), Format.parse(signed))
    there = recode(t, Format.parse(f"uint{bits}-uint{bits}.{block}*fp32"))
    back = recode(there, t.format)
    assert back.equal(t)


def test_experts_recode_together() -> None:
    t = encode(torch.stack([weight(seed=s) for s in range(3)]), Format.parse("int4.g32*bf16"))
    assert torch.equal(recode(t, Format.parse("uint4-uint4.g16*fp32")).dequantize(), t.dequantize())


def test_columns_in_activation_order_get_a_zero_point_for_every_group() -> None:
    t = replace(encode(weight(), Format.parse("int4.g16*bf16")), group_index=torch.arange(64, dtype=torch.int32) % 4)
    made = recode(t, Format.parse("uint4-uint4.g16*bf16"))
    assert isinstance(made.zero, torch.Tensor) and made.zero.shape == (8, 4)
    assert torch.equal(made.dequantize(), t.dequantize())


def test_nearly_the_same_where_a_reciprocal_is_rounded() -> None:
    """Codes and inner scales stay; the outer scale becomes fp32's nearest number to its reciprocal."""
    old = encode(weight(), Format.parse("e2m1.g16*(e4m3fn.tensor*fp32)"))
    assert isinstance(old.scale, QTensor)
    to = Format.parse("e2m1.g16*(e4m3fn.tensor/fp32)")
    with pytest.raises(FormatError, match="some numbers would change"):
        recode(old, to)
    made = recode(old, to, nearly=True)
    assert torch.equal(made.codes, old.codes) and isinstance(made.scale, QTensor)
    assert torch.equal(made.scale.codes.view(torch.uint8), old.scale.codes.view(torch.uint8))
    moved = (made.dequantize() - old.dequantize()).abs()
    assert moved.max() > 0 and bool((moved <= old.dequantize().abs() * 2**-22).all())
    with pytest.raises(FormatError, match="does not hold"):  # a rounding of another kind stays refused
        recode(encode(weight(), Format.parse("int4.g16*fp32")), Format.parse("int4.g16*bf16"), nearly=True)


@pytest.mark.parametrize(("ocp", "exact"), [("e4m3fn", 253), ("e5m2", 247)])
def test_the_flavours_of_8_bit_floats(ocp: str, exact: int) -> None:
    """All 256 codes: which go over as they are, which change, which are refused; and the way back."""
    codes = torch.arange(256, dtype=torch.uint8)
    same, zeros, refused = 0, 0, []
    for code in codes.split(1):
        old = code.view(element(ocp).storage)
        try:
            new = relabelled(old, ocp, FNUZ[ocp])
        except FormatError:
            refused.append(int(code))
            continue
        assert new.data_ptr() != old.data_ptr()
        assert float(decode(FNUZ[ocp], new)) * 2 == float(decode(ocp, old))
        same += int(new.view(torch.uint8)) == int(code)
        zeros += int(new.view(torch.uint8)) != int(code)
        back = relabelled(new, FNUZ[ocp], ocp)
        assert int(back.view(torch.uint8)) == (int(code) if int(code) != 0x80 else 0)
    assert (same, zeros) == (exact, 1)
    assert all(not torch.isfinite(decode(ocp, codes[c : c + 1].view(element(ocp).storage))) for c in refused)


def test_a_scale_that_cannot_double_is_refused() -> None:
    t = encode(weight(), Format.parse("e4m3fn.row*fp16"))
    assert isinstance(t.scale, torch.Tensor)
    large = replace(t, scale=torch.full_like(t.scale, 40000.0))
    with pytest.raises(FormatError, match="scales such as 80000, which fp16 does not hold"):
        recode(large, Format.parse("e4m3fnuz.row*fp16"))
    bare = QTensor(Format.parse("e4m3fn"), t.codes)
    with pytest.raises(FormatError, match="the scale, which would have to double or halve: there is none"):
        recode(bare, Format.parse("e4m3fnuz"))
