"""The all-reduce codec against an independent model of QuickReduce (tests/generators/quickreduce.py, numpy, fp16)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qhal import Codec, Format
from qhal.collectives import simulate
from qhal.wire import encode_part, wire_size

CODECS = {"int8": 8, "int6": 6, "int4": 4, "int3": 3}
FILE = Path(__file__).parent / "golden" / "comm" / "quickreduce" / "expected.safetensors"


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FILE)


def codec(name: str) -> Codec:
    """The same arithmetic in qhal's words."""
    planes = {"int6": (4, 2), "int3": (2, 1)}.get(name, ())
    f = Format.parse(f"{name}.g32*fp16@domain=signed,empty=zero")
    return Codec(f, order="parity", planes=planes, accumulate="fp16")


def by_parity(codes: torch.Tensor) -> torch.Tensor:
    """[rows, K] as the model keeps it: [runs of 64, parity, 32]."""
    return codes.reshape(-1, 32, 2).transpose(1, 2)


@pytest.mark.parametrize("kind", ["normal", "grid"])
@pytest.mark.parametrize("name", CODECS)
def test_scales_are_equal_and_codes_but_for_ties(expected: dict[str, torch.Tensor], name: str, kind: str) -> None:
    xs, codes, scales = (expected[f"{name}.{kind}.{part}"] for part in ("x", "codes", "scales"))
    for x, theirs, scale in zip(xs, codes, scales, strict=True):
        q = encode_part(x, codec(name))
        assert isinstance(q.scale, torch.Tensor)
        assert torch.equal(q.scale.reshape(-1, 2, 1), scale)
        ours = by_parity(q.codes)
        exact = by_parity(x).double() / torch.where(scale == 0, 1, scale).double()
        # the model rounds the reciprocal of (scale + 2^-24) and the product to fp16: three relative errors
        slack = exact.abs() * (2.0**-11 + 2.0**-11 + 2.0**-24 / scale.abs().clamp(min=2.0**-24).double()) * 1.01
        distance = (exact - exact.floor() - 0.5).abs()
        wrong = ours != theirs
        assert bool(((ours.int() - theirs.int()).abs()[wrong] == 1).all())
        assert bool((distance[wrong] <= slack[wrong]).all())
        assert kind != "grid" or not bool(wrong.any())


@pytest.mark.parametrize("name", CODECS)
def test_sums_have_the_same_bits(expected: dict[str, torch.Tensor], name: str) -> None:
    """On a grid on which both divisions are exact: own part quantized, fp16 sums in rank order."""
    xs, wanted = expected[f"{name}.grid.x"], expected[f"{name}.grid.all_reduce"]
    first = [encode_part(x, codec(name)).dequantize() for x in xs]
    assert all(torch.equal(x.float(), value) for x, value in zip(xs, first, strict=True))
    sums = simulate(list(xs), "all_reduce", replace(codec(name), requantize=False))
    assert all(isinstance(y, torch.Tensor) and torch.equal(y, expected[f"{name}.grid.sums"]) for y in sums)
    result, *others = simulate(list(xs), "all_reduce", codec(name))
    assert isinstance(result, torch.Tensor)
    assert all(torch.equal(result, y) for y in others if isinstance(y, torch.Tensor))
    # quantizing the sum again: equal codes, or one apart where the model's fp16 quotient crosses a tie
    again = encode_part(expected[f"{name}.grid.sums"], codec(name))
    assert torch.equal(result, again.dequantize().half())
    step = scale_of(expected[f"{name}.grid.sums"].float(), CODECS[name])
    assert bool(((result - wanted).abs().double() <= step * (1 + 2.0**-10) + result.abs().double() * 2.0**-10).all())


@pytest.mark.parametrize("name", CODECS)
def test_random_sums_differ_by_steps_of_ties_only(expected: dict[str, torch.Tensor], name: str) -> None:
    xs, wanted = expected[f"{name}.normal.x"], expected[f"{name}.normal.all_reduce"]
    (result, *others) = simulate(list(xs), "all_reduce", codec(name))
    assert isinstance(result, torch.Tensor)
    assert all(torch.equal(result, y) for y in others if isinstance(y, torch.Tensor))
    # a rank's code may be one step off, every fp16 sum rounds, the code of the sum may be one step off, and its scale
    # moves by what the group's peak moved over 2^(b-1), which at most 2^(b-1) codes multiply
    bits = CODECS[name]
    moved = sum(scale_of(x.float(), bits) for x in xs) + len(xs) * 2.0**-11 * sum(x.abs().double() for x in xs)
    peak_moved = scale_of(moved, bits) * (1 << (bits - 1))
    slack = moved + peak_moved + scale_of(result.float(), bits) + 2.0**-9 * (moved + peak_moved + result.abs().double())
    assert bool(((result.double() - wanted.double()).abs() <= slack).all())


def scale_of(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The step of every element: the peak of its parity group over 2^(b-1)."""
    peak = by_parity(x).abs().amax(-1, keepdim=True).double() / (1 << (bits - 1))
    return peak.expand(-1, 2, 32).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(("name", "size"), [("int8", 2176), ("int6", 1664), ("int4", 1152), ("int3", 896)])
def test_bytes_per_2048_values(name: str, size: int) -> None:
    assert wire_size(codec(name), 8, 256) == size
