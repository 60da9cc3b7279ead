"""Every format is computed twice: this file is the table of who checks what, and the checks that are exhaustive.

The second implementation of whole formats is the conformance suite's (its `encode.py`, `decode.py`, `elements.py`
and `exponents.py`): numpy, tables from the specifications, no line shared with `qhal.encoding`. Elements are compared
with ml_dtypes as well (`test_rounding.py`), rules with exact rationals (`test_encoding.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qhal import Format, FormatError, QTensor
from qhal.elements import ELEMENTS, WIDE, decode, dynamic_map, element
from qhal.encoding import encode
from qhal.grammar import ALIASES
from qhal_conformance import decode as suite_decode
from qhal_conformance import elements
from qhal_conformance import encode as suite_encode
from qhal_conformance.quantize_check import compare_planes
from qhal_conformance.quantize_data import QUANTIZE_DATA, numbers_for

DOCS = Path(__file__).parents[1] / "docs" / "formats.md"

WRITERS = [
    "int4.g128*bf16", "int4.row*bf16", "int4-int4.g128*bf16", "int4-int4.g128*bf16@domain=minmax",
    "uint4-uint4.g128*fp16", "uint4-uint4.g128*bf16", "uint4-uint4.g128*fp16@domain=minmax", "int8.row*bf16",
    "int8.row*bf16@qmax=127.5", "int8.row*bf16@qmax=127.5,arith=bf16", "e4m3fn.tensor*bf16", "e4m3fn.row*bf16",
    "e4m3fn.128x128*bf16", "e4m3fn.128x128*fp32", "e4m3fn.g128*fp32", "e4m3fn.g128*e8m0@e8m0=ceil",
    "e4m3fn.32x32*bf16", "e4m3fn.row*bf16@arith=bf16", "e5m2.row*fp32", "e5m2fnuz.row*fp32", "e4m3fnuz.row*fp32",
    "e4m3fnuz.row*fp32@qmax=240", "int8-fp32.row*fp32", "int8-fp32.g64*fp32", "int8-fp32.tensor*fp32",
    "int8-fp32.row*fp32@domain=minmax", "int8-int8.row*bf16", "int8-int8.tensor*fp32@domain=minmax",
    "uint4-fp16.g64*fp16", "uint4-fp16.g64*fp16@domain=minmax", "int8.row*(fp32.tensor/fp32)",
    "int4.row*fp32@clip=range", "e4m3fn-fp32.row*fp32", "e2m1.g32*e8m0@e8m0=even", "e2m1.g32*e8m0@e8m0=ceil",
    "e2m1.g32*e8m0@e8m0=up1.75", "e2m1.g32*e8m0@e8m0=over1.75,round=away", "e4m3fn.g32*e8m0@e8m0=up1.75",
    "e4m3fn.g32*e8m0@e8m0=ceil", "e3m2.g32*e8m0@e8m0=even", "e2m3.g32*e8m0@e8m0=even", "e5m2.g32*e8m0@e8m0=even",
    "e2m1.g32*(e4m3fn.tensor*fp32)", "int8-fp32.col*fp32", "int8-int8.head*fp32", "int8.row*fp32", "int8.tensor*fp32",
    "e4m3fn.col*fp32", "e4m3fn.head*fp32", "uint4.g32*fp16+fp16@domain=minmax", "uint5.g32*fp16+fp16@domain=minmax",
    "nf4.flat64*(lut8.flat256*fp32+fp32)", "uint2.g16*(uint4.g16*fp16)-(uint4.g16*fp16)",
    "uint4.g32*(uint6.g8*fp16)-(uint6.g8*fp16)", "e4m3fn.row*bf16%2:4", "uint2-uint2.g32*fp16", "uint3-uint3.g32*fp16",
    "uint8-uint8.g32*fp16", "int8-int8.row*fp32", "int4-fp32.row*fp32", "int4.row*(bf16.tensor*bf16)",
    "int4.g32*(fp32.row*fp32)",
]  # fmt: skip
"""Names that tools write (docs/formats.md and the rules measured on their files)."""

CORNERS = [
    "e4m3fn.tensor/fp32", "int8.row/fp32", "int4.g16/bf16", "int8.row/e8m0", "e2m1.g32/e8m0", "e4m3fn.row/fp16",
    "int8.row/fp32@scale=rcp", "int8.row/fp32@arith=bf16", "int8-int8.row/fp32@domain=minmax",
    "uint8-uint8.g32/fp32@domain=minmax", "uint4.g32/fp16+fp16@domain=minmax", "int8.row/fp32@domain=signed",
    "int8.g16*(fp16.row*fp32)", "int8.g16*(fp32.tensor*e8m0)", "int4.g16*(bf16.tensor/fp32)",
    "e2m1.g16*(e4m3fn.tensor*e8m0)", "e2m1.g16*(e4m3fn.tensor/e8m0)", "int8.g16*(uint6.g8*e8m0)",
    "uint8-uint8.row*fp32", "uint8-fp32.row*fp32", "uint4-uint4.g32*e8m0", "uint8-uint8.row*fp32@qmax=127.5",
    "bf16.row*bf16@qmax=1", "int8.4x16*fp32", "int8.flat48*fp32", "nf4.row*fp32", "lut8.g16*fp32",
    "lut8.row*fp32+fp32@domain=mean", "int8.g8*fp32@empty=zero", "int8.g8*fp32@empty=eps", "int8.g8*fp32@apply=rcp",
    "int8.g8*fp32@scale=rcp,apply=rcp,round=away", "e2m1.g8*e4m3fn", "int8.g8*fp16@special=saturate",
    "e4m3fn.row*fp32@clip=range", "uint4.g32*fp16-fp16@domain=minmax", "int8.16x16*(int8.4x4*fp32)",
    "int4.g32*fp16@domain=signed", "int3.g32*e8m0@empty=zero", "int8.g16*(int8.row*fp32@round=away)",
]  # fmt: skip

BY_BITS = [
    f"{name}{zero}.g32*bf16{rule}"
    for bits in range(1, 9)
    for name, zero, rule in (
        (f"int{bits}", "", "@domain=signed" if bits == 1 else ""),
        (f"int{bits}", f"-int{bits}", "@domain=minmax"),
        (f"int{bits}", "-fp16", "@domain=minmax"),
        (f"uint{bits}", f"-uint{bits}", "@domain=minmax"),
        (f"uint{bits}", "-fp32", "@domain=minmax"),
        *(((f"uint{bits}", f"-uint{bits}", ""),) if bits > 1 else ()),
    )
]
"""int1 to int8 and uint1 to uint8, symmetric, with integer and with float zero points."""

DECODED = list(dict.fromkeys([*ALIASES, *WRITERS, *CORNERS, *BY_BITS, "lut4.row*fp16", "lut4.flat64*fp32"]))
SEARCHED = [
    n for n in DECODED if any(f.offset is not None and f.rule.domain == "amax" for f in Format.parse(n).levels())
]
"""Files whose tools search scales and offsets: as they stand they decode, and quantizing says what to write."""
ENCODED = [n for n in DECODED if n not in SEARCHED and Format.parse(n).element != "lut4"]
ENCODED += [f"{Format.parse(n)}@domain=minmax" for n in SEARCHED if n in ALIASES]

ELEMENT_CHECKS = {
    **{f"{sign}int{b}": "numpy integers, every code and every 16-bit input" for sign in ("", "u") for b in range(1, 9)},
    **dict.fromkeys(("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"), "ml_dtypes, every code and input"),
    **dict.fromkeys(("e3m2", "e2m3", "e2m1"), "ml_dtypes, every code and input"),
    "e8m0": "ml_dtypes, every code; every 16-bit peak by five rules",
    "nf4": "QLoRA's table; every 16-bit input",
    "lut4": "its own table; quantizing is refused",
    "lut8": "bitsandbytes' table; every 16-bit input",
    "fp32": "numpy", "fp16": "numpy", "bf16": "ml_dtypes",
}  # fmt: skip


def canonical(name: str) -> Format:
    return Format.parse(name).storage


def any_tensor(f: Format, shape: tuple[int, ...], g: torch.Generator) -> QTensor:
    """Any code in every plane, NaN and Inf among them."""
    planes: dict[str, Any] = {}
    for plane in ("scale", "zero", "offset"):
        inner = getattr(f, plane)
        if inner is not None:
            assert f.block is not None
            made = any_tensor(inner, f.block.grid(*shape), g)
            planes[plane] = made.codes if inner.plain else made
    e = element(f.element)
    if e.kind == "lut" and f.element != "nf4":
        planes["table"] = torch.randn(1 << e.bits, generator=g)
    if e.wide:
        codes = torch.randn(shape, generator=g).to(e.storage)
    else:
        low = int(e.smallest) if e.kind == "int" else 0
        codes = torch.randint(low, low + (1 << e.bits), shape, generator=g).to(torch.int16).to(torch.uint8)
    return QTensor(f, codes if e.wide else codes.view(e.storage), **planes)


def same_values(q: QTensor) -> None:
    """The same float32 numbers from both decoders; of NaN only that it is one."""
    with np.errstate(all="ignore"):
        ours, theirs = q.dequantize().numpy(), suite_decode.decode(q).value
    assert np.array_equal(ours, theirs, equal_nan=True)
    number = ~np.isnan(ours)
    assert np.array_equal(np.signbit(ours[number]), np.signbit(theirs[number]))


def test_nothing_is_forgotten() -> None:
    """Every element, every alias and every canonical name of the documentation is in a table above."""
    assert set(ELEMENT_CHECKS) == set(ELEMENTS)
    assert set(ALIASES) <= set(DECODED)
    encoded = {canonical(n) for n in ENCODED}
    assert {n for n in ALIASES if canonical(n) not in encoded} == set()
    decoded = {canonical(n) for n in DECODED}
    text = DOCS.read_text(encoding="utf-8").partition("## Canonical names")[2].partition("\n## ")[0]
    named = re.findall(r"^\| (`[^|]*)\|", text, re.MULTILINE)
    written = [w for cell in named for w in re.findall(r"`([^`]+)`", cell) if re.match(r"u?(int|e\d|nf4)", w)]
    assert len(written) > 15
    assert [w for w in written if canonical(w) not in decoded] == []
    used = {level.element for n in ENCODED for level in Format.parse(n).levels()}
    assert set(ELEMENTS) - used == {"lut4"}


@pytest.mark.parametrize("name", ENCODED)
def test_codes_and_scales(name: str) -> None:
    f = Format.parse(name)
    for data in QUANTIZE_DATA:
        for shape, kind in (((33, 320), "fp32"), ((6, 512), "bf16"), ((5, 96), "fp16")):
            x = numbers_for("second", f, *shape, data, kind)
            if f.sparsity is not None:
                x = np.where(np.arange(shape[1]) % f.sparsity[1] < f.sparsity[0], x, np.float32(0))
            wrong = compare_planes(encode(torch.from_numpy(x), f), suite_encode.quantize(x, f))
            assert wrong is None, (data, kind, wrong)


@pytest.mark.parametrize("name", [n for n in ENCODED if Format.parse(n).block is not None])
def test_static_scales_zero_points_and_clips(name: str) -> None:
    f = Format.parse(name)
    x = numbers_for("static", f, 8, 128, "normal", "bf16")
    if f.sparsity is not None:
        x = np.where(np.arange(128) % f.sparsity[1] < f.sparsity[0], x, np.float32(0))
    outermost = f
    while outermost.scale is not None and not outermost.scale.plain:
        outermost = outermost.scale
    power = outermost.scale is not None and outermost.scale.element == "e8m0"
    for value in (2.0**-5, 2.0**3) if power else (0.0371, 1.7):
        static = np.array([value], np.float32)
        zero = np.array([1.0], np.float32) if f.zero is not None and f.zero.plain else None
        given = None if zero is None else torch.from_numpy(zero)
        if outermost is f or (outermost.block is not None and outermost.block.grid(8, 128) == (1, 1)):
            ours = encode(torch.from_numpy(x), f, scale=torch.from_numpy(static), zero=given)
            wrong = compare_planes(ours, suite_encode.quantize(x, f, scale=static, zero=zero))
            assert wrong is None, (value, wrong)
    for clip in ((0.5, 0.75), (1.0, 0.3)):
        wrong = compare_planes(encode(torch.from_numpy(x), f, clip=clip), suite_encode.quantize(x, f, clip=clip))
        assert wrong is None, (clip, wrong)


@pytest.mark.parametrize("name", DECODED)
def test_decoding(name: str) -> None:
    f = Format.parse(name)
    for seed, shape in enumerate([(33, 512), (8, 96), (1, 40)]):
        same_values(any_tensor(f, shape, torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------- exhaustive

NARROW = [n for n, e in ELEMENTS.items() if not e.wide and n not in ("e8m0", "lut4")]
EVERY = {
    kind: torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(WIDE[kind]).float()
    for kind in ("bf16", "fp16")
}
"""All 65,536 numbers of a 16-bit type."""


@pytest.mark.parametrize("name", NARROW)
def test_every_code_decodes(name: str) -> None:
    e = element(name)
    count = 1 << e.bits
    low = int(e.smallest) if e.kind == "int" else 0
    codes = torch.arange(low, low + count).to(torch.int8).view(torch.uint8).view(e.storage)
    table = dynamic_map() if name == "lut8" else None
    for scale in (1.0, 0.3, 2.0**-130):
        q = QTensor(Format.parse(f"{name}.tensor*fp32"), codes[None], torch.tensor([[scale]]), table=table)
        same_values(q)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", NARROW)
def test_every_input_under_static_scales(name: str, kind: str) -> None:
    x = EVERY[kind].reshape(256, 256)
    rules = [("*", "", 1.0), ("*", "", 0.3), ("*", "@apply=rcp", 0.3), ("*", "@arith=bf16", 0.3), ("/", "", 3.7)]
    if element(name).kind != "lut":
        rules += [("*", "@round=away", 0.5), ("*", "@round=away", 0.3)]
    for op, rule, scale in rules:
        f, static = Format.parse(f"{name}.tensor{op}fp32{rule}"), np.array([scale], np.float32)
        ours = encode(x, f, scale=torch.from_numpy(static))
        wrong = compare_planes(ours, suite_encode.quantize(x.numpy(), f, scale=static))
        assert wrong is None, (op, rule, scale, wrong)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", [n for n in NARROW if n not in ("int1", "uint1")])
def test_every_peak(name: str, kind: str) -> None:
    """Each number is a block of its own, so that it is its own peak: the scale by every type and rule, and its code."""
    x = EVERY[kind][:, None]
    formats = [f"{name}.row*{scale}" for scale in ("fp32", "bf16", "fp16", "e4m3fn")]
    formats += [f"{name}.row*fp32@scale=rcp", f"{name}.row/fp32", f"{name}.row*bf16@arith=bf16"]
    rules = ["floor", "ceil", "over1.75", "up1.75", *(["even"] if element(name).kind in ("float", "mini") else [])]
    formats += [f"{name}.row*e8m0@e8m0={rule}" for rule in rules]
    formats += [f"{name}.row*fp32@domain=signed"] * (element(name).smallest < 0)
    for text in formats:
        f = Format.parse(text)
        wrong = compare_planes(encode(x, f), suite_encode.quantize(x.numpy(), f))
        assert wrong is None, (text, wrong)


def test_the_dynamic_map_is_that_of_bitsandbytes(golden: Path) -> None:
    import hashlib

    pinned = (
        "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"  # of bitsandbytes 0.50.2's float32 bytes
    )
    assert hashlib.sha256(dynamic_map().numpy().tobytes()).hexdigest() == pinned
    assert np.array_equal(elements.table("lut8").astype(np.float32), dynamic_map().numpy())
    folder = golden / "bitsandbytes" / "nf4_double_quant" / "checkpoint"
    if not folder.is_dir():
        pytest.skip(f"no bitsandbytes files among the golden data in {golden} (set QHAL_GOLDEN)")
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            for key in [k for k in f.keys() if k.endswith("nested_quant_map")]:  # noqa: SIM118 - no dict
                assert torch.equal(f.get_tensor(key), dynamic_map()), key


def test_double_quantization_follows_its_words() -> None:
    """nf4_dq: block maxima, minus their mean, scaled by 256 of them and rounded to the dynamic map."""
    x = torch.randn(96, 512, generator=torch.Generator().manual_seed(0)) * torch.rand(96, 1).exp()
    q = encode(x, Format.parse("nf4_dq"))
    assert isinstance(q.scale, QTensor)
    peaks = x.reshape(-1, 64).abs().amax(1)
    planes = q.planes()
    mean = planes["scale.offset"].item()
    assert mean == float(np.float32(sum(map(float, peaks.tolist())) / peaks.numel()))
    rest = peaks - mean
    assert torch.equal(planes["scale.scale"].flatten(), rest.reshape(-1, 256).abs().amax(1))
    ratio = rest.reshape(-1, 256) / planes["scale.scale"].reshape(-1, 1)
    nearest = (ratio[..., None].double() - dynamic_map().double()).abs().argmin(-1)
    assert torch.equal(planes["scale.codes"].flatten().long(), nearest.flatten())
    error = (q.scale.dequantize().flatten() - peaks).abs() / planes["scale.scale"].reshape(-1, 1).repeat(
        1, 256
    ).flatten()
    assert float(error.max()) < 0.9 / 64 / 2 * 1.01 + 0.01  # half the widest gap of the map, and its uneven top
    assert torch.equal(decode("nf4", q.codes).abs().reshape(-1, 64).amax(1) > 0.6, torch.ones(768, dtype=torch.bool))
    for text, why in (
        ("lut8.row*fp32@domain=mean", "domain=mean needs a plain offset"),
        ("uint8-uint8.row*fp32+fp32@domain=mean", "domain=mean needs a plain offset and no zero point"),
        ("lut4.row*fp32", "lut4 needs a table to round to"),
    ):
        with pytest.raises(FormatError, match=why):
            encode(x, Format.parse(text))


@pytest.mark.parametrize("name", SEARCHED)
def test_formats_whose_tools_search_scales_say_what_to_write(name: str) -> None:
    with pytest.raises(FormatError, match="an offset is computed with domain=minmax or mean"):
        encode(torch.randn(4, 256), Format.parse(name))
