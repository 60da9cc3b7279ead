"""The compile check (L1): what holds, holds; what does not, is found; no device and no interpreter are asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from qhal_triton import compile as check
from qhal_triton import machine_code

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
