"""The compile check (L1): what holds, holds; what does not, is found; no device and no interpreter are asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from qhal_triton import compile as check
from qhal_triton import machine_code, offline
from qhal_triton.tiles import Tile, sized

HERE = Path(__file__).parent


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.update(PYTHONPATH=str(HERE), TRITON_CACHE_DIR=str(cache))
    command = [sys.executable, "-m", "qhal_triton.compile", "--tiles", "offline_tiles:tiles", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_what_does_not_hold_is_found(tmp_path: Path) -> None:
    done = run("--arch", "gfx942", "gfx950", "sm_90", "--json", str(tmp_path / "cells.json"), cache=tmp_path)
    assert done.returncode == 1, done.stderr
    cells = {(c["arch"], c["name"]): c for c in json.loads((tmp_path / "cells.json").read_text())["cells"]}
    assert len(cells) == 21
    good = {"gfx942": "v_mfma_f32_32x32x8_bf16", "gfx950": "v_mfma_f32_32x32x16_bf16", "sm_90": "wgmma.mma_async"}
    for arch, instruction in good.items():
        cell = cells[arch, "16 bits"]
        assert not cell["problems"] and cell["registers"] and cell["shared"] and cell["hash"]
        assert any(name.startswith(instruction) for name in cell["instructions"])
        assert cells[arch, "no product"]["problems"] == ["has no matrix instruction"]
        assert "power of 2" in cells[arch, "does not compile"]["problems"][0]
        assert "died with code 7" in cells[arch, "kills the compiler"]["problems"][0]
        assert not cells[arch, "after the others"]["problems"]
    assert cells["gfx942", "fp8"]["problems"] == ["has matrix instructions for 16, none for fp8 operands"]
    assert cells["gfx942", "too large"]["problems"] == ["needs 131072 bytes of shared memory, gfx942 has 65536"]
    assert not cells["gfx950", "too large"]["problems"]
    assert not cells["gfx950", "fp8"]["problems"] and not cells["sm_90", "fp8"]["problems"]


def test_what_holds_is_exit_code_0(tmp_path: Path) -> None:
    done = run("--arch", "gfx1201", "--names", "16 bits", cache=tmp_path)
    assert done.returncode == 0 and "1 of 1 cells hold" in done.stdout, done.stderr


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    done = run("--arch", "gfx1250", cache=tmp_path)
    assert done.returncode == 2 and "no backend compiles for 'gfx1250'; known: " in done.stderr


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_tiles_are_specialized_as_launches_are(tmp_path: Path, arch: str) -> None:
    """Sizes and strides that are 1 or multiples of 16: else another kernel is compiled than the one that runs."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "specialized_calls.py"), arch, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["count"] >= 40 and found["different"] == {}


def test_tensor_memory_that_is_not_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler makes a kernel that traps, with nothing in it that could fail."""
    metadata = SimpleNamespace(shared=1024, tmem_size=576)
    made = SimpleNamespace(asm={"ptx": "trap;", "cubin": b""}, metadata=metadata, hash="")
    monkeypatch.setattr(offline, "binary", lambda tile, target: made)
    monkeypatch.setattr(machine_code, "nvidia", lambda ptx, cubin: (4, 0, Counter[str]()))
    tile = Tile(name="t", fn=None, signature={}, constants={}, matrix=True)
    found = offline.compiled(tile, check.target_of("sm_100"))
    assert found.problems == ("needs 576 columns of tensor memory, a multiprocessor has 512",)


@pytest.mark.parametrize(
    ("inside", "code"),
    [
        (False, "STL [R1], R2|IADD3 R2, R2, 0x1, RZ|@P0 BRA 0x10|LDL.LU R2, [R1]|BRA 0x40"),
        (True, "MOV R1, R2|STL [R1], R2|@!P0 BRA.U UP0, 0x10|LDL.LU R2, [R1]|EXIT"),
        (False, "STL [R1], R2|SYNCS|LDL.LU R2, [R1]|EXIT|SYNCS|BRA 0x10"),
        (False, "STL [R1], R2|CALL.REL.NOINC 0x40|EXIT|NOP|LDL.LU R2, [R1]"),
    ],
)
def test_what_loops_put_aside(inside: bool, code: str) -> None:
    lines = [f"        /*{16 * i:04x}*/                   {words} ;" for i, words in enumerate(code.split("|"))]
    assert machine_code.looped("\n".join(lines)) is inside


def test_sizes_are_specialized() -> None:
    assert sized({"one": 1, "row": 4096, "none": 0, "odd": 24, "any": None}) == (
        {"row": "i32:16", "none": "i32:16", "odd": "i32", "any": "i32"},
        {"one": 1},
    )


def test_tiles_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    with pytest.raises(ValueError, match="two tiles are called 'same'"):
        check.listed("offline_tiles:twice", check.target_of("sm_90"))


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("v_mfma_f32_32x32x8_bf16_1k", "16"),
        ("v_mfma_f32_32x32x16_fp8_fp8", "fp8"),
        ("v_mfma_f32_32x32x64_f8f6f4", "fp8"),
        ("v_mfma_scale_f32_32x32x64_f8f6f4", "mx"),
        ("v_mfma_i32_32x32x16_i8", "int8"),
        ("v_wmma_i32_16x16x16_iu8", "int8"),
        ("v_wmma_f32_16x16x16_f16", "16"),
        ("wgmma.mma_async.m64n64k16.f32.f16.f16", "16"),
        ("wgmma.mma_async.m64n64k32.f32.e4m3.e4m3", "fp8"),
        ("mma.m16n8k32.s32.s8.s8.s32", "int8"),
        ("tcgen05.mma.kind::mxf4.block_scale", "mx"),
        ("tcgen05.mma.kind::i8", "int8"),
        ("mma.m16n8k8.f32.tf32.tf32.f32", "other"),
    ],
)
def test_operands_of_an_instruction(instruction: str, kind: str) -> None:
    assert machine_code.kinds(Counter([instruction])) == {kind}
