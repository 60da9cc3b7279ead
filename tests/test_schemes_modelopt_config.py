"""ModelOpt's description files: what they exclude, what they mix, two that contradict each other; caches; errors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qhal
from qhal.encoding import encode
from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal_schemes import CheckpointWarning, open_checkpoint
from qhal_schemes.packing import pack_int4

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
N, K = 64, 128
L = "model.layers.0."
Q, D, KP = L + "self_attn.q_proj", L + "mlp.down_proj", L + "self_attn.k_proj"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def side(algo: Any, cache: Any = None, **more: Any) -> dict[str, Any]:
    """hf_quant_config.json as the exporter writes it."""
    inner = {"quant_algo": algo, "kv_cache_quant_algo": cache, "exclude_modules": ["lm_head"], **more}
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": inner}


def copy_of(algo: str | None, **more: Any) -> dict[str, Any]:
    """The copy in config.json."""
    section = {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"]}
    return {k: v for k, v in section.items() if v is not None} | more


def store(write: Write, tensors: Tensors, algo: Any, **arguments: Any) -> Path:
    """A folder whose only description is hf_quant_config.json."""
    folder = write({"lm_head.weight": torch.ones(8, K).bfloat16()} | tensors, **arguments)
    (folder / "hf_quant_config.json").write_text(json.dumps(algo))
    return folder


def fp8(name: str = Q, n: int = N, k: int = K, **more: torch.Tensor) -> Tensors:
    codes = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).mul(20).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(0.01)} | more
    return {f"{name}.{leaf}": t for leaf, t in parts.items()}


def nvfp4(name: str = Q, **more: torch.Tensor) -> Tensors:
    g = torch.Generator().manual_seed(0)
    parts = {
        "weight": torch.randint(0, 256, (N, K // 2), generator=g).to(torch.uint8),
        "weight_scale": (torch.rand(N, K // 16, generator=g) * 400 + 1).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.01),
        "input_scale": torch.tensor(0.01),
    }
    return {f"{name}.{leaf}": t for leaf, t in (parts | more).items()}


def int4(name: str = Q, **more: torch.Tensor) -> Tensors:
    codes = torch.randint(-8, 8, (N, K), generator=torch.Generator().manual_seed(0))
    parts = {"weight": pack_int4(codes, 0).view(torch.uint8), "weight_scale": torch.full((N, K // 64), 0.5)}
    return {f"{name}.{leaf}": t for leaf, t in (parts | more).items()}


def mixed() -> tuple[Tensors, dict[str, Any]]:
    tensors = {L + "mlp.up_proj.weight": torch.ones(N, K).bfloat16()}
    tensors |= nvfp4(Q) | fp8(KP) | int4(D, pre_quant_scale=torch.ones(K).bfloat16())
    layers = {Q: {"quant_algo": "NVFP4", "group_size": 16}, KP: {"quant_algo": "FP8"}}
    awq = {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True}
    return tensors, layers | {D: awq}


def test_mixed_precision_opens_plans_and_runs(write_checkpoint: Write) -> None:
    tensors, layers = mixed()
    description = side("MIXED_PRECISION", quantized_layers=layers)
    del description["quantization"]["exclude_modules"]
    ckpt = open_checkpoint(store(write_checkpoint, tensors, description))
    assert [str(ckpt.format(m).weight) for m in (Q, KP, D)] == [
        "e2m1.g16*(e4m3fn.tensor*fp32)",
        "e4m3fn.tensor*fp32",
        "int4.g64*fp32",
    ]
    assert ckpt.excluded == {"lm_head": "not in quantized_layers", L + "mlp.up_proj": "not in quantized_layers"}
    ops = qhal.select("cpu_reference")
    plan = qhal.resolve(ckpt, ops, policy="exact")
    assert len(plan.entries) == 4 and json.loads(plan.explain("json"))
    for name in ckpt.modules(quantized=True):
        assert ckpt.load_linear(name, ops)(torch.ones(3, K).bfloat16()).isfinite().all()


def test_an_entry_may_name_what_holds_the_modules(write_checkpoint: Write) -> None:
    tensors = {L + "mlp.gate.weight": torch.ones(1, K).bfloat16()}
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors |= fp8(f"{L}mlp.experts.0.{name}", *((K, N) if name == "down_proj" else (N, K)))
    layers = {L + "mlp.experts": {"quant_algo": "FP8"}}
    ckpt = open_checkpoint(store(write_checkpoint, tensors, side("MIXED_PRECISION", quantized_layers=layers)))
    assert len(ckpt.modules(quantized=True)) == 3


@pytest.mark.parametrize("both", [True, False])
def test_config_json_and_the_side_file_complete_each_other(write_checkpoint: Write, both: bool) -> None:
    folder = write_checkpoint(int4() | {"lm_head.weight": torch.ones(8, K).bfloat16()}, copy_of("W4A16_AWQ"))
    if both:
        (folder / "hf_quant_config.json").write_text(json.dumps(side("W4A16_AWQ", "FP8", group_size=64)))
    ckpt = open_checkpoint(folder)  # alone, the width of the scale tells the group size
    assert (
        ckpt.method == "modelopt"
        and str(ckpt.format(Q).weight) == "int4.g64*fp32"
        and list(ckpt.excluded) == ["lm_head"]
    )
    assert (ckpt.kv_format(0) is not None) == both


def test_old_copies_in_config_json_keep_the_inner_object(write_checkpoint: Write) -> None:
    section = {"quant_method": "modelopt"} | side("FP8")
    folder = write_checkpoint(fp8() | {"lm_head.weight": torch.ones(8, K).bfloat16()}, section)
    assert torch.equal(open_checkpoint(folder).stored(Q), fp8()[f"{Q}.weight"].float() * 0.5)


def test_a_side_file_that_quantizes_nothing(write_checkpoint: Write) -> None:
    ckpt = open_checkpoint(store(write_checkpoint, {f"{Q}.weight": torch.ones(N, K)}, side(None)))
    assert ckpt.method == "" and ckpt.modules(quantized=True) == ()


def test_excluded_by_name_by_glob_and_by_what_holds_it(write_checkpoint: Write) -> None:
    plain = ["lm_head", L + "mlp.gate_proj", L + "mlp.up_proj", "model.vision.block.0.fc", L + "self_attn.o_proj"]
    tensors = {f"{m}.weight": torch.ones(8, K).bfloat16() for m in plain} | fp8()
    rules = ["lm_head", "model.layers.0.mlp.gate*", "*.up_proj", "model.vision", L + "self_attn.[kvo]_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ckpt = open_checkpoint(store(write_checkpoint, tensors, side("FP8", exclude_modules=rules)))
    assert ckpt.excluded == {m: f"exclude_modules {rule!r}" for m, rule in zip(plain, rules, strict=True)}


def test_what_the_file_holds_quantized_is_read_so_with_a_warning(write_checkpoint: Write) -> None:
    folder = write_checkpoint(nvfp4() | nvfp4("lm_head"))
    (folder / "hf_quant_config.json").write_text(json.dumps(side("NVFP4", exclude_modules=["lm_head*"])))
    with pytest.warns(CheckpointWarning, match=r"lm_head: excluded by exclude_modules 'lm_head\*', but the file holds"):
        ckpt = open_checkpoint(folder)
    assert set(ckpt.modules(quantized=True)) == {Q, "lm_head"}
    assert torch.equal(ckpt.stored(Q), ckpt.stored("lm_head"))


# ---------------------------------------------------------------- caches


def attention(**scales: float) -> Tensors:
    """A plain attention of 2 heads of 32 features."""
    tensors = {f"{L}self_attn.{p}_proj.weight": torch.ones(64, K).bfloat16() for p in "kv"}
    tensors |= {f"{L}self_attn.{p}_proj.{p}_scale": torch.tensor(s) for p, s in scales.items()}
    return tensors


HEADS = {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 32}


@pytest.mark.parametrize("cache", ["FP8", "NVFP4"])
def test_caches(write_checkpoint: Write, cache: str) -> None:
    ckpt = open_checkpoint(store(write_checkpoint, attention(k=0.5, v=0.25), side(None, cache), model=HEADS))
    spec = ckpt.kv_format(0)
    assert spec is not None and (spec.heads, spec.k_dim, spec.v_dim) == (2, 32, 32)
    assert spec.k.scale is not None and spec.v.scale is not None
    assert (spec.k.scale.tolist(), spec.v.scale.tolist()) == ([0.5], [0.25])
    assert ckpt.excluded[f"{L}self_attn.k_proj"] == "quant_algo is null: only the cache is quantized"
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    got = encode(x, spec.k.format, scale=spec.k.scale).dequantize()
    if cache == "FP8":
        want = (x / 0.5).to(torch.float8_e4m3fn).float() * 0.5
    else:  # block scales under the stored outer value, nearest code of the table
        block = x.unflatten(-1, (2, 16))
        inner = (block.abs().amax(-1, keepdim=True) / 6 / 0.5).to(torch.float8_e4m3fn).float() * 0.5
        table = torch.cat([E2M1, -E2M1])
        nearest = ((block / inner).unsqueeze(-1) - table).abs().argmin(-1)
        want = (table[nearest] * inner).flatten(-2)
    assert torch.equal(got, want)
    assert len(qhal.resolve(ckpt, qhal.select("cpu_reference"), policy="exact").entries) == 1


def test_a_cache_of_constant_range_has_scale_one(write_checkpoint: Write) -> None:
    ckpt = open_checkpoint(store(write_checkpoint, attention(), side(None, "FP8"), model=HEADS))
    spec = ckpt.kv_format(0)
    assert spec is not None and spec.k.scale is not None and spec.k.scale.tolist() == [1.0]
    assert not [f for f in ckpt.layer_formats() if isinstance(f, LinearFormat)]


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("FP8", "e4m3fn.tensor*fp32"),
        ({"num_bits": 8, "type": "float", "dynamic": False}, "e4m3fn.tensor*fp32"),
        ("NVFP4", "e2m1.g16*(e4m3fn.tensor*fp32)"),
    ],
)
def test_the_cache_key_of_config_json(write_checkpoint: Write, scheme: Any, name: str) -> None:
    folder = write_checkpoint(attention(k=0.5, v=0.5), copy_of(None, kv_cache_scheme=scheme, ignore=[]), model=HEADS)
    spec = open_checkpoint(folder).kv_format(0)
    assert spec is not None and spec.v.format == Format.parse(name)


# ---------------------------------------------------------------- errors


def refuse(folder: Path, match: str, read: str | None = None) -> None:
    """One CheckpointError when it is opened, or only when `read` is read."""
    if read is None:
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(folder)
    else:
        ckpt = open_checkpoint(folder)
        with pytest.raises(CheckpointError, match=match):
            ckpt.spec(read)


@pytest.mark.parametrize(
    ("algo", "match"),
    [
        (side("FP9"), "unsupported: .*hf_quant_config.json: quant_algo: 'FP9'; can be read: FP8, .*MIXED_PRECISION"),
        (side("fp8_pb_real"), "unsupported: .*quant_algo: 'fp8_pb_real'"),
        (side(8), "quant_algo: expected one of FP8, .*, found 8"),
        (side("NVFP4"), "q_proj.weight: expected U8 .*, found F8_E4M3"),
        (side("FP8", "INT8"), "unsupported: .*kv_cache_quant_algo: 'INT8'; can be read: FP8, NVFP4"),
        (side("FP8", "NVFP4_AFFINE"), "unsupported: .*kv_cache_quant_algo: 'NVFP4_AFFINE'"),
        (side("FP8", {"num_bits": 8, "type": "int"}), "kv_cache_quant_algo: expected a name, or an object"),
        (side("FP8", {"num_bits": 6, "type": "float"}), "unsupported: .*'float6'"),
        (side("FP8", group_size=-1), "group_size: expected a positive integer, found -1"),
        (side("FP8", has_zero_point=True), "unsupported: .*has_zero_point true"),
        (side("FP8", pre_quant_scale="yes"), "pre_quant_scale: expected true or false"),
        (side("FP8", exclude_modules="lm_head"), "exclude_modules: expected a list of names"),
        (side("FP8", exclude_modules=["re:("]), "'re:\\(' is no regular expression"),
        (side("MIXED_PRECISION"), "quantized_layers: expected an object of layers, as quant_algo is MIXED_PRECISION"),
        (side("MIXED_PRECISION", quantized_layers=[]), "quantized_layers: expected an object of layers"),
        (
            side("MIXED_PRECISION", quantized_layers={Q: "FP8"}),
            "quantized_layers.*: expected an object with quant_algo",
        ),
        (side("MIXED_PRECISION", quantized_layers={Q: {"quant_algo": "MIXED_PRECISION"}}), "unsupported: .*'MIXED_P"),
        (
            side("MIXED_PRECISION", quantized_layers={}),
            "q_proj: holds quantized tensors, but no quantized_layers entry",
        ),
        (
            side("MIXED_PRECISION", quantized_layers={D: {"quant_algo": "FP8"}}),
            "q_proj: holds quantized tensors, but no quantized_layers entry",
        ),
        (side(None, "FP8"), "q_proj: holds quantized tensors, but quant_algo is null"),
        ({"quantization": 3}, "quantization: expected an object, found 3"),
        ({}, "quantization: expected an object, found None"),
    ],
)
def test_descriptions_that_cannot_be(write_checkpoint: Write, algo: Any, match: str) -> None:
    refuse(store(write_checkpoint, fp8(), algo), match)


@pytest.mark.parametrize(
    ("copied", "match"),
    [
        (copy_of("NVFP4"), "config.json and hf_quant_config.json disagree on quant_algo: 'NVFP4' and 'FP8'"),
        (copy_of("FP8", kv_cache_scheme="NVFP4"), "disagree on kv_cache_quant_algo: 'NVFP4' and 'FP8'"),
        (copy_of("FP8", ignore=["lm_head", "x"]), r"disagree on exclude_modules: \['lm_head', 'x'\] and \['lm_head'\]"),
        (copy_of("FP8", group_size=32), "disagree on group_size: 32 and 16"),
        (copy_of("FP8", exclude_modules=["x"]), "ignore: expected the same modules as exclude_modules"),
        (
            copy_of("FP8", kv_cache_scheme="FP8", kv_cache_quant_algo=None),
            r"kv_cache_scheme: expected what kv_cache_quant_algo says \(null\), found 'FP8'",
        ),
        (
            copy_of("FP8", config_groups={"a": {"weights": {"num_bits": 4}, "targets": ["Linear"]}}),
            "config_groups.a.weights.num_bits: expected 8, as quant_algo is FP8, found 4",
        ),
        (copy_of("FP8", config_groups={"a": {"weights": 4}}), "config_groups.a.weights: expected an object"),
        (copy_of("FP8", config_groups=[]), "config_groups: expected an object of groups"),
    ],
)
def test_two_descriptions_that_disagree(write_checkpoint: Write, copied: dict[str, Any], match: str) -> None:
    folder = write_checkpoint(fp8() | {"lm_head.weight": torch.ones(8, K).bfloat16()}, copied)
    (folder / "hf_quant_config.json").write_text(json.dumps(side("FP8", "FP8", group_size=16)))
    refuse(folder, match)


def test_layers_that_disagree(write_checkpoint: Write) -> None:
    tensors, layers = mixed()
    copied = copy_of("MIXED_PRECISION", quantized_layers=layers, ignore=[])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"quantized_layers": layers | {"x": {"quant_algo": "FP8"}}}, "disagree on quantized_layers"),
        ({"quantized_layers": layers | {KP: {"quant_algo": "W8A16"}}}, "disagree on quantized_layers.*k_proj"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}, "targets": [KP]}}}, "num_bits: expected 8, as .* FP8"),
        ({"config_groups": {"a": {"weights": {"group_size": 8}, "targets": [Q]}}}, "group_size: expected 16"),
        (
            {"config_groups": {"a": {"weights": {}, "targets": ["Linear"]}}},
            "targets: expected names of quantized_layers",
        ),
    ]
    for i, (change, match) in enumerate(cases):
        folder = write_checkpoint(tensors, copied | change, name=str(i))
        described = side("MIXED_PRECISION", quantized_layers=layers, exclude_modules=None)
        (folder / "hf_quant_config.json").write_text(json.dumps(described))
        refuse(folder, match)
    plain = tensors | {f"{Q}.weight": torch.ones(N, K)}
    plain = {name: t for name, t in plain.items() if name.rpartition(".")[0] != Q or name.endswith("weight")}
    refuse(write_checkpoint(plain, copied, name="plain"), "quantized_layers makes it NVFP4, but the file holds a plain")


@pytest.mark.parametrize(
    ("algo", "tensors", "match", "late"),
    [
        ("FP8", fp8(weight_scale=torch.ones(N)), r"weight_scale: expected F32 \[\], found F32 \[64\]", False),
        ("FP8", fp8(weight_scale=torch.tensor(0.5).bfloat16()), "weight_scale: expected F32", False),
        ("FP8", fp8(extra=torch.ones(1)), "q_proj.extra is extra", False),
        ("FP8", fp8(k_scale=torch.ones(1)), "q_proj.k_scale is extra", False),
        ("FP8", fp8(bias=torch.ones(3)), r"bias: expected .*\[64\], found F32 \[3\]", False),
        ("FP8", {k: t for k, t in fp8().items() if "input" not in k}, "input_scale is missing", False),
        ("FP8", fp8(weight_scale=torch.tensor(float("nan"))), "weight_scale: expected finite scales", True),
        ("FP8", fp8(weight_scale=torch.tensor(0.0)), "weight_scale: expected finite scales that are not zero", True),
        ("FP8", fp8(weight_scale=torch.tensor(-1.0)), "weight_scale: expected positive scales", True),
        ("FP8", fp8(input_scale=torch.tensor(-1.0)), "input_scale: expected positive scales", True),
        ("FP8", fp8(pre_quant_scale=torch.zeros(K)), "pre_quant_scale: expected finite scales that are not zero", True),
        ("FP8", fp8(pre_quant_scale=torch.ones(3)), r"pre_quant_scale: expected .*\[128\]", False),
        ("FP8", fp8(weight=torch.full((N, K), torch.nan).to(torch.float8_e4m3fn)), "FP8 codes that are numbers", True),
        ("NVFP4", nvfp4(weight_scale=torch.ones(N, 4).to(torch.float8_e4m3fn)), "expected 8 groups of 16", False),
        ("NVFP4", nvfp4(weight_scale_2=torch.tensor(float("inf"))), "weight_scale_2: expected finite", True),
        ("NVFP4", {k: t for k, t in nvfp4().items() if "scale_2" not in k}, "weight_scale_2 is missing", False),
        ("W4A16_NVFP4", nvfp4(), "input_scale is extra", False),
        (
            "W4A16_AWQ",
            int4(weight_scale=torch.ones(N, 3)),
            r"expected groups that fill 128 columns \(K\), found 3 groups",
            False,
        ),
        ("NVFP4_SVD", nvfp4(), r"svdquant_lora_a is missing", False),
        (
            "NVFP4_SVD",
            nvfp4(svdquant_lora_a=torch.ones(4, K)),
            r"svdquant_lora_b is missing, expected .*\[64, 4\]",
            False,
        ),
        (
            "FP8",
            fp8() | {f"{D}.weight": torch.ones(8, K)},
            "down_proj: the configuration quantizes every Linear",
            False,
        ),
        ("FP8", fp8() | fp8("model.embed_tokens"), "unsupported: .*a quantized embedding", False),
    ],
)
def test_tensors_that_do_not_fit(write_checkpoint: Write, algo: str, tensors: Tensors, match: str, late: bool) -> None:
    refuse(store(write_checkpoint, tensors, side(algo)), match, Q if late else None)


def test_stacked_experts_are_refused(write_checkpoint: Write) -> None:
    stacked = {f"{L}mlp.experts.down_proj": torch.zeros(2, N, K, dtype=torch.uint8)}
    stacked[f"{L}mlp.experts.down_proj_weight_scale"] = torch.ones(2, N, K // 8).to(torch.float8_e4m3fn)
    folder = store(write_checkpoint, nvfp4() | stacked, side("NVFP4"))
    refuse(folder, "unsupported: .*experts.down_proj: U8 .*stacked in one parameter")


@pytest.mark.parametrize(
    ("tensors", "model", "match"),
    [
        (attention(k=0.5), HEADS, "v_proj.v_scale is missing"),
        (attention(k=0.5, v=0.5), HEADS | {"head_dim": 64}, "need a k_proj of 128 rows, .* has 64"),
        (attention(k=0.5, v=0.5), HEADS | {"kv_lora_rank": 8}, "unsupported: .*latent attention"),
        ({f"{D}.weight": torch.ones(8, K)}, HEADS, "kv_cache_quant_algo is FP8, but no attention"),
    ],
)
def test_caches_that_do_not_fit(write_checkpoint: Write, tensors: Tensors, model: dict[str, Any], match: str) -> None:
    refuse(store(write_checkpoint, tensors, side(None, "FP8"), model=model), match)


def test_scales_of_a_cache_are_checked(write_checkpoint: Write) -> None:
    bad = attention(k=float("nan"), v=0.5)
    ckpt = open_checkpoint(store(write_checkpoint, bad, side(None, "FP8"), model=HEADS))
    with pytest.raises(CheckpointError, match=r"k_proj\.k_scale: expected finite scales"):
        ckpt.kv_format(0)


@pytest.mark.parametrize(
    ("description", "match"),
    [
        (side("FP8", smooth=1), "hf_quant_config.json: smooth: no key of ModelOpt that is known here"),
        (side("FP8", exclude_modules=["lm_head", "q_proj"]), "'q_proj' matches no module .*only a part of"),
    ],
)
def test_warnings(write_checkpoint: Write, description: dict[str, Any], match: str) -> None:
    with pytest.warns(CheckpointWarning, match=match):
        open_checkpoint(store(write_checkpoint, fp8(), description))
