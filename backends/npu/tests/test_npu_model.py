"""A whole model by ModelSlim's command in transformers, on emulated generations (level L2), and its plan."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import qhal_npu_emulation as emulation
import torch
from qhal_npu_emulation import __main__ as command
from qhal_npu_emulation import model
from safetensors.torch import save_file

import qhal
import qhal_schemes
from qhal import selection
from qhal_engines import EngineError, EngineMissingError

SMALL = Path(__file__).parents[3] / "tests" / "golden"
IDS = (torch.arange(64) * 29 % 64).reshape(2, 32)


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated backends by name, as their distribution's entry points would give them."""
    pytest.importorskip("transformers")
    more = {emulation.name(arch): emulation.info(arch) for arch in emulation.ARCHS}
    known = selection.backends() | more
    monkeypatch.setattr(selection, "backends", lambda: known)


@pytest.fixture
def uninstalled() -> Any:
    """The quantizers of transformers as they were."""
    yield
    import qhal_engines.transformers

    qhal_engines.transformers.uninstall()


pytestmark = pytest.mark.usefixtures("uninstalled")


@pytest.mark.parametrize(
    ("arch", "kinds"), [("A2", {"W8A8": 11, "W4A8": 3}), ("A3", {"W8A8": 11, "W4A8": 3}), ("A5", {"W8A8": 14})]
)
def test_three_schemes_of_one_model_are_planned_to_their_operators(arch: str, kinds: dict[str, int]) -> None:
    plan = qhal.resolve(qhal_schemes.open_checkpoint(model.COMMITTED), qhal.select("npu", arch=arch), policy="error")
    assert {e.status for e in plan.entries} == {"ok"}
    counts: dict[str, int] = {}
    for e in plan.entries:
        kind = e.support.executes.partition(":")[0]
        counts[kind] = counts.get(kind, 0) + len(e.layers)
    assert counts == kinds


def test_every_layer_of_a_whole_model_is_within_its_bound() -> None:
    rows = model.run(model.COMMITTED, ("A2", "A5"), IDS)
    assert [(r["arch"], r["case"]) for r in rows] == [("A2", "command_mixed"), ("A5", "command_mixed")]
    for r in rows:
        assert r["products"]["outputs"] == r["products"]["within"] == r["plan"]["ok"] == 14
        assert 0 < r["products"]["worst"] <= 1
        assert 0.99 < r["perplexity"][r["arch"]] / r["perplexity"]["cpu_reference"] < 1.01
        assert f"{r['arch']}: 14 of 14 layers within" in model.line(r)


def test_a_layer_that_computes_something_else_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = model.load

    def wrong(folder: Path, backend: str, *more: Any) -> Any:
        made = real(folder, backend, *more)
        down = made.get_submodule("model.layers.1.mlp.down_proj")
        right = down.layer
        down.layer = lambda x: right(x) * 1.05
        return made

    monkeypatch.setattr(model, "load", wrong)
    products = model.run(model.COMMITTED, ("A2",), IDS)[0]["products"]
    assert (products["outputs"], products["within"]) == (14, 13) and products["worst"] > 1


def test_a_layer_by_another_rule_is_counted_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    real = model.load

    def ruled(folder: Path, backend: str, *more: Any) -> Any:
        made = real(folder, backend, *more)
        plan = made.qhal_plan
        first = replace(plan.entries[0], support=replace(plan.entries[0].support, rule="int8.row*fp32@round=away"))
        made.qhal_plan = replace(plan, entries=(first, *plan.entries[1:]))
        return made

    monkeypatch.setattr(model, "load", ruled)
    row = model.run(model.COMMITTED, ("A2",), IDS)[0]
    products = row["products"]
    assert products["by_rule"] > 0 and products["outputs"] == products["within"] == 14 - products["by_rule"]
    assert f"{products['by_rule']} by another rule" in model.line(row)


def test_a_model_without_quantized_layers_is_refused(tmp_path: Path) -> None:
    weights = {"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    with pytest.raises(EngineError, match="no linear layer is quantized"):
        model.run(tmp_path, ("A2",), IDS)


def test_without_transformers_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(EngineMissingError, match=r"do: make \.venv-npu/\.installed"):
        model.run(model.COMMITTED, ("A2",), IDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint with a tokenizer of its own, and a text of 64 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(model.COMMITTED, tmp_path / "slim")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "slim")
    (tmp_path / "text.txt").write_text("left out " + " ".join(f"t{i * 29 % 64}" for i in range(64)))
    return tmp_path / "slim"


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["qhal_npu_emulation", "model", *words])
    return command.main()


def test_the_command_runs_windows_of_a_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    text = ("--text", str(folder.parent / "text.txt"), "--skip", "9")
    assert asked(monkeypatch, str(folder), *text, "--windows", "2", "--length", "32", "--arch", "A2", "--json") == 0
    out, err = capsys.readouterr()
    row = json.loads(out)
    assert row["case"] == "slim" and row["perplexity"] == model.run(folder, ("A2",), IDS)[0]["perplexity"]
    assert "A2: window 2 of 2" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{folder}", "--text", "{text}", "--length", "64"), "error: 2 windows of 64 tokens need 128 tokens"),
        (("{folder}", "--text", "{folder}/none.txt"), "No such file"),
        (("{folder}/none", "--text", "{text}"), "none"),
        (("{bare}", "--text", "{text}", "--length", "32"), "no tokenizer that transformers can read; do: "),
    ],
)
def test_what_is_missing_is_one_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    paths = {"folder": folder, "text": folder.parent / "text.txt", "bare": model.COMMITTED}
    assert asked(monkeypatch, *(w.format(**paths) for w in words)) == 1
    out, err = capsys.readouterr()
    assert not out and said in err and "Traceback" not in err


def test_a_text_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        asked(monkeypatch, str(SMALL))
    assert "--text FILE" in capsys.readouterr().err
