"""RocmOps: what this backend executes, said honestly.

Products that AITER takes are AITER's, where it is installed (`products.py`); what the shared kernels of `qhal_triton`
take is theirs; everything else is the portable operation on the GPU: exact, and far from fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qhal.codebooks import CodebookTensor
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, GroupedRequest, HadamardRequest, Request, Support, VQRequest
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_portable.prepared import PreparedWeight, Run
from qhal_portable.support import support
from qhal_rocm import fnuz, products
from qhal_rocm.targets import target
from qhal_triton.gpu import GpuOps
from qhal_triton.tuning import Table


class RocmOps(GpuOps):
    """QuantOps for AMD GPUs.

    arch    exact name of the instruction set: "gfx942"
    device  the torch device: "cuda:0" (torch's word for AMD's too), "meta" offline, "cpu" for Triton's interpreter
    aiter   names of AITER's calls that can be made here, see `aiter_calls.usable`
    table   tiles that were measured on this GPU (`qhal tune`)
    """

    name: ClassVar[str] = "rocm"
    interface: ClassVar[tuple[int, int]] = (1, 0)

    def __init__(self, arch: str, device: str, aiter: frozenset[str] = frozenset(), table: Table | None = None) -> None:
        super().__init__(target(arch), torch.device(device), table)
        self._aiter = aiter

    def supports(self, request: Request) -> Support:
        """The answer of the library, else of the shared kernels, else the portable one: honest about its waits."""
        path = self._library(request)
        if path is None:
            return super().supports(request)
        assert isinstance(request, GemmRequest)
        return path.answer(request)

    def prepare(
        self,
        w: QTensor | CodebookTensor | Tensor | Sequence[Rotation],
        request: GemmRequest | GroupedRequest | HadamardRequest | VQRequest,
        *,
        inputs: Sequence[Operand] = (),
        operand: Operand | None = None,
        bias: Tensor | None = None,
        into: Prepared | None = None,
    ) -> Prepared:
        """As the portable one; where bytes are read as the other flavour of fp8, NaN among them is refused first."""
        path = self._library(request)
        if path is not None and path.foreign and isinstance(w, QTensor):
            fnuz.refuse_nan(w.codes)
        return super().prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)

    def _layout(self, request: Request) -> str:
        return "nibble" if self._library(request) is not None else super()._layout(request)

    def _rounded(self, request: Request) -> torch.dtype | None:
        return None if self._library(request) is not None else super()._rounded(request)

    def _bind(self, w: PreparedWeight) -> Run:
        path = self._library(w.request)
        return super()._bind(w) if path is None else products.bind(w, path)

    def _library(self, request: Request) -> products.Path | None:
        """AITER's product for this request; None where there is none."""
        if not isinstance(request, GemmRequest) or not support(request, self._copies, graphs=True) or request.graph:
            return None
        return products.choose(request, self._target, self._aiter)
