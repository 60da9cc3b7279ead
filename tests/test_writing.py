"""What a quantizer refuses, and that it leaves nothing behind: bad input, a full disk, an interruption, a signal."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qhal import CheckpointError
from qhal_schemes import open_checkpoint, quantize_checkpoint
from qhal_schemes.writing import AtomicDirectory, StreamingSafetensors, layout_of

Tensors = dict[str, torch.Tensor]
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def tensors(dtype: torch.dtype = torch.bfloat16, layers: int = 8) -> Tensors:
    g = torch.Generator().manual_seed(0)
    found = {"model.embed_tokens.weight": torch.randn(16, 64, generator=g).to(dtype)}
    for i in range(layers):
        found[f"model.layers.{i}.mlp.up_proj.weight"] = torch.randn(96, 64, generator=g).to(dtype)
        found[f"model.layers.{i}.mlp.down_proj.weight"] = torch.randn(64, 96, generator=g).to(dtype)
    return found


@pytest.fixture
def source(write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tensors(), name="source")


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- bad input, nothing left behind


def test_groups_that_do_not_divide_list_all_modules(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    found = {**tensors(layers=1), "model.layers.0.mlp.gate_proj.weight": torch.ones(96, 128).bfloat16()}
    folder = write_checkpoint(found, name="source")
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(folder, tmp_path / "out", "int4_g128")
    text = str(caught.value)
    assert f"{DOWN} (K=96), {UP} (K=64); nothing was written" in text
    assert "gate_proj" not in text
    assert "a group of 32 would fit all; or name these modules in `ignore`" in text
    assert left_behind(tmp_path) == ["source"]
    with pytest.raises(CheckpointError, match="divide into groups of 128"):
        open_checkpoint(folder, quantize="int4_g128")
    assert quantize_checkpoint(folder, tmp_path / "out", "int4_g128", ignore=(UP, DOWN))["modules"] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(
    write_checkpoint: Callable[..., Path], tmp_path: Path, bad: float
) -> None:
    found = tensors()
    found[f"{UP}.weight"][3, 5] = bad
    folder = write_checkpoint(found, name="source")
    with pytest.raises(CheckpointError, match=rf"{UP}\.weight: expected finite values, found 1 NaN or Inf"):
        quantize_checkpoint(folder, tmp_path / "out", "fp8")
    assert left_behind(tmp_path) == ["source"]
    with pytest.raises(CheckpointError, match="expected finite values"):
        open_checkpoint(folder, quantize="fp8").spec(UP)


def test_tiny_and_huge_blocks(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    found = tensors(torch.float32, layers=1)
    found[f"{UP}.weight"][0] = 1e-12  # its scale is 0 in fp16
    folder = write_checkpoint(found, model={"dtype": "float16"}, name="tiny")
    quantize_checkpoint(folder, tmp_path / "out", "int4_g32")
    assert bool((open_checkpoint(tmp_path / "out").stored(UP)[0] == 0).all())
    found[f"{UP}.weight"][0] = 1e7  # its scale is infinite in fp16
    folder = write_checkpoint(found, model={"dtype": "float16"}, name="huge")
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight: expected values whose scale fits int4.*peak of 1e\+07"
    ):
        quantize_checkpoint(folder, tmp_path / "other", "int4_g32")
    assert left_behind(tmp_path) == ["huge", "out", "tiny"]


def test_a_quantized_source_is_refused(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "int4", "int4_g32")
    with pytest.raises(CheckpointError, match=r"already quantized \(compressed-tensors\)"):
        quantize_checkpoint(tmp_path / "int4", tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="needs a checkpoint without quantization"):
        open_checkpoint(tmp_path / "int4", quantize="int8")
    assert left_behind(tmp_path) == ["int4", "source"]


def test_an_existing_target_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, what in (("full", "a folder that is not empty"), ("file", "a file")):
        with pytest.raises(CheckpointError, match=f"exists already and is {what}"):
            quantize_checkpoint(source, tmp_path / name, "int4_g32")
    assert (tmp_path / "full" / "keep").read_text() == (tmp_path / "file").read_text() == "mine"
    assert left_behind(tmp_path) == ["file", "full", "source"]
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(source, tmp_path / "empty", "int4_g32")
    assert open_checkpoint(tmp_path / "empty").method == "compressed-tensors"


@pytest.fixture
def failing_write(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[BaseException], None]]:
    """Makes the ninth tensor fail to be written."""

    def arrange(bad: BaseException) -> None:
        whole, calls = StreamingSafetensors.write, [0]

        def write(self: StreamingSafetensors, name: str, tensor: torch.Tensor) -> None:
            calls[0] += 1
            if calls[0] == 9:
                raise bad
            whole(self, name, tensor)

        monkeypatch.setattr(StreamingSafetensors, "write", write)

    yield arrange


def test_a_disk_that_fills_up(source: Path, tmp_path: Path, failing_write: Callable[[BaseException], None]) -> None:
    failing_write(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"the disk is full \(.* are needed\); nothing was left behind"):
        quantize_checkpoint(source, tmp_path / "new" / "deep" / "out", "int4_g32")
    assert left_behind(tmp_path) == ["source"]


def test_too_little_space_is_known_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"are needed and 1000 B are free on its disk; nothing was written"):
        quantize_checkpoint(source, tmp_path / "out", "int4_g32")
    assert left_behind(tmp_path) == ["source"]


@pytest.mark.parametrize("bad", [KeyboardInterrupt(), SystemExit(143), RuntimeError("a bug")])
def test_an_interrupted_write_leaves_nothing(
    source: Path, tmp_path: Path, bad: BaseException, failing_write: Callable[[BaseException], None]
) -> None:
    failing_write(bad)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(type(bad)):
        quantize_checkpoint(source, tmp_path / "out", "int4_g32")
    assert left_behind(tmp_path) == ["source"]
    assert signal.getsignal(signal.SIGTERM) is before


KILLED = """
import sys, time
from qhal_schemes import quantize_checkpoint
def progress(done, total, name):
    print(done, flush=True)
    time.sleep(30)
