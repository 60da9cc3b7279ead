"""AutoRound: files of the tool, conventions of zero points, overrides of single modules, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qhal
from qhal.errors import CheckpointError
from qhal_schemes import Checkpoint, CheckpointWarning, open_checkpoint
from qhal_schemes.convert import convert_checkpoint
from qhal_schemes.packing import pack, pack_awq

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
OWN = Path(__file__).parent / "golden" / "auto_round"  # made by tests/generators/auto_round_layouts.py
LAYER = "model.layers.0.mlp"
UP, DOWN, HEAD = f"{LAYER}.up_proj", f"{LAYER}.down_proj", "lm_head"
K, N, G = 64, 32, 2


@pytest.mark.parametrize("case", sorted(path.name for path in OWN.glob("*")))
def test_files_of_the_tool(case: str) -> None:
    """Weights are the tool's float16 ones to the bit; layers run within the bound of a float32 sum."""
    folder = OWN / case
    ckpt, expected = open_checkpoint(folder / "checkpoint"), load_file(folder / "expected.safetensors")
    quantized, ops = set(ckpt.modules(quantized=True)), qhal.select("cpu_reference")
    assert {f"{m}.weight" for m in quantized} == {key for key in expected if key.endswith(".weight")}
    assert qhal.resolve(ckpt, ops, policy="exact")
    for module in quantized:
        spec, rounded = ckpt.spec(module), expected[f"{module}.weight"]
        assert torch.equal(spec.stored().half().float(), rounded), module
        x, want = expected[f"{module}.input"], expected[f"{module}.output"].double()
        bias = 0 if spec.bias is None else spec.bias.double()
        magnitude = x.abs().double() @ rounded.abs().double().T + abs(bias)
        bound = (x.shape[1] + 2) * 2.0**-24 * magnitude
        assert bool(((x.double() @ rounded.double().T + bias - want).abs() <= bound).all()), module
        y = ckpt.load_linear(module, ops, dtype=torch.float32)(x).double()
        assert bool(((y - want).abs() <= bound + 2.0**-11 * magnitude).all()), module  # the tool rounds weights to fp16
        for rank in range(2):
            part = ckpt.linear_spec(module, shard=(0, rank, 2)).stored()
            assert torch.equal(part, spec.stored().chunk(2)[rank])


def test_a_model_runs_in_transformers() -> None:
    """Mixed 4 and 8 bits, a plain projection and biases: the logits of the model with the decoded weights."""
    transformers = pytest.importorskip("transformers")
    import qhal_engines.transformers

    folder = OWN / "gptq_b4_g32_mixed" / "checkpoint"
    ckpt, ids = open_checkpoint(folder), torch.arange(8)[None]
    qhal_engines.transformers.install()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    qhal_engines.transformers.uninstall()
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {name: ckpt.tensor(name).float() for name in ckpt.account.plain}
    for module in ckpt.modules(quantized=True):
        spec = ckpt.spec(module)
        weights |= {f"{module}.weight": spec.effective()} | ({} if spec.bias is None else {f"{module}.bias": spec.bias})
    plain.load_state_dict(weights)
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("case", ["gptq_b4_g32_mixed", "awq_b4_g32", "raw_b3_g32"])
def test_a_file_is_converted_exactly_and_whole(tmp_path: Path, case: str) -> None:
    source = open_checkpoint(OWN / case / "checkpoint")
    assert convert_checkpoint(source.path, tmp_path / "out", "gptq")["exact"]
    out = open_checkpoint(tmp_path / "out")
    assert out.method == "gptq" and not (tmp_path / "out" / "quantization_config.json").exists()
    for module in source.modules(quantized=True):
        assert torch.equal(out.stored(module), source.stored(module))


