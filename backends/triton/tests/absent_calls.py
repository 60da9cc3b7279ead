"""Run by `test_triton_absent.py` in a process without the interpreter: calls for a chip that is not here, printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import qhal
from qhal.requests import QuantizeRequest
from qhal_triton.absent import absent, names
from qhal_triton.compile import target_of
from qhal_triton.ops import TritonOps
from qhal_triton.quantize.tiles import FORMATS


class Ops(TritonOps):
    name, interface = "absent", (1, 0)


def main(arch: str, cache: Path) -> None:
    ops = Ops(target_of(arch), torch.device("cpu"))
    taken = {}
    with absent(ops._target, cache) as driver:
        for name in FORMATS[::2]:
            f = qhal.Format.parse(name)
            if ops._path(QuantizeRequest(x=torch.bfloat16, format=f)) is None:
                continue
            before = len(driver.launches)
            for _ in range(2):  # Triton checks that what a kernel refers to is what it was
                ops.quantize(torch.zeros(128, 256, dtype=torch.bfloat16), f)
            taken[name] = names(driver.launches[before:])
    binaries = [len(launch.binary) for launch in driver.launches]
    print(json.dumps({"taken": taken, "smallest": min(binaries), "entries": len(list(cache.iterdir()))}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
