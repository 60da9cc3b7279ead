"""What ModelOpt and Quark files can hold beyond the golden checkpoints: written from specs, read back as the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qhal_schemes
from qhal import CheckpointError, Format, FormatError, QTensor
from qhal.encoding import encode
from qhal.recoding import recode
from qhal.rotations import Diagonal
from qhal.specs import KVSpec, LinearSpec, Operand
from qhal_schemes.convert import convert_checkpoint
from qhal_schemes.modelopt_target import ModelOptTarget
from qhal_schemes.quark_target import QuarkTarget
from qhal_schemes.target import Layer, Target
from qhal_schemes.writing import layout_of

Same = Callable[[LinearSpec, LinearSpec], None]
Write = Callable[..., Path]
FP8, NVFP4 = "e4m3fn.tensor*fp32", "e2m1.g16*(e4m3fn.tensor*fp32)"
WIDE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROJECTION = "model.layers.0.self_attn.k_proj"
MODELOPT = [
    ("e4m3fn.tensor*fp32", FP8, True, "FP8"),
    ("e4m3fn.row*fp32", "e4m3fn.row*fp32", False, "FP8_PER_CHANNEL_PER_TOKEN"),
    ("e4m3fn.tensor*bf16", "e4m3fn.row*fp32", False, "FP8_PER_CHANNEL_PER_TOKEN"),
    ("e4m3fn.128x128*fp32", "", False, "fp8_pb_wo"),
    (NVFP4, NVFP4, True, "NVFP4"),
    (NVFP4, "", False, "W4A16_NVFP4"),
    ("e2m1.g32*(e4m3fn.tensor*fp32)", FP8, True, "W4A8_NVFP4_FP8"),
    ("int4.g32*fp32", "", False, "W4A16_AWQ"),
    ("int8.row*fp32", "", False, "W8A16"),
    ("int8.row*bf16", "int8.tensor*bf16", True, "W8A8_SQ_PER_CHANNEL"),
    ("e2m1.g32*e8m0", "e2m1.g32*e8m0@e8m0=ceil", False, "mxfp4"),
    ("e2m1.g32*e8m0", FP8, True, "W4A8_MXFP4_FP8"),
    ("e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0@e8m0=ceil", False, "MXFP8"),
]
"""Weight, input, whether its scale is static, and the quant_algo."""
QUARK = [
    ("e4m3fn.tensor*bf16", "e4m3fn.tensor*bf16", True),
    ("e5m2.row*fp32", "e4m3fn.tensor*fp32", False),
    ("e4m3fn.g64*fp16", "", False),
    ("e4m3fn.32x64*fp32", "e4m3fn.g64*fp32", False),
    ("e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0@qmax=256,e8m0=ceil", False),
    ("e2m1.g32*e8m0", "e2m1.g32*e8m0@e8m0=even", False),
    ("e3m2.g32*e8m0", "e3m2.g32*e8m0", False),
    ("e2m3.g64*e8m0", "int8-int8.tensor*fp32@domain=minmax", True),
    ("int8.tensor*bf16", "int8.row*fp32@qmax=127.5", False),
    ("int8-int8.row*fp32@domain=minmax", "uint8-uint8.row*fp32@domain=minmax", False),
    ("uint8-uint8.g32*fp32@domain=minmax", "", False),
    ("int4.tensor*bf16", "", False),
    ("int4.row*fp32", "int8.tensor*fp32", True),
    ("int4-int4.g32*bf16@domain=minmax", "", False),
    ("uint4-uint4.row*bf16@domain=minmax", "", False),
    ("uint4-uint4.g16*bf16@domain=minmax", "", False),
    ("int4.row*(bf16.tensor*bf16)", FP8, True),
    ("int4.g32*(fp32.row*fp32)", FP8, True),
    ("int3.g32*bf16", "", False),
]


def a_spec(weight: str, given: str = "", static: bool = False, n: int = 64, name: str = PROJECTION) -> LinearSpec:
    """A module of [n, 128] with a bias."""
    noise = torch.Generator().manual_seed(n)
    w = encode(torch.randn(n, 128, generator=noise), Format.parse(weight))
    operand = None
    if given:
        fmt = Format.parse(given).storage if static else Format.parse(given)
        wide = (
            torch.float32 if fmt.scale is None or not fmt.scale.plain else WIDE[fmt.scale.element] if static else None
        )
        scale = torch.tensor([0.046875]).to(wide) if static else None
        zero = torch.tensor([3], dtype=torch.int8) if static and fmt.zero is not None else None
        operand = Operand(fmt, scale, zero)
    bias = torch.randn(n, generator=noise).bfloat16().float()
    return LinearSpec(replace(w, format=w.format.storage), input=operand, bias=bias, name=name)


def write(writing: Write, target: Target, *specs: LinearSpec, kv: KVSpec | None = None) -> Path:
    """A checkpoint of these modules, as `convert` would write it."""
    tensors, layers = {"model.norm.weight": torch.ones(4)}, []
    for spec in specs:
        assert isinstance(spec.weight, QTensor)
        layer = Layer(spec.name, spec.format, target.goal(spec.format))
        assert not layer.goal.losses
        made = target.tensors(layer, replace(spec, weight=recode(spec.weight, layer.goal.weight)))
        assert {leaf: layout_of(t) for leaf, t in made.items()} == target.layout(layer)
        tensors |= {layer.name(leaf): t for leaf, t in made.items()}
        layers.append(layer)
    if kv is not None:
        target.cache_goal(kv.format, {f"{kv.name}.{part}_proj": True for part in "kv"})
        tensors |= target.cache_tensors(kv.name, kv)
    done = target.written(layers, {"lm_head": ""}, None if kv is None else kv.format)
    tensors["lm_head.weight"] = torch.ones(4, 4, dtype=torch.bfloat16)
    return writing(tensors, done.section)


@pytest.mark.parametrize(("weight", "given", "static", "algo"), MODELOPT)
def test_modelopt(write_checkpoint: Write, same_spec: Same, weight: str, given: str, static: bool, algo: str) -> None:
    n = 192 if "128x128" in weight else 64  # the last tile is partial
    spec = a_spec(weight, given, static, n)
    ckpt = qhal_schemes.open_checkpoint(write(write_checkpoint, ModelOptTarget(torch.bfloat16), spec))
    assert ckpt.config["quantization_config"]["quant_algo"] == algo
    same_spec(spec, ckpt.spec(PROJECTION))


@pytest.mark.parametrize(("weight", "given", "static"), QUARK)
def test_quark(write_checkpoint: Write, same_spec: Same, weight: str, given: str, static: bool) -> None:
    n = 60 if weight.startswith(("int4-int4.g", "uint4-uint4.g")) else 64  # words that are not filled
    spec = a_spec(weight, given, static, n)
    ckpt = qhal_schemes.open_checkpoint(write(write_checkpoint, QuarkTarget(torch.bfloat16), spec))
    same_spec(spec, ckpt.spec(PROJECTION))


def test_what_happens_beside_the_weight_in_modelopt(write_checkpoint: Write, same_spec: Same) -> None:
    scale = Diagonal(torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5)
    target = ModelOptTarget(torch.bfloat16)
    down, up = torch.randn(8, 128), torch.randn(64, 8)
    svd = replace(a_spec(NVFP4, NVFP4, True), rotate_in=(scale,), low_rank=(down, up))
    awq = replace(
        a_spec("int4.g128*fp32", FP8, True, name="model.layers.0.mlp.up_proj"),
        rotate_in=(scale,),
        operand=Operand(Format.parse(FP8), torch.tensor([0.25])),
    )
    plain = a_spec(NVFP4, NVFP4, True, name="model.layers.0.mlp.gate_proj")
    smoothed = replace(plain, rotate_in=(scale,), name="model.layers.0.mlp.down_proj")
    ckpt = qhal_schemes.open_checkpoint(write(write_checkpoint, target, svd, awq, plain, smoothed))
    said = ckpt.config["quantization_config"]["quantized_layers"]
    assert [said[s.name]["quant_algo"] for s in (svd, awq, plain, smoothed)] == [
        "NVFP4_SVD", "W4A8_AWQ", "NVFP4_AWQ", "NVFP4_AWQ",
    ]  # fmt: skip
    for spec in (svd, awq, plain, smoothed):
        same_spec(spec, ckpt.spec(spec.name))


@pytest.mark.parametrize("target", [ModelOptTarget, QuarkTarget])
def test_layers_of_different_formats(write_checkpoint: Write, same_spec: Same, target: type[Target]) -> None:
    specs = [
        a_spec("e4m3fn.tensor*fp32", FP8, True),
        a_spec("e4m3fn.tensor*fp32", FP8, True, 32, "model.layers.0.self_attn.v_proj"),
        a_spec("e4m3fn.row*fp32", "e4m3fn.row*fp32", False, 32, "model.layers.0.self_attn.o_proj"),
        a_spec("int4.g32*fp32", "", False, 32, "model.layers.0.mlp.up_proj"),
    ]
    ckpt = qhal_schemes.open_checkpoint(write(write_checkpoint, target(torch.bfloat16), *specs))
    for spec in specs:
        same_spec(spec, ckpt.spec(spec.name))


@pytest.mark.parametrize(
    ("target", "cache"),
    [(ModelOptTarget, FP8), (ModelOptTarget, NVFP4), (QuarkTarget, FP8), (QuarkTarget, "int8.tensor*bf16")],
)
def test_caches(
    write_checkpoint: Write, same_operand: Callable[[Operand, Operand], None], target: type[Target], cache: str
) -> None:
    """The projections have records of their own, so that the pattern's is not theirs."""
    attention = "model.layers.0.self_attn"
    specs = [
        a_spec("e4m3fn.tensor*fp32", FP8, True, 64, f"{attention}.k_proj"),
        a_spec("e4m3fn.row*fp32", "e4m3fn.row*fp32", False, 64, f"{attention}.v_proj"),
        a_spec("int4.g32*fp32", "", False, 64, "vision.layers.0.mixer.k_proj"),
    ]
    fmt = Format.parse(cache)
    wide = torch.bfloat16 if "bf16" in cache else torch.float32
    k, v = (Operand(fmt, torch.tensor([x]).to(wide)) for x in (0.5, 0.375))
    kv = KVSpec(k, v, heads=0, k_dim=0, v_dim=0, name=attention)
    ckpt = qhal_schemes.open_checkpoint(write(write_checkpoint, target(torch.bfloat16), *specs, kv=kv))
    found = ckpt.kv_format(0)
    assert found is not None and dict(ckpt.kv_layers) == {0: attention}
    same_operand(k, found.k)
    same_operand(v, found.v)