def packed(
    bits: int, minus_one: bool, index: bool = False, awq: bool = False, low: int = 1, sym: bool = False
) -> tuple[Tensors, torch.Tensor]:
    """The tensors of one module, and its weight by the arithmetic of the tool."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (N, K), generator=g)
    zero = torch.randint(low, 1 << bits, (G, N), generator=g)
    zero = torch.full_like(zero, 1 << (bits - 1)) if sym else zero
    scale = torch.rand(G, N, generator=g).half() + 0.1
    size = K // G
    w = (codes - zero.t().repeat_interleave(size, 1)).float() * scale.float().t().repeat_interleave(size, 1)
    if awq:
        words = {"qweight": pack_awq(codes.to(torch.uint8)), "qzeros": pack_awq(zero.t().to(torch.uint8))}
        return {**words, "scales": scale}, w
    t = {"qweight": pack(codes, bits).t().contiguous(), "qzeros": pack(zero - int(minus_one), bits), "scales": scale}
    return t | ({"g_idx": torch.arange(K, dtype=torch.int32) // size} if index else {}), w


def store(write: Write, parts: dict[str, Tensors], **section: Any) -> Path:
    """Modules of one block and a plain head."""
    said = {"quant_method": "auto-round", "bits": 4, "group_size": K // G, "sym": False, "data_type": "int", **section}
    tensors = {f"{module}.{name}": t for module, part in parts.items() for name, t in part.items()}
    return write(
        tensors | {f"{HEAD}.weight": torch.ones(4, K).half()}, {k: v for k, v in said.items() if v is not None}
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("layout", "minus_one", "index"),
    [
        ("auto_round", False, False),
        ("auto_round:gptqmodel", False, True),
        ("auto_round:exllamav2", False, False),
        ("auto_round:auto_gptq", True, False),
        ("auto_round:gptq", True, True),
        ("auto_round:auto_gptq:exllamav2", True, False),
    ],
)
def test_zero_points(write_checkpoint: Write, bits: int, layout: str, minus_one: bool, index: bool) -> None:
    parts, w = packed(bits, minus_one, index)
    ckpt = open_checkpoint(store(write_checkpoint, {UP: parts}, bits=bits, packing_format=layout))
    assert torch.equal(ckpt.stored(UP), w) and str(ckpt.format(UP).weight) == f"uint{bits}-uint{bits}.g32*fp16"
    assert set(ckpt.account.consumed) == {f"{UP}.{name}" for name in parts}


@pytest.mark.parametrize("layout", ["auto_round:auto_awq", "auto_round:awq"])
def test_awq_words(write_checkpoint: Write, layout: str) -> None:
    parts, w = packed(4, False, awq=True)
    extra = {UP: {"bits": 4, "group_size": None}, f"{LAYER}.gate_proj": {"bits": 16, "data_type": "float"}}
    plain = {"weight": torch.ones(N, K).half()}
    folder = store(
        write_checkpoint, {UP: parts, f"{LAYER}.gate_proj": plain}, packing_format=layout, extra_config=extra
    )
    ckpt = open_checkpoint(folder)
    assert torch.equal(ckpt.stored(UP), w)
    assert ckpt.excluded[f"{LAYER}.gate_proj"] == f"extra_config '{LAYER}.gate_proj'"


def test_a_symmetric_file_without_a_layout_is_gptqs(write_checkpoint: Write) -> None:
    parts, w = packed(4, True, sym=True)
    ckpt = open_checkpoint(store(write_checkpoint, {UP: parts}, sym=True))
    assert torch.equal(ckpt.stored(UP), w)
    parts, _ = packed(4, False, sym=True)
    folder = store(lambda *a: write_checkpoint(*a, name="other"), {UP: parts}, sym=True)
    with pytest.raises(CheckpointError, match="sym is true, so every zero point must be 8"):
        open_checkpoint(folder).spec(UP)


def test_names_come_before_patterns_and_the_first_pattern_counts(write_checkpoint: Write) -> None:
    eight, w8 = packed(8, False)
    three, w3 = packed(3, False)
    four, w4 = packed(4, False)
    modules = {
        f"model.layers.{i}.mlp.{n}_proj": t for i, n, t in ((0, "up", eight), (1, "up", three), (1, "down", four))
    }
    extra = {".*up_proj.*": {"bits": 3}, "layers.1": {"bits": 4}, UP: {"bits": 8}, ".*down.*": {}}
    ckpt = open_checkpoint(store(write_checkpoint, modules, packing_format="auto_round", extra_config=extra, bits=2))
    for module, w in zip(modules, (w8, w3, w4), strict=True):
        assert torch.equal(ckpt.stored(module), w), module


@pytest.mark.parametrize(
    "blocks", ["model.layers.0", "model.layers.0, other", ["model.layers.0"], [["model.layers.0"]]]
)
def test_blocks_that_are_left_out(write_checkpoint: Write, blocks: object) -> None:
    parts, _ = packed(4, False)
    plain = {"weight": torch.ones(N, K).half()}
    modules = {UP: parts, "model.layers.1.mlp.up_proj": plain}
    section = {"packing_format": "auto_round", "block_name_to_quantize": blocks}
    ckpt = open_checkpoint(store(write_checkpoint, modules, **section))
    assert ckpt.excluded["model.layers.1.mlp.up_proj"].startswith("outside block_name_to_quantize model.layers.0")
    assert list(ckpt.modules(quantized=True)) == [UP]


def opened(folder: Path, read: str = UP) -> Checkpoint:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        ckpt = open_checkpoint(folder)
        ckpt.spec(read)
        return ckpt


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"packing_format": None}, "packing_format: expected the name of a layout, which decides how zero points"),
        ({"packing_format": 3}, "packing_format: expected the name of a layout"),
        ({"packing_format": "auto_round:llm_compressor"}, "unsupported: .*'auto_round:llm_compressor'; can be read"),
        ({"packing_format": "auto_round:fp8"}, "unsupported: .*'auto_round:fp8'; can be read"),
        ({"packing_format": "mlx"}, "unsupported: .*'mlx'; can be read: auto_round, auto_round:auto_gptq"),
        ({"data_type": "mx_fp"}, "unsupported: .*data_type 'mx_fp'; integer weights with plain inputs"),
        ({"act_bits": 8}, "unsupported: .*act_bits 8; integer weights with plain inputs"),
        ({"act_bits": "8"}, "act_bits: expected a number of bits"),
        ({"rotation_config": {"a": 1}}, "unsupported: .*rotation_config; integer weights"),
        ({"static_kv_dtype": "fp8"}, "unsupported: .*static_kv_dtype; integer weights"),
        ({"desc_act": True}, "desc_act: expected false"),
        ({"bits": 9}, "bits: expected one of 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": 8}, "qzeros|scales|qweight"),
        ({"group_size": 16}, r"scales: expected .*\[4, 32\], found F16 \[2, 32\]"),
        ({"group_size": 0}, "group_size: expected a positive integer"),
        ({"sym": True}, "8 everywhere, as sym is true"),
        ({"sym": 1}, "sym: expected true or false"),
        ({"extra_config": []}, "extra_config: expected an object of settings by name"),
        ({"extra_config": {UP: 3}}, "extra_config: expected an object of settings by name"),
        (
            {"extra_config": {UP: {"bits": 16}}},
            f"up_proj is skipped by extra_config '{UP}', but the file holds it quan",
        ),
        ({"extra_config": {UP: {"bits": 1}}}, r"extra_config\['.*up_proj'\]\.bits: expected one of"),
        ({"extra_config": {UP: {"data_type": "nv_fp"}}}, r"unsupported: .*extra_config\['.*'\]\.data_type 'nv_fp'"),
        ({"extra_config": {UP: {"swing": 1}}}, r"extra_config\['.*'\]\.swing: expected one of act_bits, "),
        ({"extra_config": {"(a+)+": {"bits": 8}}}, r"extra_config\['\(a\+\)\+'\]: expected a regular expression"),
        ({"extra_config": {HEAD: {"bits": 4}}}, "extra_config 'lm_head' quantizes lm_head, but the file holds a plain"),
        ({"block_name_to_quantize": [3]}, "block_name_to_quantize: expected names of blocks"),
        ({"block_name_to_quantize": {"a": 1}}, "block_name_to_quantize: expected names of blocks"),
    ],
)
def test_configurations_that_are_refused(write_checkpoint: Write, section: dict[str, Any], match: str) -> None:
    folder = store(write_checkpoint, {UP: packed(4, False)[0]}, **{"packing_format": "auto_round", **section})
    with pytest.raises(CheckpointError, match=match) as info:
        opened(folder)
    assert 20 < len(str(info.value)) < 2000


def test_tensors_that_are_refused(write_checkpoint: Write) -> None:
    good, _ = packed(4, False, index=True)
    bare = {name: t for name, t in good.items() if name != "g_idx"}
    cases: list[tuple[Tensors, str, str]] = [
        (bare, "auto_round:gptqmodel", "up_proj.g_idx is missing"),
        (good | {"g_idx": good["g_idx"].flip(0)}, "auto_round", "column k in group k // 32, as desc_act is false"),
        (
            bare | {"qweight": good["qweight"][:-1]},
            "auto_round",
            "runs of 4 words, as there is no g_idx, found 7 words",
        ),
        (bare | {"scales": good["scales"] * float("nan")}, "auto_round", "scales: expected finite"),
        (
            packed(4, True, low=0)[0],
            "auto_round:auto_gptq",
            "fields below 15: they are zero points minus one, found 15",
        ),
    ]
    for i, (parts, layout, match) in enumerate(cases):
        folder = store(lambda *a, i=i: write_checkpoint(*a, name=str(i)), {UP: parts}, packing_format=layout)
        with pytest.raises(CheckpointError, match=match):
            opened(folder)


def test_awq_modules_have_one_setting(write_checkpoint: Write) -> None:
    section = {"packing_format": "auto_round:auto_awq", "extra_config": {UP: {"group_size": 16}}}
    folder = store(write_checkpoint, {UP: packed(4, False, awq=True)[0]}, **section)
    with pytest.raises(CheckpointError, match=r"unsupported: .* its own group_size; AWQ layouts of several"):
        opened(folder)


def test_what_is_not_looked_at_is_named(write_checkpoint: Write) -> None:
    section = {"packing_format": "auto_round", "novelty": 1, "iters": 200, "extra_config": {"q_proj": {"bits": 8}}}
    folder = store(write_checkpoint, {UP: packed(4, False)[0]}, **section)
    with pytest.warns(CheckpointWarning) as caught:
        open_checkpoint(folder)
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and "novelty: no key of auto-round that is known here" in texts[0]
    assert "extra_config: 'q_proj' matches no module" in texts[1]


def test_the_golden_cases_are_described() -> None:
    for path in OWN.glob("*/provenance.json"):
        assert json.loads(path.read_text())["produced_by"] == "tests/generators/auto_round_layouts.py"
