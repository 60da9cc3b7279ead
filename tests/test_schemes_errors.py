"""Bad checkpoints: each mistake in a configuration or a tensor is one CheckpointError that names it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qhal.errors import CheckpointError
from qhal_schemes import CheckpointWarning, open_checkpoint
from qhal_schemes.packing import pack, pack_awq, unsigned

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
N, K, G = 64, 128, 32
Q, D = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def model(parts: Callable[[int], Tensors]) -> Tensors:
    """A model of two quantized modules, an embedding, a norm and a head."""
    g = torch.Generator().manual_seed(0)
    tensors: Tensors = {
        "model.embed_tokens.weight": torch.randn(8, K, generator=g).bfloat16(),
        "model.norm.weight": torch.ones(K).bfloat16(),
        "lm_head.weight": torch.randn(8, K, generator=g).bfloat16(),
    }
    for i, module in enumerate((Q, D)):
        tensors |= {f"{module}.{name}": t for name, t in parts(i).items()}
    return tensors


def ct_parts(seed: int, bits: int = 4) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (N, K), generator=g)
    return {
        "weight_packed": pack(unsigned(codes, bits), bits),
        "weight_scale": (torch.rand(N, K // G, generator=g) + 0.1).bfloat16(),
        "weight_shape": torch.tensor([N, K]),
    }


def gptq_parts(seed: int) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=g)
    return {
        "qweight": pack(codes, 4).t(),
        "qzeros": pack(torch.full((K // G, N), 7), 4),
        "scales": (torch.rand(K // G, N, generator=g) + 0.1).half(),
        "g_idx": (torch.arange(K) // G).int(),
    }


def awq_parts(seed: int) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {
        "qweight": pack_awq(torch.randint(0, 16, (N, K), generator=g)),
        "qzeros": pack_awq(torch.randint(0, 16, (N, K // G), generator=g)),
        "scales": (torch.rand(K // G, N, generator=g) + 0.1).half(),
    }


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": G}
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "quantization_status": "compressed",
    "version": "0.19.0",
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": G, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": G, "zero_point": True, "version": "gemm"}
METHODS = {"ct": (CT, ct_parts), "gptq": (GPTQ, gptq_parts), "awq": (AWQ, awq_parts)}


def change(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a configuration with one value set; path: keys joined by slashes."""
    config = copy.deepcopy(config)
    place = config
    *parents, last = path.split("/")
    for key in parents:
        place = place[key]
    place[last] = value
    return config


def refuse(folder: Path, match: str, *, read: str | None = None) -> None:
    """The error comes at opening, or only when `read` is read; nothing is written either way."""
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    if read is None:
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(folder)
    else:
        ckpt = open_checkpoint(folder)
        with pytest.raises(CheckpointError, match=match):
            ckpt.spec(read)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


@pytest.mark.parametrize("method", METHODS)
def test_the_unbroken_checkpoint_opens(write_checkpoint: Write, method: str) -> None:
    config, parts = METHODS[method]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ckpt = open_checkpoint(write_checkpoint(model(parts), config))
        assert ckpt.modules(quantized=True) == (D, Q)
        assert list(ckpt.excluded) == ["lm_head"]
        assert ckpt.dequantize(Q).shape == (N, K)


def test_unknown_method_lists_the_known_ones(write_checkpoint: Write) -> None:
    folder = write_checkpoint(model(ct_parts), {"quant_method": "compresed-tensors"})
    refuse(folder, r"unknown quant_method 'compresed-tensors'; known: .*awq, .*gptq.*did you mean compressed-tensors")


GROUP = "config_groups/group_0/"