@pytest.mark.parametrize("to", ["modelopt", "compressed-tensors", "quark"])
def test_a_cache_of_some_layers_is_named(write_checkpoint: Write, tmp_path: Path, to: str) -> None:
    """Quark's records name layers one by one; a file that has one setting for all cannot say that."""
    attention = "model.layers.0.self_attn"
    names = (f"{attention}.k_proj", f"{attention}.v_proj", "model.layers.1.self_attn.q_proj")
    specs = [a_spec("e4m3fn.tensor*fp32", FP8, True, name=name) for name in names]
    k = Operand(Format.parse(FP8), torch.ones(1))
    kv = KVSpec(k, k, heads=0, k_dim=0, v_dim=0, name=attention)
    source = write(write_checkpoint, QuarkTarget(torch.bfloat16), *specs, kv=kv)
    with pytest.raises(CheckpointError, match=r"the caches of layers \[1\] are plain"):
        convert_checkpoint(source, tmp_path / "out", to)
    summary = convert_checkpoint(source, tmp_path / "out", to, lossy=True)
    assert len(summary["losses"]) == 1 and not qhal_schemes.open_checkpoint(tmp_path / "out").kv_layers


def test_quark_has_no_cache_of_plain_projections() -> None:
    k = Operand(Format.parse(FP8), torch.ones(1))
    kv = KVSpec(k, k, heads=1, k_dim=8, v_dim=8, name="m").format
    with pytest.raises(FormatError, match="quark's caches are outputs of quantized layers"):
        QuarkTarget(torch.bfloat16).cache_goal(kv, {PROJECTION: False})
    with pytest.raises(FormatError, match="quark holds caches of e4m3fn or int8"):
        QuarkTarget(torch.bfloat16).cache_goal(replace(kv, k=Format.parse(NVFP4)), {PROJECTION: True})
    with pytest.raises(FormatError, match="modelopt holds caches of e4m3fn or e2m1"):
        ModelOptTarget(torch.bfloat16).cache_goal(replace(kv, k=Format.parse(NVFP4)), {PROJECTION: True})


