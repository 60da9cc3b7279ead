"""Mutated checkpoints: each is refused by one clear error, or decodes to the numbers of the unmutated one.

`pytest tests/test_schemes_fuzz.py` ends with how many inputs were opened (the recorded property "fuzzed").
"""

from __future__ import annotations

import copy
import json
import os
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qhal.errors import CheckpointError, QhalError
from qhal.formats import Format
from qhal_schemes import Checkpoint, CheckpointWarning, open_checkpoint

Tensors = dict[str, torch.Tensor]
Record = Callable[[str, object], None]
SMALL = Path(__file__).parent / "golden"
TWINS = ("compressed_tensors/moe_qwen3_w4a16_g64_ct013", "gptq/b4_g128_sym_v1")  # differ from others in no key
CASES = sorted(
    case
    for path in SMALL.glob("*/*/checkpoint/config.json")
    if (case := path.parent.parent.relative_to(SMALL).as_posix()) not in TWINS
)
NOT_READ = frozenset({
    "observer", "observer_kwargs", "zp_dtype", "observer_cls", "enable_buffer_reuse", "max_input_numel", "round_method",
    "mx_element_dtype", "scale_type", "target_device", "quant_mode", "kv_cache_group", "min_kv_scale",
    "weight_merge_groups",
})  # fmt: skip
"""How scales were found and other keys that are not needed to read them."""
MUTATIONS = 400  # of one configuration: a large one gets a part of the values at every place
SECTIONS = ("quantization_config", "quip_params", "hidden_act", "dtype", "num_hidden_layers", "tie_word_embeddings")
VALUES = [None, "", -1, 3, 10**9, float("nan"), True, False, [], {}, [None], {"a": None}]


def copied(case: str, folder: Path) -> Path:
    folder.mkdir()
    for path in (SMALL / case / "checkpoint").iterdir():
        if path.name != "quantize_config.json":  # a copy of the section, read where config.json has none
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def weights(folder: Path) -> Path:
    """The one weight file."""
    (path,) = folder.glob("*.safetensors")
    return path


def put(folder: Path, tensors: Tensors, metadata: dict[str, str] | None) -> None:
    """Replace the weights, and what an index says of them."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, weights(folder), metadata)
    for index in folder.glob("*.safetensors.index.json"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, weights(folder).name)}))


def decoded(ckpt: Checkpoint, modules: list[str]) -> Tensors:
    return {m: ckpt.stored(m) for m in modules}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        if key not in ("meta", "observer_kwargs", "dynamic", "targets"):
            yield from places(inner, (*path, key))


def edited(config: dict[str, Any], path: tuple[Any, ...], value: Any, *, delete: bool = False) -> dict[str, Any]:
    config = copy.deepcopy(config)
    place: Any = config
    for key in path[:-1]:
        place = place[key]
    if delete:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return config


def outcome(folder: Path, modules: list[str], right: Tensors, what: object) -> str:
    """Either "refused" by one bounded error, or "same": every module that is still quantized has its numbers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            ckpt = open_checkpoint(folder)
            ckpt.summary()
            ckpt.layer_formats()
            found = decoded(ckpt, modules)
    except QhalError as bad:
        assert 20 < len(str(bad)) < 6000, what
        return "refused"
    for module, weight in found.items():
        sizes = [min(pair) for pair in zip(weight.shape, right[module].shape, strict=True)]
        region = tuple(slice(size) for size in sizes)
        assert torch.equal(weight[region], right[module][region]), f"{what} changed {module} silently"
        if weight.shape != right[module].shape:
            return "another size"
    return "same"


# ---------------------------------------------------------------- sweeps over golden cases


