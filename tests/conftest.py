"""Fixtures shared by all tests: where golden checkpoints lie, and a writer of tiny checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qhal.specs import LinearSpec, Operand


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many mutated files the fuzz tests opened, over all of them and all workers."""
    done = [r for reports in terminalreporter.stats.values() for r in reports if isinstance(r, pytest.TestReport)]
    total = sum(int(str(value)) for r in done for name, value in r.user_properties if name == "fuzzed")
    if total:
        failed = sum(r.failed and "fuzz" in r.nodeid for r in done)
        terminalreporter.write_line(f"fuzzing: {total} mutated inputs opened, {failed} tests with an escape")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Checkpoints with their tools' own answers: QHAL_GOLDEN, or the small set that comes with the tests."""
    return Path(os.environ.get("QHAL_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write config.json and model.safetensors (or shards) to a new folder; returns the folder."""

    def write(
        tensors: dict[str, torch.Tensor],
        quantization: Any = None,
        *,
        shards: int = 1,
        model: dict[str, Any] | None = None,
        name: str = "checkpoint",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False}
        config |= {"hidden_act": "silu", **(model or {})}
        if quantization is not None:
            config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {k: t.contiguous().clone() for k, t in tensors.items()}  # no two share memory
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        names = list(tensors)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = names[i::shards]
            save_file({k: tensors[k] for k in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture
def same_spec() -> Callable[[LinearSpec, LinearSpec], None]:
    """Assert that a module written in another format has the same numbers."""
    return _same_spec


@pytest.fixture
def same_operand() -> Callable[[Operand, Operand], None]:
    """Assert that a quantized input or cache written in another format has the same numbers."""
    return _same_operand


def _same_spec(a: LinearSpec, b: LinearSpec) -> None:
    """The same numbers; scales that stand in the file may be of another type."""
    assert torch.equal(b.stored() + 0.0, a.stored() + 0.0), a.name
    assert torch.equal(b.effective() + 0.0, a.effective() + 0.0), a.name
    for x, y in ((a.input, b.input), (a.decode_input, b.decode_input), (a.operand, b.operand)):
        assert (x is None) == (y is None), a.name
        if x is not None and y is not None:
            _same_operand(x, y)
    assert (a.bias is None) == (b.bias is None)
    assert a.bias is None or b.bias is None or torch.equal(a.bias, b.bias)


def _same_operand(a: Operand, b: Operand) -> None:
    """Static scales as numbers, everything else of the formats as it is."""
    assert (a.scale is None) == (b.scale is None)
    if a.scale is None or b.scale is None:
        assert a.format == b.format
        return
    assert replace(a.format, scale=b.format.scale) == b.format
    assert a.format.scale is not None and b.format.scale is not None and a.format.scale.op == b.format.scale.op
    assert torch.equal(a.scale.float().flatten(), b.scale.float().flatten())
    assert (a.zero is None) == (b.zero is None)
    assert a.zero is None or b.zero is None or torch.equal(a.zero.float().flatten(), b.zero.float().flatten())
