"""What one case can end as. The record types reject combinations that cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Status(str, Enum):
    """How a case ended."""

    PASS = "pass"
    """Executed, and everything that was asked held."""
    FAIL = "fail"
    """Executed, or claimed, and something did not hold; the kind says what."""
    ERROR = "error"
    """The suite could not finish the case: the backend raised an exception of its own, crashed or did not end."""
    UNSUPPORTED = "unsupported"
    """The backend said beforehand that it does not execute this. Data, never a pass."""
    SKIP = "skip"
    """Not run for a reason outside the backend, memory for example. Never a pass."""


class FailKind(str, Enum):
    """What did not hold."""

    NUMERIC = "numeric"
    """An element is outside its computed bound."""
    EXACT = "exact"
    """Bits that must be equal differ."""
    STATS = "stats"
    """Every element is inside its bound, but together they err too much or all to one side."""
    SHAPE = "shape"
    """Another shape than the contract's."""
    DTYPE = "dtype"
    """Another dtype than the request's."""
    STRIDES = "strides"
    """The last axis is not contiguous."""
    DEVICE = "device"
    """The result lives on another device."""
    NONFINITE = "nonfinite"
    """NaN or Inf where the reference is finite."""
    OOB = "oob"
    """Memory beside a buffer was written."""
    INPUT_MUTATED = "input_mutated"
    """An input was changed."""
    OUT_IGNORED = "out_ignored"
    """`out=` was not written, or not returned."""
    NONDETERMINISTIC = "nondeterministic"
    """Two runs differ although the backend declares that they do not."""
    ACCEPTED_INVALID = "accepted_invalid"
    """Refused by `supports`, but the call did not raise UnsupportedError."""
    CLAIM = "claim"
    """`supports` claims it and the call raises UnsupportedError, or the declared class is not the one asked for."""
    RETURN = "return"
    """The call returned something of another type than the contract's."""
    LEAK = "leak"
    """Memory of results that nobody holds stays in use."""
    GLOBAL_STATE = "global_state"
    """A setting that the whole process shares (default dtype, threads, random state, ...) was changed."""


HISTOGRAM_EDGES = (0.0, *(2.0**e for e in range(-9, 1)))
"""Upper edges of the bins of |error| / bound: exactly 0, powers of two up to 1, and one more bin for what is above."""


@dataclass(frozen=True)
class Worst:
    """The element with the largest error relative to its bound."""

    index: tuple[int, ...]
    got: float
    ref: float
    error: float
    bound: float


@dataclass(frozen=True)
class Outcome:
    """The end of one case.

    kind      set exactly when the status is FAIL
    reason    one line; required for everything but a pass
    numerics  label of the class that was judged, "" where none was
    headroom  largest |error| / bound: 0.02 is comfortable, 0.9 is close, above 1 is a failure
    rms, bias the two statistics, None where there were none
    elements  how many numbers were compared; a pass has compared something
    histogram how many elements lie in each bin of |error| / bound, see HISTOGRAM_EDGES; None where bits were compared
    """

    status: Status
    kind: FailKind | None = None
    reason: str = ""
    numerics: str = ""
    worst: Worst | None = None
    headroom: float | None = None
    rms: float | None = None
    bias: float | None = None
    elements: int = 0
    notes: tuple[str, ...] = field(default=())
    histogram: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.kind is not None) != (self.status == Status.FAIL):
            raise ValueError(
                f"status {self.status.value} with kind {self.kind}: a kind belongs to a failure, and only there"
            )
        if self.status != Status.PASS and not self.reason:
            raise ValueError(f"status {self.status.value} needs a reason")
        if self.status == Status.PASS and self.elements == 0 and "empty" not in self.notes:
            raise ValueError("a pass must have compared something (or say that the case is empty)")
        if self.status == Status.PASS and self.headroom is not None and not self.headroom <= 1.0:
            raise ValueError(f"a pass with headroom {self.headroom}: an error above its bound is a failure")
        if self.histogram is not None:
            if len(self.histogram) != len(HISTOGRAM_EDGES) + 1 or sum(self.histogram) > self.elements:
                raise ValueError(f"a histogram of {sum(self.histogram)} elements where {self.elements} were compared")
            if self.status == Status.PASS and self.histogram[-1]:
                raise ValueError("a pass with elements above their bound")
        if self.status in (Status.UNSUPPORTED, Status.SKIP) and (self.worst is not None or self.elements):
            raise ValueError(f"status {self.status.value} with compared elements: nothing was run")

    @property
    def executed(self) -> bool:
        """Whether the backend was asked to compute."""
        return self.status in (Status.PASS, Status.FAIL, Status.ERROR)


def failed(kind: FailKind, reason: str, **fields: object) -> Outcome:
    """A failure with its kind and one line of reason."""
    return Outcome(Status.FAIL, kind, reason, **fields)  # type: ignore[arg-type]
