"""What a backend must keep beside its numbers: one case per rule, each tried on every operation that is claimed.

`contract_claims.py` answers and refusals; `contract_results.py` results and what surrounds a call;
`contract_weights.py` prepared weights; `contract_graphs.py` capture and replay. Global settings are looked at after
every case of the suite (`global_state.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from qhal.interface import QuantOps
from qhal.requests import NumericsClass, Request
from qhal_conformance import contract_claims, contract_graphs, contract_results, contract_weights
from qhal_conformance.cases import Case
from qhal_conformance.contract_calls import FORMATS, weight
from qhal_conformance.decode import to_numpy
from qhal_conformance.generator import fingerprint
from qhal_conformance.outcome import Outcome, Status
from qhal_conformance.steady_check import STEADY_RULES

RULES: dict[str, Callable[[Case, QuantOps], int]] = {
    **contract_claims.RULES,
    **contract_results.RULES,
    **contract_weights.RULES,
    **contract_graphs.RULES,
    **STEADY_RULES,
}
OPTIONAL = {"memory-comes-back", "batch-invariance"}
"""A backend that does not count its memory, or does not declare that batches change nothing, cannot be asked."""
PROFILES = {"limits-hold": "kv", "experts-by-their-index": "moe", "inputs-by-index": "core-int8"}
"""Rules about what only these profiles need; all others can be asked of a backend that multiplies plain floats."""


def cases(level: int) -> list[Case]:
    """One case per rule."""
    shape = (("m", 16), ("n", 64), ("k", 256))
    made = [(name, PROFILES.get(name, "core"), name not in OPTIONAL) for name in RULES]
    return [Case("contract", name, shape, "bf16", "normal", profile=p, required=r) for name, p, r in made]


def request_of(case: Case) -> Request | None:
    """Several requests are made."""
    return None


def sha(case: Case) -> str:
    """Hash of the weights that the rules share."""
    arrays = {}
    for name in FORMATS:
        arrays.update({f"{name}.{k}": to_numpy(t) for k, t in weight(case, name).planes().items()})
    return fingerprint(arrays)


def run(case: Case, ops: QuantOps) -> Outcome:
    """Run one rule; it returns how many things it checked, 0 if nothing of it is claimed."""
    checked = RULES[case.subject](case, ops)
    if checked == 0:
        return Outcome(Status.UNSUPPORTED, reason="nothing that this rule is about is claimed")
    return Outcome(Status.PASS, numerics=NumericsClass.EXACT.label, headroom=0.0, elements=checked)
