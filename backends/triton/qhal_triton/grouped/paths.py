"""Which grouped products the kernels take: those of `gemm.paths`, with every form of groups and activation."""

from __future__ import annotations

from dataclasses import replace

from qhal.blocks import Block
from qhal.formats import Format
from qhal.requests import GroupedRequest
from qhal_triton.gemm import paths as gemm
from qhal_triton.gemm.paths import Plan
from qhal_triton.paths import Path
from qhal_triton.target import Target


def choose(request: GroupedRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    made = plan(request, target)
    if made is None:
        return None
    path = gemm.path(request.gemm, made)
    after = "" if request.activation is None else f", then {request.activation.name} in fp32"
    return replace(path, executes=f"{path.executes}; tiles of experts found on the device{after}")


def plan(request: GroupedRequest, target: Target) -> Plan | None:
    """How one expert's product is computed; a decoded copy of every expert is never made."""
    made = gemm.plan(request.gemm, target)
    if made is None or request.gemm.group_index:
        return None
    given = [f for f, fixed in zip(request.gemm.x, request.gemm.static, strict=False) if fixed]
    if any(outermost(f).block != Block("tensor") for f in given):
        return None  # each expert may have its own
    many = None if made.packed and made.specs[0].type != "bf16" else made.many  # fp16: no weight may overflow it
    numerics = max(s.numerics for s in (*made.specs, *([] if many is None else [many])))
    return replace(made, dense=0, many=many, numerics=numerics)


def outermost(f: Format) -> Format:
    """The level of a format whose scales are plain numbers: those that a static scale fixes."""
    return f if f.scale is None or f.scale.plain else outermost(f.scale)


def by_rows(f: Format) -> Format:
    """The format with one number of the outermost level for every row."""
    if f.scale is None or f.scale.plain:
        return replace(f, block=Block("row"))
    return replace(f, scale=by_rows(f.scale))
