"""Level L0: every layout is a bijection, and every change of flavour is exact. Plain torch, no device and no kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qhal
from qhal.encoding import encode
from qhal.flavours import FNUZ
from qhal.recoding import recode
from qhal_portable import storage
from qhal_rocm import layouts

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4))


def byte_numbers(rows: int, cols: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, cols), generator=torch.Generator().manual_seed(rows * cols)).to(torch.uint8)


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_tiled_weights_come_back(size: tuple[int, int]) -> None:
    w = byte_numbers(16 * size[0], 32 * size[1])
    assert torch.equal(layouts.unshuffled(layouts.shuffled(w)), w)


def test_where_a_tiled_weight_lies() -> None:
    """Element by element, from the description: lanes of 16 bytes, then rows, then halves of a tile, then tiles."""
    n, k = 32, 96
    place = torch.arange(n * k).reshape(n, k)
    w = (place % 251).to(torch.uint8)
    got = layouts.shuffled(w).flatten()
    for row, col in [(0, 0), (0, 15), (0, 16), (1, 0), (15, 31), (16, 0), (17, 50), (31, 95)]:
        tile = (row // 16) * (k // 32) + col // 32
        at = tile * 512 + (col % 32 // 16) * 256 + (row % 16) * 16 + col % 16
        assert int(got[at]) == int(w[row, col])


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_swizzled_scales_come_back(size: tuple[int, int]) -> None:
    scale = byte_numbers(32 * size[0], 8 * size[1])
    assert torch.equal(layouts.unswizzled(layouts.swizzled(scale)), scale)
    assert sorted(layouts.swizzled(scale).flatten().tolist()) == sorted(scale.flatten().tolist())


def test_where_a_swizzled_scale_lies() -> None:
    rows, cols = 64, 16
    scale = (torch.arange(rows * cols) % 253).reshape(rows, cols).to(torch.uint8)
    got = layouts.swizzled(scale).flatten()
    for r, c in [(0, 0), (1, 0), (16, 0), (0, 4), (0, 1), (33, 9), (63, 15)]:
        at = (((((r // 32) * 2 + c // 8) * 4 + c % 4) * 16 + r % 16) * 2 + c % 8 // 4) * 2 + r % 32 // 16
        assert int(got[at]) == int(scale[r, c])


@pytest.mark.parametrize("shape", [(8, 32), (16, 48)])
def test_what_does_not_tile_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(qhal.FormatError, match="N % 16"):
        layouts.shuffled(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(qhal.FormatError, match="rows % 32"):
        layouts.swizzled(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["e4m3fn.row*fp32", "e4m3fn.128x128*fp32", "e4m3fn.g32*e8m0", "e5m2.tensor*fp32"])
def test_the_other_flavour_has_the_same_numbers(name: str) -> None:
    f = qhal.Format.parse(name)
    w = encode(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), f)
    to = qhal.Format.parse(name.replace(f.element, FNUZ[f.element]))
    made = recode(w, to)
    assert torch.equal(made.dequantize(), w.dequantize()) and made.codes.data_ptr() != w.codes.data_ptr()
    assert torch.equal(recode(made, f).dequantize(), w.dequantize())


def test_nan_codes_are_refused() -> None:
    f = qhal.Format.parse("e4m3fn.row*fp32")
    w = encode(torch.ones(16, 32), f)
    w.codes.view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(qhal.FormatError, match="code 0xFF of e4m3fn has no counterpart in e4m3fnuz"):
        recode(w, qhal.Format.parse("e4m3fnuz.row*fp32"))


@pytest.mark.parametrize(
    "name", ["int4.g32*bf16", "uint4-uint4.g32*bf16@domain=minmax", "int3.g32*bf16", "e2m1.g32*e8m0"]
)
def test_two_codes_to_a_byte_come_back(name: str) -> None:
    w = encode(torch.randn(8, 256, generator=torch.Generator().manual_seed(1)), qhal.Format.parse(name))
    kept = storage.keep(w, torch.device("cpu"))
    back = storage.canonical(kept)
    assert isinstance(kept, qhal.QTensor) and isinstance(back, qhal.QTensor)
    assert kept.codes.shape[-1] == 128 and torch.equal(back.codes, w.codes)
