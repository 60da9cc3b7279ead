"""FlatQuant, QuaRot, SpinQuant: forms that no golden file has, side files that are refused, and mistakes of files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qhal
from qhal import rotations
from qhal.errors import CheckpointError
from qhal.rotations import hadamard_for
from qhal_schemes import CheckpointWarning, open_checkpoint
from qhal_schemes.convert import convert_checkpoint
from qhal_schemes.flatquant import scheme as flatquant
from qhal_schemes.packing import pack_int4
from qhal_schemes.spinquant import transformed

Tensors = dict[str, Tensor]
Side = dict[Any, Any]
SETTINGS = {"w_bits": 4, "a_bits": 4, "model_name": "m", "symmetric": True, "format": "packed_int4", "sharded": False}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def folder_of(path: Path, tensors: Tensors, files: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """A checkpoint folder with JSON files and files of torch.save."""
    path.mkdir()
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name, value in files.items():
        if name.endswith(".json"):
            (path / name).write_text(json.dumps(value))
        elif isinstance(value, bytes):
            (path / name).write_bytes(value)
        else:
            torch.save(value, path / name)
    return path


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as info:
        ckpt = open_checkpoint(folder)
        for module in ckpt.modules(quantized=True):
            ckpt.spec(module)
    assert str(folder) in str(info.value)


# ---------------------------------------------------------------- FlatQuant


def matrices(name: str, seed: int, *sizes: int) -> Tensors:
    """A transform with its transposed inverses."""
    found: Tensors = {}
    for side, size in zip(("",) if len(sizes) == 1 else ("_left", "_right"), sizes, strict=True):
        m = torch.eye(size) + 0.1 * torch.randn(size, size, generator=generator(seed + size))
        found |= {f"{name}.matrix{side}": m, f"{name}.matrix{side}_inv": torch.linalg.inv(m).T}
    return found


def flat() -> tuple[Tensors, dict[int, Tensors], Tensors]:
    """One attention block of 2 heads of 4 features: tensors, flat_matrices.pth, and the int4 codes by module."""
    side = matrices("self_attn.ln_trans", 1, 2, 4) | matrices("self_attn.o_trans", 2, 2)
    side |= matrices("self_attn.vcache_trans", 3, 4)
    side["self_attn.ln_trans.diag_scale"] = torch.rand(8, generator=generator(4)) + 0.5
    tensors, codes = {}, {}
    for i, name in enumerate("qkvo"):
        module, short = f"model.layers.0.self_attn.{name}_proj", f"self_attn.{name}_proj"
        codes[module] = torch.randint(-8, 8, (8, 8), generator=generator(5 + i)).to(torch.int8)
        q = f"quantizer.{module}.linear"
        tensors[f"{module}.linear.weight"] = pack_int4(codes[module], 1).view(torch.uint8)
        tensors |= {f"{q}.scale": torch.rand(8, 1) + 0.1, f"{q}.zero": torch.zeros(8, 1), f"{q}.maxq": torch.tensor(7)}
        for part in ("clip_factor_a_max", "clip_factor_a_min"):
            side[f"{short}.act_quantizer.{part}"] = torch.tensor([2.0 + i])
    tensors |= {f"model.layers.0.{n}": t.half() for n, t in side.items()}
    return tensors, {0: side}, codes


def files(side: Side | None, **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"quantization_config.json": SETTINGS | settings}
    return found if side is None else found | {"flat_matrices.pth": side}


def test_flatquant_attention_from_both_sources(tmp_path: Path) -> None:
    """float32 matrices of flat_matrices.pth; without it the file's float16 ones. o turns heads only."""
    tensors, side, codes = flat()
    for name, given in (("both", side), ("one", None)):
        ckpt = open_checkpoint(folder_of(tmp_path / name, tensors, files(given)))
        assert ckpt.method == "flatquant" and set(ckpt.modules()) == set(codes)
        assert ckpt.summary()["totals"]["consumed"] == len(tensors) and not ckpt.summary()["files_not_read"]
        for module, stored in codes.items():
            spec = ckpt.spec(module)
            scale = tensors[f"quantizer.{module}.linear.scale"]
            assert torch.equal(spec.stored(), stored.float() * scale) and spec.format == ckpt.format(module)
            assert ckpt.form(module).layout in flatquant.family.uncompared("flatquant")
            assert ckpt.form(module).layout.endswith("without flat_matrices.pth") == (given is None)
            assert spec.input is not None and str(spec.input.format) == "int4.row*fp32"
            short = module.removeprefix("model.layers.0.")
            c = side[0][f"{short}.act_quantizer.clip_factor_a_max"]
            assert spec.input.clip[1] == pytest.approx(float(torch.sigmoid(c)), abs=0)
            trans = "o_trans" if module.endswith("o_proj") else "ln_trans"
            wanted = [side[0].get(f"self_attn.{trans}.matrix{s}") for s in ("", "_left", "_right")]
            wanted = [m if given else m.half() for m in wanted if m is not None]
            x = torch.randn(3, 8, dtype=torch.float64, generator=generator(9))
            turned = x.reshape(3, *((2, 4))).transpose(1, 2) @ wanted[0].double()
            turned = turned.transpose(1, 2)
            turned = (turned if len(wanted) == 1 else turned @ wanted[1].double()).reshape(3, 8)
            assert torch.allclose(x @ rotations.matrix(spec.rotate_in, 8), turned, rtol=1e-12, atol=1e-12)


