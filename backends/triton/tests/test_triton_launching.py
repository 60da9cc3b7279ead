"""A launcher starts what Triton would, and notices what it must: told by the driver of a chip that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qhal_triton.gemm.kernels.finish import finish
from qhal_triton.launching import Launcher


def test_it_starts_what_triton_would_and_notices_changes(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "launcher_calls.py"
    done = subprocess.run(
        [sys.executable, str(script), "sm_90", str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["different"] == []
    assert [what for what, held in found["noticed"].items() if not held] == []
    assert found["copied"]


def test_every_argument_has_a_place() -> None:
    with pytest.raises(TypeError, match="part_stride"):
        Launcher(finish, ("part", "y", "weights", "ids"), ("n", "width"), {"BLOCK": 256})
