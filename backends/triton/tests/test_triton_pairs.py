"""Packed instructions of the kernels, executed one by one on the processor: every code, every place."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from qhal.elements import values
from qhal_triton import bits
from qhal_triton.gemm.kernels import eights, pairs
from qhal_triton.kv.kernels import packed

MASK = 0xFFFFFFFF


def lanes(register: int, half: bool) -> torch.Tensor:
    """Two 16-bit floats of a register, the lower one first, in float64."""
    words = torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32).to(torch.uint16)
    return words.view(torch.float16 if half else torch.bfloat16).double()


def register(value: torch.Tensor, half: bool) -> int:
    """float64 [2] rounded once to 16 bits; the sums here are exact in fp32, so the cast rounds once."""
    words = value.float().to(torch.float16 if half else torch.bfloat16).view(torch.uint16).tolist()
    return int(words[0]) | int(words[1]) << 16


def execute(text: str, operands: dict[str, Any]) -> dict[str, Any]:
    """What registers hold after the instructions of `text`: those of PTX that `pairs.py` and `packed.py` use."""
    held = dict(operands)

    def read(name: str) -> Any:
        return held[name] if name in held else int(name, 0)

    for line in (part.strip() for part in text.strip("{ }").split(";")):
        if not line or line.startswith(".reg"):
            continue
        name, *arguments = re.split(r"[ ,]+", re.sub(r"[{}]", "", line))
        if "{" in line:  # a register to its two halves
            low, high, whole = arguments
            held[low], held[high] = read(whole) & 0xFFFF, read(whole) >> 16
            continue
        to, given = arguments[0], [read(a) for a in arguments[1:]]
        if name == "mov.b32":
            held[to] = given[0]
        elif name == "prmt.b32":
            eight = (given[0] | given[1] << 32).to_bytes(8, "little")
            held[to] = int.from_bytes(bytes(eight[(given[2] >> (4 * i)) & 7] for i in range(4)), "little")
        elif name == "shr.u32":
            held[to] = given[0] >> given[1]
        elif name == "shl.b32":
            held[to] = given[0] << given[1] & MASK
        elif name == "and.b32":
            held[to] = given[0] & given[1]
        elif name == "mul.lo.u32":
            held[to] = given[0] * given[1] & MASK
        elif name == "mad.lo.u32":
            held[to] = given[0] * given[1] + given[2] & MASK
        elif name == "or.b32":
            held[to] = given[0] | given[1]
        elif name == "lop3.b32":
            bits = (int(given[3] >> (a << 2 | b << 1 | c) & 1) for a, b, c in zip(*map(_bits, given[:3]), strict=True))
            held[to] = sum(bit << i for i, bit in enumerate(bits))
        elif name in ("fma.rn.f16x2", "fma.rn.bf16x2"):
            half = name == "fma.rn.f16x2"
            a, b, c = (lanes(g, half) for g in given)
            held[to] = register(a * b + c, half)
        elif name == "cvt.rn.f16x2.e4m3x2":
            two = torch.tensor([given[0] & 0xFF, given[0] >> 8], dtype=torch.uint8).view(torch.float8_e4m3fn)
            held[to] = register(two.double(), True)
        elif name == "cvt.f32.f16":  # the number itself: fp32 holds it
            held[to] = lanes(given[0], True)[0]
        elif name == "cvt.rn.bf16x2.f32":
            held[to] = register(torch.stack([given[1], given[0]]), False)
        else:
            raise AssertionError(f"{name} is no instruction of this machine")
    return held


def _bits(number: int) -> list[int]:
    return [number >> i & 1 for i in range(32)]


def words(codes: list[int]) -> int:
    return sum(code << (4 * i) for i, code in enumerate(codes))


def decoded(text: str, part: int, half: bool, less: float = 0.0) -> list[tuple[float, float]]:
    """Both numbers for every code in place `part` of the first word, 15 - code in that of the second."""
    found = []
    for code in range(16):
        first, second = ([5, 10, 0, 15, 3, 12, 8, 7] for _ in range(2))
        first[part], second[part] = code, 15 - code
        operands = {"$1": words(first), "$2": words(second), "$3": 4 * (part % 4), "$4": 4 * (part % 4)}
        selector = 0x7632 if part >= 4 else 0x5410
        operands |= {"$5": selector, "$6": selector, "$7": register(torch.tensor([less, less]).double(), half)}
        low, high = lanes(execute(text, operands)["$0"], half).tolist()
        found.append((low, high))
    return found


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("half", [False, True], ids=["bf16", "fp16"])
@pytest.mark.parametrize("zero", [0, 7, 15])
def test_integers(part: int, half: bool, zero: int) -> None:
    base = 1024 if half else 128
    signed = decoded((pairs._INT_FP16 if half else pairs._INT_BF16).value, part, half, -(base + 8.0 + zero))
    plain = decoded((pairs._UINT_FP16 if half else pairs._UINT_BF16).value, part, half, -(base + 0.0 + zero))
    for code in range(16):
        values_of = [(c ^ 8) - 8 - zero for c in (code, 15 - code)]
        assert list(signed[code]) == values_of
        assert list(plain[code]) == [code - zero, 15 - code - zero]


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("half", [False, True], ids=["bf16", "fp16"])
def test_e2m1(part: int, half: bool) -> None:
    table = values("e2m1")
    assert table is not None
    found = decoded((pairs._E2M1_FP16 if half else pairs._E2M1_BF16).value, part, half)
    assert found == [(float(table[code]), float(table[15 - code])) for code in range(16)]


@pytest.mark.parametrize("name", ["e2m1", "int4", "uint4"])
@pytest.mark.parametrize("odd", [0, 1])
def test_nibbles_of_four_bytes(name: str, odd: int) -> None:
    text = getattr(packed, f"_{name.upper()}_{'HIGH' if odd else 'LOW'}").value
    table = values(name)
    for byte in range(256):
        four = [byte, 255 - byte, byte ^ 0x5A, (byte * 7) & 0xFF]
        held = execute(text, {"$2": int.from_bytes(bytes(four), "little")})
        codes = [b >> 4 if odd else b & 15 for b in four]
        wanted = [float(table[c]) if table is not None else c if name == "uint4" else (c ^ 8) - 8 for c in codes]
        assert lanes(held["$0"], False).tolist() + lanes(held["$1"], False).tolist() == wanted


def e4m3_of(name: str, nibble: int) -> int:
    """The byte of a code's number, less the power of two that `POWERS` names."""
    table = values(name)
    number = float((nibble ^ 8) - 8 if table is None else table[nibble])
    power = eights.POWERS["int" if table is None else name]
    made = torch.tensor([number / power]).to(torch.float8_e4m3fn)
    assert float(made.float() * power) == number
    return int(made.view(torch.uint8))


