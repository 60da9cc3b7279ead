"""Products of 16-bit floats with float32 sums, by torch."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_SWITCHES, _SWITCHED = torch.backends.cuda.matmul, threading.Lock()


def float_product(a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias, summed in float32 and rounded once to `dtype`; the bias is float32.

    Only NVIDIA's torch leaves sums unrounded, or rounds them last; elsewhere the operands are widened first.
    """
    if not a.is_cuda or torch.version.hip is not None:
        y = a.float() @ b.float()
    elif bias is None and dtype == a.dtype == torch.bfloat16:
        return _rounded_last(a, b)
    else:
        y = torch.mm(a, b, out_dtype=torch.float32)
    return (y if bias is None else y.add_(bias)).to(dtype)


def _rounded_last(a: Tensor, b: Tensor) -> Tensor:
    """bf16 of float32 sums. torch's default lets parts of K be rounded to bf16 before they are added: not here."""
    name = "allow_bf16_reduced_precision_reduction"
    with _SWITCHED:
        before = getattr(_SWITCHES, name), getattr(_SWITCHES, f"{name}_split_k")
        setattr(_SWITCHES, name, False)
        try:
            return torch.mm(a, b)
        finally:
            setattr(_SWITCHES, name, before)
