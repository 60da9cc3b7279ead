"""ModelSlim: forms without a golden case, files that disagree with their description, shards, fused layers, experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qhal
from qhal.errors import CheckpointError, ShardError
from qhal.groups import Indexed
from qhal_schemes import CheckpointWarning, open_checkpoint
from qhal_schemes.convert import convert_checkpoint
from qhal_schemes.packing import pack_int4, unpack_int4

Tensors = dict[str, torch.Tensor]
N, K = 8, 64
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
MODEL = {
    "model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6,
}  # fmt: skip
TAIL: dict[str, Any] = {"version": "1.0.0", "model_quant_type": "W8A8", "metadata": {}, "group_size": 0, "optional": {}}


def write(folder: Path, modules: dict[str, tuple[str, Tensors]], *, file: str = "quant_model_description.json",
          model: dict[str, Any] | None = None, **tail: Any) -> Path:  # fmt: skip
    """A checkpoint: module -> (type, tensors by last name); a name with FLOAT's own type is written `name:FLOAT`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    types: dict[str, Any] = {}
    tensors: Tensors = {}
    for module, (kind, parts) in modules.items():
        for part, tensor in parts.items():
            name, _, own = part.partition(":")
            tensors[f"{module}.{name}"], types[f"{module}.{name}"] = tensor.contiguous().clone(), own or kind
    description = types | {k: v for k, v in (TAIL | tail).items() if v is not None}
    (folder / file).write_text(json.dumps(description))
    (folder / "config.json").write_text(json.dumps(MODEL | (model or {})))
    save_file(tensors, folder / "quant_model_weights.safetensors")
    return folder


def codes(bits: int, n: int = N, k: int = K, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (n, k), generator=g, dtype=torch.int8)


