"""Products of the device's own library against the suite's bounds: do right kernels of real hardware pass their class?

    python benchmarks/device_products.py [--json] [--seeds N] [--level L] [--device TYPE]

The bounds of docs/conformance.md were fitted on models of matrix instructions. Here torch multiplies on this machine's
accelerator what the gemm cases of the suite ask: in float32, with both operands decoded to 16 bits, and fp8 codes by
the matrix instruction, its sums promoted to float32 or not ("fast"). Per kind: checks, how many pass, the largest error
as a share of the bound. Without an accelerator nothing is run. Exits 1 if a kind that must pass its class does not;
"fast" may fail, which is what it is for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qhal.requests import NumericsClass
from qhal.tensors import QTensor
from qhal_conformance import encode, gemm_check
from qhal_conformance.cases import Case
from qhal_conformance.datasets import has_statistics
from qhal_conformance.gemm_cases import cases
from qhal_conformance.problem import DTYPES
from qhal_conformance.tolerance import judge

Product = Callable[[Case, gemm_check.Problem, torch.device], Tensor | None]


def value(t: QTensor | Tensor | np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """float32 numbers of an operand, on the device."""
    if isinstance(t, QTensor):
        return t.dequantize().to(device)
    return torch.as_tensor(t).float().to(device)


def coded(p: gemm_check.Problem) -> QTensor | None:
    """x as codes: as the case has it, or quantized by the suite's own rule; None if x stays plain."""
    if isinstance(p.x, QTensor):
        return p.x
    if not p.operands:
        return None
    scale = p.operands[0].scale
    return encode.quantize(p.x, p.operands[0].format, scale=None if scale is None else scale.numpy())


def finished(y: Tensor, case: Case, p: gemm_check.Problem) -> Tensor:
    """The bias in float32, one rounding."""
    bias = 0.0 if p.bias is None else torch.from_numpy(p.bias).to(y.device)
    return (y + bias).to(DTYPES[case.out])


def in_float32(case: Case, p: gemm_check.Problem, device: torch.device) -> Tensor | None:
    """Both operands decoded to float32."""
    q = coded(p)
    return finished(value(p.x if q is None else q, device) @ value(p.w, device).T, case, p)


def in_sixteen(case: Case, p: gemm_check.Problem, device: torch.device) -> Tensor | None:
    """A plain x and the weight in 16 bits, sums in float32."""
    if case.out == "fp32" or coded(p) is not None or not all(p.w.shape) or not case.size("m"):
        return None
    dtype = DTYPES[case.out]
    x, w = value(p.x, device).to(dtype), value(p.w, device).to(dtype)
    return finished(torch.mm(x, w.T, out_dtype=torch.float32), case, p)


def scaled(fast: bool) -> Product:
    """Codes of e4m3 with row or tensor scales through the matrix instruction."""

    def product(case: Case, p: gemm_check.Problem, device: torch.device) -> Tensor | None:
        q = coded(p)
        m, n, k = (case.size(letter) for letter in "mnk")
        if q is None or q.format.element != "e4m3fn" or p.w.format.element != "e4m3fn" or m * n == 0 or (n | k) % 16:
            return None
        blocks = {str(f.block) for f in (q.format, p.w.format)}
        if not blocks <= {"row", "tensor"}:
            return None
        assert isinstance(q.scale, Tensor) and isinstance(p.w.scale, Tensor)
        a = q.scale.float().reshape(-1, 1).expand(m, 1).contiguous().to(device)
        b = p.w.scale.float().reshape(1, -1).expand(1, n).contiguous().to(device)
        codes = (q.codes.to(device), p.w.codes.to(device).T)
        y = torch._scaled_mm(*codes, scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=fast)
        return y if p.bias is None and case.out == "bf16" else None  # it rounds by itself: nothing may follow

    return product


KINDS: dict[str, tuple[Product, NumericsClass, bool]] = {
    "float32": (in_float32, NumericsClass.FP32_ACC, True),
    "16 bits": (in_sixteen, NumericsClass.DEQUANT_16, True),
    "fp8, promoted": (scaled(False), NumericsClass.REDUCED_ACC, True),
    "fp8, fast": (scaled(True), NumericsClass.REDUCED_ACC, False),
}
"""name -> how, its class, whether it must pass"""


def checks(level: int, seeds: int) -> Iterator[Case]:
    for case in cases(level):
        if not case.has("exact") and case.size("m") * case.size("n") * case.size("k") <= 1 << 24:
            yield from (case.reseeded(seed) for seed in range(seeds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--level", type=int, choices=(0, 1), default=0)
    parser.add_argument("--device", help="a torch device; default: the accelerator of this machine")
    arguments = parser.parse_args()
    found = torch.accelerator.current_accelerator(check_available=True)
    if arguments.device is None and found is None:
        print("not run: no accelerator here; --device cpu tries the float32 kind on the processor", file=sys.stderr)
        return 0
    device = torch.device(arguments.device or found)
    torch.set_float32_matmul_precision("highest")
    rows: dict[str, dict[str, Any]] = {
        name: {"class": numerics.label, "checks": 0, "passed": 0, "largest": 0.0, "failed": []}
        for name, (_, numerics, _) in KINDS.items()
    }
    for case in checks(arguments.level, arguments.seeds):
        p = gemm_check.build(case)
        for name, (product, numerics, _) in KINDS.items():
            if device.type == "cpu" and name != "float32":
                continue
            y = product(case, p, device)
            if y is None:
                continue
            got, row = y.double().cpu().numpy(), rows[name]
            verdict = judge(got, p.product.expected(numerics), numerics, case.out, statistics=has_statistics(case.data))
            row["checks"] += 1
            row["passed"] += verdict.kind is None
            row["largest"] = max(row["largest"], verdict.headroom or 0.0)
            if verdict.kind is not None:
                row["failed"].append(f"{case.id}: {verdict.detail}")
    if arguments.json:
        print(json.dumps({"device": str(device), "torch": torch.__version__, "kinds": rows}, indent=1))
    else:
        print(f"on {device}, torch {torch.__version__}")
        print(f"{'':16}{'class':>14}{'checks':>8}{'passed':>8}{'error/bound':>13}")
        for name, row in rows.items():
            print(f"{name:16}{row['class']:>14}{row['checks']:>8}{row['passed']:>8}{row['largest']:>13.3f}")
            for text in row["failed"][:3]:
                print(f"  {text}")
    return int(any(must and rows[name]["failed"] for name, (_, _, must) in KINDS.items()))


if __name__ == "__main__":
    sys.exit(main())
