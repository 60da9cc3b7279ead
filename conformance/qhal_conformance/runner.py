"""Running cases on a backend in this process: one after the other, whatever a backend raises never ends the run.

`isolated.py` does the same in a process of its own, which a backend may also end, hang or fill.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from qhal.errors import UnsupportedError
from qhal.interface import QuantOps
from qhal_conformance.cases import Case
from qhal_conformance.global_state import Watch
from qhal_conformance.operations import OPERATIONS
from qhal_conformance.outcome import FailKind, Outcome, Status, failed
from qhal_conformance.problem import Fault, first_line
from qhal_conformance.watched import Watched, seconds

NO_INPUTS = "the suite cannot make the inputs"
"""How the reason of a case begins that no backend has to answer for."""


@dataclass(frozen=True)
class Record:
    """A case, how it ended, how long it took, and the hash of its inputs.

    asked  seconds of it that were spent inside the backend
    stuck  a global setting was changed that cannot be put back: a fresh process should run the next case
    """

    case: Case
    outcome: Outcome
    seconds: float
    inputs_sha: str
    asked: float = 0.0
    stuck: bool = False


def run_case(case: Case, ops: QuantOps) -> Record:
    """Run one case. Whatever the backend raises becomes the outcome; global settings are put back."""
    watched, stuck = Watched(ops), False
    start = time.perf_counter()
    try:
        sha = OPERATIONS[case.operation].sha(case)
    except Exception as error:  # a case that was made for a request of somebody's
        outcome = Outcome(Status.SKIP, reason=f"{NO_INPUTS}: {type(error).__name__}: {first_line(error)}")
        return Record(case, outcome, time.perf_counter() - start, "")
    try:
        watch = Watch(watched.device)
        outcome = _outcome(case, watched)
        changed, left = watch.changes()
        outcome, stuck = _with_settings(outcome, changed, left), bool(left)
    except Fault as fault:
        outcome = fault.outcome
    except Exception as error:
        outcome = Outcome(Status.ERROR, reason=raised(error))
    elapsed = time.perf_counter() - start
    return Record(case, outcome, elapsed, sha, seconds(watched), stuck)


def _outcome(case: Case, ops: QuantOps) -> Outcome:
    try:
        return OPERATIONS[case.operation].run(case, ops)
    except Fault as fault:
        return fault.outcome
    except UnsupportedError as refused:
        return failed(FailKind.CLAIM, f"supports claims it, the call refuses: {first_line(refused)}")
    except (MemoryError, torch.OutOfMemoryError) as full:
        return Outcome(Status.SKIP, reason=f"not enough memory: {first_line(full)}")
    except (Exception, SystemExit) as error:
        return Outcome(Status.ERROR, reason=raised(error))


def _with_settings(outcome: Outcome, changed: tuple[str, ...], stuck: tuple[str, ...]) -> Outcome:
    """A pass that changed a global setting is none; whatever failed otherwise keeps its reason and gets a note."""
    if not changed:
        return outcome
    text = f"changed global settings: {', '.join(changed)}"
    if stuck:
        text += f" ({', '.join(stuck)} could not be put back)"
    if outcome.status in (Status.FAIL, Status.ERROR):
        return replace(outcome, notes=(*outcome.notes, text))
    return failed(FailKind.GLOBAL_STATE, text, notes=outcome.notes)


def run_cases(
    ops: QuantOps, cases: Iterable[Case], seen: Callable[[Record], None] = lambda record: None
) -> list[Record]:
    """Run cases in order, in this process; `seen` is called after each."""
    records = []
    for case in cases:
        record = run_case(case, ops)
        records.append(record)
        seen(record)
    return records


def raised(error: BaseException) -> str:
    """`file.py:12 in gemm: ValueError: text`: where the backend raised, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} in {frames[-1].name}: " if frames else ""
    return f"{where}{type(error).__name__}: {first_line(error)}"
