"""The parts of `make modelslim-demo` that need neither ModelSlim nor an emulated NPU; what is missing is one error."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import golden_cases
import pytest
from rich.console import Console

import qhal
import qhal_schemes

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "modelslim"
QUIET = Console(file=io.StringIO(), width=120)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    for name in ("modelslim", "demo", "fetch", "gguf_file", "model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import modelslim

    return modelslim


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "config.json").write_text('{"num_hidden_layers": 2}')
    return tmp_path / "float"


def tool(folder: Path, body: str) -> Path:
    """A program in the place of msmodelslim; its options are in `given`."""
    program = folder / "msmodelslim"
    head = f"#!{sys.executable}\nimport sys\ngiven = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
    program.write_text(head + body)
    program.chmod(0o755)
    return program


def test_a_missing_environment_is_one_error_with_its_command(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(example.DemoError, match=r"msmodelslim is not there; do: make \.venv-modelslim/\.installed$"):
        example.installed(tmp_path / ".venv-modelslim", "msmodelslim")


def test_every_recipe_is_run(example: ModuleType) -> None:
    assert sorted(example.RECIPES) == sorted(p.stem for p in (FOLDER / "recipes").glob("*.yaml"))


def test_the_makefile_makes_what_the_error_says(example: ModuleType) -> None:
    text = (ROOT / "Makefile").read_text()
    assert "SLIM_VENV ?= .venv-modelslim\n" in text and "\n$(SLIM_VENV)/.installed: " in text
    assert "msmodelslim==26.1.0" in (FOLDER / "requirements.txt").read_text()


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (FOLDER / "recipes").glob("*.yaml")))
def test_recipes_are_saved_as_ascendv1_and_calibrate_with_the_demos_text(recipe: str) -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((FOLDER / "recipes" / f"{recipe}.yaml").read_text())
    spec = found["spec"]
    assert (found["apiversion"], spec["dataset"]) == ("modelslim_v1", "calibration.json")
    # part_file_size 0 would fail on tied embeddings: only the other writer knows tensors that share memory
    assert [(s["type"], s["part_file_size"] > 0) for s in spec["save"]] == [("ascendv1_saver", True)]
    assert all(p["type"] == "linear_quant" for p in spec["process"])


def test_the_tools_command_is_followed(example: ModuleType, source: Path, tmp_path: Path) -> None:
    body = """
from pathlib import Path
for i in range(2):
    print(f'INFO - Run processor AscendV1Saver for "model.layers.{i}"', flush=True)
out = Path(given["--save_path"])
out.mkdir()
(out / "quant_model_description.json").write_text("{}")
(out / "given").write_text(repr(given))
"""
    out = tmp_path / "room" / "w8a8_dynamic"
    out.mkdir(parents=True)
    (out / "stale").write_text("")
    assert example.quantize(tool(tmp_path, body), source, "w8a8_dynamic", out, 1, QUIET) > 0
    assert not (out / "stale").exists() and "layers.1" in out.with_suffix(".log").read_text()
    given = (out / "given").read_text()
    assert "'--model_type': 'default'" in given and "'--device': 'cpu'" in given and "w8a8_dynamic.yaml" in given


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "sys.exit('x - ERROR - [Unexpected]\\nx - ERROR - Original exception: RuntimeError(1)\\nTIP: report it')",
            r"ended with 1: Original exception: RuntimeError\(1\)\n  all it said: .*w8a8_dynamic\.log$",
        ),
        ("sys.exit('no such option')", "ended with 1: no such option\n"),
        ("print('done')", "ended with 0: done\n"),  # and no description was written
        ("", "ended with 0: it said nothing\n"),
    ],
)
def test_a_failure_of_the_tool_is_its_own_words(
    example: ModuleType, source: Path, tmp_path: Path, body: str, said: str
) -> None:
    (tmp_path / "room").mkdir()
    with pytest.raises(example.DemoError, match=said):
        example.quantize(tool(tmp_path, body), source, "w8a8_dynamic", tmp_path / "room" / "w8a8_dynamic", 1, QUIET)


def test_calibration_passages_are_no_part_of_the_windows(example: ModuleType, tmp_path: Path) -> None:
    text = "".join(f"{i:08d}" for i in range(40_000))
    (tmp_path / "text.txt").write_text(text)
    example.calibration(tmp_path / "text.txt", tmp_path / "calibration.json")
    passages = json.loads((tmp_path / "calibration.json").read_text())
    assert [len(p) for p in passages] == [example.PASSAGE] * example.PASSAGES and len(set(passages)) == example.PASSAGES
    assert min(text.index(p) for p in passages) >= example.FIRST


def test_a_plan_is_told_by_operators(example: ModuleType) -> None:
    checkpoint = qhal_schemes.open_checkpoint(golden_cases.path("modelslim/command_mixed") / "checkpoint")
    said = example.planned(qhal.resolve(checkpoint, qhal.select("npu", arch="A2"), policy="error"))
    assert said == (
        "7 layers W8A8: npu_quant_matmul -> aclnnQuantMatmulWeightNz; 4 layers W8A8: npu_quant_matmul -> "
        "aclnnQuantMatmulV5; 3 layers W4A8: npu_grouped_matmul -> aclnnGroupedMatmulV5"
    )


def rows() -> list[dict[str, object]]:
    logits = {"distance": 0.0123, "reference_in_float32": 0.0456, "same_token": 0.9}
    numbers = {"products": {"outputs": 210, "within": 210, "worst": 0.5}, "logits": logits}
    return [{"arch": a, "perplexity": {a: 28.9, "cpu_reference": 28.8}, **numbers} for a in ("A2", "A5")]


def test_the_table_has_a_row_for_every_recipe_and_chip(example: ModuleType) -> None:
    console = Console(file=io.StringIO(), width=80)
    found = {"cpu_reference": 28.8, "emulated": rows()}
    console.print(example.table({"bf16": 28.0, "recipes": {"w8a8_dynamic": found, "w8a8_static": found}}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("210/210") == 4 and text.count("1.0286") == 2 and text.count("1.0035") == 4


@pytest.mark.parametrize(("code", "ends"), [(0, False), (1, True)])
def test_what_the_emulation_says_is_shown(example: ModuleType, tmp_path: Path, code: int, ends: bool) -> None:
    body = (
        f"print({chr(10).join(map(json.dumps, rows()))!r})\nprint('error: not so', file=sys.stderr)\nsys.exit({code})"
    )
    python = tool(tmp_path, body)
    console = Console(file=io.StringIO(), width=200)
    arguments = SimpleNamespace(windows=2, threads=1, arch=["A2", "A5"])
    call = (python, tmp_path, tmp_path / "text.txt", arguments, console)
    if ends:
        with pytest.raises(example.DemoError, match="the emulation ended with 1: error: not so"):
            example.emulate(*call)
    else:
        assert example.emulate(*call) == rows()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "A5 emulated: perplexity 28.900; 210 of 210 layers" in text and "0.012 from cpu_reference" in text
