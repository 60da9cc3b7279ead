"""The command line: what it prints, its JSON, its exit codes (0 ok, 1 the thing asked failed, 2 wrong use)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qhal_schemes import open_checkpoint

CASE = "compressed_tensors/w4a16_g128_sym"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`qhal ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "qhal_cli.entry", *arguments]
    clean = {k: v for k, v in os.environ.items() if k != "QHAL_BACKEND"}
    return subprocess.run(command, capture_output=True, text=True, env=clean | {"COLUMNS": "200"} | environment)


def ok(*arguments: str) -> Any:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_devices_explain_every_backend() -> None:
    record = ok("devices")
    found = {r["name"]: r for r in record["backends"]}
    assert {"cuda", "rocm", "npu", "cpu_reference"} <= set(found)
    for r in found.values():
        assert r["devices"] if r["usable"] else r["reason"] and r["hint"]
    text = run("devices").stdout
    for r in found.values():
        assert r["name"] in text and r.get("hint", "") in text


def test_a_wanted_backend_that_is_not_usable_fails_with_what_to_do() -> None:
    done = run("devices", QHAL_BACKEND="npu")
    assert done.returncode == 1
    assert "QHAL_BACKEND=npu: backend 'npu'" in done.stdout and "not usable here" in done.stdout
    assert "do: " in done.stdout
    assert run("devices", QHAL_BACKEND="nothing").returncode == 1
    assert run("devices", QHAL_BACKEND="cpu_reference").returncode == 0


def test_doctor() -> None:
    checks = {c["check"]: c for c in ok("doctor")}
    assert checks["backend cpu_reference"]["status"] == "ok"
    assert "compressed-tensors" in checks["schemes"]["found"]


def test_inspect(golden: Path) -> None:
    folder = golden / CASE / "checkpoint"
    record = ok("inspect", str(folder))
    assert record["method"] == "compressed-tensors"
    assert record["formats"][0]["weight"] == "int4.g128*bf16"
    text = run("inspect", str(folder)).stdout
    assert "int4.g128*bf16" in text and "lm_head" in text


def test_tables_show_brackets(golden: Path) -> None:
    assert "vq1x8[e8p12]" in run("inspect", str(golden / "quip/quip_e8p12_had12_20/checkpoint")).stdout


SHELL = """
import qhal
import torch

class Shell(qhal.QuantOps):
    name, interface = "shell", (1, 0)
    device = property(lambda self: torch.device("meta"))

    def supports(self, request):
        return qhal.Support("not_implemented", "nothing is written yet")

def backend():
    here = qhal.Unavailable("a shell", "write it")
    return qhal.BackendInfo("shell", (1, 0), 500, lambda: here, lambda d: Shell(), lambda a: Shell())
