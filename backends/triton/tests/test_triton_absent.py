"""Launches for chips that are not here: they are compiled as a program would, twice the same, and not made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qhal
from qhal_triton.absent import absent
from qhal_triton.bits import INTERPRETED
from qhal_triton.compile import target_of


def test_quantizations_can_be_launched_again(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "absent_calls.py"
    done = subprocess.run(
        [sys.executable, str(script), "gfx942", str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found["taken"]) >= 8 and all(found["taken"].values())
    assert found["smallest"] > 1000 and found["entries"] >= 8


def test_the_interpreter_has_no_compiler(tmp_path: Path) -> None:
    if not INTERPRETED:
        pytest.skip("the tests run on a GPU here")
    with (
        pytest.raises(qhal.BackendError, match="TRITON_INTERPRET=1 has replaced"),
        absent(target_of("gfx942"), tmp_path),
    ):
        pass
