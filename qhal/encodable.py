"""Whether numbers can be quantized to a format. The definition (`qhal.encoding`) is asked, on two rows of numbers.

A backend whose table of answers asks here cannot promise what the definition refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from qhal.encoding import encode
from qhal.errors import QhalError
from qhal.formats import Format


def encodable(f: Format, *, static: bool = False) -> Iterator[str]:
    """Nothing if values can be quantized to `f` (static: under a given scale), else the reason."""
    fault = _fault(f, static)
    if fault:
        yield fault


def dense(f: Format) -> Iterator[str]:
    """Nothing unless `f` is sparse: activations and caches are not pruned, and a pruned weight needs no second word."""
    if f.sparsity is not None:
        yield f"{f}: only a stored weight is sparse; write this format without %{f.sparsity[0]}:{f.sparsity[1]}"


@lru_cache(maxsize=4096)
def _fault(f: Format, static: bool) -> str:
    """Why the definition refuses to quantize two rows of numbers to `f`, or makes no numbers of them; else ""."""
    columns = 16 * f.sparsity[1] if f.sparsity is not None else 64
    with torch.device("cpu"):  # asked while models are built on the meta device too; the answer is the same
        one = torch.ones(1) if static else None
        zero = torch.zeros(1) if static and f.zero is not None else None
        kept = 1.0 if f.sparsity is None else torch.arange(columns) % f.sparsity[1] < f.sparsity[0]
        rows = torch.linspace(-1, 1, 2 * columns).reshape(2, columns) * kept
        try:
            value = encode(rows, f, scale=one, zero=zero).dequantize()
        except QhalError as refusal:
            return str(refusal)
    return "" if bool(torch.isfinite(value).all()) else f"{f}: values within 1 become NaN or Inf"