@pytest.mark.parametrize("case", CASES)
def test_mutated_configurations(tmp_path: Path, case: str, record_property: Record) -> None:
    folder = copied(case, tmp_path / "c")
    ckpt = open_checkpoint(folder)
    modules = list(ckpt.modules(quantized=True)[:2])
    right = decoded(ckpt, modules)
    seen = {"refused": 0, "same": 0, "another size": 0}
    jobs = [(file, path, i) for file in sorted(folder.glob("*.json")) for path, i in mutations(file, modules[0])]
    step = -(-len(jobs) // MUTATIONS)
    for file, path, i in jobs[::step]:  # 13 values at a place: a step of 2 or more meets all of them in turn
        text = file.read_text()
        value = [*VALUES, None][i]
        file.write_text(json.dumps(edited(json.loads(text), path, value, delete=i == len(VALUES))))
        seen[outcome(folder, modules, right, (file.name, path, value))] += 1
        file.write_text(text)
    assert min(seen["refused"], seen["same"]) > 20 and not seen["another size"], seen
    record_property("fuzzed", sum(seen.values()))


def mutations(file: Path, module: str) -> Iterator[tuple[tuple[Any, ...], int]]:
    """(place, number of the value) of every change to one JSON file; the last number deletes."""
    for path in places(json.loads(file.read_text())):
        if file.name == "config.json" and path[0] not in SECTIONS:
            continue
        if file.name.endswith(".index.json") and not str(path[-1]).startswith(f"{module}."):
            continue
        if ".layers." in str(path[0]) and not path[0].startswith(f"{module}."):
            continue  # a description that names every tensor: one module's entries stand for all
        if path[-1] in NOT_READ or "meta" in path[:-1]:
            continue
        yield from ((path, i) for i in range(len(VALUES) + 1))


def mutated(t: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Changes that can never decode to the right numbers, or never change them."""
    for dtype in (torch.float64, torch.int64, torch.int8, torch.bool, torch.float8_e5m2):
        if dtype != t.dtype:
            yield f"as {dtype}", t.float().to(dtype)
    yield "one axis more", t.unsqueeze(0)
    if t.dim() != 1:
        yield "flat", t.reshape(-1)
    yield "scalar", t.reshape(-1)[0]
    yield "empty", t.reshape(-1)[:0]
    for axis in range(t.dim()):
        raw = t.contiguous().view(torch.uint8) if t.dtype.itemsize == 1 else t
        if t.shape[axis] > 1:
            yield f"one less on axis {axis}", raw.narrow(axis, 0, t.shape[axis] - 1).view(t.dtype)
        yield f"one more on axis {axis}", torch.cat([raw, raw.narrow(axis, 0, 1)], axis).view(t.dtype)
        yield f"none on axis {axis}", raw.narrow(axis, 0, 0).view(t.dtype)
    if t.dim() == 2 and t.shape[0] != t.shape[1]:
        yield "transposed", t.t()
    if t.is_floating_point() and t.dtype.itemsize > 1:
        for value in (float("nan"), float("inf"), -float("inf"), 0.0):
            bad = t.clone()
            bad.view(-1)[-1] = value
            if not torch.equal(bad, t):
                yield f"{value}", bad


@pytest.mark.parametrize("case", CASES)
def test_mutated_tensors(tmp_path: Path, case: str, record_property: Record) -> None:
    folder = copied(case, tmp_path / "c")
    file = weights(folder)
    tensors = load_file(file)
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    ckpt = open_checkpoint(folder)
    module = ckpt.modules(quantized=True)[0]
    right = decoded(ckpt, [module])
    fmt = ckpt.format(module).weight
    kind = fmt.block.kind if isinstance(fmt, Format) and fmt.block is not None else ""
    axes = {"tensor": (0, 1), "tile": (0, 1), "row": (1,)}.get(kind, ())  # that no plane counts, or not to the last one
    uncounted = [f"one {more} on axis {axis}" for axis in axes for more in ("less", "more")]
    count = 0
    for name in [n for n, owner in ckpt.account.consumed.items() if owner == module]:
        rest = {n: t for n, t in tensors.items() if n != name}
        changes = [(what, rest | {name: t}) for what, t in mutated(tensors[name])]
        free = ("bias", "lowrank", "codebooks", "centroids")  # zero is a number like any other there
        right_too = ["0.0"] if any(part in name for part in free) else []
        right_too += ["transposed"] if kind == "tensor" else []  # nothing in the file counts rows or columns
        changes = [(what, new) for what, new in changes if what not in right_too]
        changes += [("dropped", rest), ("renamed", rest | {f"{name}_": tensors[name]})]
        changes += [("doubled", tensors | {f"{name}.{module}": tensors[name].clone()})]
        for what, new in changes:
            put(folder, new, metadata)
            found = outcome(folder, [module], right, (name, what))
            resized = found == "another size" and name.endswith("weight") and what in uncounted
            single = tensors[name].numel() == 1 and what in ("one axis more", "flat")  # [] or [1]
            redundant = found == "same" and "zero_point" in name and what == "dropped"  # zeros of symmetric codes
            assert found == "refused" or what == "scalar" or resized or redundant or single, (name, what)
            count += 1
    assert count > 30
    record_property("fuzzed", count)


def test_bit_flips_and_cuts_of_the_header(tmp_path: Path, record_property: Record) -> None:
    folder = copied("compressed_tensors/w4a16_g128_sym", tmp_path / "c")
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    ckpt = open_checkpoint(folder)
    modules = list(ckpt.modules(quantized=True)[:1])
    right = decoded(ckpt, modules)
    length = struct.unpack("<Q", raw[:8])[0]
    for i in range(150):
        flipped = bytearray(raw)
        flipped[i * 7919 % (8 + length)] ^= 1 << (i % 8)
        file.write_bytes(flipped)
        outcome(folder, modules, right, i)
    for size in (0, 7, 8, *(len(raw) * i // 8 for i in range(1, 8)), len(raw) - 1):
        file.write_bytes(raw[:size])
        assert outcome(folder, modules, right, size) == "refused"
    for wrong in (0, 1, length - 1, length + 1, len(raw), 1 << 63, (1 << 64) - 1):
        file.write_bytes(struct.pack("<Q", wrong) + raw[8:])
        assert outcome(folder, modules, right, wrong) == "refused"
    record_property("fuzzed", 150 + 10 + 7)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("gguf/legacy_quants", "model.gguf"),
        ("rotations/flatquant_w4a4_mlp", "flat_matrices.pth"),
        ("rotations/quarot_w4a4_down_proj", "quarot.json"),
    ],
)
def test_bit_flips_and_cuts_of_other_files(tmp_path: Path, case: str, name: str, record_property: Record) -> None:
    """A flipped bit may make another number, which is read; it never makes a crash or a tensor of another size."""
    folder = copied(case, tmp_path / "c")
    path = folder / name if name.endswith(".gguf") else folder
    raw = (folder / name).read_bytes()
    ckpt = open_checkpoint(path)
    modules = list(ckpt.modules(quantized=True)[:1])
    right = decoded(ckpt, modules)
    steps = [i * 7919 % len(raw) for i in range(100)] + list(range(0, min(len(raw), 600), 4))
    for i, at in enumerate(steps):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << (i % 8)
        (folder / name).write_bytes(flipped)
        opened_or_refused(path, right, (name, at))
    for size in [len(raw) * i // 16 for i in range(16)]:
        (folder / name).write_bytes(raw[:size])
        opened_or_refused(path, right, size)
    record_property("fuzzed", len(steps) + 16)


def opened_or_refused(path: Path, right: Tensors, what: object) -> None:
    """Anything but a clear error, or weights of about the right size, is an escape."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            ckpt = open_checkpoint(path)
            ckpt.summary()
            found = decoded(ckpt, [m for m in right if m in ckpt.modules()])
    except QhalError as bad:
        assert 20 < len(str(bad)) < 6000, what
        return
    assert all(w.numel() <= 2 * right[m].numel() for m, w in found.items()), what


# ---------------------------------------------------------------- files


def refused(action: Callable[[], object], match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as info:
        action()
    assert len(str(info.value)) < 6000


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("a.weight", {"dtype": ["F32"]}, "unknown dtype"),
        ("a.weight", {"dtype": {}}, "unknown dtype"),
        ("a.weight", {"shape": [1] * 50_000}, "50000 axes: expected .* at most 32 axes"),
        ("a.weight", {"shape": [10**400]}, "corrupt header entry"),
        ("x" * 5000 + ".weight", {}, "a name of 5007 characters"),
        ("a\0b.weight", {}, "printable characters"),
        ("\x1b[2J.weight", {}, "printable characters"),
        ("", {}, "a name of 0 characters"),
        (".weight", {}, "no empty part"),
        ("\ud800.weight", {}, "corrupt safetensors header"),
    ],
)
def test_header_entries(tmp_path: Path, name: str, change: dict[str, Any], match: str) -> None:
    entry = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]} | change
    text = json.dumps({name: entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    (tmp_path / "config.json").write_text("{}")
    refused(lambda: open_checkpoint(tmp_path), match)


def test_a_duplicated_key_among_many_is_found_fast(tmp_path: Path) -> None:
    pairs = ",".join(f'"k{i}": 0' for i in range(100_000))
    (tmp_path / "config.json").write_text(f'{{{pairs}, "k99999": 1}}')
    start = time.perf_counter()
    refused(lambda: open_checkpoint(tmp_path), "key 'k99999' is duplicated")
    assert time.perf_counter() - start < 10, "linear in the number of keys"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", "nested more than 64 levels"),
        ('{"quantization_config": {"quant_method": ' + "[" * 60 + "]" * 60 + "}}", "expected the name of a method"),
        ('{"a": "\\ud800"}', "no valid JSON"),
        (json.dumps({"quantization_config": {"quant_method": "x" * 100_000}}), "unknown quant_method 'xxx"),
    ],
)
def test_json_that_would_break_its_users(tmp_path: Path, text: str, match: str) -> None:
    save_file({"m.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    refused(lambda: open_checkpoint(tmp_path), match)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_weights_that_are_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    os.mkfifo(file)  # reading it would wait for ever
    refused(lambda: open_checkpoint(tmp_path), "no regular file")
    file.unlink()
    file.mkdir()
    refused(lambda: open_checkpoint(tmp_path), "no regular file")
    file.rmdir()
    file.symlink_to(file)
    refused(lambda: open_checkpoint(tmp_path), "cannot be|is missing")
    file.unlink()
    file.symlink_to("nothing")
    refused(lambda: open_checkpoint(tmp_path), "is missing")


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "a\0b", ".", "config.json"])
def test_file_names_of_an_index(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": name}}))
    refused(lambda: open_checkpoint(tmp_path), "cannot be|outside|missing|no valid JSON|no safetensors file")


def test_folders_that_no_system_has(tmp_path: Path) -> None:
    refused(lambda: open_checkpoint(tmp_path / ("x" * 300)), "cannot be read: File name too long")
    refused(lambda: open_checkpoint(tmp_path / "a\0b"), "does not exist|cannot be read")
