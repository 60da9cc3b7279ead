"""A product of x like an earlier one skips its checks: it gives the same bits, and what is not alike is checked."""

from __future__ import annotations

import pytest
import torch
from triton_ops import DEVICE, Emulated

from qhal.encoding import encode
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal.tensors import QTensor

OPS = Emulated()
W = Format.parse("int4.g32*bf16")


def weight(n: int, k: int, seed: int = 0) -> QTensor:
    return encode(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), W)


@pytest.mark.parametrize("k", [256, 2048])  # the second in parts that are summed
def test_the_second_call_gives_what_the_first_one_does(k: int) -> None:
    request = GemmRequest(w=W, n=48, k=k, x=(Format("bf16"), Format("fp16")), bias=True)
    bias = torch.randn(48, generator=torch.Generator().manual_seed(1))
    wide = torch.randn(8, k + 8, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
    p = OPS.prepare(weight(48, k), request, bias=bias)
    for x in (wide[:8, :k], wide[:3, :k], wide[:3, 1 : k + 1], wide[:8, :k].contiguous(), wide[:8, :k].half()):
        fresh = OPS.gemm(x, OPS.prepare(weight(48, k), request, bias=bias))
        first, again = OPS.gemm(x, p), OPS.gemm(x, p)
        into = torch.empty_like(fresh)
        assert OPS.gemm(x, p, out=into) is into
        assert all(torch.equal(fresh, y) for y in (first, again, into)) and first.data_ptr() != again.data_ptr()
        assert torch.equal(OPS.gemm(-x, p), OPS.gemm(-x, OPS.prepare(weight(48, k), request, bias=bias)))


def test_a_refit_and_what_does_not_fit_are_noticed() -> None:
    request = GemmRequest(w=W, n=48, k=256, x=(Format("bf16"),))
    p, x = OPS.prepare(weight(48, 256), request), torch.ones(4, 256, dtype=torch.bfloat16, device=DEVICE)
    for _ in range(2):
        OPS.gemm(x, p)
    OPS.prepare(weight(48, 256, seed=3), request, into=p)
    assert torch.equal(OPS.gemm(x, p), OPS.gemm(x, OPS.prepare(weight(48, 256, seed=3), request)))
    for bad in (x[:, ::2], x.float(), x[:, :128], x[0], x.to("meta"), x.T.contiguous().T):
        for _ in range(2):
            with pytest.raises(FormatError):
                OPS.gemm(bad, p)
    assert OPS.gemm(x[:0], p).shape == (0, 48)


def test_codes_elsewhere_are_refused_in_one_line() -> None:
    f = Format.parse("int8.row*fp32")
    w, x = (encode(torch.randn(n, 64, generator=torch.Generator().manual_seed(n)), f) for n in (48, 4))
    p = OPS.prepare(w, GemmRequest(w=f, n=48, k=64, x=(f,), out=torch.bfloat16))
    with pytest.raises(FormatError, match="x is on meta, must be on"):
        OPS.gemm(x.to("meta"), p)
