"""Tables of measured tiles: what is chosen, what is written, and what happens to a file that is not whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from qhal.selection import Device
from qhal_triton import tuning
from qhal_triton.tuning import Entry, Table, TuneError, load, measure, path_of, rows, save

FACTS = {"gpu": "Some GPU 80GB", "driver": "1.2", "triton": "3.9.0"}


@dataclass(frozen=True)
class Config:
    bm: int
    parts: int


CANDIDATES = (Config(16, 1), Config(32, 1), Config(16, 4))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QHAL_TUNED", str(tmp_path / "tuned"))


def test_without_a_table_the_first_candidate_is_taken() -> None:
    table = load(FACTS)
    assert table.pick("gemm", CANDIDATES) == CANDIDATES[0] and table.digest == ""


def test_the_fastest_candidate_is_kept_and_chosen() -> None:
    times = {CANDIDATES[0]: 9.0, CANDIDATES[1]: 7.125, CANDIDATES[2]: 8.0}
    entry = measure(CANDIDATES, times.__getitem__)
    assert entry == Entry((32, 1), (((16, 1), 9.0), ((32, 1), 7.12), ((16, 4), 8.0)))
    save(FACTS, {"gemm m<=16": entry})
    save(FACTS, {"gemm m<=32": Entry((16, 4))})
    table = load(FACTS)
    assert table.pick("gemm m<=16", CANDIDATES) == Config(32, 1)
    assert table.pick("gemm m<=32", CANDIDATES) == Config(16, 4)
    assert table.pick("gemm m<=64", CANDIDATES) == CANDIDATES[0]
    assert len(table.digest) == 8


def test_a_tile_that_is_no_candidate_any_more_is_not_taken() -> None:
    table = Table(FACTS, {"gemm": Entry((64, 2))})
    assert table.pick("gemm", CANDIDATES) == CANDIDATES[0]


def test_another_fingerprint_is_another_table() -> None:
    save(FACTS, {"gemm": Entry((32, 1))})
    assert not load({**FACTS, "driver": "1.3"}).entries


def test_candidates_that_do_not_run_lose() -> None:
    def time(c: Config) -> float:
        if c.bm == 16:
            raise RuntimeError("out of shared memory")
        return 5.0

    assert measure(CANDIDATES, time) == Entry((32, 1), (((16, 1), None), ((32, 1), 5.0), ((16, 4), None)))
    with pytest.raises(TuneError, match="none of 1 candidates runs; the last one: RuntimeError: out of shared memory"):
        measure(CANDIDATES[:1], time)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1}', json.dumps({"schema": 2, "facts": FACTS, "entries": {}})]
)
def test_a_damaged_table_is_one_clear_error(text: str) -> None:
    path = path_of(FACTS)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(TuneError, match=r"is no table of tiles .*; delete it and run `qhal tune` again"):
        load(FACTS)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QHAL_TUNED", str(tmp_path / "file" / "below"))
    with pytest.raises(TuneError, match="set QHAL_TUNED to a"):
        save(FACTS, {"gemm": Entry((32, 1))})


def test_a_failed_write_leaves_the_old_table(monkeypatch: pytest.MonkeyPatch) -> None:
    save(FACTS, {"gemm": Entry((32, 1))})

    def broken(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(TuneError, match="No space left"):
        save(FACTS, {"gemm": Entry((16, 1))})
    assert load(FACTS).entries["gemm"] == Entry((32, 1))


def test_a_fingerprint_names_the_chip_where_the_driver_gives_no_name() -> None:
    known = tuning.fingerprint(Device(0, "sm_90", 0, {"name": "Some GPU", "driver": "1", "cuda": "13.0", "role": "x"}))
    assert known["gpu"] == "Some GPU" and known["driver"] == "1" and "role" not in known and "hip" not in known
    other = tuning.fingerprint(Device(0, "gfx942", 0, {"hip": "7.0"}))
    assert (other["gpu"], other["hip"], other["kernels"]) == ("gfx942", "7.0", known["kernels"])


def test_buckets_and_sources() -> None:
    assert [rows(m) for m in (0, 1, 2, 3, 16, 17, 4096)] == [0, 1, 2, 4, 16, 32, 4096]
    assert len(tuning.sources()) == 16
