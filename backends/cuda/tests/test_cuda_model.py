"""The whole-model benchmark on the processor: every row runs, near its definition; and what it says without a GPU."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qhal
from qhal.tensors import QTensor

FOLDER = Path(__file__).parents[3] / "benchmarks"
SIZES = {
    "layers": 2, "hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 96, "context": 48,
    "prompt": 24, "checked": 17, "steps": 1,
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of rows and the one that measures."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from model_rows import measure, rows, shape

    yield rows, measure, shape.Shape(**SIZES, batches=(2,))
    for name in [n for n in sys.modules if n == "model_rows" or n.startswith("model_rows.")]:
        del sys.modules[name]


def test_every_row_runs_near_its_definition(bench: Any) -> None:
    rows, measure, shape = bench
    runner = measure.Runner(qhal.select("cpu_reference"), shape)
    errors = {}
    for row in rows.ROWS:
        found = runner.run(row)
        assert not found.note, (row.name, found.note)
        assert set(found.decode) == {2} and found.prefill > 0 and found.weights > 0 and not found.graph
        errors[row.name] = max(found.error)
    plain = [e for name, e in errors.items() if name.startswith("w/") and "-a" not in name]
    assert max(plain) < 0.02, errors  # bf16 between operations, over two layers
    assert max(e for name, e in errors.items() if "a4" not in name) < 0.1, errors  # and codes that flip
    assert max(errors.values()) < 0.5, errors


def test_a_wrong_weight_shows(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, measure, shape = bench
    ops = qhal.select("cpu_reference")
    right = ops.prepare

    def swapped(w: QTensor, request: Any, **more: Any) -> Any:
        """Reads the two codes of a byte in the wrong order."""
        return right(replace(w, codes=w.codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)), request, **more)

    monkeypatch.setattr(ops, "prepare", swapped)
    row = next(r for r in rows.ROWS if r.name == "w/int4-g128")
    assert min(measure.Runner(ops, shape).run(row).error) > 0.5


def test_a_row_that_breaks_says_so_and_leaves_the_others(bench: Any) -> None:
    rows, measure, shape = bench
    runner = measure.Runner(qhal.select("cpu_reference"), replace(shape, checked=64))
    found = runner.run(rows.BASE)
    assert "65 tokens are checked, 48 are the context" in found.note and not found.decode


def test_the_command_lists_runs_and_writes(tmp_path: Path) -> None:
    script, out = str(FOLDER / "cuda_model.py"), tmp_path / "model.json"
    listed = subprocess.run([sys.executable, script, "--list"], capture_output=True, text=True, check=True).stdout
    names = listed.split()
    assert len(names) == len(set(names)) and "w/int4-g128" in names and "kv/nvfp4/w-int4" in names
    sizes = [x for name, value in SIZES.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, script, "--backend", "cpu_reference", *sizes, "--batches", "1"]
    command += ["--rows", "w/mxfp4", "w/int8-row", "w/mxfp4"]
    done = subprocess.run([*command, "--json", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["row"] for row in report["rows"]] == ["w/bf16-torch", "w/mxfp4", "w/int8-row"]
    assert report == json.loads(out.read_text()) and report["shape"]["layers"] == 2
    assert "NOT the model of 7 billion parameters" in done.stderr
    several = subprocess.run([*command, "--json", "--gpus", "2"], capture_output=True, text=True)
    assert several.returncode == 0, several.stderr
    assert [row["row"] for row in json.loads(several.stdout)["rows"]] == ["w/bf16-torch", "w/mxfp4", "w/int8-row"]
    wrong = subprocess.run([*command, "--part", "3/2"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "3/2 is no part" in wrong.stderr
    wrong = subprocess.run([sys.executable, script, "--rows", "w/int5"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--rows w/int5: no row begins so" in wrong.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_run() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "cuda_model.py")], capture_output=True, text=True)
    assert done.returncode == 0 and "no NVIDIA GPU here" in done.stderr


def test_the_demo_measures_perplexity_per_format_in_transformers(bench: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from model_rows import demo
    from rich.console import Console

    from qhal_engines.transformers import uninstall

    folder, text = tmp_path / "model", tmp_path / "text.txt"
    tokens = ["<unk>", "</s>", *("Ġ." + string.ascii_letters)]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokens), hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, eos_token_id=1, bos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    model = tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    text.write_text("the quick brown fox. " * 2000)
    asked = Namespace(demo=folder, text=text, windows=1, backend="cpu_reference", rows=["w/int4_g32", "kv/int8"])
    rows: list[dict[str, Any]] = []
    try:
        demo.run(asked, Console(quiet=True), rows.append)
    finally:
        uninstall()
    bf16, int4, int8 = rows
    assert [r["row"] for r in rows] == ["bf16", "w/int4_g32", "kv/int8"] and not any(r["note"] for r in rows)
    for row in (int4, int8):
        assert row["perplexity"] != bf16["perplexity"] and abs(row["perplexity"] / bf16["perplexity"] - 1) < 0.1
        assert row["decode"] > 0 and row["model_bytes"] > 0
