"""The judge of the NVIDIA bars: what is missed, what is not measured, what is not judged; without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """missed() of one bar and one row."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from cuda_rows import bars

    def one(bar: dict[str, Any], *rows: dict[str, Any], gpu: str = "NVIDIA H200") -> list[tuple[str, str]]:
        file = tmp_path / "bars.json"
        file.write_text(json.dumps({"bars": [bar]}))
        monkeypatch.setattr(bars, "FILE", file)
        return list(bars.missed({"device": {"gpu": gpu}, "rows": list(rows)}))

    yield one
    for name in [n for n in sys.modules if n == "cuda_rows" or n.startswith("cuda_rows.")]:
        del sys.modules[name]


def row(us: float | None = 10.0, name: str = "a", **more: Any) -> dict[str, Any]:
    return {"row": name, "us": us, "peers": {}, "best": None, "value": None, "bytes": None, "note": "", **more}


def test_a_ratio_is_judged_against_the_best_peer(judge: Any) -> None:
    bar = {"row": "a", "at_most": 1.02}
    assert not judge(bar, row(best=["torch", 9.9]))
    assert "1.25 x torch (8.0 us)" in judge(bar, row(best=["torch", 8.0]))[0][1]
    assert "was not measured" in judge(bar, row())[0][1]
    assert judge(bar)[0] == ("a", "not measured")
    assert judge(bar, row(None, note="no kernel: x"))[0][1] == "no kernel: x"


def test_a_named_peer_and_another_row_are_judged_too(judge: Any) -> None:
    assert not judge({"row": "a", "against": "mm", "at_most": 1.12}, row(peers={"mm": 9.0}))
    assert (
        "no peer: why" in judge({"row": "a", "against": "mm", "at_most": 1.12}, row(peers={"mm": "no peer: why"}))[0][1]
    )
    both = {"row": "a", "against_row": "b", "at_most": 1.0}
    assert not judge(both, row(), row(10.0, "b"))
    assert judge(both, row(), row(9.0, "b"))


def test_absolute_bars_are_for_the_gpu_they_name(judge: Any) -> None:
    bar = {"row": "a", "share_of_bandwidth": 0.75, "bandwidth": 4e12, "needs": "H200"}
    assert not judge(bar, row(1.0, bytes=3_000_001))
    assert "2.00 TB/s, at least 3.00" in judge(bar, row(1.0, bytes=2_000_000))[0][1]
    assert "stated for H200" in judge(bar, row(1.0, bytes=3_000_001), gpu="NVIDIA H100 80GB HBM3")[0][1]
    assert not judge({"row": "a", "value_at_most": 4.0}, row(value=3.5))
    assert judge({"row": "a", "value_at_most": 4.0}, row(value=4.5))


def test_every_bar_names_a_row_and_the_command_judges_a_file(tmp_path: Path) -> None:
    script = str(FOLDER / "cuda_bars.py")
    listed = subprocess.run(
        [sys.executable, script, "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    bars = json.loads((FOLDER / "bars.json").read_text())["bars"]
    assert {b["row"] for b in bars} <= set(listed) and len(listed) == len(set(listed))
    empty = tmp_path / "bench.json"
    empty.write_text(json.dumps({"device": {"gpu": "none"}, "rows": []}))
    done = subprocess.run([sys.executable, script, "--check", str(empty)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("MISSED") == len(bars)