@pytest.mark.parametrize(
    ("method", "path", "value", "match"),
    [
        ("ct", GROUP + "weights/num_bits", 0, r"weights\.num_bits: expected one of 2, .*found 0"),
        ("ct", GROUP + "weights/num_bits", "4", "num_bits: expected one of"),
        ("ct", GROUP + "weights/num_bits", True, "num_bits: expected one of"),
        ("ct", GROUP + "weights/group_size", -7, "group_size: expected a positive integer, found -7"),
        ("ct", GROUP + "weights/group_size", "32", "group_size: expected a positive integer"),
        ("ct", GROUP + "weights/group_size", None, "group_size: expected a positive integer with strategy group"),
        ("ct", GROUP + "weights/group_size", 48, r"weight_packed: expected 24 words for K=192.*4 groups of 48"),
        ("ct", GROUP + "weights/strategy", "row", "strategy: expected one of"),
        ("ct", GROUP + "weights/strategy", "channel", "strategy: expected group where group_size is given"),
        ("ct", GROUP + "weights/type", "complex", "type: expected int or float"),
        ("ct", GROUP + "weights/type", "float", "expected int weights for pack-quantized"),
        ("ct", GROUP + "weights/symmetric", "yes", "symmetric: expected true or false"),
        ("ct", GROUP + "weights/symmetric", False, r"weight_zero_point is missing, expected I32 \[8, 4\]"),
        ("ct", GROUP + "weights/dynamic", True, "expected static weights"),
        ("ct", GROUP + "weights/actorder", "group", r"weight_g_idx is missing"),
        ("ct", GROUP + "weights/actorder", "best", "actorder: expected group, weight or null"),
        ("ct", GROUP + "weights", None, "unsupported: .*inputs only"),
        ("ct", GROUP + "output_activations", WEIGHTS, "unsupported: .*quantized outputs"),
        ("ct", GROUP + "input_activations", {**WEIGHTS, "dynamic": False}, "unsupported: .*inputs group with dynamic"),
        ("ct", GROUP + "targets", [], "targets: expected a list of names"),
        ("ct", GROUP + "targets", "Linear", "targets: expected a list of names"),
        ("ct", GROUP + "targets", ["Conv2d"], "targets 'Conv2d' match no module"),
        (
            "ct",
            GROUP + "targets",
            ["q_proj"],
            r"match no module \(it is only a part of model\.layers\.0\.self_attn\.q_",
        ),
        ("ct", GROUP + "targets", ["re:.*("], "is no regular expression"),
        ("ct", GROUP + "targets", ["re:.*q_proj$"], f"{D}: holds quantized tensors, but no target"),
        ("ct", "config_groups", {}, "no target of any config group matches"),
        ("ct", "config_groups", [1], "config_groups: expected an object"),
        ("ct", "config_groups/group_0", 3, "expected an object"),
        ("ct", "format", "marlin-24", "unsupported: .*'marlin-24'"),
        ("ct", "format", None, "format: expected one of"),
        ("ct", "ignore", "lm_head", "ignore: expected a list of names"),
        ("ct", "ignore", [], "lm_head: target 'Linear' of group_0 quantizes it, but the file holds a plain weight"),
        ("ct", "ignore", ["head"], "lm_head: .* holds a plain weight .*'head' of ignore is only a part of its name"),
        ("ct", "ignore", ["lm_head", Q], f"{Q}: ignored by '{Q}', but the file holds quantized"),
        ("ct", "quantization_status", "calibration", "unsupported: .*'calibration'"),
        ("ct", "sparsity_config", {"format": "sparse-bitmask"}, "unsupported: .*sparse-bitmask"),
        ("ct", "kv_cache_scheme", {"num_bits": 4}, "unsupported: .*kv_cache_scheme"),
        ("gptq", "bits", 0, "bits: expected one of 2, 3, 4, 8, found 0"),
        ("gptq", "bits", 5, "bits: expected one of"),
        ("gptq", "bits", "4", "bits: expected one of"),
        ("gptq", "group_size", -7, "group_size: expected a positive integer, found -7"),
        ("gptq", "group_size", None, "group_size: expected a positive integer"),
        ("gptq", "group_size", 48, r"scales: expected F?.*\[3, 64\], found F16 \[4, 64\]"),
        ("gptq", "desc_act", "yes", "desc_act: expected true or false"),
        ("gptq", "bits", 8, r"qweight: expected I32 \[32, \*\], found I32 \[16, 64\]"),
        ("gptq", "checkpoint_format", "gptq_p", "unsupported: .*gptq_p"),
        ("gptq", "checkpoint_format", "marlin", "unsupported: .*marlin"),
        ("gptq", "qhal_zero_format", "v3", "qhal_zero_format: expected v1 or v2"),
        ("gptq", "dynamic", [1], "dynamic: expected an object"),
        ("gptq", "dynamic", {"+:(": {}}, "expected a regular expression"),
        ("gptq", "dynamic", {"+:.*": {"bits": 9}}, "bits: expected one of"),
        ("gptq", "dynamic", {r"-:.*q_proj": {}}, r"skipped by dynamic '-:\.\*q_proj'"),
        ("awq", "bits", 3, "bits: expected one of 4"),
        ("awq", "group_size", 0, "group_size: expected a positive integer"),
        ("awq", "group_size", 48, r"columns that divide into groups of 48, found 128 columns"),
        ("awq", "group_size", 64, r"scales: expected .*\[2, 64\], found F16 \[4, 64\]"),
        ("awq", "zero_point", 1, "zero_point: expected true or false"),
        ("awq", "version", "gemv", "unsupported: .*'gemv'"),
        (
            "awq",
            "modules_to_not_convert",
            ["self_attn"],
            "excluded by modules_to_not_convert 'self_attn', but the file",
        ),
    ],
)
def test_configuration(write_checkpoint: Write, method: str, path: str, value: Any, match: str) -> None:
    config, parts = METHODS[method]
    refuse(write_checkpoint(model(parts), change(config, path, value)), match)


