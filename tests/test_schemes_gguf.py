"""GGUF: every block type against the gguf package, names and row order of models, experts, splits, golden files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qhal
from qhal.errors import CheckpointError, ShardError
from qhal_schemes import Checkpoint, CheckpointWarning, open_checkpoint
from qhal_schemes.gguf_blocks import TYPES, unpack
from qhal_schemes.gguf_names import ARCHITECTURES

READ = [number for number, kind in TYPES.items() if kind.planes]
Kind = gguf.GGMLQuantizationType
Q8, Q4 = Kind.Q8_0, Kind.Q4_0


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("number", READ, ids=[TYPES[n].name for n in READ])
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_blocks_decode_as_in_the_gguf_package(number: int, rows: int, blocks: int, seed: int) -> None:
    kind = TYPES[number]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * kind.nbytes), dtype=np.uint8)
    if kind.name == "MXFP4":
        raw[:, :: kind.nbytes] &= 127  # 255 is NaN here and a power of two there; reading refuses it
    want = torch.from_numpy(gguf.dequantize(raw, Kind(number)))
    got = unpack(kind.name, torch.from_numpy(raw)).dequantize()
    assert torch.equal(got.nan_to_num(123.0), want.nan_to_num(123.0))  # random scales may be NaN


def test_the_table_of_types_is_that_of_the_gguf_package() -> None:
    for number, kind in TYPES.items():
        assert Kind(number).name == kind.name
        if kind.readable:
            assert gguf.GGML_QUANT_SIZES[Kind(number)] == (kind.elements, kind.nbytes)


# ---------------------------------------------------------------- files


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def file(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Kind]], arch: str = "llama"
) -> Path:
    """Written by the gguf package, tensors quantized by it."""
    w = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, list):
            w.add_array(key, value)
        elif isinstance(value, float):
            w.add_float32(key, value)
        else:
            w.add_uint32(key, value)
    for name, (data, kind) in tensors.items():
        w.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def decoded(data: np.ndarray, kind: Kind) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(gguf.quantize(data, kind), kind)).reshape(data.shape)


def facts(
    arch: str = "llama", layers: int = 1, heads: int = 4, kv: int = 2, width: int = 64, **more: Any
) -> dict[str, Any]:
    said = {"block_count": layers, "context_length": 128, "embedding_length": width, "feed_forward_length": 96}
    said |= {"attention.head_count": heads, "attention.head_count_kv": kv, "vocab_size": 40, "rope.freq_base": 10000.0}
    said |= {"attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": width // heads, **more}
    return {f"{arch}.{key}": value for key, value in said.items()}


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter orders the rows of Q and K."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def dense(interleaved: bool = True, kind: Kind = Q8) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Tensors of one layer by GGUF name, and what they should be by transformers' name."""
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64),
              "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}  # fmt: skip
    names = ARCHITECTURES["llama"].names
    tensors: dict[str, Any] = {"token_embd.weight": (weight(40, 64), Q8), "output_norm.weight": (weight(64), Kind.F32)}
    want = {"model.embed_tokens.weight": decoded(weight(40, 64), Q8), "model.norm.weight": torch.from_numpy(weight(64))}
    for i, (part, shape) in enumerate(shapes.items()):
        w, heads = weight(*shape, seed=i), {"attn_q": 4, "attn_k": 2}.get(part, 0)
        stored = permuted(w, heads) if heads and interleaved else w
        tensors[f"blk.0.{part}.weight"] = (stored, kind)
        want[f"model.layers.0.{names[part]}.weight"] = decoded(w, kind)
    for part in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{part}.weight"] = (weight(64, seed=9), Kind.F32)
        want[f"model.layers.0.{names[part]}.weight"] = torch.from_numpy(weight(64, seed=9))
    return tensors, want


def compare(path: Path, want: dict[str, torch.Tensor]) -> Checkpoint:
    ckpt = open_checkpoint(path)
    assert set(ckpt.tensor_names) == set(want)
    for name, right in want.items():
        module = name.removesuffix(".weight")
        got = ckpt.stored(module) if module in ckpt.modules(quantized=True) else ckpt.tensor(name).float()
        assert torch.equal(got, right), name
    return ckpt


