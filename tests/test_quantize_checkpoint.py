"""Quantizing a checkpoint: the same bits on disk and on the way in, and what the peer's tools read."""

from __future__ import annotations

import json
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qhal import CheckpointError, Format, FormatError, QTensor, ShardError
from qhal.encoding import encode
from qhal_schemes import CheckpointWarning, open_checkpoint, quantize_checkpoint
from qhal_schemes.quantizing import WORDS, resolve_format

HIDDEN, INNER, VOCAB = 128, 256, 64
NAMES = [
    *WORDS,
    "int4_g32",
    "int4_g64",
    "int4_row",
    "int3_g32",
    "int8_g32",
    "int5_row",
    "uint4_g32",
    "uint4_row",
    "uint3_g64",
]
EXPLICIT = [
    "int4.g32*bf16@qmax=7.5",
    "int8.row*fp32",
    "e4m3fn.row*fp32",
    "e4m3fn.64x64*bf16",
    "int4-int4.g32*fp16@domain=minmax",
]


def tensors(
    layers: int = 2, *, bias: bool = True, head: bool = True, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * 0.05).to(dtype)

    found = {"model.embed_tokens.weight": rand(VOCAB, HIDDEN)}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, n, k in (("q_proj", 128, 128), ("k_proj", 64, 128), ("v_proj", 64, 128), ("o_proj", 128, 128)):
            found[f"{at}self_attn.{name}.weight"] = rand(n, k)
            if bias:
                found[f"{at}self_attn.{name}.bias"] = rand(n)
        for name, n, k in (("gate_proj", INNER, HIDDEN), ("up_proj", INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
            found[f"{at}mlp.{name}.weight"] = rand(n, k)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = torch.ones(HIDDEN, dtype=dtype)
    found["model.norm.weight"] = torch.ones(HIDDEN, dtype=dtype)
    if head:
        found["lm_head.weight"] = rand(VOCAB, HIDDEN)
    first = found["model.layers.0.mlp.down_proj.weight"]
    first[0] = 0  # a row of zeros
    first[1, :32] = 0
    return found


MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "attention_bias": True, "tie_word_embeddings": False, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "source"
    return write_source(folder, tensors(), MODEL)


def write_source(folder: Path, found: dict[str, torch.Tensor], model: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody opens")
    return folder


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- the same bits, offline, online and per shard


@pytest.mark.parametrize("name", [*NAMES, *EXPLICIT])
def test_written_read_and_online_agree(source: Path, tmp_path: Path, name: str) -> None:
    summary = quantize_checkpoint(source, tmp_path / "out", name)
    written, online, plain = (
        open_checkpoint(tmp_path / "out"),
        open_checkpoint(source, quantize=name),
        open_checkpoint(source),
    )
    quantized = written.modules(quantized=True)
    assert len(quantized) == summary["modules"] == 14
    assert quantized == online.modules(quantized=True)
    assert set(written.excluded) == set(online.excluded) == {"lm_head"}
    layout = resolve_format(name, torch.bfloat16)
    for module in quantized:
        a, b = written.spec(module), online.spec(module)
        assert isinstance(a.weight, QTensor)
        assert isinstance(b.weight, QTensor)
        assert written.format(module) == online.format(module) == a.format == b.format
        assert a.weight.equal(b.weight)
        direct = encode(plain.tensor(f"{module}.weight"), layout.weight)
        assert torch.equal(a.weight.dequantize(), direct.dequantize())
        assert (a.bias is None) == (b.bias is None)
        assert a.bias is None or b.bias is None or torch.equal(a.bias, b.bias)
    for tensor in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(written.tensor(tensor), plain.tensor(tensor))
    for dim, part in ((0, "up_proj"), (1, "down_proj")):
        cut = f"model.layers.1.mlp.{part}"
        halves = [written.linear_spec(cut, (dim, rank, 2)).weight for rank in range(2)]
        online_halves = [online.linear_spec(cut, (dim, rank, 2)).weight for rank in range(2)]
        for one, other in zip(halves, online_halves, strict=True):
            assert isinstance(one, QTensor)
            assert isinstance(other, QTensor)
            assert one.equal(other)


@pytest.mark.parametrize("name", [*NAMES, *EXPLICIT])
def test_a_rank_holds_its_part_of_the_quantized_whole(source: Path, name: str) -> None:
    """Scales that span the cut (a tensor, a row under dim 1) are the whole's, never the part's; no block is cut."""
    online = open_checkpoint(source, quantize=name)
    module = "model.layers.1.mlp.down_proj"
    whole = online.spec(module).weight
    assert isinstance(whole, QTensor)
    block = whole.format.block
    for dim in (0, 1):
        if block is not None and (whole.shape[dim] // 2) % (block.rows, block.cols)[dim]:
            with pytest.raises(ShardError, match="lies inside a block of"):
                online.linear_spec(module, (dim, 0, 2))
            continue
        for rank in range(2):
            part = online.linear_spec(module, (dim, rank, 2)).weight
            assert isinstance(part, QTensor)
            assert torch.equal(part.dequantize(), whole.dequantize().chunk(2, dim)[rank])


def test_files_are_split_and_indexed(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    summary = quantize_checkpoint(
        source, tmp_path / "out", "int4_g32", shard_bytes=100_000, progress=lambda *step: seen.append(step)
    )
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == summary["bytes"]
    assert [step[:2] for step in seen] == [(i + 1, 14) for i in range(14)]
    whole = tmp_path / "whole"
    quantize_checkpoint(source, whole, "int4_g32")
    one = load_file(whole / "model.safetensors")
    many = {k: v for file in files for k, v in load_file(tmp_path / "out" / file).items()}
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[k], many[k]) for k in one)
    again = tmp_path / "again"
    quantize_checkpoint(source, again, "int4_g32")
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert left_behind(whole) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert stat.S_IMODE((whole / "config.json").stat().st_mode) == 0o666 & ~umask()
    assert stat.S_IMODE(whole.stat().st_mode) == 0o777 & ~umask()


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_scales_take_the_models_dtype(tmp_path: Path) -> None:
    for name, dtype, kind in (("float16", torch.float16, "F16"), ("float32", torch.float32, "F32")):
        folder = write_source(
            tmp_path / name, tensors(1, dtype=dtype), {**MODEL, "dtype": name, "num_hidden_layers": 1}
        )
        out = tmp_path / f"{name}-int4"
        summary = quantize_checkpoint(folder, out, "int4_g32")
        assert summary["format"] == f"int4.g32*{'fp16' if kind == 'F16' else 'fp32'}@qmax=7.5"
        assert open_checkpoint(out).spec("model.layers.0.mlp.up_proj").effective().shape == (INNER, HIDDEN)


# ---------------------------------------------------------------- the peer's tools read it

FORMATS_OF_THE_PEER = [*NAMES, "int8.row*bf16", "e4m3fn.64x64*bf16"]


@pytest.mark.parametrize("name", FORMATS_OF_THE_PEER)
def test_compressed_tensors_decompresses_to_the_same_bits(source: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    out = tmp_path / "out"
    quantize_checkpoint(source, out, name)
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(section)
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format or section["format"])
    stored, ckpt = load_file(out / "model.safetensors"), open_checkpoint(out)
    for module in ckpt.modules(quantized=True):
        own = {k.rpartition(".")[2]: v for k, v in stored.items() if k.rpartition(".")[0] == module}
        bias = own.pop("bias", None)
        assert set(own) == set(compressor.compression_param_names(scheme))
        weight = compressor.decompress(own, scheme)["weight"]
        assert bias is None or bias.dtype == torch.bfloat16
        # the peer multiplies in the dtype of its scales: the exact product, rounded once
        assert torch.equal(weight, ckpt.stored(module).to(weight.dtype)), module


@pytest.mark.parametrize(
    "name", ["int4_g32", "int4_row", "int8", "fp8", "fp8_row", "fp8_block", "uint4_g32", "nvfp4", "mxfp4"]
)
def test_transformers_loads_the_same_weights(source: Path, tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "out"
    quantize_checkpoint(source, out, name)
    extra = {}
    if name.startswith("u"):  # transformers 5 keeps no packed zero points; it loads them decompressed
        extra["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, **extra)
        logits = model(torch.tensor([[1, 2, 3]])).logits  # weights are decompressed by the first forward
    assert bool(torch.isfinite(logits).all())
    ckpt = open_checkpoint(out)
    for module in ckpt.modules(quantized=True):
        assert torch.equal(model.get_submodule(module).weight, ckpt.stored(module).bfloat16()), module
    assert torch.equal(model.lm_head.weight, ckpt.tensor("lm_head.weight"))


# ---------------------------------------------------------------- which modules


def test_heads_routers_and_ignored_modules_stay_plain(tmp_path: Path) -> None:
    found = tensors(head=False)
    found["model.layers.0.mlp.gate.weight"] = torch.zeros(4, HIDDEN).bfloat16()
    found["model.layers.0.mlp.none.weight"] = torch.zeros(0, HIDDEN).bfloat16()
    folder = write_source(tmp_path / "source", found, {**MODEL, "tie_word_embeddings": True})
    ignore = ("lm_head", "model.layers.1.mlp.down_proj", "re:.*self_attn.o_proj")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = quantize_checkpoint(folder, tmp_path / "out", "int4_g32", ignore=ignore)
    assert summary["plain"] == {
        "model.layers.0.mlp.gate": "a router is not quantized",
        "model.layers.0.mlp.none": "an empty weight",
        "model.layers.0.self_attn.o_proj": "ignore 're:.*self_attn.o_proj'",
        "model.layers.1.self_attn.o_proj": "ignore 're:.*self_attn.o_proj'",
        "model.layers.1.mlp.down_proj": "ignore 'model.layers.1.mlp.down_proj'",
    }
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(section["ignore"]) == {*summary["plain"], "lm_head"}  # a tied head has no weight of its own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = open_checkpoint(tmp_path / "out")
    assert len(written.modules(quantized=True)) == 11


def test_an_ignore_entry_that_matches_nothing_is_a_warning(source: Path, tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning, match="'down_proj' matches no module"):
        quantize_checkpoint(source, tmp_path / "out", "int4_g32", ignore=("lm_head", "down_proj"))
    with pytest.raises(CheckpointError, match="nothing to quantize"):
        quantize_checkpoint(source, tmp_path / "none", "int4_g32", ignore=("Linear",))


# ---------------------------------------------------------------- formats


def test_words_mean_what_they_say() -> None:
    for word, (weight, inputs) in {
        "int4": ("int4.g128*bf16@qmax=7.5", None),
        "int8": ("int8.row*bf16@qmax=127.5", "int8.row*bf16@qmax=127.5"),
        "fp8": ("e4m3fn.tensor*bf16", "e4m3fn.row*bf16"),
        "fp8_block": ("e4m3fn.128x128*bf16", "e4m3fn.g128*bf16"),
        "mxfp8": ("e4m3fn.g32*e8m0@e8m0=up1.75", "e4m3fn.g32*e8m0@e8m0=up1.75"),
        "int6_channel": ("int6.row*bf16@qmax=31.5", None),
        "uint4-uint4.g64*bf16@domain=minmax": ("int4-int4.g64*bf16@domain=minmax", None),
    }.items():
        layout = resolve_format(word, torch.bfloat16)
        assert str(layout.weight) == weight
        found = layout.input("bf16")
        assert (None if found is None else str(found)) == inputs
    assert resolve_format(Format.parse("int4_g32"), torch.float16).stored == Format.parse("int4.g32*bf16")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("uint8", "is a bare element: words for a checkpoint are int4, int8, fp8"),
        ("bf16", "is a bare element"),
        ("int5", "is a bare element"),
        ("floaty", "unknown element 'floaty'"),
        ("q4_k", "no compressed-tensors checkpoint holds it; possible: int2..int8"),
        ("nf4.flat64*fp32", "no compressed-tensors checkpoint holds it"),
        ("e5m2.row*bf16", "no compressed-tensors checkpoint holds it"),
        ("int4.tensor*bf16", "no compressed-tensors checkpoint holds it"),
        ("int8.row*e4m3fn", "no compressed-tensors checkpoint holds it"),
        ("int4-fp16.g32*fp16", "no compressed-tensors checkpoint holds it"),
        ("uint4-uint4.g32*bf16", "no compressed-tensors checkpoint holds it"),
        ("e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor/fp32)"),
        ("e4m3fn.row*bf16%2:4", "no compressed-tensors checkpoint holds it"),
        ("int4.g32/bf16", "no compressed-tensors checkpoint holds it"),
    ],
)
def test_other_formats_are_refused(source: Path, tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(FormatError) as caught:
        quantize_checkpoint(source, tmp_path / "out", name)
    assert text in str(caught.value)
    assert left_behind(tmp_path) == []
    with pytest.raises(FormatError):
        open_checkpoint(source, quantize=name)
