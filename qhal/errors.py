"""Every error that qhal raises.

QhalError
 +- FormatError(ValueError)      a name, a rule or a plane that cannot be read
 +- CheckpointError              file, module, tensor: what was expected, what was found
 +- ShardError(ValueError)       the block, vector or rotation that a cut would go through
 +- BatchError(ValueError)       lengths, pages or slots past the limits
 +- UnsupportedError             carries the Support that says why, and what is near
 +- PlanError                    carries the Plan that was refused
 +- PolicyError(ValueError)      a policy that does not exist
 +- CommError                    ranks that disagree or died
 +- BackendError                 a backend that cannot be loaded
     +- NoBackendError           every candidate, why it is not usable, what to do
     +- InterfaceError(TypeError)  a backend class that does not fit the interface
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhal.plan import Plan
    from qhal.requests import Support


class QhalError(Exception):
    """Base of all errors of this project; its text says what was asked, what was found and what to do."""


class FormatError(QhalError, ValueError):
    """A format name, a quantization rule or a tensor plane that cannot be read."""


class CheckpointError(QhalError):
    """A checkpoint that is incomplete, inconsistent or not understood; names the file, module and tensor."""


class ShardError(QhalError, ValueError):
    """A tensor-parallel cut (or a fusion) that would go through a block, a vector or a rotation."""


class BatchError(QhalError, ValueError):
    """Sequence lengths, page tables or slots that do not fit the limits they were planned with."""


class UnsupportedError(QhalError):
    """An operation that this backend does not execute. `support` says why and names the nearest thing that works."""

    def __init__(self, support: Support, asked: object = None) -> None:
        self.support = support
        self.asked = asked
        text = f"{support.level}: {support.reason or 'no reason given'}"
        if asked is not None:
            text = f"{asked}: {text}"
        if support.nearest is not None:
            text += f"; nearest that works: {support.nearest}"
        super().__init__(text)


class PlanError(QhalError):
    """A plan that the policy refuses. `plan` lists every entry; the text lists every offending one."""

    def __init__(self, message: str, plan: Plan) -> None:
        self.plan = plan
        super().__init__(message)


class PolicyError(QhalError, ValueError):
    """A policy that does not exist; the text lists those that do."""


class CommError(QhalError):
    """Ranks of one collective that disagree on codec, version or shape, or that died."""


class BackendError(QhalError):
    """A backend that is installed but cannot be loaded."""


class NoBackendError(BackendError):
    """No usable backend: the text lists every candidate, its reason and what to do."""


class InterfaceError(BackendError, TypeError):
    """A backend class whose public names or signatures do not fit `QuantOps`."""
