"""VPTQ: every form against the definition written out, shards, and each mistake a file can have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tensor_changes import Tensors, cut, drop, last, put
from torch import Tensor

from qhal.errors import CheckpointError, ShardError
from qhal_schemes import open_checkpoint
from qhal_schemes.packing import pack, words, wrap
from qhal_schemes.vptq import scheme

Write = Callable[..., Path]
Q = "model.layers.0.self_attn.o_proj"


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder).spec(Q)


def named(parts: Tensors) -> Tensors:
    return {f"{Q}.{leaf}": value for leaf, value in parts.items()}


def vptq(
    *, n: int = 13, k: int = 24, v: int = 6, entries: int = 40, residual: int = 0, groups: int = 1, outliers: int = 0,
    norm: bool = False, perm: bool = False, packed: bool = True, floats: bool = False, bias: bool = False,
) -> tuple[Tensors, Tensor, dict[str, Any]]:  # fmt: skip
    """Random tensors, their weight from the definition, and the module's configuration."""
    g = torch.Generator().manual_seed(n + k + entries + residual)
    size, rows = -(-(k - outliers) // groups), -(-n // v)
    t: Tensors = {"centroids.weight": torch.randn(groups, entries * v, generator=g).half()}
    index = torch.randint(0, entries, (groups, rows, size), generator=g)
    index.view(-1)[0] = entries - 1
    second = torch.randint(0, max(residual, 1), (groups, rows, size), generator=g)
    blocks = []
    if residual:
        t["res_centroids.weight"] = torch.randn(groups, residual * v, generator=g).half()
    for j in range(groups):
        block = t["centroids.weight"][j].reshape(entries, v).float()[index[j]]
        if residual:
            block = block + t["res_centroids.weight"][j].reshape(residual, v).float()[second[j]]
        blocks.append(block.transpose(1, 2).reshape(rows * v, size)[:n])
    w = torch.cat(blocks, 1)
    b, b2 = (entries - 1).bit_length(), (residual - 1).bit_length() if residual else 0
    if packed:
        t["indices"] = pack_wide(index | second << b, b + b2)
    else:
        t |= {"indices": short(index)} | ({"res_indices": short(second)} if residual else {})
    if outliers:
        t["outlier_centroids.weight"] = torch.randn(1, 300 * 4, generator=g).half()
        chosen = torch.randint(0, 300, (1, -(-n // 4), outliers), generator=g)
        t["outlier_indices"] = short(chosen)
        block = t["outlier_centroids.weight"].reshape(300, 4).float()[chosen[0]].transpose(1, 2).reshape(-1, outliers)
        w = torch.cat([block[:n], w], 1)
    w = w[:, :k]
    if perm:
        order = torch.randperm(k, generator=g)
        t["perm"] = order.short() if packed else order
        w = w[:, torch.argsort(order)]
    if norm:
        t |= {
            "weight_scale": (torch.rand(k, generator=g) + 0.5).half(),
            "weight_bias": torch.randn(k, generator=g).half(),
        }
        w = w * t["weight_scale"].float() + t["weight_bias"].float()
    if bias:
        t["bias"] = torch.randn(n, generator=g).half()
    if floats:
        t |= {p: t[p].view(torch.float32 if t[p].dtype == torch.int32 else torch.float16) for p in t if "indices" in p}
    layer = {
        "vector_lens": [4 if outliers else -1, v], "num_centroids": [300 if outliers else -1, entries],
        "num_res_centroids": [-1, residual or -1], "group_num": groups, "group_size": size, "outlier_size": outliers,
        "indices_as_float": floats, "enable_norm": norm, "enable_perm": perm, "is_indice_packed": packed, "bias": bias,
        "in_features": k, "out_features": n, "vector_quant_dim": "out",
    }  # fmt: skip
    return t, w, layer


def short(index: Tensor) -> Tensor:
    """uint16 bits in int16."""
    return torch.where(index >= 1 << 15, index - (1 << 16), index).short()


def pack_wide(fields: Tensor, bits: int) -> Tensor:
    """int32 words of a dense bit stream, bit by bit."""
    flat = fields.reshape(-1, fields.shape[-1])
    out = torch.zeros(flat.shape[0], words(flat.shape[1], bits), dtype=torch.int64)
    for j in range(flat.shape[1]):
        for b in range(bits):
            word, shift = divmod(j * bits + b, 32)
            out[:, word] |= ((flat[:, j] >> b) & 1) << shift
    return wrap(out).reshape(*fields.shape[:-1], -1)


def layers(layer: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"quant_method": "vptq", "config_for_layers": {Q: layer}} | more


FORMS: list[dict[str, Any]] = [
    {},
    {"entries": 2},
    {"entries": 65536, "v": 1},
    {"entries": 1000, "residual": 256, "norm": True, "perm": True},
    {"entries": 60000, "residual": 50000, "v": 2},
    {"entries": 100, "residual": 300},
    {"groups": 3, "norm": True},
    {"groups": 5},
    {"outliers": 4, "groups": 2, "norm": True, "perm": True, "bias": True},
    {"packed": False, "norm": True, "perm": True},
    {"packed": False, "residual": 30, "entries": 65536, "outliers": 2},
    {"packed": False, "floats": True, "outliers": 2},
    {"floats": True, "residual": 7},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_vptq(write_checkpoint: Write, form: dict[str, Any]) -> None:
    parts, w, layer = vptq(**form)
    ckpt = open_checkpoint(write_checkpoint(named(parts), layers(layer)))
    spec = ckpt.spec(Q)
    assert torch.equal(spec.stored(), w) and spec.format == ckpt.format(Q)
    assert (spec.bias is not None) == bool(form.get("bias"))
    plain, wide = not form.get("packed", True), form.get("perm") or form.get("residual")
    layout, uncompared = ckpt.form(Q).layout, scheme.family.uncompared("vptq")
    assert (layout in uncompared) == bool(form.get("floats") or (plain and wide)) and layout in scheme.family.layouts
    assert not ckpt.compared(Q) or layout not in uncompared
    shared = {"quant_method": "vptq", "shared_layer_config": {"o_proj": layer}}
    again = open_checkpoint(write_checkpoint(named(parts), shared, name="shared"))
    assert torch.equal(again.stored(Q), w)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 20), st.integers(2, 4), st.integers(1, 6), st.booleans(), st.integers(0, 3))
def test_vptq_shards_are_parts(
    tmp_path_factory: pytest.TempPathFactory, n: int, world: int, v: int, perm: bool, outliers: int
) -> None:
    parts, w, layer = vptq(n=n * v * world, v=v, k=24, perm=perm, outliers=outliers)
    folder = tmp_path_factory.mktemp("vptq")
    (folder / "config.json").write_text(json.dumps({"quantization_config": layers(layer), "dtype": "float16"}))
    save_file({k: t.contiguous() for k, t in named(parts).items()}, folder / "model.safetensors")
    ckpt = open_checkpoint(folder)
    for dim in (0, 1):
        try:
            found = [ckpt.linear_spec(Q, shard=(dim, rank, world)).stored() for rank in range(world)]
        except ShardError as refusal:
            assert perm if dim else outliers and (n * v) % 4, refusal
            continue
        assert torch.equal(torch.cat(found, dim), w)


FULL: dict[str, Any] = {"entries": 40, "residual": 12, "outliers": 4, "norm": True, "perm": True, "bias": True}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop("indices"), r"indices is missing, expected I32 \[1, 3, 7\]"),
        (drop("centroids.weight"), r"centroids.weight is missing"),
        (drop("res_centroids.weight"), r"res_centroids.weight is missing"),
        (drop("perm"), r"perm is missing"),
        (drop("weight_bias"), r"weight_bias is missing"),
        (cut("indices", 2), r"indices: expected I32 \[1, 3, 7\], found I32 \[1, 3, 6\]"),
        (cut("centroids.weight", 1), r"centroids.weight: expected .*\[1, 240\], found F16 \[1, 239\]"),
        (cut("outlier_indices", 1), r"outlier_indices: expected I16 \[1, 4, 4\]"),
        (put("indices", torch.full((1, 3, 7), -1, dtype=torch.int32)), r"indices 0..39 of a codebook, found .*63"),
        (last("outlier_indices", 300), r"outlier_indices: expected indices 0..299 of a codebook, found .*300"),
        (last("outlier_indices", -1), r"expected indices 0..299 of a codebook, found .*65535"),
        (put("perm", torch.zeros(24, dtype=torch.int16)), r"perm: expected a permutation of 24 columns"),
        (last("weight_scale", math.nan), r"weight_scale: expected finite scales"),
        (last("weight_bias", math.inf), r"weight_bias: expected finite values"),
        (last("centroids.weight", math.nan), r"centroids.weight: expected finite values"),
        (put("res_indices", torch.zeros(1, 3, 20, dtype=torch.int16)), r"res_indices is extra"),
        (put("weight", torch.zeros(13, 24).half()), r"o_proj.*weight"),
    ],
)
def test_mistakes_of_vptq_files(write_checkpoint: Write, change: Callable[[Tensors], None], match: str) -> None:
    parts, _, layer = vptq(**FULL)
    change(parts)
    refused(write_checkpoint(named(parts), layers(layer)), match)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("vector_lens", [4], r"vector_lens: expected \[for outliers, for the rest\]"),
        ("vector_lens", [4, 0], r"num_centroids: expected vectors and 2 to 65536 entries"),
        ("num_centroids", [300, 1], r"num_centroids: expected vectors and 2 to 65536 entries"),
        ("num_centroids", [1 << 17, 40], r"expected 2 to 65536 entries for outliers"),
        ("num_centroids", [300, 100], r"expected .*\[1, 600\]"),
        ("num_res_centroids", [16, 12], r"-1 for outliers: VPTQ has no residual there"),
        ("num_res_centroids", [-1, 1], r"expected -1, or 2 to 65536 entries"),
        ("outlier_size", 0, r"outlier_size: expected a positive integer"),
        ("outlier_size", 24, r"group_size: expected 1 groups that cover 0 columns"),
        ("group_size", 19, r"group_size: expected 1 groups that cover 20 columns"),
        ("group_size", 21, r"group_size: expected groups of exactly 20 columns, as they are permuted"),
        ("group_num", 0, r"group_num: expected a positive integer"),
        ("in_features", 23, r"group_size"),
        ("in_features", None, r"in_features: expected a positive integer"),
        ("out_features", 19, r"centroids|indices"),
        ("enable_norm", "yes", r"enable_norm: expected true or false"),
        ("enable_norm", False, r"weight_(scale|bias) is extra"),
        ("enable_perm", False, r"perm is extra"),
        ("bias", False, r"bias is extra"),
        ("is_indice_packed", False, r"indices: expected I16 \[1, 3, 20\]"),
        ("vector_quant_dim", "in", r"vector_quant_dim: expected out"),
        ("codebook_sharing", 1, r"codebook_sharing: expected no such key"),
    ],
)
def test_mistakes_of_vptq_configurations(write_checkpoint: Write, key: str, value: object, match: str) -> None:
    parts, _, layer = vptq(**FULL)
    refused(write_checkpoint(named(parts), layers(layer | {key: value})), match)


