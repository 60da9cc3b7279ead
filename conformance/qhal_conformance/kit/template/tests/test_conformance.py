"""The conformance suite, one test per case, and the verdict at the end. Options are in pyproject.toml."""

from qhal_conformance.suite import *  # noqa: F403
