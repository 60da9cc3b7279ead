"""Adapters that run qhal inside inference engines; importing this package imports no engine."""

from __future__ import annotations

from qhal.errors import QhalError


class EngineMissingError(QhalError, ImportError):
    """An adapter was imported but its engine is not installed; the text gives the install line."""


class EngineError(QhalError):
    """An engine's model, options or placement that an adapter cannot serve; nothing was loaded."""


class EngineWarning(UserWarning):
    """An engine runs what was asked, but with something that its caller should know."""