def scales(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def dynamic(bits: int = 8, groups: int = 1, seed: int = 0, n: int = N) -> Tensors:
    return {"weight": codes(bits, n=n, seed=seed), "weight_scale": scales(n, groups, seed=seed + 1),
            "weight_offset": torch.zeros(n, groups)}  # fmt: skip


def static(seed: int = 0, bias: torch.Tensor | None = None) -> Tensors:
    """W8A8 as the writer computes it."""
    w, scale, offset, deq = codes(8, seed=seed), torch.tensor([0.05]), torch.tensor([-7.0]), 0.05 * scales(N, seed=3)
    real = torch.zeros(N) if bias is None else bias
    quant_bias = torch.round(real / deq - w.float().sum(1) * offset).to(torch.int32)
    parts = {"weight": w, "quant_bias": quant_bias, "input_scale": scale, "input_offset": offset, "deq_scale": deq}
    return parts if bias is None else parts | {"bias:FLOAT": bias}


def refused(folder: Path, match: str, read: str = "") -> None:
    with pytest.raises(CheckpointError, match=match):
        ckpt = open_checkpoint(folder)
        ckpt.layer_formats()
        if read:
            ckpt.spec(read)


# ---------------------------------------------------------------- forms from specification


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([0, 1, -1, -2]), st.integers(0, 99))
def test_pairs_of_int4_codes_round_trip(rows: int, columns: int, dim: int, seed: int) -> None:
    values = codes(4, 2 * rows, 2 * columns, seed)
    packed = pack_int4(values, dim)
    assert packed.dtype == torch.int8 and packed.numel() * 2 == values.numel()
    assert torch.equal(unpack_int4(packed, dim), values)
    low, high = (values.unflatten(dim, (-1, 2)).select(dim % 2 + 1, i).long() for i in (0, 1))
    assert torch.equal(packed.long() & 255, (low & 15) + 16 * (high & 15))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_w4a16(tmp_path: Path, packed: bool, groups: int) -> None:
    w, s, o = codes(4), scales(N, groups), torch.randint(-3, 4, (N, groups)).float()
    stored = pack_int4(w, 0 if groups > 1 else 1) if packed else w
    parts = {"weight": stored, "weight_scale": s, "weight_offset": o}
    size = K // groups if groups > 1 else 0
    folder = write(tmp_path / "c", {Q: ("W4A16", parts)}, version="1.0.0" if packed else None, group_size=size)
    ckpt = open_checkpoint(folder)
    assert str(ckpt.format(Q).weight) == f"int4-fp32.{'row' if groups == 1 else 'g16'}*fp32"
    right = (w.float() - o.repeat_interleave(K // groups, 1)) * s.repeat_interleave(K // groups, 1)
    assert ckpt.format(Q).input is None and torch.equal(ckpt.stored(Q), right)


@pytest.mark.parametrize("packed", [True, False])
def test_two_stage_w4a8(tmp_path: Path, packed: bool) -> None:
    w, first, second = codes(4), scales(N, 1), scales(N, 2, seed=9).bfloat16().float()
    deq = (w.float() * second.repeat_interleave(32, 1)) * first.bfloat16().float()
    parts = {
        "weight": pack_int4(w, 0) if packed else w, "weight_scale": first, "weight_offset": torch.zeros(N, 1),
        "weight_scale_second": second, "weight_offset_second": torch.zeros(N, 2),
    }  # fmt: skip
    if packed:
        parts["scale_bias"] = 8 * deq.reshape(N, 16, 4).sum(-1)
    folder = write(tmp_path / "c", {Q: ("W4A8_DYNAMIC", parts)}, group_size=32, version="1.0.0" if packed else None)
    ckpt = open_checkpoint(folder)
    assert str(ckpt.format(Q).weight) == "int4.g32*(fp32.row*fp32)"
    assert torch.equal(ckpt.stored(Q), w.float() * (second * first).repeat_interleave(32, 1))
    parts["weight_scale_second"] = scales(N, 4)
    parts["weight_offset_second"] = torch.zeros(N, 4)
    folder = write(tmp_path / "c", {Q: ("W4A8_DYNAMIC", parts)}, group_size=32)
    refused(folder, r"weight_scale: expected 2 columns, as group_size is 32, found 4 columns")


@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W4A4_DYNAMIC"])
def test_groups_with_quantized_inputs(tmp_path: Path, kind: str) -> None:
    parts = dynamic(8 if kind[1] == "8" else 4, groups=2)
    ckpt = open_checkpoint(write(tmp_path / "c", {Q: (kind, parts)}, group_size=32))
    element = "int8" if kind[1] == "8" else "int4"
    assert (str(ckpt.format(Q).weight), str(ckpt.format(Q).input)) == (f"{element}.g32*fp32", f"{element}.row*fp32")
    right = parts["weight"].float() * parts["weight_scale"].repeat_interleave(32, 1)
    assert torch.equal(ckpt.stored(Q), right)


def test_scale_bias_of_any_number_of_slices(tmp_path: Path) -> None:
    w, s = codes(4), scales(N, 1)
    deq = w.float() * s
    for slices, stored in ((1, 8 * deq.sum(1, keepdim=True)), (16, 8 * deq.reshape(N, 16, -1).sum(-1)), (K, deq)):
        parts = {"weight": pack_int4(w, 0), "weight_scale": s, "weight_offset": torch.zeros(N, 1), "scale_bias": stored}
        folder = write(tmp_path / "c", {Q: ("W4A8_DYNAMIC", parts)})
        assert torch.equal(open_checkpoint(folder).stored(Q), deq), slices
        parts["scale_bias"] = stored + 0.01
        folder = write(tmp_path / "c", {Q: ("W4A8_DYNAMIC", parts)})
        refused(folder, r"q_proj\.scale_bias: expected 8 times the sums of the rows", read=Q)
    parts["scale_bias"] = torch.zeros(N, 5)
    refused(write(tmp_path / "c", {Q: ("W4A8_DYNAMIC", parts)}), "a number of slices that divides 64 columns", read=Q)


def test_the_older_writer(tmp_path: Path) -> None:
    """Types in file names, no version, a weight scale beside the product scale, norms twice, W8A8S for pruned codes."""
    parts = static(bias=torch.linspace(-1, 1, N)) | {"weight_offset": torch.zeros(N, 1)}
    parts["weight_scale"] = (parts["deq_scale"] / parts["input_scale"]).reshape(N, 1)
    parts["deq_scale"] = parts["input_scale"] * parts["weight_scale"].flatten()
    norm = {"weight:FLOAT": torch.ones(K), "bias:FLOAT": torch.zeros(K), "module.weight": torch.ones(K)}
    modules = {Q: ("W8A8", parts), UP: ("W8A8S", static(seed=5)), "model.layers.0.input_layernorm": ("W8A8", norm)}
    folder = write(tmp_path / "c", modules, file="quant_model_description_w8a8.json", version=None, optional=None)
    (folder / "quant_model_weights.safetensors").rename(folder / "quant_model_weight_w8a8.safetensors")
    with pytest.warns(CheckpointWarning, match=r"1 norms have a bias .*\(model\.layers\.0\.input_layernorm\.bias"):
        ckpt = open_checkpoint(folder)
    assert set(ckpt.modules()) == {Q, UP} and str(ckpt.format(Q).weight) == "int8.row*fp32"
    assert torch.equal(ckpt.stored(Q), parts["weight"].float() * parts["weight_scale"])
    (folder / "quant_model_description_w8a8s.json").write_text("{}")
    refused(folder, r"quant_model_description_w8a8.json and quant_model_description_w8a8s.json are there")


def test_product_scales_as_bits(tmp_path: Path) -> None:
    parts = static()
    right = open_checkpoint(write(tmp_path / "a", {Q: ("W8A8", parts)})).stored(Q)
    bits = parts["deq_scale"].view(torch.int32).long()
    for stored in (bits, bits | (1 << 46)):
        folder = write(tmp_path / "b", {Q: ("W8A8", parts | {"deq_scale": stored})})
        assert torch.equal(open_checkpoint(folder).stored(Q), right)
    for wrong in (bits | (1 << 40), -bits):
        folder = write(tmp_path / "b", {Q: ("W8A8", parts | {"deq_scale": wrong})})
        refused(folder, r"deq_scale: expected the bits of float32 numbers", read=Q)


def test_a_static_bias_is_what_devices_add(tmp_path: Path) -> None:
    bias = torch.linspace(-3, 3, N)
    parts = static(bias=bias)
    spec = open_checkpoint(write(tmp_path / "a", {Q: ("W8A8", parts)})).spec(Q)
    deq, rows = parts["deq_scale"].double(), parts["weight"].double().sum(1)
    assert spec.bias is not None
    assert torch.equal(spec.bias, ((parts["quant_bias"].double() - 7 * rows) * deq).float())
    assert bool(((spec.bias - bias).abs() <= parts["deq_scale"] * 0.5001).all())
    again = torch.round(spec.bias / parts["deq_scale"] + 7 * rows.float()).int()
    assert torch.equal(again, parts["quant_bias"]), "a backend that folds it gets the file's integers"
    plain = open_checkpoint(write(tmp_path / "b", {Q: ("W8A8", static())})).spec(Q)
    assert plain.bias is not None and not bool(plain.bias.any())


# ---------------------------------------------------------------- fused, cut, stacked


def test_fused_projections(tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    modules = {name: ("W8A8", static(seed=i)) for i, name in enumerate(names)}
    ckpt = open_checkpoint(write(tmp_path / "c", modules))
    fused = ckpt.linear_spec("model.layers.0.self_attn.qkv_proj")
    assert torch.equal(fused.stored(), torch.cat([ckpt.stored(name) for name in names]))
    modules[names[1]][1]["input_scale"] = torch.tensor([0.06])
    with pytest.raises(ShardError, match="their input quantization differ"):
        open_checkpoint(write(tmp_path / "c", modules)).linear_spec(names)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("case", ["w8a8_pdmix", "w8a8_c8_kv", "wrapped_mixed_attention"])
def test_shards_of_golden_cases(case: str, dim: int) -> None:
    ckpt = open_checkpoint(Path(__file__).parent / "golden" / "modelslim" / case / "checkpoint")
    for module in ckpt.modules(quantized=True):
        whole = ckpt.spec(module)
        parts = [ckpt.linear_spec(module, (dim, rank, 2)) for rank in range(2)]
        assert torch.equal(torch.cat([p.stored() for p in parts], dim), whole.stored()), module
        biases = [p.bias for p in parts if p.bias is not None]
        assert (whole.bias is None) == (not biases) and (dim == 0 or len(biases) <= 1)
        if whole.bias is not None:
            assert torch.equal(torch.cat(biases), whole.bias)


def test_a_converted_checkpoint_keeps_no_description(tmp_path: Path) -> None:
    source = write(tmp_path / "c", {Q: ("W8A16", dynamic()), "lm_head": ("FLOAT", {"weight": torch.ones(4, K)})})
    convert_checkpoint(source, tmp_path / "out", "fp32")
    assert not (tmp_path / "out" / "quant_model_description.json").exists()
    found = open_checkpoint(tmp_path / "out")
    assert found.method == "" and torch.equal(found.stored(Q), open_checkpoint(source).stored(Q))


def test_rotations_are_not_cut(tmp_path: Path) -> None:
    parts = dynamic() | {"heads_rotation": torch.eye(4)}
    quarot = {"heads_rotation": {"layers": [Q]}, "max_tp_size": 4}
    folder = write(tmp_path / "c", {Q: ("W8A8_DYNAMIC", parts)}, metadata={"quarot": quarot})
    text = json.loads((folder / "quant_model_description.json").read_text())
    del text[f"{Q}.heads_rotation"]
    (folder / "quant_model_description.json").write_text(json.dumps(text))
    ckpt = open_checkpoint(folder)
    assert ckpt.format(Q).rotate_in == (("kronecker", 4, 0),)
    assert ckpt.linear_spec(Q, (0, 1, 2)).weight.shape == (N // 2, K)
    with pytest.raises(ShardError, match="Kronecker rotation of 64 features"):
        ckpt.linear_spec(Q, (1, 0, 2))


def experts(count: int = 3) -> dict[str, tuple[str, Tensors]]:
    found = {}
    for e in range(count):
        for i, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            w, s = codes(4, K, K, seed=9 * e + i), scales(K, 1, seed=9 * e + i) / 50
            slices = 16 if name == "down_proj" else 1
            sums = 8 * (w.float() * s).reshape(K, slices, -1).sum(-1)
            parts = {"weight": pack_int4(w, 0), "weight_scale": s, "weight_offset": torch.zeros(K, 1)}
            found[f"model.layers.0.mlp.experts.{e}.{name}"] = ("W4A8_DYNAMIC", parts | {"scale_bias": sums})
    return found


def test_experts_stack_and_run(tmp_path: Path) -> None:
    ckpt = open_checkpoint(write(tmp_path / "c", experts()))
    prefix = "model.layers.0.mlp.experts"
    assert ckpt.experts_format(prefix).gate_up.weight == ckpt.format(f"{prefix}.0.up_proj").weight
    layer = ckpt.load_experts(prefix, qhal.select("cpu_reference"), dtype=torch.float32)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(2))
    ids, weights = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]], dtype=torch.int32), torch.rand(5, 2)

    def linear(name: str, rows: torch.Tensor) -> torch.Tensor:
        return ckpt.load_linear(name, qhal.select("cpu_reference"), dtype=torch.float32)(rows)

    right = torch.zeros(5, K)
    for t in range(5):
        for j in range(2):
            e, row = int(ids[t, j]), x[t : t + 1]
            inner = torch.nn.functional.silu(linear(f"{prefix}.{e}.gate_proj", row))
            inner = inner * linear(f"{prefix}.{e}.up_proj", row)
            right[t] += weights[t, j] * linear(f"{prefix}.{e}.down_proj", inner)[0]
    assert torch.allclose(layer(x, Indexed(ids, weights)), right, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- mistakes


Edit = Callable[[dict[str, Any], Tensors], object]
ATTENTION = "model.layers.0.self_attn"


def said(**changes: Any) -> Edit:
    """Change the description: by key, or by the last part of a tensor's name in q_proj."""
    return lambda d, t: d.update({f"{Q}.{k}" if f"{Q}.{k}" in d else k: v for k, v in changes.items()})


def retyped(kind: str) -> Edit:
    """All of q_proj has another type."""
    return lambda d, t: d.update({k: kind for k in d if k.startswith(f"{Q}.")})


def operands(text: str) -> Edit:
    return lambda d, t: d.update({f"{ATTENTION}.quant_type": text})


def stored(**changes: torch.Tensor) -> Edit:
    """Change or add tensors of q_proj, without a word in the description."""
    return lambda d, t: t.update({f"{Q}.{k}": v for k, v in changes.items()})


def added(kind: str, **changes: torch.Tensor) -> Edit:
    """Add tensors to q_proj that the description gives this type."""

    def edit(d: dict[str, Any], t: Tensors) -> None:
        t.update({f"{Q}.{k}": v for k, v in changes.items()})
        d.update({f"{Q}.{k}": kind for k in changes})

    return edit


def quarot(section: Any) -> Edit:
    return said(metadata={"quarot": section})


def emptied(d: dict[str, Any], t: Tensors) -> None:
    d.clear()
    t.clear()
    d["lm_head.weight"], t["lm_head.weight"] = "FLOAT", torch.ones(4, K)


UNSAID = r"is extra: quant_model_description\.json does not say"
THIRDS = {"weight_scale": torch.ones(N, 3), "weight_offset": torch.zeros(N, 3)}
BRANCH = {"svd_lowrank_l1": torch.ones(2, K), "svd_lowrank_l2": torch.ones(N, 2)}
MISTAKES: list[tuple[str, Edit, str]] = [
    ("unknown type", said(weight="W3A3"), r"q_proj\.weight: unknown quantization type 'W3A3'; known: FLOAT"),
    ("compressed type", said(weight="W8A8SC"), "unsupported: .*W8A8SC: compressed codes"),
    ("type that is no text", said(weight=8), r"q_proj\.weight: expected the name of a quantization"),
    ("empty type", said(weight=""), "expected the name of a quantization type, found ''"),
    ("two types", said(weight_scale="W8A16"), r"weight_scale has the type 'W8A16', but .* has W8A8_DYNAMIC"),
    ("scale that is FLOAT", said(weight_scale="FLOAT"), r"weight_scale has the type 'FLOAT', but"),
    ("codes that are FLOAT", retyped("FLOAT"), r"q_proj\.weight.* is extra: it looks quantized"),
    (
        "FLOAT that has a type",
        lambda d, t: d.update({"lm_head.weight": "W8A8_DYNAMIC"}),
        r"lm_head\.weight: expected I8",
    ),
    ("type without its tensors", retyped("W8A8_MIX"), r"q_proj\.input_scale is missing, expected .*; .*q_proj has"),
    ("other width", retyped("W4A4_DYNAMIC"), "weight: expected int4 values -8..7"),
    ("tensor without an entry", lambda d, t: d.pop(f"{Q}.weight_offset"), f"weight_offset {UNSAID}"),
    ("entry without a tensor", lambda d, t: d.update({f"{Q}.bias": "FLOAT"}), r"bias is missing from the weight files"),
    ("module without an entry", lambda d, t: t.update({"a.b.weight": torch.ones(2, 2)}), rf"a\.b\.weight {UNSAID}"),
    (
        "entry without a module",
        lambda d, t: d.update({"a.b.weight": "FLOAT"}),
        r"a\.b\.weight is missing from the weight",
    ),
    ("part of another type", added("W8A8_DYNAMIC", deq_scale=torch.ones(N)), r"q_proj\.deq_scale is extra"),
    ("FlatQuant without matrices", retyped("W8A8_FLATQUANT_DYNAMIC"), "left_trans is missing"),
    ("matrix without FlatQuant", added("W8A8_DYNAMIC", left_trans=torch.eye(8)), "left_trans is there"),
    ("branch without SVD", added("FLOAT", **BRANCH), "svd_lowrank_l1 is there"),
    ("SVD without a branch", retyped("W8A8_SVD_DYNAMIC"), "svd_lowrank_l1 is missing"),
    ("nothing quantized", emptied, "no Linear module has another type than FLOAT"),
    ("listed rotation", quarot({"heads_rotation": {"layers": [Q]}}), r"q_proj\.heads_rotation is missing"),
    ("rotation that is not listed", stored(heads_rotation=torch.eye(4)), f"heads_rotation {UNSAID}"),
    (
        "layers that are text",
        quarot({"heads_rotation": {"layers": Q}}),
        r"quarot\.heads_rotation: expected an object with",
    ),
    ("quarot that is a list", quarot([1]), r"metadata\.quarot: expected an object"),
    ("metadata that is a list", said(metadata=[1]), "metadata: expected an object"),
    ("group size of text", said(group_size="32"), "group_size: expected 0 or a positive integer, found '32'"),
    ("cache without scales", said(kv_cache_type="C8"), "kv_cache_type: expected no such key"),
    ("unknown cache", said(kv_cache_type="C4"), "kv_cache_type: expected C8"),
    ("unknown operands", operands("QK_INT2"), "'QK_INT2' is no list of formats such as"),
    ("operand twice", operands("Q_FP8_DYNAMIC_Q_INT8_DYNAMIC"), "is no list of formats"),
    ("static MX operands", operands("MXFP4"), "unsupported: .*static MXFP4"),
    ("static operands without scales", operands("FP8"), r"fa_q\.scale is missing"),
    (
        "asymmetric weights",
        stored(weight_offset=torch.ones(N, 1)),
        "weight_offset: expected zeros: with quantized inputs",
    ),
    ("NaN scale", stored(weight_scale=torch.full((N, 1), torch.nan)), "expected finite scales that are not zero"),
    (
        "other rows",
        stored(weight_scale=scales(9, 1), weight_offset=scales(9, 1)),
        r"weight: expected 9 rows, as .* has 9, found 8 rows",
    ),
    ("groups that do not divide", stored(**THIRDS), "columns that divide the 64 columns"),
]


@pytest.mark.parametrize(("edit", "match"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes(tmp_path: Path, edit: Edit, match: str) -> None:
    modules = {
        Q: ("W8A8_DYNAMIC", dynamic()),
        UP: ("W8A8_DYNAMIC", dynamic()),
        "lm_head": ("FLOAT", {"weight": torch.ones(4, K)}),
    }
    folder = write(tmp_path / "c", modules)
    file, weights = folder / "quant_model_description.json", folder / "quant_model_weights.safetensors"
    description, tensors = json.loads(file.read_text()), load_file(weights)
    assert open_checkpoint(folder).spec(Q).weight is not None
    edit(description, tensors)
    file.write_text(json.dumps(description))
    save_file(tensors, weights)
    refused(folder, match, read=Q)


STATIC_MISTAKES: list[tuple[str, torch.Tensor, str]] = [
    ("quant_bias", torch.zeros(N, dtype=torch.int32), r"quant_bias: expected round\(bias / deq_scale"),
    ("bias:FLOAT", torch.full((N,), 9.0), r"quant_bias: expected round\(bias / deq_scale"),
    ("bias:FLOAT", torch.full((N,), float("inf")), "bias: expected finite values"),
    ("weight_scale", torch.ones(N, 1), r"deq_scale: expected input_scale \* weight_scale"),
    ("weight_offset", torch.ones(N, 1), "weight_offset: expected zeros"),
    ("input_scale", torch.tensor([-1.0]), "input_scale: expected positive scales"),
    ("input_scale", torch.ones(2), r"input_scale: expected .* \[1\], found F32 \[2\]"),
    ("input_offset", torch.tensor([float("nan")]), "input_offset: expected finite values"),
    ("deq_scale", torch.ones(N - 1), r"deq_scale: expected F32\|I64 \[8\]"),
]


@pytest.mark.parametrize(("part", "value", "match"), STATIC_MISTAKES)
def test_static_mistakes(tmp_path: Path, part: str, value: torch.Tensor, match: str) -> None:
    parts = static(bias=torch.linspace(-1, 1, N)) | {"weight_offset": torch.zeros(N, 1)}
    parts["weight_scale"] = (parts["deq_scale"] / parts["input_scale"]).reshape(N, 1)
    for kind in ("W8A8", "W8A8_MIX"):
        assert open_checkpoint(write(tmp_path / "a", {Q: (kind, parts)})).spec(Q).bias is not None
        refused(write(tmp_path / "b", {Q: (kind, parts | {part: value})}), match, read=Q)


def test_wrappers_that_files_cannot_order_or_formats_cannot_say(tmp_path: Path) -> None:
    flat = dynamic() | {"left_trans": torch.eye(8), "right_trans": torch.eye(8), "clip_ratio": torch.tensor([0.9])}
    folder = write(tmp_path / "c", {Q: ("W8A8_FLATQUANT_DYNAMIC", flat)})
    spec = open_checkpoint(folder).spec(Q)
    assert spec.input is not None and spec.input.clip == pytest.approx((0.9, 0.9))
    for part, value, match in (
        ("clip_ratio", torch.tensor([1.5]), "a ratio above 0 and at most 1"),
        ("left_trans", torch.eye(7), r"sizes that make the 64 columns \(K\) of the weight, found 7 x 8"),
        ("left_trans", torch.full((8, 8), float("nan")), "left_trans: expected finite values"),
        ("left_trans", torch.ones(8, 4), r"left_trans: expected .* \[8, 8\], found F32 \[8, 4\]"),
    ):
        folder = write(tmp_path / "c", {Q: ("W8A8_FLATQUANT_DYNAMIC", flat | {part: value})})
        refused(folder, match, read=Q)
    one = {k: v for k, v in flat.items() if k != "right_trans"}
    assert open_checkpoint(write(tmp_path / "c", {Q: ("W8A8_FLATQUANT_DYNAMIC", one)})).format(Q).rotate_in == (
        ("kronecker", 8, 0),
    )
    svd = {"svd_lowrank_l1:FLOAT": torch.ones(2, K), "svd_lowrank_l2:FLOAT": torch.ones(N, 2)}
    folder = write(tmp_path / "c", {Q: ("W8A8_FLATQUANT_SVD_DYNAMIC", flat | svd)})
    refused(folder, "unsupported: .*left_trans and .*svd_lowrank_l1: the files do not say which is applied first")
    mx = {
        "weight": torch.zeros(N, K // 2, dtype=torch.uint8),
        "weight_scale": torch.full((N, 2), 127, dtype=torch.uint8),
    }
    clipped = mx | {k: v for k, v in flat.items() if "weight" not in k}
    folder = write(tmp_path / "c", {Q: ("W4A4_MXFP4_FLATQUANT", clipped)}, group_size=32)
    refused(folder, "unsupported: .*a clip ratio of whole tokens with W4A4_MXFP4_FLATQUANT")


@pytest.mark.parametrize(("blocks", "columns", "size"), [(2, 1024, 512), (3, 1280, 512), (6, 1408, 256), (5, 1408, 0)])
def test_outer_blocks_of_dual_scales(tmp_path: Path, blocks: int, columns: int, size: int) -> None:
    parts = {
        "weight": torch.randint(0, 256, (N, columns // 2), dtype=torch.uint8),
        "weight_scale": torch.randint(120, 130, (N, columns // 32), dtype=torch.uint8),
        "weight_dual_scale": scales(N, blocks, 1),
    }  # fmt: skip
    folder = write(tmp_path / "c", {Q: ("W4A4_MXFP4_DUALSCALE", parts)}, group_size=32)
    if size == 0:
        refused(folder, "weight_dual_scale: expected a number of blocks that the 1408 columns")
        return
    ckpt = open_checkpoint(folder)
    assert str(ckpt.format(Q).weight) == f"e2m1.g32*(e8m0.g{size // 32}*fp32)"
    outer = parts["weight_dual_scale"][..., 0].repeat_interleave(size, 1)[:, :columns]
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    w = torch.stack([parts["weight"] & 15, parts["weight"] >> 4], -1).flatten(1)
    inner = torch.exp2(parts["weight_scale"].float() - 127).repeat_interleave(32, 1)
    assert torch.equal(ckpt.stored(Q), values[w.long()] * (inner * outer))


def test_rotations_in_the_place_of_modules_are_named(tmp_path: Path) -> None:
    modules = {Q: ("W8A8_DYNAMIC", dynamic()), "model.layers.0.self_attn": ("FLOAT", {"q_rot": torch.eye(4)})}
    with pytest.warns(CheckpointWarning, match=r"1 matrices are no weight: rotations.*self_attn\.q_rot"):
        open_checkpoint(write(tmp_path / "c", modules))


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    for tail, match in (
        ({"future": 1}, "future: no key of ModelSlim that is known here; it is not looked at"),
        ({"version": "2.0.0"}, r"version 2\.0\.0: 1\.0\.0 is known here"),
        ({"reduce_quant_type": "per_channel"}, "reduce_quant_type: the format of collectives is chosen where"),
        ({"metadata": {"quarot": {"spin": 1}}}, r"metadata\.quarot\.spin: no key of ModelSlim"),
    ):
        folder = write(tmp_path / "c", {Q: ("W8A8_DYNAMIC", dynamic())}, **tail)
        with pytest.warns(CheckpointWarning, match=match):
            open_checkpoint(folder)
    refused(write(tmp_path / "c", {Q: ("W8A8_DYNAMIC", dynamic())}, version=2), r"version: expected 1\.0\.0")


# ---------------------------------------------------------------- caches


def attention(acts: dict[str, tuple[str, Tensors]]) -> dict[str, tuple[str, Tensors]]:
    return {Q: ("W8A8_DYNAMIC", dynamic())} | acts


def test_attention_operands_of_the_older_writer_and_of_fp8(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn"
    acts = {
        f"{module}.fa_{a}": ("FAQuant", {"scale": scales(h, 1), "offset": torch.zeros(h, 1, dtype=torch.int8)})
        for a, h in (("q", 4), ("k", 2), ("v", 1))
    }
    found = open_checkpoint(write(tmp_path / "a", attention(acts), fa_quant_type="FAQuant")).kv_format(0)
    assert found is not None and found.q is not None
    assert [str(o.format) for o in (found.q, found.k, found.v)] == ["int8.head*fp32"] * 2 + ["int8.tensor*fp32"]
    folder = write(tmp_path / "b", attention(acts), **{f"{module}.quant_type": "QK_FP8_V_INT8"})
    assert str(open_checkpoint(folder).layer_formats()[-1]) == (
        "mha(k=e4m3fn.head*fp32, v=int8.tensor*fp32, q=e4m3fn.head*fp32)"
    )
    folder = write(tmp_path / "b", attention({}), **{f"{module}.quant_type": "Q_INT8_DYNAMIC_P_FP8_DYNAMIC"})
    found = open_checkpoint(folder).kv_format(0)
    assert found is not None and found.p is not None and str(found.k.format) == "bf16"
    acts[f"{module}.fa_k"][1]["offset"] = torch.ones(2, 1, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"fa_k\.offset: expected zeros"):
        open_checkpoint(write(tmp_path / "a", attention(acts))).kv_format(0)
    acts[f"{module}.fa_k"][1]["scale"] = scales(3, 1)
    acts[f"{module}.fa_k"][1]["offset"] = torch.zeros(3, 1)
    refused(write(tmp_path / "a", attention(acts)), r"fa_k\.scale: expected \[2, 1\], one scale per head, or \[1, 1\]")


def test_caches_with_an_offset_and_what_is_refused(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn"
    acts = {
        f"{module}.{a}_proj": ("C8", {"kv_cache_scale": scales(8), "kv_cache_offset": torch.full((8,), 3.0)})
        for a in "kv"
    }
    found = open_checkpoint(write(tmp_path / "a", attention(acts), kv_cache_type="C8")).kv_format(0)
    assert found is not None and found.k.zero is not None and float(found.k.zero[0]) == 3
    refused(write(tmp_path / "a", attention(acts), model={"kv_lora_rank": 8}), "unsupported: .*latent attention")
    refused(write(tmp_path / "a", attention(acts), model={"head_dim": 8}), r"kv_cache_scale: expected .* \[16\]")
    del acts[f"{module}.v_proj"][1]["kv_cache_offset"]
    refused(write(tmp_path / "a", attention(acts)), r"v_proj\.kv_cache_offset is missing")
    other = {"model.self_attn.fa_q": ("FAQuant", {"scale": scales(4, 1), "offset": torch.zeros(4, 1)})}
    refused(write(tmp_path / "a", attention(other)), "it has no layer number")
