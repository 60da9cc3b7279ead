"""Faults planted in what this backend keeps of a weight: the suite names them, on a GPU (L3) or interpreted (L2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from qhal.codebooks import CodebookTensor
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, GroupedRequest, HadamardRequest, VQRequest
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance.cases import Case
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_cuda.ops import CudaOps
from qhal_portable.prepared import PreparedWeight, Run

GPU = torch.cuda.is_available()
DEVICE = "cuda:0" if GPU else "cpu"
_CASES = {case.id: case for case in catalogue(0)}
NIBBLES = [case for case in _CASES.values() if case.id.startswith("gemm/int4.g32*bf16/") and case.size("m") <= 8]
REFITS = ["contract/refits/m16_n64_k256/bf16/normal/0"]
REFITS += ["contract/graphs-see-refits/m16_n64_k256/bf16/normal/0"] if GPU else []


class Sound(CudaOps):
    """The backend, where there is no GPU in Triton's interpreter."""

    interface: ClassVar[tuple[int, int]] = (1, 0)

    def __init__(self) -> None:
        super().__init__("sm_{}{}".format(*torch.cuda.get_device_capability()) if GPU else "sm_90", DEVICE)

    def synchronize(self) -> None:
        """Nothing runs beside an interpreter."""
        if GPU:
            super().synchronize()


class SwappedNibble(Sound):
    """The two codes of every byte change places when a weight is kept."""

    interface: ClassVar[tuple[int, int]] = (1, 0)

    def _bind(self, w: PreparedWeight) -> Run:
        if isinstance(w.stored, QTensor) and w.stored.layout != "canonical":
            codes = w.stored.codes
            codes.copy_((codes >> 4) | (codes << 4))
        return super()._bind(w)


class StaleScale(Sound):
    """A refit writes codes and leaves the scales of the weight before."""

    interface: ClassVar[tuple[int, int]] = (1, 0)

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
        """The weight with the scales that `into` had."""
        stored = into.stored if isinstance(into, PreparedWeight) else None
        old = stored.scale.clone() if isinstance(stored, QTensor) and isinstance(stored.scale, Tensor) else None
        made = super().prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)
        if old is not None:
            stored.scale.copy_(old)  # type: ignore[union-attr]
        return made


def product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.to(out_dtype) @ b.to(out_dtype)


@pytest.fixture(autouse=True)
def _processors_have_no_such_product(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(torch, "mm", product)


@pytest.mark.parametrize("case", NIBBLES, ids=[case.id for case in NIBBLES])
def test_a_swapped_nibble_is_named(case: Case) -> None:
    assert run_case(case, Sound()).outcome.status is Status.PASS
    record = run_case(case, SwappedNibble())
    assert record.outcome.status is Status.FAIL, record.outcome.reason


@pytest.mark.parametrize("name", REFITS)
def test_a_stale_scale_is_named(name: str) -> None:
    assert run_case(_CASES[name], Sound()).outcome.status is Status.PASS
    record = run_case(_CASES[name], StaleScale())
    assert record.outcome.status is Status.FAIL and "refit" in record.outcome.reason.replace(
        "prepare(into=)", "a refit"
    ), record.outcome.reason
