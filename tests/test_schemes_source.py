"""TensorIndex: truncated, corrupt, missing, duplicated, pickled or foreign files are one clear error each."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qhal.errors import CheckpointError
from qhal_schemes import TensorIndex, open_checkpoint

Write = Callable[..., Path]
TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    "c.scale": torch.ones(4).to(torch.float8_e4m3fn),
    "d.exponent": torch.full((4,), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "e.index": torch.arange(3, dtype=torch.int32),
    "f.shape": torch.tensor([3, 4]),
    "g.matrix": torch.eye(2, dtype=torch.float64),
    "h.empty": torch.empty(0, 4),
}


def refused(folder: Path, match: str) -> None:
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(CheckpointError, match=match):
        TensorIndex.open(folder)
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("shards", [1, 3])
def test_every_dtype_is_indexed_and_read(write_checkpoint: Write, shards: int) -> None:
    index = TensorIndex.open(write_checkpoint(TENSORS, shards=shards))
    assert set(index) == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = index.read(name)
        assert found.dtype == tensor.dtype and index[name].shape == tuple(tensor.shape)
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    assert index.read_ints("f.shape") == (3, 4)
    assert index["a.weight"].nbytes == 48


def test_opening_reads_headers_only(write_checkpoint: Write) -> None:
    folder = write_checkpoint(TENSORS)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    path.write_bytes(raw[: 8 + length] + b"\xff" * (len(raw) - 8 - length))
    index = TensorIndex.open(folder)
    assert bool(torch.isnan(index.read("a.weight")).all())


def test_unknown_tensor_is_named(write_checkpoint: Write) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.here is missing"):
        TensorIndex.open(write_checkpoint(TENSORS)).read("nothing.here")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated(write_checkpoint: Write, keep: int) -> None:
    folder = write_checkpoint(TENSORS)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:keep])
    refused(folder, "truncated")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], tail: bytes = b"") -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :] + tail)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: h["a.weight"].update(shape=[3, 5]), r"a\.weight: F32 \[3, 5\] needs 60 bytes"),
        (lambda h: h["a.weight"].update(shape=[-3, -4]), "corrupt header entry"),
        (lambda h: h["a.weight"].update(shape="x"), "corrupt header entry"),
        (lambda h: h["a.weight"].pop("shape"), "corrupt header entry"),
        (lambda h: h["a.weight"].update(dtype="F3"), "unknown dtype 'F3'"),
        (lambda h: h["e.index"].update(data_offsets=[0, 12]), "corrupt offsets"),
        (lambda h: h["e.index"].update(data_offsets=[10**9, 10**9 + 12]), "corrupt offsets"),
        (lambda h: h.pop("e.index"), "corrupt offsets|longer"),
        (lambda h: h.update(x=3), "corrupt header entry"),
    ],
)
def test_corrupt_header(write_checkpoint: Write, change: Callable[[dict[str, Any]], object], match: str) -> None:
    folder = write_checkpoint(TENSORS)
    rewrite(folder, change)
    refused(folder, match)


def test_bytes_after_the_last_tensor(write_checkpoint: Write) -> None:
    folder = write_checkpoint(TENSORS)
    rewrite(folder, lambda h: None, b"extra")
    refused(folder, "longer than its header says")


@pytest.mark.parametrize("raw", [b"[]", b"{", b"\xff\xfe{}", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_header_that_is_no_object(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    refused(tmp_path, "corrupt safetensors header")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda i: i["weight_map"].update({"z.weight": "nothing.safetensors"}),
            "nothing.safetensors, which is missing",
        ),
        (lambda i: i["weight_map"].update({"z.weight": "../evil.safetensors"}), "outside the checkpoint's folder"),
        (lambda i: i["weight_map"].update({"z.weight": "/etc/passwd"}), "outside the checkpoint's folder"),
        (lambda i: i["weight_map"].update({"z.weight": ""}), "outside the checkpoint's folder"),
        (lambda i: i["weight_map"].update({"z.weight": 3}), "expected a weight_map"),
        (lambda i: i.pop("weight_map"), "expected a weight_map"),
        (lambda i: i["weight_map"].pop("a.weight"), r"a\.weight is extra"),
        (
            lambda i: i["weight_map"].update({"z.weight": "model-00001-of-00002.safetensors"}),
            r"z\.weight is missing from model-00001-of-00002\.safetensors; no shard has it",
        ),
        (
            lambda i: i["weight_map"].update({"a.weight": "model-00002-of-00002.safetensors"}),
            r"a\.weight is missing from model-00002.*; model-00001-of-00002\.safetensors has it",
        ),
    ],
)
def test_index_that_disagrees(write_checkpoint: Write, change: Callable[[dict[str, Any]], object], match: str) -> None:
    folder = write_checkpoint(TENSORS, shards=2)
    edit_index(folder, change)
    refused(folder, match)


def test_tensor_in_two_shards(write_checkpoint: Write) -> None:
    folder = write_checkpoint(TENSORS, shards=2)
    save_file(TENSORS, folder / "model-00002-of-00002.safetensors")
    refused(folder, r"tensor \w\.\w+ is duplicated, in model-00001.* and in model-00002")


def test_link_that_leaves_the_folder(write_checkpoint: Write, tmp_path: Path) -> None:
    folder = write_checkpoint(TENSORS)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    refused(folder, "is a link to .*, outside the checkpoint's folder")


def test_links_of_the_hub_cache_are_followed(write_checkpoint: Write, tmp_path: Path) -> None:
    folder = write_checkpoint(TENSORS)
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, snapshot))
    assert set(TensorIndex.open(snapshot)) == set(TENSORS)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "weights.pkl"])
def test_pickled_weights_are_never_opened(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="only pickled weights"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_no_weights_and_unindexed_shards(tmp_path: Path) -> None:
    refused(tmp_path, "no weights")
    for i in range(2):
        save_file({f"t{i}": torch.zeros(1)}, tmp_path / f"part{i}.safetensors")
    refused(tmp_path, "2 safetensors files but no model.safetensors.index.json")


def test_two_sets_of_weights(write_checkpoint: Write) -> None:
    folder = write_checkpoint(TENSORS, shards=2)
    save_file(TENSORS, folder / "model.safetensors")
    refused(folder, "remove one set of weights")


def test_other_files_are_listed_as_not_read(write_checkpoint: Write) -> None:
    folder = write_checkpoint(TENSORS)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert TensorIndex.open(folder).unread == ("pytorch_model.bin",)


def test_file_that_changed_after_opening(write_checkpoint: Write) -> None:
    folder = write_checkpoint(TENSORS)
    index = TensorIndex.open(folder)
    save_file({"a.weight": torch.zeros(7)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight changed since the checkpoint was opened"):
        index.read("a.weight")
    with pytest.raises(CheckpointError, match=r"b\.weight cannot be read"):
        index.read("b.weight")


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (None, "config.json is missing"),
        (b"{", "no valid JSON"),
        (b"\xff", "no valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"a": 1, "a": 1}', "duplicated"),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"quantization_config": [1]}', "expected an object, found list"),
        (b'{"quantization_config": {"bits": 4}}', "quant_method: expected the name of a method"),
        (b'{"quantization_config": {"quant_method": 3}}', "quant_method: expected the name of a method"),
        (b'{"dtype": "int3"}', "dtype 'int3'"),
    ],
)
def test_configuration_that_cannot_be_read(write_checkpoint: Write, raw: bytes | None, match: str) -> None:
    folder = write_checkpoint({"m.weight": torch.zeros(2, 2)})
    (folder / "config.json").unlink()
    if raw is not None:
        (folder / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=match):
        _ = open_checkpoint(folder).dtype


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(tmp_path / "file")
