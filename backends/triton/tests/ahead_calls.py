"""Run by `test_triton_ahead.py` without the interpreter: build a folder, or use one, and print what is new."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton

import qhal
from qhal.requests import QuantizeRequest
from qhal_triton import ahead
from qhal_triton.absent import absent
from qhal_triton.calls import calls
from qhal_triton.compile import target_of
from qhal_triton.ops import TritonOps

REQUESTS = [
    QuantizeRequest(x=torch.bfloat16, format=qhal.Format.parse("int8.g128*fp32")),
    QuantizeRequest(x=torch.bfloat16, format=qhal.Format.parse("nf4.g32*fp32")),  # no kernel takes it
]


class Ops(TritonOps):
    name, interface = "ahead", (1, 0)


def main(what: str, arch: str, folder: Path, cache: Path) -> None:
    ops = Ops(target_of(arch), torch.device("cpu"))
    if what == "build":
        print(json.dumps(ahead.build(ops, REQUESTS, folder, lambda request: None)))
        return
    triton.knobs.cache.dir = str(cache)
    placed, again = ahead.use(folder, ops._target), ahead.use(folder, ops._target)
    before = set(cache.iterdir())
    with absent(ops._target, cache) as driver:
        calls(ops, REQUESTS[0])
    compiled = len(set(cache.iterdir()) - before)
    print(json.dumps({"placed": placed, "again": again, "compiled": compiled, "launches": len(driver.launches)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