"""


def test_plan_and_its_refusal(golden: Path, tmp_path: Path) -> None:
    info = tmp_path / "shell_backend-1.0.dist-info"
    info.mkdir()
    (tmp_path / "shell_backend.py").write_text(SHELL)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shell-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qhal.backends]\nshell = shell_backend:backend\n")
    folder = str(golden / CASE / "checkpoint")
    record = ok("plan", folder, "--backend", "cpu_reference")
    assert {e["status"] for e in record["entries"]} == {"ok"}
    refused = run("plan", folder, "--backend", "shell", "--arch", "any", PYTHONPATH=str(tmp_path))
    assert refused.returncode == 1 and "refuses" in refused.stderr and "Traceback" not in refused.stderr
    as_json = run("plan", folder, "--backend", "shell", "--arch", "any", "--json", PYTHONPATH=str(tmp_path))
    assert as_json.returncode == 1 and json.loads(as_json.stdout)["plan"]["entries"][0]["status"] == "refused"
    told = run("plan", folder, "--backend", "shell", "--arch", "any", "--policy", "report", PYTHONPATH=str(tmp_path))
    assert told.returncode == 0 and "[refused]" in told.stdout


def test_tuning_says_what_nothing_is_measured_for(golden: Path) -> None:
    case = str(golden / CASE / "checkpoint")
    told = run("tune", case, "--backend", "cpu_reference", "--json")
    document = json.loads(told.stdout)
    assert told.returncode == 1 and document["tuned"] == [] and document["left"]
    assert all("cpu_reference has no tune yet" in line for line in document["left"])
    shown = run("tune", case, "--backend", "cpu_reference")
    assert shown.returncode == 1 and "not tuned: gemm" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(("backend", "arch"), [("rocm", "gfx942"), ("cuda", "sm_90")])
def test_kernels_are_built_ahead(golden: Path, tmp_path: Path, backend: str, arch: str) -> None:
    folder, out = str(golden / CASE / "checkpoint"), str(tmp_path / "b")
    asked = ("build", folder, "--backend", backend, "--arch", arch, "--out", out)
    made = run(*asked, "--json", TRITON_INTERPRET="0")
    assert made.returncode == 0, made.stderr
    record = json.loads(made.stdout)
    assert record["arch"] == arch and record["requests"] and (tmp_path / "b" / "manifest.json").is_file()
    again = run(*asked)
    assert again.returncode == 1 and "is there already" in again.stderr


def test_a_backend_that_compiles_nothing_ahead_says_so(golden: Path, tmp_path: Path) -> None:
    folder = str(golden / CASE / "checkpoint")
    nothing = run("build", folder, "--backend", "cpu_reference", "--arch", "cpu", "--out", str(tmp_path / "a"))
    assert nothing.returncode == 1 and "compiles nothing ahead of time" in nothing.stderr


@pytest.mark.parametrize("case", [CASE, "gptq/b4_g128_sym_desc_act_v1", "awq/autoawq_b4_g128_gemm"])
def test_dequantize_writes_what_the_api_says(golden: Path, tmp_path: Path, case: str) -> None:
    folder, out = golden / case / "checkpoint", tmp_path / "w.safetensors"
    record = ok("dequantize", str(folder), "--out", str(out))
    ckpt = open_checkpoint(folder)
    with safe_open(out, "pt") as file:
        names = set(file.keys())
        for module in ckpt.modules(quantized=True):
            assert torch.equal(file.get_tensor(f"{module}.weight"), ckpt.dequantize(module))
        assert "model.embed_tokens.weight" in names or len(names) == len(ckpt.modules(quantized=True))
    assert record["tensors"] == len(names)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_dequantize_rounds_once_and_replaces_an_older_file(golden: Path, tmp_path: Path) -> None:
    folder, out = golden / CASE / "checkpoint", tmp_path / "w.safetensors"
    out.write_text("old")
    ok("dequantize", str(folder), "--out", str(out), "--dtype", "bfloat16", "--stored")
    ckpt = open_checkpoint(folder)
    module = ckpt.modules(quantized=True)[0]
    with safe_open(out, "pt") as file:
        assert torch.equal(file.get_tensor(f"{module}.weight"), ckpt.stored(module).to(torch.bfloat16))


def test_a_failure_leaves_nothing_behind(write_checkpoint: Callable[..., Path], golden: Path, tmp_path: Path) -> None:
    source = golden / CASE / "checkpoint"
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    broken = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[broken] = torch.full_like(tensors[broken], torch.nan)
    config = json.loads((source / "config.json").read_text())
    folder = write_checkpoint(tensors, config["quantization_config"], model={"num_hidden_layers": 1})
    out = tmp_path / "out" / "w.safetensors"
    done = run("dequantize", str(folder), "--out", str(out))
    assert done.returncode == 1
    assert broken in done.stderr and "Traceback" not in done.stderr
    assert not out.exists() and not out.parent.exists()


def test_quantize_equals_quantizing_on_the_way_in(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator).to(torch.bfloat16)
    source = write_checkpoint({"model.layers.0.mlp.up_proj.weight": weight}, model={"num_hidden_layers": 1})
    out = tmp_path / "int4"
    record = ok("quantize", str(source), "--format", "int4_g32", "--out", str(out))
    assert record["modules"] == 1
    name = "model.layers.0.mlp.up_proj"
    written, online = open_checkpoint(out).spec(name), open_checkpoint(source, quantize="int4_g32").spec(name)
    assert written.weight.equal(online.weight)  # type: ignore[union-attr,arg-type]
    again = run("quantize", str(source), "--format", "int4_g32", "--out", str(out))
    assert again.returncode == 1 and "exists already" in again.stderr
    odd = run("quantize", str(source), "--format", "int4_g128", "--out", str(tmp_path / "odd"))
    assert odd.returncode == 1 and name in odd.stderr and not (tmp_path / "odd").exists()


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["inspect"], ["plan", "x", "--policy", "maybe"], ["dequantize", "x"], ["devices", "--nope"]],
)
def test_wrong_use_exits_with_2(arguments: list[str]) -> None:
    assert run(*arguments).returncode == 2


@pytest.mark.parametrize("arguments", [["inspect"], ["plan"], ["generate", "--prompt", "x"]])
def test_what_fails_exits_with_1_and_one_message(arguments: list[str]) -> None:
    done = run(*arguments, "/nowhere")
    assert done.returncode == 1
    assert "/nowhere" in done.stderr and "Traceback" not in done.stderr


def test_help_has_examples_and_the_version_both_numbers() -> None:
    for command in ("devices", "doctor", "inspect", "plan", "dequantize", "quantize", "generate"):
        text = run(command, "--help").stdout
        assert "Examples" in text, command
    assert "interface 1.0" in run("--version").stdout


def test_a_broken_subcommand_of_a_backend_is_named_and_the_rest_works(tmp_path: Path) -> None:
    meta = tmp_path / "torn-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: torn\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[qhal.cli]\ntorn = torn_module:app\n")
    done = run("--version", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert "'torn'" in done.stderr and "No module named 'torn_module'" in done.stderr


def test_devices_doctor_and_select_agree_about_the_environment() -> None:
    for value in ("", "auto"):
        assert run("devices", QHAL_BACKEND=value).returncode == 0
    for value in ("cpu_reference:7", "cpu_reference:x", "nope"):
        assert run("devices", QHAL_BACKEND=value).returncode == 1
        assert run("doctor", QHAL_BACKEND=value).returncode == 1


def test_dequantize_never_writes_over_a_device_a_link_or_its_own_source(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(golden / CASE / "checkpoint", folder)
    before = (folder / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(folder / "model.safetensors")
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for target in (folder / "model.safetensors", folder / "new.safetensors", tmp_path / "link", fifo, tmp_path):
        done = run("dequantize", str(folder), "--out", str(target))
        assert done.returncode == 1 and "Traceback" not in done.stderr, target
    assert (folder / "model.safetensors").read_bytes() == before
    assert fifo.is_fifo() and not (folder / "new.safetensors").exists()


def test_text_from_a_single_file_is_refused() -> None:
    file = str(Path(__file__).parent / "golden" / "gguf" / "legacy_quants" / "checkpoint" / "model.gguf")
    done = run("generate", file, "--prompt", "x")
    assert done.returncode == 1 and "unsupported" in done.stderr and "text from a single file" in done.stderr
    assert run("inspect", file, "--json").returncode == 0


def test_generate_checks_what_it_was_given(golden: Path) -> None:
    folder = str(golden / CASE / "checkpoint")
    assert run("generate", folder, "--prompt", "x", "--policy", "report").returncode == 2
    for arguments in (["--backend", "nope"], []):  # the golden checkpoints come without a tokenizer
        done = run("generate", folder, "--prompt", "x", *arguments)
        assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_plan_for_an_architecture_needs_a_backend(golden: Path) -> None:
    done = run("plan", str(golden / CASE / "checkpoint"), "--arch", "sm_90")
    assert done.returncode == 1 and "needs a backend's name" in done.stderr


def test_convert(golden: Path, tmp_path: Path) -> None:
    source = str(golden / CASE / "checkpoint")
    record = ok("convert", source, "--to", "gptq", "--out", str(tmp_path / "gptq"))
    assert record["exact"] and record["changes"][0]["to"] == "uint4-uint4.g128*bf16"
    assert open_checkpoint(tmp_path / "gptq").method == "gptq"
    refused = run("convert", source, "--to", "nothing", "--out", str(tmp_path / "x"))
    assert refused.returncode == 2 and "choose one of compressed-tensors, gptq" in refused.stderr
    text = run("convert", source, "--to", "bf16", "--out", str(tmp_path / "bf16")).stdout
    assert "moved by up to" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_result_that_cannot_be_printed(golden: Path) -> None:
    command = [sys.executable, "-m", "qhal_cli.entry", "inspect", str(golden / CASE / "checkpoint"), "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "cannot print the result" in done.stderr and "Traceback" not in done.stderr


def test_words_that_are_none_are_wrong_use(golden: Path, tmp_path: Path) -> None:
    folder, out = str(golden / CASE / "checkpoint"), str(tmp_path / "out")
    for arguments in (
        ("convert", folder, "--to", "nope", "--out", out),
        ("dequantize", folder, "--dtype", "nope", "--out", out),
        ("plan", folder, "--backend", "cpu_reference", "--dtype", "nope"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and "choose one of" in " ".join(done.stderr.split()), done.stderr
    assert not list(tmp_path.iterdir())


def test_help_says_what_stays_plain() -> None:
    assert "lm_head" in run("quantize", "--help").stdout