def test_flatquant_input_bits_and_tokens_without_clips(tmp_path: Path) -> None:
    tensors, side, codes = flat()
    module = next(iter(codes))
    for bits, name in ((8, "int8.row*fp32"), (16, "None")):
        ckpt = open_checkpoint(folder_of(tmp_path / f"b{bits}", tensors, files(side, a_bits=bits)))
        assert str(ckpt.format(module).input) == name and (ckpt.spec(module).input is None) == (bits == 16)
    bare = {n: t for n, t in side[0].items() if "clip" not in n}
    kept = {n: t for n, t in tensors.items() if "clip" not in n}
    spec = open_checkpoint(folder_of(tmp_path / "bare", kept, files({0: bare}))).spec(module)
    assert spec.input is not None and spec.input.clip == (1.0, 1.0)


LN, VALUE = "self_attn.ln_trans.matrix_left", "model.layers.0.self_attn.ln_trans.matrix_left"
SCALE = "quantizer.model.layers.0.self_attn.q_proj.linear"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, s: s[0].update({LN: torch.ones(2, 2)}), r"matrix_left: expected (the numbers|a matrix)"),
        (lambda t, s: s[0].update({LN: s[0][LN] * float("nan")}), r"matrix_left: expected finite values"),
        (lambda t, s: s[0].update({LN: torch.eye(3)}), r"has the sizes 3 x 4, expected the 8 columns"),
        (lambda t, s: s[0].update({LN: torch.ones(2, 3)}), r"matrix_left: expected a square matrix, found \[2, 3\]"),
        (lambda t, s: s[0].update({LN: [1, 2]}), r"expected a float tensor \[\*, \*\], found list"),
        (lambda t, s: s[0].pop(LN), r"expected self_attn.ln_trans.matrix_left of layer 0, found none"),
        (lambda t, s: s.update({1: s.pop(0)}), r"matrix_left of layer 0, found none"),
        (lambda t, s: t.update({VALUE: t[VALUE] * 2}), r"expected the numbers of layer 0 in flat_matrices.pth"),
        (lambda t, s: t.pop(f"{SCALE}.scale"), r"scale is missing"),
        (lambda t, s: t.update({f"{SCALE}.zero": torch.ones(8, 1)}), r"zero: expected 0 and maxq 7"),
        (lambda t, s: t.update({f"{SCALE}.maxq": torch.tensor(15)}), r"expected 0 and maxq 7, .* found maxq 15"),
        (lambda t, s: t.update({f"{SCALE}.scale": torch.zeros(8, 1)}), r"scale: expected finite scales"),
        (
            lambda t, s: t.update({"model.layers.0.self_attn.kcache_trans.matrix": torch.eye(4).half()}),
            r"unsupported: .*kcache_trans.matrix: a rotated or quantized cache",
        ),
        (
            lambda t, s: t.update({"model.layers.0.mlp.extra.linear.weight": torch.zeros(8, 4, dtype=torch.uint8)}),
            r"mlp.extra.linear.weight: expected one of self_attn.q_proj, .* found mlp.extra",
        ),
    ],
)
def test_mistakes_of_flatquant_files(tmp_path: Path, change: Callable[[Tensors, Side], object], match: str) -> None:
    tensors, side, _ = flat()
    change(tensors, side)
    refused(folder_of(tmp_path / "c", tensors, files(side)), match)