def test_vptq_modules_and_the_configuration_agree(write_checkpoint: Write) -> None:
    parts, _, layer = vptq()
    ghost = {"quant_method": "vptq", "config_for_layers": {Q: layer, "model.layers.0.mlp.up_proj": layer}}
    refused(write_checkpoint(named(parts), ghost, name="a"), r"up_proj is in config_for_layers, but the file has no")
    unnamed = {"quant_method": "vptq", "shared_layer_config": {"q_proj": layer}}
    refused(write_checkpoint(named(parts), unnamed, name="b"), r"neither config_for_layers names it nor .*'o_proj'")
    refused(write_checkpoint(named(parts), layers([]), name="c"), r"expected an object of settings")  # type: ignore[arg-type]
    odd = {"quant_method": "vptq", "config_for_layers": []}
    with pytest.raises(CheckpointError):
        open_checkpoint(write_checkpoint(named(parts), odd, name="d"))
    plain = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 8).half()}
    refused(write_checkpoint(named(parts) | plain, layers(layer), name="e"), r"up_proj: .* no rule excludes it")
    kept = layers(layer, modules_to_not_convert=["up_proj"])
    assert open_checkpoint(write_checkpoint(named(parts) | plain, kept, name="f")).excluded


def test_pack_agrees_with_the_definition_used_here() -> None:
    codes = torch.randint(0, 8, (2, 20))
    assert torch.equal(pack_wide(codes, 3), pack(codes.to(torch.uint8), 3))
