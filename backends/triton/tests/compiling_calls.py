"""Run by `test_triton_tune.py` without the interpreter: what processes compiled ahead is found by the launch itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton

from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal_triton.compile import target_of
from qhal_triton.gemm.compiling import Compiler, compiled
from qhal_triton.gemm.config import Config
from qhal_triton.ops import here


def main(cache: Path) -> None:
    triton.knobs.cache.dir = str(cache)
    target, counts = target_of("sm_90"), []
    for x in ("bf16", "int8.row*fp32"):
        f = Format.parse(x)
        request = GemmRequest(w=Format.parse("int4.g128*bf16"), n=256, k=512, x=(f,), m=(1, 128), out=torch.bfloat16)
        tiles = [(f, 16, Config(16, 64, parts, 4, 3)) for parts in (1, 2)] + [(f, 128, Config(128, 128, 1, 8, 2))]
        with Compiler(here, target, request, 2) as compiler:
            compiler([*tiles, (f, 16, Config(16, 64, 1, 4, -1))])  # the last one is none
        before = set(cache.iterdir())
        for one in tiles:
            compiled(here, target, request, *one, str(cache))
        counts.append([len(before), len(set(cache.iterdir()) - before)])
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
