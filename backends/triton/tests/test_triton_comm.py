"""Collectives encode their parts with the kernel, and every byte on the wire stays the same."""

from __future__ import annotations

import pytest
import torch
from triton_ops import DEVICE, Emulated

from qhal.codecs import Codec
from qhal.collectives import Rank
from qhal.formats import Format

OPS = Emulated()


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather"])
@pytest.mark.parametrize(
    "codec",
    [
        Codec(Format.parse("int8.g128*bf16")),
        Codec(Format.parse("e4m3fn.g128*fp32")),
        Codec(Format.parse("uint4-uint4.g32*bf16@domain=minmax"), order="parity"),
        Codec(Format.parse("e2m1.g32*e8m0"), requantize=False),
    ],
    ids=lambda codec: str(codec.format),
)
@pytest.mark.parametrize("rows", [5, 1])
def test_the_bytes_are_those_of_the_definition(
    codec: Codec, collective: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    messages = []
    for here, device in ((x, torch.device("cpu")), (x.to(DEVICE), torch.device(DEVICE))):
        kernel = len(messages) > 0
        extra = {"quantize": OPS._encode} if kernel else {}
        if kernel:
            monkeypatch.setattr("qhal_portable.quantize.encode", None)  # the kernel is what runs
        steps = Rank(here, collective, codec, None, True, 0, 2, None, device, **extra).steps()  # type: ignore[arg-type]
        header = next(steps).messages[0]
        sent = steps.send([header, header]).messages
        total = steps.send([sent[0], sent[0]]).messages if collective == "all_reduce" else []
        messages.append([m.cpu() for m in (*sent, *total)])
    assert all(torch.equal(a, b) for a, b in zip(*messages, strict=True)) and len(messages[0]) >= 2
