"""The bytes between two ranks: the documented stream, written here once more with Python integers, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal import Codec, Format
from qhal.elements import element
from qhal.encoding import encode
from qhal.tensors import same_bits
from qhal.wire import encode_part, read_wire, wire_bytes, wire_size

NAMES = (
    "int8.g32*fp16", "int8.row*fp32", "int6.g32*fp16", "int6.row*bf16", "int4.g128*fp16", "int4.g32*fp16@domain=signed",
    "e4m3fn.row*fp32", "e4m3fn.g128*fp32", "e4m3fnuz.row*fp32@qmax=224", "e2m1.g32*e8m0", "e4m3fn.g32*e8m0",

    "nvfp4", "bf16", "fp32", "e4m3fn", "int3.g32*fp16", "int5.row*fp32", "uint4-uint4.g32*fp16@domain=minmax", "q3_k",
    "mxfp6_e3m2", "mxfp6_e2m3", "nf4.g64*fp32", "mxfp4_dual", "uint4.g32*fp16+fp16@domain=minmax", "e5m2.row*fp32",
    "int8.tensor*fp32", "int8.col*fp32", "int8.16x16*(e4m3fn.4x4*fp32)", "nf4.flat64*fp32", "int8.head*fp32", "int7",
)  # fmt: skip


def codec(name: str, **options: object) -> Codec:
    return Codec(Format.parse(name), **options)  # type: ignore[arg-type]


def stream(plane: torch.Tensor, bits: int) -> bytes:
    """The documented layout with Python integers: element i fills the bits from i * bits on."""
    raw = plane.contiguous().flatten().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[plane.element_size()])
    whole = sum((int(v) & ((1 << bits) - 1)) << (i * bits) for i, v in enumerate(raw.tolist()))
    return whole.to_bytes(-(-raw.numel() * bits // 8), "little")


def elements(f: Format) -> list[int]:
    inner = [b for plane in (f.scale, f.zero, f.offset) if plane is not None for b in elements(plane)]
    return [element(f.element).bits, *inner]


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(0, 5),
    k=st.sampled_from([0, 1, 3, 31, 32, 33, 64, 65, 129]),
    order=st.sampled_from(["sequential", "parity"]),
    seed=st.integers(0, 9),
)
def test_the_wire_is_the_documented_stream_and_reads_back(name, rows, k, order, seed):
    c = codec(name, order=order)
    if order == "parity" and str(c.format.block) != "g32":
        return
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    q = encode_part(x, c)
    wire = wire_bytes(q, c)
    planes = [plane for key, plane in q.planes().items() if key != "group_index"]
    want = b"".join(stream(p, bits) for p, bits in zip(planes, elements(c.format), strict=True))
    assert bytes(wire.tolist()) == want and len(want) == wire_size(c, rows, k)
    back = read_wire(wire, c, rows, k)
    assert back.equal(q) and back.shape == (rows, k)
    if order == "sequential":
        assert q.equal(encode(x, c.format))


@settings(max_examples=100, deadline=None)
@given(widths=st.lists(st.integers(1, 8), min_size=1, max_size=4), k=st.integers(0, 20), seed=st.integers(0, 9))
def test_bit_planes_send_the_low_bits_first(widths, k, seed):
    bits = sum(widths)
    if not 2 <= bits <= 8:
        return
    c = codec(f"int{bits}.row*fp32", planes=tuple(widths))
    q = encode_part(torch.randn(2, k, generator=torch.Generator().manual_seed(seed)), c)
    wire, codes = wire_bytes(q, c), q.codes.int() & ((1 << bits) - 1)
    want = b""
    for w in widths:
        want += stream((codes & ((1 << w) - 1)).to(torch.uint8), w)
        codes = codes >> w
    assert bytes(wire.tolist()) == want + stream(q.scale, 32)
    assert read_wire(wire, c, 2, k).equal(q) and wire.numel() == wire_size(c, 2, k)


def test_wire_bytes_by_hand():
    c = codec("int4.row*fp16")  # amax 7: the scale is 1, fp16 0x3c00; nibbles low first, two's complement
    wire = wire_bytes(encode_part(torch.tensor([[7.0, -1.0, 2.0], [-7.0, 0.0, 1.0]]), c), c)
    assert bytes(wire.tolist()).hex() == "f79210" + "003c003c"
    split = codec("int6.row*fp16", planes=(4, 2))  # -2 = 0b111110, 31 = 0b011111
    wire = wire_bytes(encode_part(torch.tensor([[-2.0, 31.0]]), split), split)
    assert bytes(wire.tolist()).hex() == "fe" + "07" + "003c"
    mx = codec("mxfp4")  # amax 6: exponent 2 - 2 = 0, biased 127; 6 is code 7, -0.5 code 9
    wire = wire_bytes(encode_part(torch.tensor([[6.0, -0.5]]), mx), mx)
    assert bytes(wire.tolist()).hex() == "97" + "7f"


@pytest.mark.parametrize("name", ["int8.g32*fp16", "int6.g32*fp16@domain=signed", "e2m1.g32*e8m0", "mxfp8"])
@pytest.mark.parametrize("k", [64, 128, 70, 33, 1])
def test_parity_groups_are_the_even_and_the_odd_columns(name, k):
    c = codec(name, order="parity")
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
    q = encode_part(x, c)
    value = q.dequantize()
    for run in range(0, k, 64):
        for parity in (0, 1):
            columns = torch.arange(run + parity, min(run + 64, k), 2)
            if columns.numel():
                alone = encode(x[:, columns], c.format)
                assert same_bits(q.codes[:, columns], alone.codes) and same_bits(value[:, columns], alone.dequantize())
                assert same_bits(q.scale[:, run // 32 + parity], alone.scale[:, 0])