def broken(
    parts: Callable[[int], Tensors], tensor: str, edit: Callable[[torch.Tensor], torch.Tensor | None]
) -> Tensors:
    tensors = model(parts)
    name = f"{Q}.{tensor}"
    value = edit(tensors.pop(name)) if name in tensors else edit(torch.zeros(0))
    if value is not None:
        tensors[name] = value
    return tensors


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[1, 1] = value
        return t

    return edit


def last(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.cat([t[:-1], torch.tensor([value], dtype=t.dtype)])


@pytest.mark.parametrize(
    ("method", "tensor", "edit", "match"),
    [
        ("ct", "weight_scale", lambda t: None, r"q_proj\.weight_scale is missing"),
        ("ct", "weight_shape", lambda t: None, r"q_proj\.weight_shape is missing"),
        ("ct", "weight_packed", lambda t: None, r"q_proj\.weight_packed is missing.*q_proj has weight_s"),
        ("ct", "weight_packed", lambda t: t[:, :-1], r"weight_packed: expected 16 words for K=128"),
        ("ct", "weight_packed", lambda t: t.long(), r"weight_packed: expected I32 .*found I64"),
        ("ct", "weight_scale", lambda t: t[:-1], r"weight_scale: expected .*\[64, \*\], found BF16 \[63, 4\]"),
        ("ct", "weight_scale", lambda t: t.double(), r"weight_scale: expected .*found F64"),
        ("ct", "weight_bogus", lambda t: torch.zeros(3), r"weight_bogus is extra"),
        ("ct", "weight_zero_point", lambda t: torch.ones(8, 4).float(), None),
        ("ct", "bias", lambda t: torch.zeros(3), r"bias: expected .*\[64\], found F32 \[3\]"),
        ("gptq", "qweight", lambda t: None, r"q_proj\.qweight is missing"),
        ("gptq", "qzeros", lambda t: None, r"q_proj\.qzeros is missing"),
        ("gptq", "scales", lambda t: None, r"q_proj\.scales is missing"),
        ("gptq", "g_idx", lambda t: None, r"q_proj\.g_idx is missing"),
        ("gptq", "g_idx", lambda t: t.long(), r"g_idx: expected I32 \[\*\], found I64"),
        ("gptq", "qzeros", lambda t: t[:, :-1], r"qzeros: expected I32 \[4, 8\], found I32 \[4, 7\]"),
        ("gptq", "extra", lambda t: torch.zeros(3), r"q_proj\.extra is extra"),
        ("awq", "qzeros", lambda t: None, r"q_proj\.qzeros is missing"),
        ("awq", "scales", lambda t: t.t(), r"scales: expected .*\[4, 64\], found F16 \[64, 4\]"),
        ("awq", "g_idx", lambda t: torch.zeros(3), r"q_proj\.g_idx is extra"),
    ],
)
def test_tensors(
    write_checkpoint: Write, method: str, tensor: str, edit: Callable[..., Any], match: str | None
) -> None:
    config, parts = METHODS[method]
    folder = write_checkpoint(broken(parts, tensor, edit), config)
    if match is not None:
        refuse(folder, match)
    else:  # a stored zero point of a symmetric weight is legal if it is zero, and here it is not
        refuse(folder, "expected zeros, as symmetric is true", read=Q)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("method", METHODS)
def test_scales_that_are_no_scales(write_checkpoint: Write, method: str, value: float) -> None:
    config, parts = METHODS[method]
    tensor = "weight_scale" if method == "ct" else "scales"
    folder = write_checkpoint(broken(parts, tensor, put(value)), config)
    refuse(folder, rf"q_proj\.{tensor}: expected finite scales that are not zero, found .* of 256", read=Q)
    assert open_checkpoint(folder).dequantize(D).shape == (N, K), "other modules still read"


@pytest.mark.parametrize(
    ("desc_act", "edit", "match"),
    [
        (False, last(4), r"g_idx: expected group numbers 0\.\.3, found values 0\.\.4"),
        (True, last(4), r"g_idx: expected group numbers 0\.\.3, found values 0\.\.4"),
        (True, last(-1), r"g_idx: expected group numbers 0\.\.3, found values -1\.\.3"),
        (False, last(0), r"g_idx: expected column k in group k // 32, as desc_act is false"),
    ],
)
def test_group_index(write_checkpoint: Write, desc_act: bool, edit: Callable[..., Any], match: str) -> None:
    folder = write_checkpoint(broken(gptq_parts, "g_idx", edit), change(GPTQ, "desc_act", desc_act))
    refuse(folder, match, read=Q)


def test_group_index_of_compressed_tensors(write_checkpoint: Write) -> None:
    config = change(CT, GROUP + "weights/actorder", "group")
    tensors = model(ct_parts)
    for module in (Q, D):
        tensors[f"{module}.weight_g_idx"] = (torch.arange(K) % 4).int()
    assert open_checkpoint(write_checkpoint(tensors, config, name="good")).spec(Q).format.group_index
    tensors[f"{Q}.weight_g_idx"] = (torch.arange(K) % 5).int()
    refuse(write_checkpoint(tensors, config, name="bad"), r"weight_g_idx: expected group numbers 0\.\.3", read=Q)
    refuse(write_checkpoint(tensors, CT, name="unexpected"), r"weight_g_idx: expected no such tensor, as actorder")


def test_stored_shape_that_disagrees(write_checkpoint: Write) -> None:
    folder = write_checkpoint(broken(ct_parts, "weight_shape", lambda t: torch.tensor([N, K - 1])), CT)
    refuse(folder, r"weight_shape: expected \[64, 128\], found \[64, 127\]", read=Q)


def test_two_groups_that_claim_one_module(write_checkpoint: Write) -> None:
    config = change(CT, "config_groups/group_1", {"targets": ["re:.*q_proj$"], "weights": WEIGHTS})
    refuse(write_checkpoint(model(ct_parts), config), rf"{Q}: claimed by two config groups, group_0 .* and group_1")


@pytest.mark.parametrize(
    ("entry", "near"),
    [
        ("q_proj", r"only a part of model\.layers\.0\.self_attn\.q_proj"),
        ("model.layers.0.mlp.down_prj", r"near: model\.layers\.0\.mlp\.down_proj"),
        ("re:vision.*", "matches no module"),
        ("re:down_proj", r"only a part of model\.layers\.0\.mlp\.down_proj"),
        ("something.else.entirely", "matches no module"),
    ],
)
def test_ignore_entry_that_matches_nothing_is_a_warning(write_checkpoint: Write, entry: str, near: str) -> None:
    folder = write_checkpoint(model(ct_parts), change(CT, "ignore", ["lm_head", entry]))
    with pytest.warns(CheckpointWarning, match=near):
        ckpt = open_checkpoint(folder)
    assert ckpt.modules(quantized=True) == (D, Q), "a part of a name never matches"


def test_ignored_head_of_a_tied_model_is_no_warning(write_checkpoint: Write) -> None:
    tensors = model(ct_parts)
    del tensors["lm_head.weight"]
    folder = write_checkpoint(tensors, CT, model={"tie_word_embeddings": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(folder)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_plain_weight_inside_a_quantized_block(write_checkpoint: Write, method: str) -> None:
    config, parts = METHODS[method]
    tensors = model(parts) | {"model.layers.0.mlp.gate_proj.weight": torch.zeros(4, 4).bfloat16()}
    refuse(write_checkpoint(tensors, config, name="a"), r"gate_proj: the configuration quantizes every Linear layer")
    kept = change(config, "modules_to_not_convert", ["gate_proj"])
    ckpt = open_checkpoint(write_checkpoint(tensors, kept, name="b"))
    assert ckpt.excluded["model.layers.0.mlp.gate_proj"] == "modules_to_not_convert 'gate_proj'"
    short = change(config, "modules_to_not_convert", ["gate"])
    refuse(write_checkpoint(tensors, short, name="c"), "gate_proj: .*'gate' of modules_to_not_convert is only a part")


def test_router_is_a_named_exclusion(write_checkpoint: Write) -> None:
    tensors = {"model.layers.0.mlp.gate.weight": torch.zeros(4, K).bfloat16()}
    for method, (config, parts) in METHODS.items():
        ckpt = open_checkpoint(write_checkpoint(model(parts) | tensors, config, name=method))
        assert "router" in ckpt.excluded["model.layers.0.mlp.gate"]


def test_quantized_tensor_that_nothing_reads(write_checkpoint: Write) -> None:
    tensors = model(gptq_parts) | {"model.other.weight_packed": torch.zeros(2, 2, dtype=torch.int32)}
    refuse(write_checkpoint(tensors, GPTQ, name="a"), r"model\.other\.weight_packed .*is extra: it looks quantized")
    tensors = {"m.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}
    refuse(write_checkpoint(tensors, None, name="b"), r"m\.weight .*is extra: it looks quantized")


def test_missing_layer(write_checkpoint: Write) -> None:
    folder = write_checkpoint(model(ct_parts), CT, model={"num_hidden_layers": 3})
    refuse(folder, r"counts 3 layers, but model\.layers has no tensor of layer 1, 2")


def test_absurd_counts_do_not_hang(write_checkpoint: Write) -> None:
    folder = write_checkpoint(model(ct_parts), CT, model={"num_hidden_layers": 10**15}, name="layers")
    refuse(folder, "no tensor of layer 1, 2, 3")
    tensors = {f"model.layers.0.mlp.experts.{10**15}.gate_proj.weight": torch.zeros(2, 2).bfloat16()}
    refuse(write_checkpoint(tensors, None, name="experts"), r"experts\.0\.gate_proj is missing")


def test_zero_points_of_the_other_gptq_format(write_checkpoint: Write) -> None:
    tensors = model(gptq_parts)
    for module in (Q, D):
        tensors[f"{module}.qzeros"] = pack(torch.full((K // G, N), 8), 4)  # version 2 under the name of version 1
    refuse(write_checkpoint(tensors, GPTQ, name="a"), r'must be 8; read as gptq \(v1\) all are 9.*"v2"', read=Q)
    fixed = change(GPTQ, "qhal_zero_format", "v2")
    right = open_checkpoint(write_checkpoint(model(gptq_parts), GPTQ, name="b")).dequantize(Q)
    assert torch.equal(open_checkpoint(write_checkpoint(tensors, fixed, name="c")).dequantize(Q), right)
    kept = change(GPTQ, "qhal_zero_format", "v1")
    assert not torch.equal(open_checkpoint(write_checkpoint(tensors, kept, name="d")).dequantize(Q), right)
    v2 = change(GPTQ, "checkpoint_format", "gptq_v2")
    refuse(write_checkpoint(model(gptq_parts), v2, name="e"), r"read as gptq_v2 all are 7", read=Q)


def test_unknown_names_get_near_ones(write_checkpoint: Write) -> None:
    ckpt = open_checkpoint(write_checkpoint(model(ct_parts), CT))
    with pytest.raises(CheckpointError, match=rf"no Linear module 'model\.layers\.0\.mlp\.down_prj' \(near: {D}"):
        ckpt.dequantize("model.layers.0.mlp.down_prj")
    with pytest.raises(CheckpointError, match="it is only a part of"):
        ckpt.stored("q_proj")
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        ckpt.tensor("x")
    with pytest.raises(CheckpointError, match="no experts 'model"):
        ckpt.experts_spec("model.layers.0.mlp")
