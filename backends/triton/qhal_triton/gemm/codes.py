"""Codes of a kept weight as fp8, for a library's product that scales sums by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qhal.elements import element
from qhal.tensors import QTensor
from qhal_portable.storage import packing
from qhal_triton.gemm.kernels.dense import dense
from qhal_triton.launching import Launcher

ELEMENTS = ("int4", "e2m1")
"""What e4m3 holds: every code is exact."""
_ROWS, _RUN = 32, 64
_NONE = ("sw", "ow", "zw", "fw", "table", "index")
_STRIDES = ("sw_row", "sw_col", "zw_row", "zw_col", "fw_row", "fw_col", "ow_row")


def writer(w: QTensor) -> Callable[[], Tensor]:
    """Makes [N, K] in e4m3fn of the codes of w, in any layout of `storage.keep`: numbers without scales, exact.

    Every call makes a new tensor of what w's tensor of codes holds then. w: [N, K] of one of ELEMENTS.
    """
    e, (apart, size) = element(w.format.element), packing(w.layout)
    if e.name not in ELEMENTS or w.codes.dim() != 2:
        raise TypeError(f"codes of {w.format} [{w.codes.dim()} axes] are not written as e4m3fn")
    parts = 2 * size if apart else 1
    codes = w.codes.view(torch.int32) if size == 4 else w.codes
    n, k = codes.shape[0], codes.shape[1] * parts
    run = apart if apart > 1 else _RUN
    fixed = {
        **dict.fromkeys(_NONE), **dict.fromkeys(_STRIDES, 0), **dict.fromkeys(("SW", "OW", "ZW", "FW"), ""),
        "w": codes, "w_row": codes.stride(0), "n": n, "k": k, "WKIND": "int" if e.kind == "int" else e.name,
        "OVERW": False, "GW": 0, "RW": 1, "CHUNK": run, "PARTS": parts, "APART": apart, "INDEXED": False, "BN": _ROWS,
    }  # fmt: skip
    start = Launcher(dense, ("y",), (), fixed, enable_fp_fusion=False)
    grid = (-(-n // _ROWS), -(-k // (run * parts)), 1)

    def made() -> Tensor:
        y = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=codes.device)
        start(grid, (y,), ())
        return y

    return made
