"""The emulation is a distribution of its own that `make dev` does not install: tests take it from its folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "emulation"))
