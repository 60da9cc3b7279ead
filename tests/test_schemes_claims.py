"""Claims: formats without a quant_method are found by their own files, in any package, and never by two at once."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qhal.errors import CheckpointError
from qhal_schemes import TensorIndex, open_checkpoint

Write = Callable[..., Path]

NOTES = textwrap.dedent('''
    """A toy format that says in notes*.json which modules are int8 with one step, and in one file, toy.one."""

    import json

    from qhal import Format, LinearFormat, LinearSpec, QTensor
    from qhal_schemes import MappingScheme, SchemeMapping, TensorIndex
    from qhal_schemes.claims import Claimed
    from qhal_schemes.source import read_header
    from qhal_schemes.strict_json import load_json

    FORMAT = Format.parse("int8.tensor*fp32")


    class Notes(SchemeMapping):
        @property
        def modules(self):
            return tuple(m for m, kind in self.config.quantization.items() if kind == "int8")

        @property
        def excluded(self):
            return {}

        def tensors(self, module):
            return (f"{module}.codes", f"{module}.step")

        def describe(self, module):
            n, k = self.index.expect(f"{module}.codes", ("I8",), (None, None)).shape
            return LinearFormat(module, n, k, FORMAT)

        def read(self, module):
            codes, step = self.index.read_all(self.tensors(module)).values()
            return LinearSpec(QTensor(FORMAT, codes, step.reshape(1, 1)), name=module)


    def claim(files, model):
        section = load_json(files[0])
        return Claimed("toy-notes", section, files[0].name) if section else None


    def one_file(path):
        return TensorIndex(path.parent, {e.name: e for e in read_header(path, path.name)})


    def single(files, model):
        return Claimed("toy-notes", {"fc": "int8"}, files[0].name, {"dtype": "float32"}, one_file)


    scheme = MappingScheme(Notes)
''')


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Install a distribution: entry points of qhal.claims, and the source of the module toy_notes."""
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(str(root))

    def install(claims: str, source: str = NOTES) -> None:
        (root / "toy_notes.py").write_text(source)
        info = root / "toy-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        text = f"[qhal.schemes]\ntoy-notes = toy_notes:scheme\n[qhal.claims]\n{claims}\n"
        (info / "entry_points.txt").write_text(text)
        importlib.invalidate_caches()

    yield install
    sys.modules.pop("toy_notes", None)


CODES = torch.arange(-16, 16, dtype=torch.int8).reshape(4, 8)
TENSORS = {"fc.codes": CODES, "fc.step": torch.tensor([0.5])}


def test_a_format_is_found_by_its_side_file(site: Callable[..., None], write_checkpoint: Write) -> None:
    folder = write_checkpoint(TENSORS)
    (folder / "notes_v2.json").write_text('{"fc": "int8"}')
    with pytest.raises(CheckpointError, match=r"fc\.codes .* looks quantized, but"):
        open_checkpoint(folder).spec("fc")
    site("notes*.json = toy_notes:claim")
    ckpt = open_checkpoint(folder)
    assert ckpt.method == "toy-notes" and torch.equal(ckpt.dequantize("fc"), CODES.float() * 0.5)
    (folder / "notes_v2.json").write_text("{}")  # the claim says: not mine
    with pytest.raises(CheckpointError, match="the checkpoint has no quantization section"):
        open_checkpoint(folder)


def test_a_single_file_without_config_json(site: Callable[..., None], tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "toy.one")
    with pytest.raises(CheckpointError, match=r"toy\.one: is a file, expected a checkpoint folder"):
        open_checkpoint(tmp_path / "toy.one")
    site("*.one = toy_notes:single")
    ckpt = open_checkpoint(tmp_path / "toy.one")
    assert ckpt.dtype == torch.float32 and torch.equal(ckpt.dequantize("fc"), CODES.float() * 0.5)


def test_a_section_of_config_json_comes_first(site: Callable[..., None], write_checkpoint: Write) -> None:
    site("notes.json = toy_notes:nothing_of_this_name")
    folder = write_checkpoint(TENSORS, {"quant_method": "toy-notes", "fc": "int8"})
    (folder / "notes.json").write_text("{}")
    assert open_checkpoint(folder).method == "toy-notes"


def test_two_files_that_disagree(site: Callable[..., None], write_checkpoint: Write) -> None:
    site("notes.json = toy_notes:claim")
    folder = write_checkpoint(TENSORS)
    (folder / "notes.json").write_text('{"fc": "int8"}')
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    match = r"two files say how it is quantized: notes\.json \(toy-notes\) and quantize_config\.json \(gptq\)"
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("source", "match"),
    [("import nothing_of_this_name", "cannot be loaded: No module named"), ("claim = 3", "is no claim")],
)
def test_a_broken_claim_stops_only_what_it_claims(
    site: Callable[..., None], write_checkpoint: Write, source: str, match: str
) -> None:
    site("notes.json = toy_notes:claim", source)
    folder = write_checkpoint({"m.weight": torch.ones(2, 2)})
    assert open_checkpoint(folder).method == ""
    (folder / "notes.json").write_text("{}")
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder)


def test_weights_under_other_names(write_checkpoint: Write) -> None:
    tensors = {f"m{i}.weight": torch.full((2, 2), float(i)) for i in range(4)}
    folder = write_checkpoint(tensors, shards=2)
    other = folder / "quant_weights.safetensors.index.json"
    (folder / "model.safetensors.index.json").rename(other)
    index = TensorIndex.open(folder)
    assert set(index) == set(tensors) and torch.equal(index.read("m3.weight"), tensors["m3.weight"])
    weights = json.loads(other.read_text())
    del weights["weight_map"]["m3.weight"]
    other.write_text(json.dumps(weights))
    with pytest.raises(CheckpointError, match=r"m3\.weight is extra: quant_weights\.safetensors\.index\.json"):
        TensorIndex.open(folder)
    (folder / "a.safetensors.index.json").write_text(other.read_text())
    with pytest.raises(CheckpointError, match=r"a\.safetensors\.index\.json and quant_weights.*remove the other sets"):
        TensorIndex.open(folder)