quantize_checkpoint(sys.argv[1], sys.argv[2], "int4_g32", progress=progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_terminated_process_leaves_nothing(source: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    assert any(name.endswith(".partial") for name in left_behind(tmp_path))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    process.stdout.close()
    assert left_behind(tmp_path) == ["source"]


# ---------------------------------------------------------------- the writers by themselves


def test_streaming_safetensors_in_any_order_and_aligned(tmp_path: Path) -> None:
    found = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "long": torch.tensor([1, -2], dtype=torch.int64),
        "fp8": torch.randn(5, 3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
        "turned": torch.randn(4, 6).t(),
    }
    layout = {k: layout_of(v) for k, v in found.items()}
    file = tmp_path / "some.safetensors"
    with StreamingSafetensors(file, layout) as out:
        for name in reversed(found):
            out.write(name, found[name])
    with safe_open(file, "pt") as back:
        assert back.metadata() == {"format": "pt"}
        for name, value in found.items():
            got = back.get_tensor(name)
            assert got.dtype == value.dtype
            assert torch.equal(got.float(), value.float())
    with pytest.raises(ValueError, match="the header has"), StreamingSafetensors(file, layout) as out:
        out.write("odd", torch.zeros(4, dtype=torch.uint8))
    with (
        pytest.raises(ValueError, match="tensors were not written, first fp8"),
        StreamingSafetensors(file, layout) as out,
    ):
        out.write("odd", found["odd"])


def test_atomic_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with AtomicDirectory(target) as folder:
        (folder.path / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with (
        pytest.raises(CheckpointError, match="cannot be written"),
        AtomicDirectory(tmp_path / "deep" / "target" / "a" / "b"),
    ):
        pass
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError), AtomicDirectory(tmp_path / "other") as folder:
        (folder.path / "sub").mkdir()
        (folder.path / "sub" / "a").write_text("1")
        _ = 1 / 0
    assert time.monotonic() - started < 10
    assert left_behind(tmp_path) == ["deep"]