def test_matrices_that_cannot_be_inverted_or_are_no_pair(tmp_path: Path) -> None:
    tensors, side, _ = flat()
    kept = {n: t for n, t in tensors.items() if "ln_trans" not in n}
    singular = {0: side[0] | {LN: torch.ones(2, 2)}}
    refused(folder_of(tmp_path / "a", kept, files(singular)), r"matrix_left: expected a matrix that can be inverted")
    plain_inverse = {0: side[0] | {f"{LN}_inv": side[0][f"{LN}_inv"].T.contiguous()}}
    refused(folder_of(tmp_path / "b", kept, files(plain_inverse)), r"times its inverse: expected the identity to")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"w_bits": 8}, r"w_bits: expected one of 4, found 8"),
        ({"a_bits": 5}, r"a_bits: expected one of 4, 8, 16"),
        ({"symmetric": False}, r"unsupported: .*symmetric: expected true"),
        ({"format": "other"}, r"format: expected packed_int4, found 'other'"),
    ],
)
def test_mistakes_of_flatquant_settings(tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    tensors, side, _ = flat()
    refused(folder_of(tmp_path / "c", tensors, files(side, **settings)), match)


def test_matrices_alone_are_no_checkpoint(tmp_path: Path) -> None:
    tensors, side, _ = flat()
    refused(folder_of(tmp_path / "c", tensors, {"flat_matrices.pth": side}), r"matrices of FlatQuant without")
    folder = folder_of(tmp_path / "d", tensors, files(side))
    settings = {k: v for k, v in SETTINGS.items() if k != "a_bits"}
    (folder / "quantization_config.json").write_text(json.dumps(settings | {"rotate": 1}))
    with pytest.warns(CheckpointWarning, match="4 is assumed"), pytest.warns(CheckpointWarning, match="rotate: no key"):
        open_checkpoint(folder)


class Opens:
    """What a pickle can do when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["flat_matrices.pth", "R.bin"])
def test_side_files_run_no_code(tmp_path: Path, name: str) -> None:
    touched = tmp_path / "touched"
    contents: dict[str, Any] = {
        "code": {0: Opens(touched), "R1": Opens(touched)},
        "raw": pickle.dumps(Opens(touched)),
        "cut": b"PK\x03\x04 and no more",
        "empty": b"",
        "text": b"no pickle at all",
    }
    tensors, _, _ = flat()
    plain = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}
    for what, content in contents.items():
        given = {name: content} if name == "R.bin" else files(content)
        folder = folder_of(tmp_path / what, plain if name == "R.bin" else tensors, given, {"dtype": "float32"})
        refused(
            folder, rf"{name}: expected tensors in a dictionary, saved by torch.save; anything else .* is not loaded"
        )
    listed = {name: [torch.eye(2)]} if name == "R.bin" else files([torch.eye(2)])  # type: ignore[arg-type]
    folder = folder_of(tmp_path / "list", plain if name == "R.bin" else tensors, listed, {"dtype": "float32"})
    refused(folder, rf"{name}: expected a dictionary of tensors, found list")
    assert not touched.exists()


# ---------------------------------------------------------------- QuaRot

WORDS = {"w_bits": 4, "a_bits": 4, "a_sym": True, "a_clip_ratio": 0.9, "online_full_had": True, "had_dim": -1}
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"


def quarot(k: int = 24) -> tuple[Tensors, Tensors]:
    codes = {m: torch.randint(-8, 8, (6, k), generator=generator(i)).to(torch.int8) for i, m in enumerate((DOWN, UP))}
    tensors = {f"{m}.weight": pack_int4(c, 1).view(torch.uint8) for m, c in codes.items()}
    tensors |= {f"{m}.weight_scales": torch.rand(6, 1, generator=generator(3)).half() + 0.1 for m in codes}
    return tensors, codes


def test_quarot_rotates_down_proj_only(tmp_path: Path) -> None:
    tensors, codes = quarot()
    ckpt = open_checkpoint(folder_of(tmp_path / "c", tensors, {"quarot.json": WORDS | {"K": 12, "in_features": 24}}))
    for module, turned in ((DOWN, (("hadamard", 24, 12, "quarot-12", False),)), (UP, ())):
        spec = ckpt.spec(module)
        assert spec.format == ckpt.format(module) and spec.format.rotate_in == turned
        assert torch.equal(spec.stored(), codes[module].float() * tensors[f"{module}.weight_scales"].float())
        assert spec.input is not None and spec.input.clip == (0.9, 0.9)
    without = WORDS | {"online_full_had": False, "a_bits": 16}
    ckpt = open_checkpoint(folder_of(tmp_path / "d", tensors, {"quarot.json": without}))
    assert ckpt.format(DOWN).rotate_in == () and ckpt.format(DOWN).input is None


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"w_bits": 8}, r"w_bits: expected one of 4"),
        ({"a_bits": None}, r"a_bits: expected one of 4, 8, 16"),
        ({"a_sym": False}, r"unsupported: .*a_sym: expected true"),
        ({"a_clip_ratio": 1.5}, r"a_clip_ratio: expected a ratio above 0 and at most 1"),
        ({"had_dim": 64}, r"unsupported: .*had_dim: expected -1"),
        ({"K": 20}, r"K: expected 12, by the shape of .*down_proj, found 20"),
        ({"in_features": 48}, r"in_features: expected 24, by the shape"),
        ({"groupsize": 128}, r"groupsize: expected no such key"),
    ],
)
def test_mistakes_of_quarot_json(tmp_path: Path, words: dict[str, Any], match: str) -> None:
    refused(folder_of(tmp_path / "c", quarot()[0], {"quarot.json": WORDS | words}), match)


def test_mistakes_of_quarot_files(tmp_path: Path) -> None:
    tensors, _ = quarot(k=22)
    refused(folder_of(tmp_path / "size", tensors, {"quarot.json": WORDS}), r"unsupported: .*down_proj: QuaRot has no")
    tensors, _ = quarot()
    heads = tensors | {n.replace("mlp.up_proj", "self_attn.o_proj"): t for n, t in tensors.items() if "up_proj" in n}
    refused(folder_of(tmp_path / "heads", heads, {"quarot.json": WORDS}), r"unsupported: .*o_proj of QuaRot has")
    bad = tensors | {f"{UP}.weight_scales": torch.full((6, 1), float("nan")).half()}
    refused(folder_of(tmp_path / "nan", bad, {"quarot.json": WORDS}), r"weight_scales: expected finite scales")
    cut = tensors | {f"{UP}.weight_scales": torch.ones(5, 1).half()}
    refused(folder_of(tmp_path / "cut", cut, {"quarot.json": WORDS}), r"weight_scales: expected .*\[6, 1\]")
    refused(
        folder_of(tmp_path / "none", {"a.weight": torch.ones(2, 2)}, {"quarot.json": WORDS}), r"no module has weight_s"
    )


# ---------------------------------------------------------------- SpinQuant


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator(seed)))[0].float()


def llama(hidden: int = 16, inner: int = 24, bias: bool = True) -> tuple[Tensors, Side]:
    """A decoder layer with two heads of 8 for q and one for k and v, and R.bin."""
    shapes = {"self_attn.q": (16, hidden), "self_attn.k": (8, hidden), "self_attn.v": (8, hidden)}
    shapes |= {"self_attn.o": (hidden, 16), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden)}
    shapes |= {"mlp.down": (hidden, inner)}
    t: Tensors = {"model.embed_tokens.weight": torch.randn(5, hidden), "lm_head.weight": torch.randn(5, hidden)}
    for i, (name, shape) in enumerate(shapes.items()):
        t[f"model.layers.0.{name}_proj.weight"] = torch.randn(*shape, generator=generator(i))
        if bias:
            t[f"model.layers.0.{name}_proj.bias"] = torch.randn(shape[0], generator=generator(20 + i))
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    t |= {f"{n}.weight": torch.rand(hidden, generator=generator(30 + i)) + 0.5 for i, n in enumerate(norms)}
    return t, {"R1": orthogonal(hidden, 1), "model.layers.0.self_attn.R2": orthogonal(8, 2)}


CONFIG = {"dtype": "float32", "model_type": "llama", "num_hidden_layers": 1}


def test_spinquant_layers_keep_their_meaning(tmp_path: Path) -> None:
    """On the reference: each layer gives what the plain one gives, v in the basis that o undoes, biases included."""
    tensors, side = llama()
    ckpt = open_checkpoint(folder_of(tmp_path / "c", tensors, {"R.bin": side}, CONFIG))
    assert ckpt.method == "spinquant" and not ckpt.excluded and not ckpt.summary()["files_not_read"]
    ops, r2 = qhal.select("cpu_reference"), side["model.layers.0.self_attn.R2"].double()
    for module in ckpt.modules():
        w, b = tensors[f"{module}.weight"].double(), tensors.get(f"{module}.bias")
        assert ckpt.form(module).layout.endswith(", bias") == (b is not None) == (not ckpt.compared(module))
        x = torch.randn(4, w.shape[1], generator=generator(7))
        given = x
        if module.endswith("o_proj"):
            given = (x.double().unflatten(1, (-1, 8)) @ r2).flatten(1).float()
        y = x.double() @ w.T + (0 if b is None else b.double())
        if module.endswith("v_proj"):
            y = (y.unflatten(1, (-1, 8)) @ r2).flatten(1)
        spec, layer = ckpt.spec(module), ckpt.load_linear(module, ops, dtype=torch.float32)
        n, k = w.shape
        size = given.double().abs() @ rotations.matrix(spec.rotate_in, k).abs() @ spec.stored().double().abs().T
        size = size @ rotations.matrix(spec.rotate_out, n).abs() + (0 if b is None else b.double().abs())
        bound = (2 * k + n + 8) * 2.0**-24 * size  # of float32 sums in any order
        assert bool(((layer(given).double() - y).abs() <= bound).all()), module


@pytest.mark.parametrize("n", [8, 12 * 4, 44 * 2])
def test_rows_are_transformed_as_the_matrix_does(n: int) -> None:
    w = torch.randn(3, n, dtype=torch.float64, generator=generator(n))
    h = hadamard_for(n, "spinquant")
    for turn in (h, h.inverse()):
        assert torch.allclose(transformed(w, turn), w @ turn.matrix(n), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, s: s.pop("R1"), r"R1: expected a float tensor \[\*, \*\], found NoneType"),
        (lambda t, s: s.update({"R1": s["R1"] * 1.01}), r"R1 times its transpose: expected the identity to"),
        (lambda t, s: s.update({"R1": orthogonal(8, 1)}), r"expected 8 features on the side that R1 turns, found 16"),
        (lambda t, s: s.update({"R1": s["R1"][:8]}), r"R1: expected a float tensor|features on the side"),
        (lambda t, s: s.pop("model.layers.0.self_attn.R2"), r"R2: expected a float tensor"),
        (lambda t, s: s.update({"model.layers.0.self_attn.R2": torch.ones(8, 8)}), r"R2 times its transpose"),
        (lambda t, s: s.update({"model.layers.0.self_attn.R2": orthogonal(3, 1)}), r"a size that divides the (8|16)"),
        (
            lambda t, s: s.update({"model.layers.9.self_attn.R2": torch.eye(8)}),
            r"layers.9.self_attn.R2: expected R1 and",
        ),
        (
            lambda t, s: t.update({"model.norm.weight": torch.zeros(16)}),
            r"norm.weight: expected finite scales that are not",
        ),
        (lambda t, s: t.pop("model.layers.0.input_layernorm.weight"), r"input_layernorm.weight is missing"),
        (lambda t, s: t.pop("model.norm.weight"), r"expected one final norm, which lm_head follows, found none"),
        (
            lambda t, s: t.update({"model.layers.0.mlp.gate.weight": torch.ones(4, 16)}),
            r"unsupported: .*mlp.gate: Spin",
        ),
        (
            lambda t, s: t.update({f"{DOWN}.weight": torch.full((16, 24), float("nan"))}),
            r"weight: expected finite values",
        ),
    ],
)
def test_mistakes_of_spinquant_files(tmp_path: Path, change: Callable[[Tensors, Side], object], match: str) -> None:
    tensors, side = llama()
    change(tensors, side)
    refused(folder_of(tmp_path / "c", tensors, {"R.bin": side}, CONFIG), match)


def test_spinquant_models_that_are_refused(tmp_path: Path) -> None:
    tensors, side = llama()
    gemma = CONFIG | {"model_type": "gemma2"}
    refused(folder_of(tmp_path / "gemma", tensors, {"R.bin": side}, gemma), r"norms multiply by 1 \+ weight")
    tensors, side = llama(inner=22)
    refused(folder_of(tmp_path / "c", tensors, {"R.bin": side}, CONFIG), r"unsupported: .*down_proj: SpinQuant has no")


# ---------------------------------------------------------------- transform_config


def test_hadamard_matrices_that_are_none(tmp_path: Path) -> None:
    """A stored matrix of a table order: any Hadamard matrix will do, another one would not keep the product."""
    apply = [{"targets": ["re:.*down_proj$"], "location": "input", "inverse": False, "ignore": []}]
    group = {"type": "random-hadamard", "apply": apply, "head_dim": 12, "randomize": False, "requires_grad": False}
    section = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R4": group}}}
    table = hadamard_for(12).matrix(12).T * 12**0.5
    for name, matrix in (("right", table.round()), ("wrong", table.round().abs())):
        tensors = {f"{DOWN}.weight": torch.ones(4, 24), f"{DOWN}.R4_input.weight": matrix.float().contiguous()}
        folder = folder_of(tmp_path / name, tensors, {}, CONFIG | {"quantization_config": section})
        if name == "right":
            assert open_checkpoint(folder).spec(DOWN).rotate_in[0].kind == ("dense", 12)
        else:
            refused(
                folder, r"R4_input.weight: expected a Hadamard matrix of order 12, found rows that are not orthogonal"
            )


# ---------------------------------------------------------------- written anew


def test_what_recognized_a_folder_is_not_written_again(tmp_path: Path) -> None:
    """Plain floats of a QuaRot and a SpinQuant folder open as plain floats, with the rotations multiplied in."""
    tensors, side = llama()
    spin = folder_of(tmp_path / "spin", tensors, {"R.bin": side}, CONFIG)
    quarot_folder = folder_of(tmp_path / "quarot", quarot()[0], {"quarot.json": WORDS | {"a_bits": 16}})
    for folder, module in ((spin, UP), (quarot_folder, DOWN)):
        out = tmp_path / f"{folder.name}_bf16"
        convert_checkpoint(folder, out, "bf16", lossy=True)
        ckpt = open_checkpoint(out)
        assert ckpt.method == ""
        assert torch.equal(ckpt.dequantize(module), open_checkpoint(folder).dequantize(module).bfloat16().float())
