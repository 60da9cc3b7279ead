"""Format names: every generated format round-trips, every documented name reads and prints canonically."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal import Block, Format, FormatError, Rule
from qhal.elements import ELEMENTS, dtype_name, element
from qhal.grammar import ALIASES
from qhal.rules import _CHOICES

BLOCKS = st.one_of(
    st.sampled_from(["tensor", "row", "col", "head"]).map(Block),
    st.integers(1, 4096).map(lambda k: Block("group", cols=k)),
    st.integers(1, 4096).map(lambda k: Block("flat", cols=k)),
    st.tuples(st.integers(1, 512), st.integers(1, 512)).map(lambda nk: Block("tile", *nk)),
)
QMAX = st.one_of(st.sampled_from([127.5, 127.0, 448.0, 240.0, 224.0, 7.5, 0.1]), st.floats(1e-30, 1e30))


@st.composite
def rules(draw: Any) -> Rule:
    chosen: dict[str, Any] = {
        name: draw(st.sampled_from(options)) for name, options in _CHOICES.items() if draw(st.integers(0, 3)) == 0
    }
    if chosen.get("domain") != "minmax" and draw(st.booleans()):
        chosen["qmax"] = draw(QMAX)
    return Rule(**chosen)


@st.composite
def formats(draw: Any, depth: int = 2) -> Format:
    name = draw(st.sampled_from(sorted(ELEMENTS)))
    plane = formats(depth=depth - 1) if depth else st.sampled_from(["fp32", "fp16", "bf16", "e8m0"]).map(Format)
    given_: dict[str, Any] = {}
    if draw(st.integers(0, 4)):
        given_["block"], given_["scale"] = draw(BLOCKS), draw(plane)
        given_["op"] = draw(st.sampled_from("*/"))
        if draw(st.booleans()):
            given_["offset"], given_["offset_sign"] = draw(plane), draw(st.sampled_from([1, -1]))
    if element(name).kind in ("int", "uint", "float") and draw(st.booleans()):
        given_["zero"] = draw(plane)
    if draw(st.integers(0, 3)) == 0:
        n = draw(st.integers(1, 8))
        given_["sparsity"] = (n, n + draw(st.integers(1, 8)))
    return Format(name, rule=draw(rules()), **given_)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(formats())
def test_round_trip(f: Format) -> None:
    assert Format.parse(str(f)) == f
    assert hash(Format.parse(str(f))) == hash(f)
    assert str(Format.parse(str(f))) == str(f)
    assert f.storage.storage == f.storage
    assert "@" not in str(f.storage)
    assert Format.parse(str(f.storage)) == f.storage
    assert f.bits >= element(f.element).bits * 0.1


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text("int48e3m2fnuzbg.*/()-+%@:,=x16 ", max_size=24))
def test_any_text_is_a_format_or_a_format_error(text: str) -> None:
    try:
        f = Format.parse(text)
    except FormatError as bad:
        assert repr(text) in str(bad)
    else:
        assert Format.parse(str(f)) == f


CANONICAL = {
    "int4.g128*bf16": None,
    "int4.row*bf16": None,
    "int4.channel*bf16": "int4.row*bf16",
    "int4.token*bf16": "int4.row*bf16",
    "int2.g128*fp16": None,
    "int4_g128": "int4.g128*bf16",
    "int4-int4.g128*bf16": None,
    "uint4-uint4.g128*fp16": None,
    "uint4_g128": "uint4-uint4.g128*bf16@domain=minmax",
    "uint4-fp16.g64*fp16": None,
    "int8.row*fp32": None,
    "int8.tensor*fp32": None,
    "int8.g32*fp32": None,
    "int8": None,
    "int8.row*bf16@qmax=127.5": None,
    "int8.row*bf16@arith=bf16,qmax=127.5": "int8.row*bf16@qmax=127.5,arith=bf16",
    "int8.row*bf16@qmax=127": "int8.row*bf16",
    "int8-int8.row*bf16": None,
    "int8-int8.tensor*fp32": None,
    "int8-fp32.row*fp32": None,
    "int8-fp32.g64*fp32": None,
    "int4-fp32.row*fp32": None,
    "int8.row*(fp32.tensor/fp32)": None,
    "int4-int4.row*(bf16.tensor*bf16)": None,
    "int4_fp8": "int4-int4.row*(bf16.tensor*bf16)",
    "int4.row*fp32@clip=range": None,
    "e4m3fn.tensor*fp32": None,
    "fp8": "e4m3fn.tensor*fp32",
    "e4m3fn.row*bf16": None,
    "e4m3fn.col*bf16": None,
    "e4m3fn.head*bf16": None,
    "e5m2.tensor*fp32": None,
    "e4m3fn.128x128*fp32": None,
    "fp8_block": "e4m3fn.128x128*fp32",
    "e4m3fn.128x128*e8m0": None,
    "e4m3fn.32x32*bf16": None,
    "e4m3fn.1x128*fp32": "e4m3fn.g128*fp32",
    "e4m3fn.g128*e8m0@e8m0=ceil": None,
    "e4m3fn-fp32.row*fp32": None,
    "e4m3fnuz.row*fp32@qmax=224": None,
    "e4m3fnuz.row*fp32@qmax=240": "e4m3fnuz.row*fp32",
    "fp8_fnuz": "e4m3fnuz.row*fp32@qmax=224",
    "mxfp4": "e2m1.g32*e8m0",
    "e2m1.g32*e8m0@e8m0=even": None,
    "e2m1.g32*e8m0@round=away,e8m0=over1.75": "e2m1.g32*e8m0@e8m0=over1.75,round=away",
    "mxfp8": "e4m3fn.g32*e8m0",
    "e4m3fn.g32*e8m0@e8m0=up1.75": None,
    "mxfp6_e3m2": "e3m2.g32*e8m0",
    "mxfp6_e2m3": "e2m3.g32*e8m0",
    "nvfp4": "e2m1.g16*(e4m3fn.tensor*fp32)",
    "nvfp4_div": "e2m1.g16*(e4m3fn.tensor/fp32)",
    "e2m1.g32*(e4m3fn.tensor*fp32)": None,
    "mxfp4_dual": "e2m1.g32*(e8m0.g16*fp32)",
    "nf4.flat64*fp32": None,
    "nf4": None,
    "nf4_dq": "nf4.flat64*(lut8.flat256*fp32+fp32@domain=mean)",
    "lut4.flat64*fp32": None,
    "q4_0": "int4.g32*fp16",
    "q4_1": "uint4.g32*fp16+fp16",
    "q5_0": "int5.g32*fp16",
    "q5_1": "uint5.g32*fp16+fp16",
    "q8_0": "int8.g32*fp16",
    "q2_k": "uint2.g16*(uint4.g16*fp16)-(uint4.g16*fp16)",
    "q3_k": "int3.g16*(int6.g16*fp16)",
    "q4_k": "uint4.g32*(uint6.g8*fp16)-(uint6.g8*fp16)",
    "q5_k": "uint5.g32*(uint6.g8*fp16)-(uint6.g8*fp16)",
    "q6_k": "int6.g16*(int8.g16*fp16)",
    "tq2_0": "int2.g256*fp16",
    "e4m3fn.row*bf16%2:4": None,
    "int8-fp32.col*fp32": None,
    "int8-int8.head*fp32": None,
    " mxfp4 ": "e2m1.g32*e8m0",
}


@pytest.mark.parametrize("name", CANONICAL)
def test_documented_names(name: str) -> None:
    f = Format.parse(name)
    assert str(f) == (CANONICAL[name] or name)
    assert Format.parse(str(f)) == f


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_stand_for_canonical_names(alias: str) -> None:
    assert str(Format.parse(alias)) == str(Format.parse(ALIASES[alias])) == ALIASES[alias]


MALFORMED = {
    "": "an empty name",
    "int9.row*fp32": "unknown element 'int9'",
    "e4m3.row*fp32": "the flavour changes the value; write e4m3fn",
    "int4.g128": "expected '*' or '/'",
    "int4.g128*": "expected an element",
    "int4.g128*bf17": "unknown element 'bf17'; known: bf16",
    "int4.block*bf16": "expected a block: tensor, row",
    "int4.g0*bf16": "sizes must be at least 1",
    "int4.g128*(bf16.tensor*fp32": "expected ')'",
    "int4.g128*bf16)": "expected the end of the name; read 'int4.g128*bf16', stopped before ')'",
    "int4.g128*bf16%4": "expected a sparsity such as 2:4",
    "int4.g128*bf16%4:2": "sparsity 4:2",
    "int4.g128*bf16@": "expected key=value once for each of",
    "int4.g128*bf16@colour=blue": "expected key=value once for each of: apply",
    "int4.g128*bf16@round=up": "choose one of even, away",
    "int4.g128*bf16@qmax=x": "qmax='x' is no number",
    "int4.g128*bf16@qmax=-1": "must be a positive number",
    "int4.g128*bf16@qmax=7.5,qmax=7": "once for each",
    "int4.g128*bf16@qmax=7,domain=minmax": "qmax has no meaning with domain=minmax",
    "nf4-int4.g64*fp32": "a zero point has no meaning",
    "mxfp5": "near it: ",
    "int4_g32x": "near it: int4_g128",
    "INT4.row*bf16": "write lower case",
    "int4_g\u0663\u0662": "expected the end",
    "int4.g\u0663*bf16": "expected a block",
    "int4.g128*bf16@qmax=1_0": "qmax='1_0' is no number",
    "int4.g128*bf16@qmax=inf": "qmax='inf' is no number",
    "int8-int4_g32.row*fp32": "an alias must be the whole name",
    "mxfp4.row*fp32": "an alias must be the whole name",
    "int8.row*q4_0": "an alias must be the whole name",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_names_say_what_is_wrong(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        Format.parse(name)
    assert MALFORMED[name] in str(caught.value)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"element": "int4", "block": Block("row")}, "belong together"),
        ({"element": "int4", "scale": Format("fp32")}, "belong together"),
        ({"element": "int4", "offset": Format("fp32")}, "an offset needs a block"),
        ({"element": "int4", "op": "+"}, "op='.' is"),
        ({"element": "int4", "offset_sign": 2}, "offset_sign=2 1 or -1"),
        ({"element": "int4", "sparsity": (2.0, 4)}, "two whole numbers"),
        ({"element": "int4", "sparsity": "24"}, "two whole numbers"),
        ({"element": 4}, "an element is a name"),
    ],
)
def test_senseless_formats_are_refused(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        Format(**kwargs)


def test_bits_count_every_plane() -> None:
    assert Format.parse("int4.g32*bf16").bits == 4.5
    assert Format.parse("int4-int4.g128*bf16").bits == 4 + 20 / 128
    assert Format.parse("nvfp4").bits == 4.5
    assert Format.parse("uint4.g32*(uint6.g8*fp16)-(uint6.g8*fp16)").bits == 4.5  # llama.cpp counts Q4_K as 4.5
    assert Format.parse("e4m3fn.row*bf16%2:4").bits == 5.0
    assert Format.parse("bf16").bits == 16


def test_fields_without_a_plane_do_not_split_one_format_in_two() -> None:
    assert Format("int4", op="/") == Format("int4")
    assert Format("int4", offset_sign=-1) == Format("int4")
    assert Format("int8", rule=Rule(qmax=127.0)) == Format("int8")


def test_rule_defaults_print_nothing() -> None:
    assert str(Rule()) == ""
    assert {f.name for f in fields(Rule)} == {*_CHOICES, "qmax"}
    for name, options in _CHOICES.items():
        assert getattr(Rule(), name) == options[0]


def test_dtype_names() -> None:
    import torch

    assert dtype_name(torch.bfloat16) == "bf16"
    assert dtype_name(torch.float8_e4m3fnuz) == "e4m3fnuz"
    with pytest.raises(FormatError, match=r"torch\.int32 is no element"):
        dtype_name(torch.int32)


def test_nesting_ends() -> None:
    deep = "int8.row*(" * 2000 + "fp32" + ")" * 2000
    with pytest.raises(FormatError, match="nest more than 8 levels deep") as caught:
        Format.parse(deep)
    assert len(str(caught.value)) < 600
    f = Format("fp32")
    for _ in range(7):
        f = Format("int8", Block("row"), f)
    assert Format.parse(str(f)) == f
    with pytest.raises(FormatError, match="nest more than 8 levels deep"):
        Format("int8", Block("row"), f)


@pytest.mark.parametrize("name", [None, 3, [], b"int4"])
def test_names_are_text(name: Any) -> None:
    with pytest.raises(FormatError, match="a format name is text"):
        Format.parse(name)


@pytest.mark.parametrize("name", ["x" * 100_000, "int4.g128*bf16@qmax=" + "9" * 5000 + "z", "int4.g" + "9" * 5000])
def test_long_names_are_cut_in_errors(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        Format.parse(name)
    assert len(str(caught.value)) < 900


def test_a_hash_stays_in_its_process() -> None:
    f = Format.parse("e2m1.g16*(e4m3fn.tensor*fp32)")
    assert hash(f) == hash(f.storage) and f.storage is f.storage
    g = pickle.loads(pickle.dumps(f))
    assert g == f and hash(g) == hash(f)
    kept = set(vars(pickle.loads(pickle.dumps(f))))
    assert kept == {field.name for field in fields(Format)}