def test_scales_that_are_not_positive_are_refused() -> None:
    target, spec = ModelOptTarget(torch.bfloat16), a_spec("int8.row*fp32")
    signs = replace(a_spec("int4.g32*fp32"), rotate_in=(Diagonal(-torch.ones(128)),))
    layer = Layer(signs.name, signs.format, target.goal(signs.format))
    with pytest.raises(FormatError, match="pre_quant_scale of these files is positive, here it reaches down to -1"):
        target.tensors(layer, signs)
    layer = Layer(spec.name, spec.format, target.goal(spec.format))
    with pytest.raises(FormatError, match="weight_scale of these files is positive"):
        target.tensors(layer, replace(spec, weight=replace(spec.weight, scale=torch.zeros(64, 1))))


def test_a_module_that_cannot_be_written_is_named(write_checkpoint: Write, tmp_path: Path) -> None:
    """Quark's weights may have negative scales, ModelOpt's may not."""
    spec = a_spec("int8.row*fp32")
    assert isinstance(spec.weight, QTensor) and isinstance(spec.weight.scale, torch.Tensor)
    spec.weight.scale[3] = -0.5
    source = write(write_checkpoint, QuarkTarget(torch.bfloat16), spec)
    with pytest.raises(CheckpointError, match=r"self_attn\.k_proj: weight_scale of these files is positive"):
        convert_checkpoint(source, tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "weight", "given", "static", "text"),
    [
        (ModelOptTarget, "int4.row*fp32", "", False, "no quant_algo with a weight of int4.row"),
        (ModelOptTarget, "e4m3fn.64x64*fp32", "", False, "no quant_algo with a weight of e4m3fn.64x64"),
        (ModelOptTarget, "e3m2.g32*e8m0", "", False, "no quant_algo"),
        (QuarkTarget, NVFP4, NVFP4, True, "quark holds fp8"),
        (QuarkTarget, "int8.row*fp32", "int4.row*fp32", False, "no word for inputs quantized to int4"),
        (QuarkTarget, "int8.row*fp32", "e4m3fn.row*fp32", True, "no word for static inputs"),
    ],
)
def test_what_has_no_word_is_refused(target: type[Target], weight: str, given: str, static: bool, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        target(torch.bfloat16).goal(a_spec(weight, given, static).format)


@pytest.mark.parametrize("to", ["compressed-tensors", "modelopt", "quark"])
def test_rows_of_zeros_in_int8_of_bitsandbytes(write_checkpoint: Write, tmp_path: Path, to: str) -> None:
    """They have scales of 0, which no other tool's readers take."""
    tensors = {f"{PROJECTION}.weight": torch.ones(32, 32, dtype=torch.int8), f"{PROJECTION}.SCB": torch.ones(32)}
    tensors[f"{PROJECTION}.SCB"][5] = 0.0
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}
    source = write_checkpoint(tensors, section)
    with pytest.raises(CheckpointError, match="has scales of 0"):
        convert_checkpoint(source, tmp_path / "out", to, lossy=True)
    assert not (tmp_path / "out").exists()
    convert_checkpoint(source, tmp_path / "bf16", "bf16", lossy=True)
    assert not qhal_schemes.open_checkpoint(tmp_path / "bf16").tensor(f"{PROJECTION}.weight")[5].any()
