"""quant_kv: rows scattered by the NPU's operator."""

from __future__ import annotations

import torch
from torch import Tensor

from qhal_npu import calls


def write(plane: Tensor, where: Tensor, values: Tensor) -> None:
    """`portable.kv`'s writer: npu_scatter_nd_update_ on the slots of a plane, bytes as int8."""
    rows = plane.flatten(0, 1)
    if rows.data_ptr() != plane.data_ptr():  # strides of its own: flattening copied
        page = plane.shape[1]
        plane[where // page, where % page] = values
    elif plane.dtype == torch.uint8:
        calls.scatter_rows(rows.view(torch.int8), where, values.view(torch.int8))
    else:
        calls.scatter_rows(rows, where, values)
