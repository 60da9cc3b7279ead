"""What the suite cannot know: how this backend is found, its layout, its words."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import qhal
from qhal.encoding import encode
from qhal_acme import backend, probe, weights


def test_describing_the_backend_loads_no_operation() -> None:
    script = "import sys, qhal; qhal.backends()['acme']; print('qhal_acme.ops' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"


def test_the_device_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(probe.VARIABLE, "cpu")
    found = backend().probe()
    assert isinstance(found, qhal.Available) and found.devices[0].arch == "cpu"
    monkeypatch.setenv(probe.VARIABLE, "nothing:7")
    found = backend().probe()
    assert isinstance(found, qhal.Unavailable) and "nothing:7" in found.reason and "cpu" in found.hint


@pytest.mark.parametrize("k", [1, 7, 32])
def test_nibbles_come_back(k: int) -> None:
    codes = (torch.arange(3 * k).reshape(3, k) % 16 - 8).to(torch.int8)
    packed = weights.pack(codes)
    assert packed.shape == (3, (k + 1) // 2) and torch.equal(weights.unpack(packed, k), codes)


def test_a_refusal_says_what_is_in_the_way() -> None:
    ops = qhal.select("acme")
    refused = ops.supports(qhal.GemmRequest(w=qhal.Format.parse("nf4_flat64"), n=64, k=64, x=(qhal.Format("bf16"),)))
    assert not refused and "nf4" in refused.reason and "int4" in refused.reason


def test_a_layer_of_int8_times_int8() -> None:
    ops, int8 = qhal.select("acme"), qhal.Format.parse("int8.row*fp32")
    w = encode(torch.linspace(-1, 1, 8 * 16).reshape(8, 16), int8).to(ops.device)
    x = torch.linspace(-2, 2, 3 * 16, device=ops.device).reshape(3, 16)
    weight = ops.prepare(w, qhal.GemmRequest(w=int8, n=8, k=16, x=(int8,)), inputs=[qhal.Operand(int8)])
    expected = ops.quantize(x, int8).dequantize() @ w.dequantize().T
    assert torch.allclose(ops.gemm(x, weight), expected, rtol=1e-6, atol=1e-6)