@pytest.mark.parametrize("kind", [Q8, Q4, Kind.F16, Kind.BF16])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_model_has_the_names_and_rows_of_transformers(tmp_path: Path, arch: str, kind: Kind) -> None:
    tensors, want = dense(arch == "llama", kind)
    ckpt = compare(file(tmp_path / "m.gguf", facts(arch), tensors, arch), want)
    assert ckpt.config["model_type"] == arch and ckpt.config["tie_word_embeddings"] is True
    assert (ckpt.config["num_key_value_heads"], ckpt.config["head_dim"], ckpt.config["rms_norm_eps"]) == (2, 16, 1e-5)
    assert ckpt.method == "gguf" and ckpt.summary()["files"] == [{"file": "m.gguf", "tensors": 11}]
    if kind in (Kind.F16, Kind.BF16):
        assert ckpt.excluded["model.layers.0.mlp.up_proj"] == f"the file stores it as {kind.name}"


@pytest.mark.parametrize("installed", [False, True])
def test_rows_are_those_that_transformers_reads(tmp_path: Path, installed: bool) -> None:
    """Also where qhal took over transformers' quantizers: this reading stays transformers' own."""
    transformers = pytest.importorskip("transformers")
    import qhal_engines.transformers

    if installed:
        qhal_engines.transformers.install()
    tensors, _ = dense()
    file(tmp_path / "m.gguf", facts(), tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    qhal_engines.transformers.uninstall()
    ckpt = open_checkpoint(tmp_path)
    for name, parameter in model.state_dict().items():
        module = name.removesuffix(".weight")
        if name == "lm_head.weight":
            assert name not in ckpt.tensor_names  # tied
        elif module in ckpt.modules(quantized=True):
            assert torch.equal(ckpt.stored(module), parameter), name
        else:
            assert torch.equal(ckpt.tensor(name).float(), parameter), name


def test_biases_of_queries_and_keys_are_reordered_with_their_rows(tmp_path: Path) -> None:
    tensors, _ = dense()
    b = weight(64, seed=5)
    tensors["blk.0.attn_q.bias"] = (permuted(b, 4), Kind.F32)
    spec = open_checkpoint(file(tmp_path / "m.gguf", facts(), tensors)).spec("model.layers.0.self_attn.q_proj")
    assert spec.bias is not None and torch.equal(spec.bias, torch.from_numpy(b))


def test_some_rows_are_read_and_what_is_written_to_them_stays_in_memory(tmp_path: Path) -> None:
    """Tensors are views of the mapped file, from any byte of a page on."""
    data = weight(64, 64)
    tensors = {name: (data, kind) for name, kind in (("blk.0.ffn_up.weight", Q4), ("blk.0.ffn_down.weight", Kind.F32))}
    path = file(tmp_path / "m.gguf", facts(), tensors)
    before = path.read_bytes()
    index = open_checkpoint(path)._index
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down")]
    whole = index.read_all(names)
    for first, count in ((0, 64), (63, 1), (5, 20)):
        for name, found in index.read_all(names, (first, count)).items():
            assert torch.equal(found, whole[name][first : first + count])
    assert torch.equal(whole[names[1]], torch.from_numpy(data))
    for found in whole.values():
        found.fill_(1)
    assert path.read_bytes() == before


def test_heads_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    tensors, want = dense()
    path = file(tmp_path / "m.gguf", facts() | {"llama.attention.head_count_kv": [2]}, tensors)
    compare(path, want)
    path = file(tmp_path / "n.gguf", facts() | {"llama.attention.head_count_kv": [4]}, tensors)
    with pytest.raises(CheckpointError, match=r"attn_k\.weight: expected rows of 4 heads of 16 .*, found 32 rows"):
        open_checkpoint(path)


def test_layers_run_are_fused_and_cut(tmp_path: Path) -> None:
    tensors, want = dense()
    ckpt, ops = open_checkpoint(file(tmp_path / "m.gguf", facts(), tensors)), qhal.select("cpu_reference")
    assert qhal.resolve(ckpt, ops, policy="exact")
    qkv = ckpt.linear_spec("model.layers.0.self_attn.qkv_proj")
    parts = [want[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"]
    assert torch.equal(qkv.stored(), torch.cat(parts))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    y = ckpt.load_linear("model.layers.0.self_attn.qkv_proj", ops, dtype=torch.float32)(x)
    bound = (64 + 2) * 2.0**-24 * (x.abs().double() @ torch.cat(parts).abs().double().T)
    assert bool(((y.double() - x.double() @ torch.cat(parts).double().T).abs() <= bound).all())
    down = "model.layers.0.mlp.down_proj"
    for rank in range(3):
        part = ckpt.linear_spec(down, shard=(1, rank, 3)).stored()
        assert torch.equal(part, want[f"{down}.weight"][:, rank * 32 : rank * 32 + 32])
    with pytest.raises(ShardError, match="inside a block of 32"):
        ckpt.linear_spec(down, shard=(1, 0, 2))


@pytest.mark.parametrize("number", READ, ids=[TYPES[n].name for n in READ])
def test_every_type_runs_on_the_reference(tmp_path: Path, number: int) -> None:
    kind = TYPES[number]
    raw = np.random.default_rng(1).integers(0, 256, (6, 2 * kind.nbytes), dtype=np.uint8).reshape(-1, kind.nbytes)
    fields = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": ()}
    for at in fields.get(kind.name, (0, 2) if "1" in kind.name or kind.name in ("Q4_K", "Q5_K") else (0,)):
        raw[:, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    if kind.name == "MXFP4":
        raw[:, 0] = 120
    if kind.name == "TQ2_0":
        raw[:, :64] = raw[:, :64] & 0x55  # no code of 3
    raw = raw.reshape(6, -1)
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "none")
    w.add_tensor("fc.weight", raw, raw_dtype=Kind(number))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.warns(CheckpointWarning, match="architecture 'none' is not known here"):
        ckpt = open_checkpoint(tmp_path / "m.gguf")
    ops = qhal.select("cpu_reference")
    assert qhal.resolve(ckpt, ops, policy="exact")
    k, right = ckpt.format("fc").k, torch.from_numpy(gguf.dequantize(raw, Kind(number)))
    x = torch.randn(2, k, generator=torch.Generator().manual_seed(0))
    y = ckpt.load_linear("fc", ops, dtype=torch.float32)(x)
    bound = (k + 2) * 2.0**-24 * (x.abs().double() @ right.abs().double().T)
    assert bool(((y.double() - x.double() @ right.double().T).abs() <= bound).all())
    assert torch.equal(ckpt.linear_spec("fc", shard=(1, 1, 2)).stored(), right[:, k // 2 :])
    assert torch.equal(ckpt.linear_spec("fc", shard=(0, 1, 3)).stored(), right[2:4])


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("arch", ["qwen3moe", "qwen2moe", "llama"])
def test_experts(tmp_path: Path, arch: str) -> None:
    e, inner = 3, 32
    tensors, _ = dense(arch == "llama")
    tensors = {name: t for name, t in tensors.items() if "ffn_" not in name or "norm" in name}
    stacked = {"gate": weight(e, inner, 64, seed=1), "up": weight(e, inner, 64, seed=2), "down": weight(e, 64, inner)}
    tensors |= {f"blk.0.ffn_{part}_exps.weight": (w, Q8) for part, w in stacked.items()}
    tensors["blk.0.ffn_gate_inp.weight"] = (weight(e, 64, seed=3), Kind.F32)
    if arch == "qwen2moe":
        tensors["blk.0.ffn_gate_inp_shexp.weight"] = (weight(64, seed=4), Kind.F32)
    path = file(tmp_path / "m.gguf", facts(arch, expert_count=e, expert_used_count=2), tensors, arch)
    ckpt, block = open_checkpoint(path), "block_sparse_moe" if arch == "llama" else "mlp"
    prefix = f"model.layers.0.{block}.experts"
    spec = ckpt.experts_spec(prefix)
    right = {part: decoded(w, Q8) for part, w in stacked.items()}
    assert torch.equal(spec.gate_up.stored(), torch.cat([right["gate"], right["up"]], 1))
    assert torch.equal(spec.down.stored(), right["down"])
    assert torch.equal(ckpt.experts_spec(prefix, range(1, 3)).down.stored(), right["down"][1:])
    assert ckpt.excluded[f"model.layers.0.{block}.gate"] == "the file stores it as F32"
    assert ckpt.config["num_local_experts" if arch == "llama" else "num_experts"] == e
    assert ckpt.config["model_type"] == {"llama": "mixtral"}.get(arch, arch.replace("moe", "_moe"))
    assert sum(row["bytes"] for row in ckpt.summary()["formats"]) == sum(
        entry.nbytes for name in ckpt.tensor_names if (entry := ckpt.entry(name)).dtype == "Q8_0"
    )
    if arch == "qwen2moe":
        assert ckpt.entry("model.layers.0.mlp.shared_expert_gate.weight").shape == (1, 64)
    layer = ckpt.load_experts(prefix, qhal.select("cpu_reference"), top_k=2)
    x, ids = torch.ones(2, 64).bfloat16(), torch.tensor([[0, 2], [1, 0]], dtype=torch.int32)
    assert layer(x, qhal.Indexed(ids, torch.full((2, 2), 0.5))).isfinite().all()


def test_experts_of_old_files_lie_one_by_one(tmp_path: Path) -> None:
    tensors, _ = dense()
    tensors = {
        name: t for name, t in tensors.items() if "ffn_g" not in name and "ffn_u" not in name and "_d" not in name
    }
    for i in range(2):
        for part, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
            tensors[f"blk.0.ffn_{part}.{i}.weight"] = (weight(*shape, seed=i), Q8)
    tensors["blk.0.ffn_gate_inp.weight"] = (weight(2, 64), Kind.F16)
    ckpt = open_checkpoint(file(tmp_path / "m.gguf", facts(expert_count=2, expert_used_count=1), tensors))
    spec = ckpt.experts_spec("model.layers.0.block_sparse_moe.experts")
    assert torch.equal(spec.down.stored()[1], decoded(weight(64, 32, seed=1), Q8))


# ---------------------------------------------------------------- folders


def test_splits_open_from_any_of_them(tmp_path: Path) -> None:
    tensors, want = dense()
    names, keys = list(tensors), {"split.count": 2, "split.tensors.count": len(tensors)}
    paths = []
    for i in range(2):
        part = {n: tensors[n] for n in names[i::2]}
        said = {**(facts() if i == 0 else {}), **keys, "split.no": i}
        paths.append(file(tmp_path / f"m-0000{i + 1}-of-00002.gguf", said, part))
    for path in (tmp_path, *paths):
        compare(path, want)
    moved = paths[0].rename(tmp_path / "moved.gguf")
    with pytest.raises(CheckpointError, match=r"split\.no, split\.count: expected 0 and 1, .*found \[0, 2\]"):
        open_checkpoint(moved)
    moved.rename(paths[0])
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf: is missing"):
        open_checkpoint(tmp_path)
    file(paths[1], keys | {"split.no": 5}, {"output.weight": (weight(40, 64), Q8)})
    with pytest.raises(CheckpointError, match=r"split\.no, split\.count: expected 1 and 2, as its name says"):
        open_checkpoint(tmp_path)
    file(paths[1], keys | {"split.no": 1}, {"output.weight": (weight(40, 64), Q8)})
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count: expected 7, .*found 11"):
        open_checkpoint(tmp_path)


def test_one_of_several_files_is_chosen_by_its_path(tmp_path: Path) -> None:
    tensors, want = dense()
    for name in ("a", "b"):
        file(tmp_path / f"{name}.gguf", facts(), tensors)
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a\.gguf, b\.gguf\); open one of them by its own path"):
        open_checkpoint(tmp_path)
    compare(tmp_path / "b.gguf", want)


def test_a_copy_beside_the_models_own_weights(tmp_path: Path) -> None:
    tensors, want = dense()
    path = file(tmp_path / "m.gguf", facts(), tensors)
    config: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 1, "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ckpt = compare(tmp_path, want)
    assert ckpt.dtype == torch.float16, "config.json is there and counts"
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).method == "" and open_checkpoint(path).method == "gguf"
    config["quantization_config"] = {"quant_method": "gguf"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quant_method: expected another method: .*no GGUF file"):
        open_checkpoint(tmp_path)


def test_a_link_to_a_file_elsewhere(tmp_path: Path) -> None:
    tensors, want = dense()
    (tmp_path / "store").mkdir()
    link = tmp_path / "m.gguf"
    link.symlink_to(file(tmp_path / "store" / "blob", facts(), tensors))
    compare(link, want)


# ---------------------------------------------------------------- golden


def cases(golden: Path) -> list[Path]:
    return sorted((golden / "gguf").glob("*"))


@pytest.mark.filterwarnings("ignore::qhal_schemes.CheckpointWarning")
def test_golden_files(golden: Path) -> None:
    """Weights to the bit; outputs of float32 layers within the bound of a sum of K products."""
    assert cases(golden)
    for case in cases(golden):
        ckpt, expected = open_checkpoint(case / "checkpoint"), load_file(case / "expected.safetensors")
        weights = {key for key in expected if key.endswith(".weight")}
        assert weights == {f"{m}.weight" for m in ckpt.modules(quantized=True)}
        assert set(json.loads((case / "provenance.json").read_text())["weight_sha256"]) == weights
        for key in weights:
            w = ckpt.stored(key.removesuffix(".weight"))
            assert torch.equal(w, expected[key]), (case.name, key)
            if f"{key}.input" in expected:
                x, want = expected[f"{key}.input"].double(), expected[f"{key}.output"].double()
                bound = (w.shape[1] + 2) * 2.0**-24 * (x.abs() @ w.abs().double().T)
                assert bool(((x @ w.double().T - want).abs() <= bound).all()), (case.name, key)
