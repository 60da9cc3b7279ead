"""Evidence: what a form is, which forms were compared, and that everything else is marked as not compared."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import qhal
from qhal import Format, LinearFormat
from qhal.codebooks import CodebookFormat, SegmentFormat
from qhal_schemes import known_methods, open_checkpoint
from qhal_schemes.evidence import COMPARED, UNCOMPARED, cache_form, compared_forms, form, parse, variants
from qhal_schemes.registry import load_scheme

ROOT = Path(__file__).parent.parent


def module(name: str) -> ModuleType:
    """A helper of docs/, which is no package."""
    if str(ROOT / "docs") not in sys.path:
        sys.path.insert(0, str(ROOT / "docs"))
    return importlib.import_module(name)


def of(weight: str, input: str | None = None, **more: object) -> str:
    given = None if input is None else Format.parse(input)
    return str(form(LinearFormat("m", 64, 128, Format.parse(weight), given, **more), "l"))  # type: ignore[arg-type]


def test_sizes_and_float_dtypes_are_parameters_of_a_form() -> None:
    assert of("int4.g128*bf16") == of("int4.g32*fp16") == "l | int4.g*float | - | -"
    assert of("e4m3fn.128x128*fp32", "e4m3fn.g128*bf16") == of("e4m3fn.64x64*bf16", "e4m3fn.g64*fp32")
    assert of("nf4.flat64*(lut8.flat256*fp32+fp32)") == of("nf4.flat128*(lut8.flat64*fp32+fp32)")


def test_everything_else_makes_another_form() -> None:
    forms = [
        of("int4.g32*bf16"),
        of("int4.row*bf16"),
        of("int4-int4.g32*bf16"),
        of("int4.g32*bf16", "int8.row*fp32"),
        of("int4.g32*bf16", "int8.row*fp32@qmax=127.5"),
        of("int4.g32*bf16", "int8.row*fp32", static_input=True),
        of("int4.g32*bf16", group_index=True),
        of("int4.g32*bf16", low_rank=8),
        of("int4.g32*bf16", rotate_in=(("hadamard", 128),)),
        of("int4.g32*bf16", rotate_out=(("hadamard", 128),)),
        of("int4.g32*bf16", operand=Format.parse("fp8")),
        of("e2m1.g16*(e4m3fn.tensor*fp32)"),
        of("e2m1.g32*(e4m3fn.tensor*fp32)"),
    ]
    assert len(set(forms)) == len(forms)
    assert all(str(parse(text)) == text for text in forms)
    assert str(parse("R1 | float | - | in dense")) == "R1 | float | - | in dense"
    kv = qhal.layer_formats.KVFormat("mha", Format.parse("int8.row*fp32"), Format.parse("int4.row*fp32"))
    assert str(cache_form(kv)) == "cache | int8.row*float | int4.row*float | -"


def codebooks(*segments: tuple[int, ...], **flags: bool) -> str:
    """The name of segments (vector, entries of each codebook)."""
    parts = (SegmentFormat(64, (v, 1), tuple((n, "") for n in entries)) for v, *entries in segments)
    return form(LinearFormat("m", 64, 128, CodebookFormat(tuple(parts), **flags)), "l").first


def test_how_many_groups_have_codebooks_is_a_parameter() -> None:
    assert codebooks((8, 256)) == "vq8x1[256]"
    assert codebooks((8, 256), (8, 256)) == codebooks(*[(8, 256)] * 5) == "vq8x1[256]|..."
    assert codebooks(*[(8, 256, 16)] * 3, scale=True) == "vq8x1[256+16]|...*scale"
    assert codebooks((4, 128), (8, 256), (8, 256)) == "vq4x1[128]|vq8x1[256]|..."
    assert codebooks((8, 256), (8, 25)) == "vq8x1[256]|vq8x1[25]"
    assert variants("a", "x", "y") == ("a", "a, x", "a, y", "a, x, y")


@pytest.mark.parametrize("method", known_methods())
def test_every_scheme_has_a_row_in_the_table(method: str) -> None:
    """A title, layouts of which those that were compared are some, refusals."""
    family = getattr(load_scheme(method), "family", None)
    assert family is not None and family.title and family.tools and family.refused
    forms = compared_forms(method)
    assert forms
    known = {*family.layouts, "cache"}
    assert all(f.layout in known or f.layout.partition(",")[0] in known for f in forms)
    assert set(family.uncompared(method)) < set(family.layouts)


@pytest.mark.parametrize("method", ["nothing", "../compared/awq", "", "awq.txt", "AWQ"])
def test_a_method_without_a_list_has_no_evidence(method: str) -> None:
    assert compared_forms(method) == frozenset()


def test_a_form_that_no_case_compared_is_marked(golden: Path, tmp_path: Path) -> None:
    """A compared checkpoint with the scales of its inputs taken away: the tool was never seen to write this one."""
    source = golden / "compressed_tensors/fp8_tensor_kv_fp8/checkpoint"
    (compared,) = open_checkpoint(source).summary()["formats"]
    assert compared["evidence"] == COMPARED
    folder = tmp_path / "checkpoint"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = None
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept: dict[str, torch.Tensor] = {k: v for k, v in tensors.items() if not k.endswith("input_scale")}
    save_file(kept, folder / "model.safetensors")
    ckpt = open_checkpoint(folder)
    record = ckpt.summary()
    assert [row["evidence"] for row in record["formats"]] == [UNCOMPARED]
    assert [row["evidence"] for row in record["kv"]] == [COMPARED]
    name = ckpt.modules(quantized=True)[0]
    assert not ckpt.compared(name) and ckpt.compared("lm_head")
    with pytest.raises(qhal.CheckpointError, match="lm_head is not quantized: "):
        ckpt.form("lm_head")


def test_the_table_of_formats_is_made_of_the_lists() -> None:
    """docs/families.py: every compared form is one row, becomes a layer again, and runs on cpu_reference."""
    families = module("families")
    rows = families.forms().splitlines()[2:]
    assert len(rows) == sum(len(compared_forms(method)) for method in known_methods())
    for method in known_methods():
        assert f"(`{method}`)" in families.families()
        assert all(families.runs(one) for one in compared_forms(method))
    text = (ROOT / "docs/formats.md").read_text()
    assert families.refreshed(text) == text
    renewed = families.refreshed("<!-- generated: words -->\nold\n<!-- end -->")
    assert "`fp8_e5m2`" in renewed and "old" not in renewed
    with pytest.raises(KeyError):
        families.refreshed("<!-- generated: nothing -->\n<!-- end -->")
    assert families.table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x&#124;y |"
