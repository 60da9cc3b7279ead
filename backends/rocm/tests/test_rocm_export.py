"""A kernel that is exported brings what is needed to run it elsewhere; here nothing runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qhal
from qhal.encoding import encode

MACHINE = {"gfx942": 0x4C, "gfx950": 0x4F, "gfx1100": 0x41, "gfx1201": 0x4E}
"""The lowest byte of e_flags (LLVM's AMDGPU user guide, table of EF_AMDGPU_MACH)."""


def export(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qhal_rocm.export", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_a_quantization(arch: str, tmp_path: Path) -> None:
    done = export("--arch", arch, "--kernel", "quantize[bf16 to int8.g128*fp32]", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (launch,) = json.loads((tmp_path / "launches.json").read_text())["launches"]
    code = (tmp_path / launch["file"]).read_bytes()
    assert code[:4] == b"\x7fELF" and int.from_bytes(code[18:20], "little") == 224  # EM_AMDGPU
    assert int.from_bytes(code[48:52], "little") & 0xFF == MACHINE[arch]
    assert launch["threads"] % (64 if arch == "gfx942" else 32) == 0 and min(launch["grid"]) >= 1
    tensors, expected = load_file(tmp_path / "tensors.safetensors"), load_file(tmp_path / "expected.safetensors")
    given = {a["name"]: a for a in launch["arguments"]}
    assert {a["is"] for a in given.values() if a.get("is")} == {"codes", "scale"}
    made = encode(tensors["0.x"], qhal.Format.parse("int8.g128*fp32"))
    assert torch.equal(made.codes, expected["codes"]) and torch.equal(made.scale, expected["scale"])  # type: ignore[arg-type]


def test_a_product(tmp_path: Path) -> None:
    name = "gemm[e4m3fn.row*fp32 x e4m3fn.row*fp32]"
    done = export("--arch", "gfx950", "--kernel", name, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    launches = json.loads((tmp_path / "launches.json").read_text())["launches"]
    assert "product" in [launch["kernel"] for launch in launches]
    assert load_file(tmp_path / "expected.safetensors")["y"].shape == (16, 64)


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        ("product", "is no kernel: write"),
        ("gemm[bf16 to int8.row*fp32]", "is no kernel: write"),
        ("quantize[int8 to int8.row*fp32]", "'int8' is no plain float"),
        ("quantize[bf16 to nf4.g32*fp32]", "no kernel takes it on gfx942"),
    ],
)
def test_what_cannot_be_exported_is_one_line(kernel: str, why: str, tmp_path: Path) -> None:
    done = export("--arch", "gfx942", "--kernel", kernel, "--out", str(tmp_path / "new"))
    assert done.returncode == 1 and why in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
