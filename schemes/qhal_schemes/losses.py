"""What a conversion loses: how far weights move, and what the files of the target cannot say, by module."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qhal.errors import CheckpointError

_SHOWN = 8


@dataclass
class Change:
    """What happened to the modules of one pair of formats.

    max_abs, squares, signal  of the decoded weights: largest difference, sums of squared differences and values
    """

    source: str
    target: str
    modules: int = 0
    exact: bool = True
    why: str = ""
    max_abs: float = 0.0
    squares: float = 0.0
    signal: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Compare two decoded weights."""
        d = (after - before).double()
        self.max_abs = max(self.max_abs, float(d.abs().max())) if d.numel() else self.max_abs
        self.squares += float((d * d).sum())
        self.signal += float((before.double() ** 2).sum())

    def record(self) -> dict[str, Any]:
        """JSON-able; relative_rms is the root of the summed squares over that of the weights."""
        relative = (self.squares / self.signal) ** 0.5 if self.signal else 0.0
        return {
            "from": self.source,
            "to": self.target,
            "modules": self.modules,
            "exact": self.exact,
            "why": self.why,
            "max_abs": self.max_abs,
            "relative_rms": relative,
        }


@dataclass
class Losses:
    """Losses by their text, with the modules that have them."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, text: str, module: str) -> None:
        """One loss of one module."""
        self.found.setdefault(text, []).append(module)

    def lines(self) -> list[str]:
        """Each loss with the number of modules that have it."""
        return [f"{text} ({len(names)} modules, first {names[0]})" for text, names in self.found.items()]

    def error(self, path: Path, to: str, fatal: bool) -> CheckpointError:
        """The refusal. fatal: not even `lossy` could write it."""
        shown = self.lines()[:_SHOWN]
        more = f"\n  and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
        verb = "cannot be written" if fatal else "cannot be written without a loss"
        todo = "choose another target" if fatal else "--lossy (lossy=True) writes it all the same and says how much"
        listed = "\n  ".join(shown)
        return CheckpointError(f"{path} {verb} as {to}; nothing was written:\n  {listed}{more}\n  do: {todo}")
