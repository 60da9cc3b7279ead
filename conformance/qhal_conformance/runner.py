"""Running cases on a backend: one after the other, an exception of one never ends the run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qhal.errors import UnsupportedError
from qhal.interface import QuantOps
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS
from qhal_conformance.outcome import FailKind, Outcome, Status, failed
from qhal_conformance.problem import Fault, first_line


@dataclass(frozen=True)
class Record:
    """A case, how it ended, how long it took, and the hash of its inputs."""

    case: Case
    outcome: Outcome
    seconds: float
    inputs_sha: str


def run_case(case: Case, ops: QuantOps) -> Record:
    """Run one case. Whatever the backend raises becomes the outcome."""
    operation = OPERATIONS[case.operation]
    start = time.perf_counter()
    try:
        outcome = operation.run(case, ops)
    except Fault as fault:
        outcome = fault.outcome
    except UnsupportedError as refused:
        outcome = failed(FailKind.CLAIM, f"supports claims it, the call refuses: {first_line(refused)}")
    except MemoryError:
        outcome = Outcome(Status.SKIP, reason="not enough memory")
    except Exception as error:
        outcome = Outcome(Status.ERROR, reason=_last_line(error))
    seconds = time.perf_counter() - start
    return Record(case, outcome, seconds, operation.sha(case))


def run_cases(
    ops: QuantOps, cases: Iterable[Case], seen: Callable[[Record], None] = lambda record: None
) -> list[Record]:
    """Run cases in order; `seen` is called after each."""
    records = []
    for case in cases:
        record = run_case(case, ops)
        records.append(record)
        seen(record)
    return records


def _last_line(error: Exception) -> str:
    """`file.py:12 in gemm: ValueError: text`: where the backend raised, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} in {frames[-1].name}: " if frames else ""
    return f"{where}{type(error).__name__}: {first_line(error)}"
