"""What the checks of all operations share: an answer from `supports`, an honest refusal, a well-formed result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qhal.errors import UnsupportedError
from qhal.interface import QuantOps
from qhal.requests import NumericsClass, Request, Support, minimum_class
from qhal_conformance.outcome import FailKind, Outcome, Status, failed
from qhal_conformance.tolerance import Verdict

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Fault(Exception):  # noqa: N818 - the backend's fault, not an error of the suite
    """A contract that did not hold, found in the middle of a check; the runner turns it into its outcome."""

    def __init__(self, kind: FailKind, reason: str) -> None:
        self.kind, self.reason = kind, reason
        super().__init__(reason)

    @property
    def outcome(self) -> Outcome:
        """The failure that this is."""
        return failed(self.kind, self.reason)


@dataclass(frozen=True)
class Claim:
    """What a backend says that it will do with a request."""

    support: Support
    numerics: NumericsClass


def claim(ops: QuantOps, request: Request) -> Claim | None:
    """The backend's claim; None if it refuses. Fault if the declared class is looser than the request allows."""
    try:
        support = ops.supports(request)
    except Exception as error:
        reason = f"supports must never raise; it raised {type(error).__name__}: {first_line(error)}"
        raise Fault(FailKind.CLAIM, reason) from error
    if not isinstance(support, Support):
        raise Fault(FailKind.CLAIM, f"supports returned {type(support).__name__}, must be a Support")
    if not support:
        if not support.reason:
            raise Fault(FailKind.CLAIM, f"supports refuses ({support.level}) without a reason")
        return None
    allowed = minimum_class(request)
    numerics = allowed if support.numerics is None else support.numerics
    if numerics > allowed:
        reason = f"declares {numerics.label}, but the request accepts {allowed.label} at most; refuse it or be stricter"
        raise Fault(FailKind.CLAIM, reason)
    return Claim(support, numerics)


def refusal(ops: QuantOps, request: Request, call: Callable[[], object]) -> Outcome:
    """A refused request must raise UnsupportedError when it is tried; nothing may fall back."""
    support = ops.supports(request)
    try:
        call()
    except UnsupportedError:
        return Outcome(Status.UNSUPPORTED, reason=f"{support.level}: {support.reason}")
    except Exception as error:
        reason = f"refused by supports, but the call raised {type(error).__name__} instead of UnsupportedError: "
        return failed(FailKind.ACCEPTED_INVALID, reason + first_line(error))
    note = "works although supports refuses it: claim it, or refuse it in the call too"
    return Outcome(Status.UNSUPPORTED, reason=f"{support.level}: {support.reason}", notes=(note,))


def well_formed(y: object, what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The result as a tensor of the contract's shape, dtype, device and last stride; Fault otherwise."""
    if not isinstance(y, torch.Tensor):
        raise Fault(FailKind.RETURN, f"{what} returned {type(y).__name__}, must be a tensor")
    if tuple(y.shape) != shape:
        raise Fault(FailKind.SHAPE, f"{what} has shape {tuple(y.shape)}, must be {shape}")
    if y.dtype != dtype:
        raise Fault(FailKind.DTYPE, f"{what} is {y.dtype}, must be {dtype}")
    if y.device.type != device.type:
        raise Fault(FailKind.DEVICE, f"{what} lives on {y.device}, must be on {device}")
    if y.dim() and y.shape[-1] > 1 and y.numel() and y.stride(-1) != 1:
        raise Fault(FailKind.STRIDES, f"{what} has strides {y.stride()}, the last must be 1")
    return y


def outcome(v: Verdict, numerics: NumericsClass, elements: int, support: Support | None = None) -> Outcome:
    """A verdict as the end of a case."""
    notes = ("empty",) if elements == 0 else ()
    if support is not None and support.rule is not None:
        notes = (*notes, f"conditional: rule {support.rule}")
    return Outcome(
        Status.PASS if v.kind is None else Status.FAIL,
        v.kind,
        v.detail,
        numerics.label,
        v.worst,
        v.headroom,
        v.rms,
        v.bias,
        elements,
        notes,
        v.histogram,
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters."""
    text = str(error).strip().splitlines()
    return text[0][:300] if text else "(no text)"
