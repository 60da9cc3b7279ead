"""quantize: numbers to codes and scales, bit for bit by the format's rule. The definition is `qhal.encoding`.

The rule of the formats in `support.QUANTIZED`: scale = amax / largest code, in fp32, rounded once to the scale's type,
1 for an all-zero block; code = x / scale, rounded half to even, saturated. NaN and Inf reach the whole block through
its scale; under a static scale they saturate, and an integer code for NaN is 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qhal.elements import WIDE, element
from qhal.errors import FormatError
from qhal.specs import Operand
from qhal.tensors import QTensor


def quantize(x: Tensor, to: Operand, out: QTensor | None = None) -> QTensor:
    """x [..., K] to a QTensor of the format `to.format`; written into the planes of `out` if it is given."""
    f, e, block = to.format, element(to.format.element), to.format.block
    assert block is not None and f.scale is not None  # support.py has refused everything else
    value = x.float()
    blocks = block.split(value.abs())  # [..., rows, cols, elements]: one block along the last axis, padded with 0
    if to.scale is not None:
        scale = to.scale.to(x.device, torch.float32).reshape(blocks.shape[:-1])
    else:
        amax = blocks.amax(-1) if blocks.shape[-1] else blocks.sum(-1)  # no element: 0
        # a tensor of divisors: a scalar would let some devices multiply by its reciprocal, which has other bits
        scale = torch.where(amax == 0, 1.0, amax / torch.full_like(amax, e.largest))
    scale = scale.to(WIDE[f.scale.element])
    quotient = value / block.expand(scale.float(), value.shape)
    if e.integer:
        codes = quotient.round().clamp(e.smallest, e.largest).nan_to_num(0.0).to(e.storage)
    else:
        codes = quotient.clamp(e.smallest, e.largest).to(e.storage)  # the cast rounds half to even
    return QTensor(f, codes, scale) if out is None else _write(out, QTensor(f, codes, scale))


def _write(out: QTensor, q: QTensor) -> QTensor:
    ours, theirs = q.planes(), out.planes()
    fits = out.format == q.format and {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    if not fits:
        raise FormatError(f"out is a {out.format} tensor {out.shape}, the result is {q.format} {q.shape}")
    return replace(out, codes=theirs["codes"].copy_(ours["codes"]), scale=theirs["scale"].copy_(ours["scale"]))