@pytest.mark.parametrize("name", ["int4", "e2m1"])
@pytest.mark.parametrize("high", [False, True])
def test_nibbles_as_bytes_of_e4m3(name: str, high: bool) -> None:
    """Every byte in every place of a register, by the instructions and by the arithmetic that stands for them."""
    kind = "int" if name == "int4" else name
    text = getattr(eights, f"_{kind.upper()}_{'HIGH' if high else 'LOW'}").value
    wanted = [e4m3_of(name, byte >> 4 if high else byte & 15) for byte in range(256)]
    for byte in range(256):
        four = [byte, 255 - byte, byte ^ 0x5A, (byte * 7) & 0xFF]
        held = execute(text, {"$1": int.from_bytes(bytes(four), "little")})
        assert list(held["$0"].to_bytes(4, "little")) == [wanted[b] for b in four]
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    every = torch.arange(256, dtype=torch.uint8, device=device)
    made = torch.zeros_like(every)
    every_byte[(1,)](every, made, KIND=kind, PART=int(high), PTX=device != "cpu")
    assert made.tolist() == wanted


@triton.jit
def every_byte(source, made, KIND: tl.constexpr, PART: tl.constexpr, PTX: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(made + at, eights.eights(tl.load(source + at), KIND, PART, PTX))


@pytest.mark.parametrize("odd", [0, 1])
def test_bytes_of_two_words(odd: int) -> None:
    text = (packed._INT8_HIGH if odd else packed._INT8_LOW).value
    for byte in range(256):
        four = [byte, 255 - byte, byte ^ 0x5A, (byte * 7) & 0xFF]
        held = execute(text, {"$1": int.from_bytes(bytes(four), "little")})
        assert lanes(held["$0"], False).tolist() == [float((b ^ 128) - 128) for b in four[odd::2]]


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("odd", [0, 1])
def test_small_floats_of_two_words(name: str, odd: int) -> None:
    text = getattr(packed, f"_{name.upper()}_{'HIGH' if odd else 'LOW'}").value
    kind = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    for byte in range(256):
        four = torch.tensor([byte, 255 - byte, byte ^ 0x5A, (byte * 7) & 0xFF], dtype=torch.uint8)
        held = execute(text, {"$1": int.from_bytes(bytes(four.tolist()), "little")})
        wanted = four.view(kind).double()[odd::2]
        assert torch.equal(lanes(held["$0"], False).nan_to_num(1e9), wanted.nan_to_num(1e9))


@pytest.mark.parametrize("half", [False, True], ids=["bf16", "fp16"])
def test_a_product_is_rounded_once_and_keeps_its_sign(half: bool) -> None:
    text = (bits.TIMES_FP16 if half else bits.TIMES_BF16).value
    kind = torch.float16 if half else torch.bfloat16
    numbers = torch.arange(-15, 16).double()
    scales = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(kind).double()
    for scale in [*scales, torch.tensor(0.0).double()]:
        for at in range(30):
            a, b = numbers[at : at + 2], torch.stack([scale, -scale])
            got = lanes(execute(text, {"$1": register(a, half), "$2": register(b, half)})["$0"], half)
            wanted = (a * b).float().to(kind).double()
            assert torch.equal(got, wanted) and torch.equal(got.signbit(), wanted.signbit())
