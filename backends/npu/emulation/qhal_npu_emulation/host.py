"""Level L1 host: every path through the wheel's own host code, on one chip under one version of CANN.

A path passes if the operator's wrapper accepts the call, if one of the named aclnn entry points is reached, if a weight
that should be in FRACTAL_NZ arrives in it, and if the values are those of the emulation on the processor.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from qhal import selection
from qhal_npu import backend
from qhal_npu.calls import INTERNAL
from qhal_npu.ops import NpuOps
from qhal_npu.soc import EXAMPLES
from qhal_npu_emulation import library, standins
from qhal_npu_emulation.device import Device
from qhal_npu_emulation.questions import Question, questions

RUNS = (("A2", "8.5.0"), ("A3", "9.1.0"), ("A5", "9.1.0"))
"""Generation and version of CANN: up to 9.1 weights of A2 and A3 are cast by another call."""


def run(arch: str, cann: str) -> dict[str, Any]:
    """Every question of a generation. One process per run: the stand-in is one chip."""
    standins.load(device=True, soc=EXAMPLES[arch], cann=cann)
    library.install()
    wanted = [q for q in questions() if arch in q.on]
    expected = {q.name: q.ask(NpuOps(arch, "cpu")) for q in wanted}
    with warnings.catch_warnings(), Device() as mode:
        warnings.simplefilter("ignore")
        rows = [_detected(arch), *(_ask(q, arch, expected[q.name]) for q in wanted)]
        packer = _packer()
    return {
        "arch": arch,
        "cann": cann,
        "soc": EXAMPLES[arch],
        "calls": len(mode.calls),
        "paths": rows,
        "packer": packer,
    }


def _detected(arch: str) -> dict[str, Any]:
    """Loading asks the wheel for the chip's name and number, as it does on a device."""
    found = backend().load(selection.Device(0, "unknown until loaded"))
    assert isinstance(found, NpuOps)
    fault = "" if found._arch == arch else f"loaded as {found._arch}"
    return {"name": "detection", "asked": [arch], "reached": [found._arch], "nz": False, "fault": fault}


def _ask(q: Question, arch: str, expected: torch.Tensor) -> dict[str, Any]:
    standins.taken()
    row: dict[str, Any] = {"name": q.name, "asked": list(q.entries), "reached": [], "nz": q.nz, "fault": ""}
    try:
        found = q.ask(NpuOps(arch, "npu:0"))
    except Exception as error:  # a refusal of the wheel is the row's result
        row["fault"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return row
    taken = standins.taken()
    names = [name for name, _ in taken]
    row["reached"] = sorted({n for n in names if n.startswith(q.entries)})
    if not row["reached"]:
        row["fault"] = f"reached {sorted(set(names))}"
    elif q.nz and not any(_has_nz(args) for name, args in taken if name in row["reached"]):
        row["fault"] = "the weight is not in FRACTAL_NZ"
    elif not torch.equal(found, expected):
        row["fault"] = "other values than the emulation on the processor"
    return row


def _has_nz(args: list[Any]) -> bool:
    flat = [t for a in args for t in (a if isinstance(a, list) else [a])]
    return any(isinstance(t, dict) and t.get("format") in INTERNAL and len(t["storage"]) >= 4 for t in flat)


def _packer() -> dict[str, Any]:
    """Level L0 against the wheel itself: its int4 packer runs on the host; its NZ shapes are `layouts.nz`'s."""
    from qhal_npu import calls, layouts

    codes = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    packed = torch.ops.npu.npu_convert_weight_to_int4pack(codes.to("npu:0")).cpu()
    shapes = []
    for k, n in ((32, 64), (48, 96), (40, 33)):
        cast = calls.to_nz(torch.zeros(k, n, dtype=torch.int8).to("npu:0"))
        stored = torch.ops.npu.get_storage_size(cast) if hasattr(torch.ops.npu, "get_storage_size") else -1
        shapes.append((int(stored), layouts.nz(torch.zeros(k, n, dtype=torch.int8)).numel()))
    return {"int4": bool(torch.equal(packed, layouts.pack_int4(codes))), "nz_elements": shapes}
