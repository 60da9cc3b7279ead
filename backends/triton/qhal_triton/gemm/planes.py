"""Tensors of an operand as kernel arguments: small floats as bytes, strides of 0 where one value serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qhal.elements import element, values
from qhal.tensors import QTensor
from qhal_portable.storage import Stored
from qhal_triton.gemm.paths import Spec
from qhal_triton.gemm.sides import WIDE_KIND


def planes(w: Stored, made: Mapping[str, Tensor], spec: Spec, k: int) -> dict[str, Any]:
    """Of a kept weight and its decoded planes: "w" (words of codes), its planes, and "strides".

    strides: in rows and columns of codes (rows only), scale, zero, offset, outer scale (rows only), then of experts.
    """
    s = spec.w
    if isinstance(w, Tensor):
        codes, found = w, {}
    else:
        assert isinstance(w, QTensor)
        codes = w.codes.view(torch.int32) if spec.parts == 8 else w.codes
        inner, outer = _levels(made.get("scale", w.scale))
        offset = made.get("offset", w.offset)
        found = {"sw": inner, "zw": w.zero, "fw": offset, "ow": outer, "index": w.group_index, "table": w.table}
    if s.kind == "table" and found["table"] is None:
        table = values("nf4")
        assert table is not None
        found["table"] = table.to(codes.device)
    given: dict[str, Any] = {name: found.get(name) for name in ("sw", "zw", "fw", "ow", "index", "table")}
    steps = [codes.stride(-2)]
    for name in ("sw", "zw", "fw"):
        steps += (k // s.group, 1) if s.flat and _full(given[name]) else steps_of(given[name])
    steps.append(steps_of(given["ow"])[0])
    experts = [codes, *(given[name] for name in ("sw", "zw", "fw", "ow"))]
    steps += [0 if t is None or t.dim() < 3 or t.shape[0] == 1 else t.stride(0) for t in experts]
    given |= {name: raw(given[name]) for name in ("sw", "zw", "fw")}
    return {**given, "w": raw(codes), "strides": steps}


def activation(q: Tensor | QTensor, spec: Spec) -> tuple[Tensor, dict[str, Any]]:
    """Codes [rows, K] of x and its planes: scale, zero point and outer scale, with strides in rows and columns.

    Of the outer scale in rows only.
    """
    given = q if isinstance(q, Tensor) else q.codes
    codes = given if given.dim() == 2 else given.reshape(-1, given.shape[-1])
    if spec.x.kind == WIDE_KIND:
        kind = element(spec.type).storage
        codes = codes if codes.dtype == kind else codes.detach().to(kind)
    if isinstance(q, Tensor):
        return codes, _PLAIN
    assert not isinstance(q.zero, QTensor)
    made = "scale" in spec.x.made and isinstance(q.scale, QTensor)
    scale, outer = _levels(q.scale.dequantize() if made else q.scale)  # type: ignore[union-attr]
    scale, zero, outer = _rows(scale), _rows(q.zero), _rows(outer)
    strides = [*steps_of(scale), *steps_of(zero), steps_of(outer)[0]]
    found = {"sx": raw(scale), "ox": outer, "zx": raw(zero), "strides": strides}
    bare = codes if spec.x.kind == WIDE_KIND else raw(codes)
    assert bare is not None
    return bare, found


_PLAIN: dict[str, Any] = {"sx": None, "ox": None, "zx": None, "strides": (0, 0, 0, 0, 0)}
"""Of an x that is not quantized."""


def _levels(scale: Tensor | QTensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A plane of scales: its own numbers or codes, and the numbers above them."""
    if not isinstance(scale, QTensor):
        return scale, None
    assert not isinstance(scale.scale, QTensor)
    return scale.codes, scale.scale


def _rows(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dim() == 2 else t.reshape(-1, t.shape[-1])


def raw(t: Tensor | None) -> Tensor | None:
    """One-byte floats as uint8."""
    return t.view(torch.uint8) if t is not None and t.is_floating_point() and t.element_size() == 1 else t


def steps_of(t: Tensor | None) -> tuple[int, int]:
    """Strides of a grid in rows and columns."""
    if t is None:
        return 0, 0
    return (0 if t.shape[-2] == 1 else t.stride(-2)), (0 if t.shape[-1] == 1 else t.stride(-1))


def _full(t: Tensor | None) -> bool:
    return t is not None and t.shape[-1] > 1
