"""The call: `humming_forward` with everything that does not change bound. Kernels are compiled when it is bound."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qhal.errors import FormatError
from qhal.requests import GemmRequest
from qhal.tensors import QTensor
from qhal_cuda.humming.choice import Kind, torch_dtype
from qhal_cuda.libraries import making
from qhal_portable.gemm import quantized, write
from qhal_portable.prepared import Run

if TYPE_CHECKING:
    from qhal_cuda.humming.weight import HummingWeight

COMPUTE = json.dumps({"gemm_type": "dense", "use_batch_invariant": True})
"""No split sums: see `choice`."""
_ALIGNED = 16
"""Bytes: the kernels read rows of x by the tensor memory accelerator."""


def config(request: GemmRequest, k: Kind) -> Any:
    """The library's LayerConfig."""
    from humming.config import LayerConfig

    return LayerConfig(
        sm_version=90,
        shape_n=request.n,
        shape_k=request.k,
        a_dtype=k.x,
        b_dtype=k.weight,
        c_dtype=k.x,
        bs_dtype=k.scale,
        weight_scale_group_size=k.group,
        weight_scale_type="group",
        weight_scale_2_type="tensor" if k.two else None,
        has_zero_point=k.zero,
    )


def bind(p: HummingWeight, k: Kind) -> Run:
    """The body of `gemm`. One call with a row of zeros compiles every kernel that later row counts choose."""
    request, stored, kind = p.request, p.stored, torch_dtype(k)
    assert isinstance(request, GemmRequest) and isinstance(stored, QTensor)
    scale = stored.scale.codes if isinstance(stored.scale, QTensor) else stored.scale
    assert isinstance(scale, Tensor)
    with making("humming", request):
        from humming.forward import humming_forward

        layer = config(request, k)
    planes = {
        "config": layer,
        "weight": stored.codes,
        "weight_scale": scale.view(torch.float8_e8m0fnu) if k.scale == "float8e8m0" else scale,
        "zero_point": stored.zero,
        "weight_scale_2": stored.scale.scale if isinstance(stored.scale, QTensor) else None,
        "compute_config": COMPUTE,
    }

    def run(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        q, dtype = quantized(x, request, p, index)
        value = q.codes if isinstance(q, QTensor) else q.detach()
        if value.dtype != kind:
            raise FormatError(f"x arrives as {value.dtype}, the weight was prepared for {request}")
        y = torch.empty(value.shape[0], request.n, dtype=dtype, device=value.device)
        if value.shape[0]:
            if value.data_ptr() % _ALIGNED or not value.is_contiguous():
                value = value.clone(memory_format=torch.contiguous_format)
            humming_forward(inputs=value, outputs=y, **planes)
        return write(y, out)

    with making("humming", request):
        run(torch.zeros(1, request.k, dtype=kind, device=p.device), 0, None)
    return run
