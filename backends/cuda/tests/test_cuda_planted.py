"""Faults planted in what this backend keeps of a weight: the suite names them, on a GPU (L3) or interpreted (L2)."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qhal.prepared import Prepared
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


def stale(ops: Sound, monkeypatch: pytest.MonkeyPatch) -> Sound:
    """A refit writes codes and leaves the scales of the weight before."""
    sound = ops.prepare

    def prepare(*args: Any, into: Any = None, **more: Any) -> Prepared:
        scale = None if into is None else getattr(into.stored, "scale", None)
        old = scale.clone() if isinstance(scale, Tensor) else None
        made = sound(*args, into=into, **more)
        if isinstance(scale, Tensor) and old is not None:
            scale.copy_(old)
        return made

    monkeypatch.setattr(ops, "prepare", prepare)
    return ops


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
def test_a_stale_scale_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_case(_CASES[name], Sound()).outcome.status is Status.PASS
    record = run_case(_CASES[name], stale(Sound(), monkeypatch))
    assert record.outcome.status is Status.FAIL and "refit" in record.outcome.reason.replace(
        "prepare(into=)", "a refit"
    ), record.outcome.reason
