"""Tuning of products: which tiles are measured, what a table changes, and that results do not depend on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from qhal.errors import UnsupportedError
from qhal.formats import Format
from qhal.requests import GemmRequest, Request, Support
from qhal_triton.gemm import config as sizes
from qhal_triton.gemm import measuring
from qhal_triton.gemm.paths import plan
from qhal_triton.gemm.weights import random_weight
from qhal_triton.ops import TritonOps
from qhal_triton.target import Target
from qhal_triton.tuning import Entry, Table, load

CHIP = Target(kind="cuda", arch="sm_90", warp=32, shared=227 << 10, fp8=frozenset({"e4m3fn", "e5m2"}))
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
BF16 = Format("bf16")
WEIGHTS = ("int4.g32*bf16", "uint4-uint4.g32*fp16", "e2m1.g16*(e4m3fn.tensor*fp32)", "e4m3fn.row*fp32",
           "int6.g16*(int8.g16*fp16)")  # fmt: skip


class Ops(TritonOps):
    name: ClassVar[str] = "triton"
    interface: ClassVar[tuple[int, int]] = (1, 0)

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        return fn


def request_of(w: str = "int4.g32*bf16", n: int = 48, k: int = 512, **more: Any) -> GemmRequest:
    return GemmRequest(w=Format.parse(w), n=n, k=k, x=(BF16,), **more)


def test_the_usual_tile_is_the_first_candidate() -> None:
    r = request_of(n=8192, k=8192)
    made = plan(r, CHIP)
    assert made is not None
    (spec,) = made.specs
    for m in (1, 16, 64, 128):
        steps = -(-r.k // spec.span)
        found = sizes.candidates(spec, m, r.n, steps, CHIP)
        assert found[0] == sizes.config(spec, m, r.n, steps, CHIP) and len(set(found)) == len(found) > 10


@pytest.mark.parametrize("w", WEIGHTS)
def test_another_tile_gives_the_product_within_its_rounding(w: str) -> None:
    r = request_of(w, k=4096, out=torch.float32)  # codes times x are exact in fp32, so are scales: only sums round
    q = random_weight(r.w, (r.n, r.k), torch.Generator(device=DEVICE).manual_seed(1))  # type: ignore[arg-type]
    x = torch.randn(5, r.k, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
    made = plan(r, CHIP)
    assert made is not None
    some = sizes.candidates(made.specs[0], 8, r.n, -(-r.k // made.specs[0].span), CHIP)
    other = next(c for c in some if c.bn != some[0].bn and c.parts > 1)
    table = Table({}, {sizes.problem(r, BF16, 8): Entry(astuple(other))})
    usual, tuned = Ops(CHIP, DEVICE), Ops(CHIP, DEVICE, table)
    value = q.dequantize().double()
    exact, size = x.double() @ value.T, x.double().abs() @ value.abs().T
    for ops in (usual, tuned):
        y = ops.gemm(x, ops.prepare(q, r)).double()
        assert bool(((y - exact).abs() <= (r.k + 4) * 2.0**-24 * size).all())


def test_what_is_measured_is_written_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QHAL_TUNED", str(tmp_path))
    monkeypatch.setattr(measuring, "ROWS", (1, 16))
    seen: list[str] = []

    def measured(ops: Any, bound: Any, f: Format, m: int, compiler: Any) -> Entry:
        return Entry((16, 32, 2, 4, 3), (((16, 64, 1, 4, 4), 9.0), ((16, 32, 2, 4, 3), 7.0)))

    monkeypatch.setattr(measuring, "_measured", measured)
    facts = {"gpu": "A GPU"}
    found = Ops(CHIP, DEVICE, Table(facts)).tune(request_of(m=(1, 16)), seen=seen.append)
    assert seen == ["gemm bf16 x int4.g32*bf16 n=48 k=512 m<=1", "gemm bf16 x int4.g32*bf16 n=48 k=512 m<=16"]
    assert [t.problem for t in found] == seen and found[0].us == 7.0
    assert found[0].rejected == (("(16, 64, 1, 4, 4)", 9.0),)
    assert set(load(facts).entries) == set(seen)


def test_what_has_no_tiles_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="measuring"):
        Ops(CHIP, DEVICE).tune(request_of("bf16"))
    with pytest.raises(UnsupportedError, match="measuring"):
        Ops(CHIP, DEVICE).tune(request_of(batch_invariant=True))


def test_a_kernel_that_a_library_replaces_is_not_measured() -> None:
    class Library(Ops):
        interface: ClassVar[tuple[int, int]] = (1, 0)

        def supports(self, request: Request) -> Support:
            return replace(super().supports(request), executes="a library's product")

    with pytest.raises(UnsupportedError, match="measuring"):
        Library(CHIP, DEVICE).tune(request_of())


def test_processes_compile_what_a_launch_finds(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compiling_calls.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for before, after in json.loads(done.stdout):
        assert before >= 3 and after == 0
