"""qhal_conformance: the suite that decides whether a backend computes what a quantized checkpoint means.

It imports the contract (`qhal`) and nothing else of this project; backends come from `qhal.select`. Start with
`runner.py` (a run), `cases.py` (what a case is), `tolerance.py` (how a result is judged); `docs/conformance.md`
explains why each part is as it is.
"""

SUITE_VERSION = "1.0"
"""Version of cases, data and bounds. Inputs are keyed by its first number; reports of another version are refused."""
