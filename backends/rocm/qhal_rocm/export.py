"""`python -m qhal_rocm.export --arch gfx950 --kernel NAME --out DIR`: a kernel to be run elsewhere.

For an emulator of the instruction set, or a GPU without Python: the code objects (hsaco), how each is launched, the
inputs, and what must come out. NAME: "quantize[bf16 to int8.row*fp32]", "gemm[int4.g32*bf16 x bf16]"; --rows, --n, --k
give sizes. DIR holds

    launches.json         per launch: kernel, file, grid, threads, bytes of LDS, arguments in order. Constants are in
                          the code; behind the arguments stand two hidden pointers, for scratch memory, both null
    N.hsaco               the code object of launch N
    tensors.safetensors   every tensor that a launch is given, by "N.argument", before the first launch
    expected.safetensors  the operation's result by the portable definition, float64 rounded once
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qhal.elements import WIDE
from qhal.encoding import encode
from qhal.errors import FormatError, QhalError
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import GemmRequest
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_portable.ops import PortableOps
from qhal_rocm.ops import RocmOps
from qhal_triton.absent import Launch, absent


class _Expected(PortableOps):
    """The portable operations, which say what must come out."""

    name, interface = "expected", (1, 0)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def export(arch: str, kernel: str, out: Path, rows: int, n: int, k: int) -> list[Launch]:
    """Writes the folder; FormatError for a name that is none, or that no kernel of this chip takes."""
    found = re.fullmatch(r"(gemm|quantize)\[(\S+) (x|to) (\S+)\]", kernel)
    if found is None or (found[1] == "gemm") != (found[3] == "x"):
        raise FormatError(f'{kernel!r} is no kernel: write "quantize[bf16 to FORMAT]" or "gemm[WEIGHT x INPUT]"')
    ops = RocmOps(arch, "cpu")
    call = _gemm if found[1] == "gemm" else _quantize
    with tempfile.TemporaryDirectory() as cache, absent(ops._target, Path(cache)) as driver:
        got = call(ops, found[2], found[4], rows, n, k)
    if not driver.launches:
        raise FormatError(f"{kernel}: no kernel takes it on {arch}; the portable operation does")
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    written = [_launch(i, launch, out, tensors, ops._target.warp, got) for i, launch in enumerate(driver.launches)]
    (out / "launches.json").write_text(
        json.dumps({"arch": arch, "kernel": kernel, "launches": written}, indent=1) + "\n"
    )
    save_file({name: _bytes(t) for name, t in tensors.items()}, out / "tensors.safetensors")
    save_file({name: _bytes(t) for name, t in call(_Expected(), found[2], found[4], rows, n, k).items()},
              out / "expected.safetensors")  # fmt: skip
    return driver.launches


def _quantize(ops: QuantOps, x: str, to: str, rows: int, n: int, k: int) -> dict[str, Tensor]:
    if x not in WIDE:
        raise FormatError(f"{x!r} is no plain float: choose {', '.join(WIDE)}")
    q = ops.quantize(_numbers(rows, k, 0).to(WIDE[x]), Format.parse(to))
    named = {"codes": q.codes, "scale": q.scale, "zero": q.zero}
    outer = q.scale.scale if isinstance(q.scale, QTensor) else None
    named |= {"scale": q.scale.codes, "outer": outer} if isinstance(q.scale, QTensor) else {}
    return {name: t for name, t in named.items() if isinstance(t, Tensor)}


def _gemm(ops: QuantOps, w: str, x: str, rows: int, n: int, k: int) -> dict[str, Tensor]:
    weight, given = Format.parse(w), Format.parse(x)
    request = GemmRequest(w=weight, x=(given,), n=n, k=k, out=torch.float32)
    numbers = _numbers(n, k, 1)
    kept = encode(numbers, weight)
    inputs = [] if given.plain else [Operand(given)]
    prepared = ops.prepare(kept.codes if weight.plain else kept, request, inputs=inputs)
    plain = WIDE.get(given.element, torch.bfloat16)
    return {"y": ops.gemm(_numbers(rows, k, 0).to(plain), prepared)}


def _numbers(rows: int, k: int, seed: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def _launch(
    index: int, launch: Launch, out: Path, tensors: dict[str, Tensor], warp: int, results: dict[str, Tensor]
) -> dict[str, Any]:
    """One launch for the file; its tensors are added to `tensors`, its code written."""
    (out / f"{index}.hsaco").write_bytes(launch.binary)
    arguments: list[dict[str, Any]] = []
    for (name, kind), value in zip(launch.source.signature.items(), launch.arguments, strict=True):
        if kind == "constexpr":
            continue
        entry: dict[str, Any] = {"name": name, "type": kind}
        if isinstance(value, Tensor):
            entry["tensor"] = f"{index}.{name}"
            tensors[entry["tensor"]] = value
            entry["is"] = next((r for r, t in results.items() if t.data_ptr() == value.data_ptr()), None)
        else:
            entry["value"] = value
        arguments.append(entry)
    metadata = launch.metadata
    return {
        "kernel": launch.kernel,
        "file": f"{index}.hsaco",
        "grid": list(launch.grid),
        "threads": metadata.num_warps * warp,
        "lds": metadata.shared,
        "arguments": arguments,
    }


def _bytes(t: Tensor) -> Tensor:
    """A copy of its own, small floats as bytes: readers differ in which they know."""
    t = t.detach().contiguous().clone()
    return t.view(torch.uint8) if t.is_floating_point() and t.element_size() == 1 else t


def main(arguments: Sequence[str] | None = None) -> int:
    """See the first lines."""
    parser = argparse.ArgumentParser("python -m qhal_rocm.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", required=True)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--out", type=Path, required=True)
    for name, size in (("rows", 16), ("n", 64), ("k", 256)):
        parser.add_argument(f"--{name}", type=int, default=size)
    given = parser.parse_args(arguments)
    try:
        launches = export(given.arch, given.kernel, given.out, given.rows, given.n, given.k)
    except QhalError as error:
        print(f"qhal_rocm.export: {error}", file=sys.stderr)
        return 1
    print(f"written: {given.out}: {', '.join(launch.kernel for launch in launches)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
