"""The registry: a format is one file behind an entry point; duplicates and broken ones are explained. Plus the bars."""

from __future__ import annotations

import importlib
import json
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch

from qhal.errors import CheckpointError
from qhal_schemes import known_methods, open_checkpoint

Write = Callable[..., Path]

TOY = textwrap.dedent('''
    """A toy format in one file: `codes` int8 [N, K] and one float `step` per tensor."""

    from qhal import Format, LinearFormat, LinearSpec, QTensor
    from qhal_schemes import MappingScheme, SchemeMapping

    FORMAT = Format.parse("int8.tensor*fp32")


    class Toy(SchemeMapping):
        @property
        def modules(self):
            return tuple(n.removesuffix(".codes") for n in self.index if n.endswith(".codes"))

        @property
        def excluded(self):
            return {}

        def tensors(self, module):
            return (f"{module}.codes", f"{module}.step")

        def describe(self, module):
            n, k = self.index.expect(f"{module}.codes", ("I8",), (None, None)).shape
            self.index.expect(f"{module}.step", ("F32",), (1,))
            return LinearFormat(module, n, k, FORMAT)

        def read(self, module):
            codes, step = self.index.read_all(self.tensors(module)).values()
            return LinearSpec(QTensor(FORMAT, codes, step.reshape(1, 1)), name=module)


    scheme = MappingScheme(Toy)
''')


def distribution(root: Path, name: str, module: str, source: str, method: str, target: str = "scheme") -> None:
    """A distribution as an installer leaves it: one module and its metadata with an entry point."""
    (root / f"{module}.py").write_text(source)
    info = root / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qhal.schemes]\n{method} = {module}:{target}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(str(root))
    importlib.invalidate_caches()
    return root


def test_the_built_in_methods_are_known() -> None:
    assert {"awq", "compressed-tensors", "gptq", "modelslim"} <= set(known_methods())


def test_a_format_is_one_file_behind_an_entry_point(site: Path, write_checkpoint: Write) -> None:
    codes = torch.arange(-16, 16, dtype=torch.int8).reshape(4, 8)
    tensors = {"model.layers.0.fc.codes": codes, "model.layers.0.fc.step": torch.tensor([0.5])}
    folder = write_checkpoint(tensors, {"quant_method": "toy-step"})
    with pytest.raises(CheckpointError, match=r"unknown quant_method 'toy-step'; known: .*awq"):
        open_checkpoint(folder)
    distribution(site, "qhal-toy", "qhal_toy_scheme", TOY, "toy-step")
    assert "toy-step" in known_methods()
    ckpt = open_checkpoint(folder)
    assert ckpt.method == "toy-step" and ckpt.modules() == ("model.layers.0.fc",)
    assert torch.equal(ckpt.dequantize("model.layers.0.fc"), codes.float() * 0.5)
    assert ckpt.summary()["totals"]["consumed"] == 2
    sys.modules.pop("qhal_toy_scheme", None)


def test_a_method_claimed_twice(site: Path, write_checkpoint: Write) -> None:
    distribution(site, "qhal-toy", "qhal_toy_a", TOY, "toy-twice")
    distribution(site, "other-toy", "qhal_toy_b", TOY, "toy-twice")
    folder = write_checkpoint({"a.codes": torch.zeros(2, 2)}, {"quant_method": "toy-twice"})
    with pytest.raises(CheckpointError, match=r"claimed by other-toy \(.*\) and qhal-toy \(.*\); uninstall one"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("source", "target", "match"),
    [
        ("import nothing_of_this_name\n", "scheme", "cannot be loaded: No module named"),
        ("x = 1\n", "scheme", "cannot be loaded: module .* has no attribute"),
        ("scheme = 3\n", "scheme", "is no scheme"),
    ],
)
def test_a_broken_scheme(site: Path, write_checkpoint: Write, source: str, target: str, match: str) -> None:
    module = f"qhal_toy_broken_{abs(hash(source)) % 10**8}"
    distribution(site, "qhal-broken", module, source, "toy-broken", target)
    folder = write_checkpoint({"a.codes": torch.zeros(2, 2)}, {"quant_method": "toy-broken"})
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder)


def test_a_scheme_whose_description_lies_is_caught(site: Path, write_checkpoint: Write) -> None:
    lying = TOY.replace("LinearFormat(module, n, k, FORMAT)", "LinearFormat(module, n, k, FORMAT, bias=True)")
    distribution(site, "qhal-liar", "qhal_toy_liar", lying, "toy-liar")
    tensors = {"a.codes": torch.zeros(2, 2, dtype=torch.int8), "a.step": torch.ones(1)}
    ckpt = open_checkpoint(write_checkpoint(tensors, {"quant_method": "toy-liar"}))
    with pytest.raises(CheckpointError, match="this is a bug of the scheme"):
        ckpt.spec("a")


def test_a_scheme_that_forgets_a_linear_module_is_caught(site: Path, write_checkpoint: Write) -> None:
    """Every Linear module is quantized, excluded by a named rule, or an error; embeddings and norms are none."""
    distribution(site, "qhal-forgetful", "qhal_toy_forgetful", TOY, "toy-forgetful")
    tensors = {"a.codes": torch.zeros(2, 2, dtype=torch.int8), "a.step": torch.ones(1)}
    tensors |= {"model.embed_tokens.weight": torch.ones(4, 2), "norm.weight": torch.ones(2), "weight": torch.ones(2, 2)}
    folder = write_checkpoint(tensors, {"quant_method": "toy-forgetful"})
    assert open_checkpoint(folder).modules() == ("a",)
    folder = write_checkpoint(tensors | {"b.weight": torch.ones(4, 2)}, {"quant_method": "toy-forgetful"}, name="b")
    with pytest.raises(CheckpointError, match=r"b: a Linear module with a plain weight.*'toy-forgetful' neither"):
        open_checkpoint(folder)


def test_importing_schemes_loads_no_scheme() -> None:
    code = "import sys, qhal_schemes; print([m for m in sys.modules if m in ('qhal_schemes.awq', 'qhal_schemes.gptq')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ten_thousand_modules_open_and_describe_quickly(tmp_path: Path) -> None:
    header, position = {}, 0
    for layer in range(2500):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            module = f"model.layers.{layer}.{name}"
            for suffix, dtype, shape, size in (
                ("weight_packed", "I32", (8, 16), 4),
                ("weight_scale", "BF16", (8, 4), 2),
                ("weight_shape", "I64", (2,), 8),
            ):
                end = position + prod(shape) * size
                header[f"{module}.{suffix}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
                position = end
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        f.truncate(8 + len(raw) + position)
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    config = {
        "num_hidden_layers": 2500,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    open_checkpoint(tmp_path)
    start = time.process_time()
    ckpt = open_checkpoint(tmp_path)
    formats = ckpt.layer_formats()
    elapsed = time.process_time() - start
    assert len(formats) == 10_000
    assert elapsed < 3, f"{elapsed:.2f} s"  # about 0.7 s of processor time, header parsing included
