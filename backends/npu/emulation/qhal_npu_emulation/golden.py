"""Every golden ModelSlim checkpoint: planned for each generation, run in emulation, compared with what the tool says.

With fp32 activations, as the tool computes, a layer's output is within (K + 8) 2^-24 S of the tool's (S: the sum of
the terms' magnitudes): `output_per_token`, `output_device`, `output_decode` or `output_clip_once`, which follow the
serving operators, where a case has them, else `output`. With bf16 activations, where every operator of a path runs, it
is within the class of the path and half a unit of the exact product of the codes. Where the hardware fixes another
rule than the checkpoint's, the plan says so, and the distance is told and not judged.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import qhal
import qhal_npu_emulation as emulation
import qhal_schemes
from qhal import rotations
from qhal.encoding import encode
from qhal.interface import QuantOps
from qhal.layer_formats import LinearFormat
from qhal.layers import gemm_request, prepare_linear
from qhal.requests import NumericsClass
from qhal.specs import LinearSpec

BESIDE = {"output_per_token": False, "output_device": None, "output_decode": True, "output_clip_once": False}
"""Whether an output is that of decoding; None: of the static input, whichever step has it."""
_OPERANDS = {
    NumericsClass.EXACT: 0.0,
    NumericsClass.FP32_ACC: 0.0,
    NumericsClass.REDUCED_ACC: 1.25 * 2.0**-12,
    NumericsClass.DEQUANT_16: 2.0**-9,
}
"""What a class may lose of S besides its fp32 sums: in aligned sums, or as operands become bf16."""


def run() -> list[dict[str, Any]]:
    """One row per case and generation: $QHAL_GOLDEN, and the cases that only this repository has."""
    own = {p.name: p for p in _cases(Path(__file__).parents[4] / "tests" / "golden")}
    given = os.environ.get("QHAL_GOLDEN")
    cases = own | ({p.name: p for p in _cases(Path(given))} if given else {})
    return [_case(cases[name], arch) for name in sorted(cases) for arch in emulation.ARCHS]


def _cases(folder: Path) -> list[Path]:
    found = folder / "modelslim"
    return [p for p in sorted(found.iterdir()) if (p / "checkpoint").is_dir()] if found.is_dir() else []


def _case(path: Path, arch: str) -> dict[str, Any]:
    ops = emulation.ops(arch)
    checkpoint = qhal_schemes.open_checkpoint(path / "checkpoint")
    plan = qhal.resolve(checkpoint, ops, policy="report", dtype=torch.bfloat16)
    count = {
        s: sum(len(e.layers) for e in plan.entries if e.status == s) for s in ("ok", "rule", "downgrade", "refused")
    }
    refused = {name for e in plan.entries if e.status == "refused" for name in e.layers}
    row: dict[str, Any] = {
        "case": path.name,
        "arch": arch,
        "plan": {word: n for word, n in count.items() if n},
        "refused": sorted({e.support.reason for e in plan.entries if e.status == "refused"}),
        "fp32": {"outputs": 0, "within": 0, "worst": 0.0},
        "bf16": {"outputs": 0, "within": 0, "worst": 0.0},
        "rule": 0.0,
    }
    expected = load_file(path / "expected.safetensors")
    for f in checkpoint.layer_formats():
        if isinstance(f, LinearFormat) and f.name not in refused and f"{f.name}.input" in expected:
            _layer(row, checkpoint.linear_spec(f.name), f, ops, expected)
    return row


def _layer(row: dict[str, Any], spec: LinearSpec, f: LinearFormat, ops: QuantOps, expected: dict[str, Tensor]) -> None:
    x = expected[f"{f.name}.input"]
    for dtype, column in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        support = ops.supports(gemm_request(f, dtype))
        layer = prepare_linear(spec, ops, dtype=dtype)
        for name in [n for n in BESIDE if f"{f.name}.{n}" in expected] or ["output"]:
            decode = BESIDE.get(name, False)
            decode = spec.decode_input is not None if decode is None else decode
            y = layer(x.to(dtype), decode=decode).double()
            exact, size = product(spec, x.to(dtype), decode)
            if column == "fp32":
                want = expected[f"{f.name}.{name}"].double()
                if support.rule is not None:
                    row["rule"] = max(row["rule"], float((y - want).abs().max() / want.abs().max()))
                    continue
                room = size * (f.k + 8) * 2.0**-24 + want.abs() * 2.0**-24
            elif support.rule is not None:
                continue
            else:
                want, room = exact, bound(support.numerics, exact, size, f.k, dtype)
            worst = float(((y - want).abs() / room.clamp_min(1e-30)).max())
            found = row[column]
            found["outputs"] += 1
            found["within"] += worst <= 1
            found["worst"] = round(max(found["worst"], worst), 3)


def bound(numerics: NumericsClass | None, exact: Tensor, size: Tensor, k: int, out: torch.dtype) -> Tensor:
    """How far a result in `out` may be from the exact one: what its class may lose of S = `size`, one rounding."""
    assert numerics is not None
    room = size * (_OPERANDS[numerics] + (k + 8) * 2.0**-24)
    return room + (exact.abs() + room) * torch.finfo(out).eps / 2


def product(spec: LinearSpec, x: Tensor, decode: bool) -> tuple[Tensor, Tensor]:
    """float64 y of the codes of x, and the sum of the terms' magnitudes."""
    operand = spec.decode_input if decode else spec.input
    turned = x
    for r in spec.rotate_in:
        turned = (turned.double() @ rotations.matrix((r,), x.shape[-1])).to(x.dtype)
    q = turned
    if operand is not None:
        q = encode(turned, operand.format, scale=operand.scale, zero=operand.zero, clip=operand.clip).dequantize()
    w = spec.stored().double()
    y, size = q.double() @ w.T, q.abs().double() @ w.abs().T
    if spec.low_rank is not None:
        down, up = (part.double() for part in spec.low_rank)
        y, size = y + turned.double() @ down.T @ up.T, size + turned.abs().double() @ down.abs().T @ up.abs().T
    return (y, size) if spec.bias is None else (y + spec.bias.double(), size + spec.bias.abs().double())
