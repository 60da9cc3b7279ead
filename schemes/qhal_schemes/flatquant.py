"""FlatQuant: int4 weights behind learned Kronecker transforms of the input, which is quantized per token and clipped.

quantization_config.json says `packed_int4`. Of a linear <m> of a decoder layer the file holds
    <m>.linear.weight uint8 [N, K/2]             two int4 a byte, the even column in the low half
    quantizer.<m>.linear.{scale, zero, maxq}     W = code * scale [N, 1]; zero 0, maxq 7
    <m>.act_quantizer.clip_factor_a_{max,min}    logits c: the input's range is cut to sigmoid(c) of itself on each side
    <t>.matrix_left [l, l], <t>.matrix_right [r, r]   x' = left^T X right with x viewed [l, r]; `o_trans` is left alone
and <t>.matrix_{left,right}_inv, the transposed inverses, which the weight has taken; <t>.diag_scale, which the norm or
up_proj before has taken; clip_factor_w, which the codes have taken. Those are checked and dropped. Here all of them are
float16; flat_matrices.pth, where it is there, has them in float32 ({layer: {name: tensor}}), and its numbers are used.

The files do not say with how many bits inputs are quantized: 4, as the method does, unless quantization_config.json has
`a_bits`. Source: Y. Sun et al., FlatQuant: Flatness Matters for LLM Quantization (2024), and files of FlatQuant
9d88ffc, with whose MLP this was compared; attention (ln_trans, o_trans, vcache_trans folded into v and o) is from its
description, not compared; that vcache_trans is folded, not applied by itself, is FlatQuant's default and said nowhere.
Rotated caches are refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.rotations import Kronecker
from qhal.specs import LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.base import CheckpointWarning, MappingScheme, SchemeMapping
from qhal_schemes.claims import Claimed
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family, variants
from qhal_schemes.matching import PathPatterns
from qhal_schemes.modules import ModuleTable
from qhal_schemes.packing import unpack_int4
from qhal_schemes.plain import BlockRules
from qhal_schemes.side_files import check_inverse, load_pickle, matrix, without
from qhal_schemes.source import WIDE, TensorIndex
from qhal_schemes.strict_json import is_file, load_json

_SETTINGS, _MATRICES = "quantization_config.json", "flat_matrices.pth"
_KEYS = frozenset({"w_bits", "a_bits", "model_name", "symmetric", "format", "sharded", "quant_method"})
_SUFFIX = ".linear.weight"
_TRANSFORMS = {
    "self_attn.q_proj": "self_attn.ln_trans",
    "self_attn.k_proj": "self_attn.ln_trans",
    "self_attn.v_proj": "self_attn.ln_trans",
    "self_attn.o_proj": "self_attn.o_trans",
    "mlp.gate_proj": "mlp.up_gate_trans",
    "mlp.up_proj": "mlp.up_gate_trans",
    "mlp.down_proj": "mlp.down_trans",
}
"""Linear of a decoder layer -> the transform of its input."""
_CACHE = re.compile(r"(.*\.)?self_attn\.(kcache_trans|[qkv]_cache_quantizer)\.")
_FOLDED = "self_attn.vcache_trans"
_LAYER = re.compile(r"(.*\blayers\.(\d+)\.)?(.*)$")
_WEIGHT = Format.parse("int4.row*fp32")
_ROUNDED = f"without {_MATRICES}"


def claim(files: Sequence[Path], model: Mapping[str, Any]) -> Claimed | None:
    """quantization_config.json with the format packed_int4; flat_matrices.pth alone is refused with the reason."""
    settings = files[0].parent / _SETTINGS
    if not is_file(settings):
        raise CheckpointError(
            f"unsupported: {files[0]}: matrices of FlatQuant without {_SETTINGS}: the weights beside them are neither "
            "transformed nor quantized; save them with FlatQuant's save_quantized_weights_with_safetensors"
        )
    section = load_json(settings)
    if section.get("format") != "packed_int4" and files[0].name == _SETTINGS:
        return None
    return Claimed("flatquant", section, _SETTINGS, None if model else {"dtype": "float16"})


@dataclass(frozen=True)
class _Linear:
    """Where one module's transform and layer are: layer prefix in the file, key in flat_matrices.pth, short names."""

    prefix: str
    layer: int
    name: str
    transform: str


class FlatQuantMapping(SchemeMapping):
    """A FlatQuant checkpoint."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        index = without(index, _MATRICES)
        super().__init__(config, index)
        for key in (k for k in config.quantization if k not in _KEYS):
            text = f"{config.folder / config.file}: {key[:80]}: no key of FlatQuant that is known here"
            warnings.warn(f"{text}; it is not looked at", CheckpointWarning, stacklevel=2)
        config.integer("w_bits", (4,))
        if config.quantization.get("format") != "packed_int4":
            raise config.bad("format", "packed_int4", config.quantization.get("format"))
        if not config.boolean("symmetric", True):
            raise CheckpointError(f"unsupported: {config.bad('symmetric', 'true, the only form compared', False)}")
        self._bits = config.integer("a_bits", (4, 8, 16), 4)
        if "a_bits" not in config.quantization:
            warnings.warn(
                f"{config.folder / config.file}: does not say with how many bits inputs are quantized; 4 is assumed, "
                'set "a_bits" if it is another number',
                CheckpointWarning,
                stacklevel=2,
            )
        cached = next((n for n in index if _CACHE.match(n)), None)
        if cached is not None:
            raise CheckpointError(
                f"unsupported: {index.folder}: {cached}: a rotated or quantized cache of FlatQuant; linears can be "
                "read, from files saved with q_bits, k_bits and v_bits 16"
            )
        self._side = load_pickle(config.folder, _MATRICES) if is_file(config.folder / _MATRICES) else None
        self._modules = {n.removesuffix(_SUFFIX): self._place(n) for n in index if n.endswith(_SUFFIX)}
        if not self._modules:
            raise CheckpointError(f"{index.folder}: {_SETTINGS} says packed_int4, but no module has a linear.weight")
        rules = BlockRules(config, self._modules, PathPatterns(_SETTINGS, ()))
        self._excluded = rules.exclude(ModuleTable(index).plain_linears())

    @property
    def modules(self) -> Sequence[str]:
        """Linears of decoder layers, without the `.linear` of their names in the file."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain modules: heads, other towers."""
        return self._excluded

    def layout(self, module: str) -> str:
        """The transform of its input, and whether its matrices are the rounded ones of the weight files."""
        name = self._modules[module].transform.rpartition(".")[2]
        return name if self._side is not None else f"{name}, {_ROUNDED}"

    def tensors(self, module: str) -> Sequence[str]:
        """Codes, scales, clips, the transform with its inverse and diagonal, and a bias, where the file has them."""
        m = self._modules[module]
        own = [f"{module}{_SUFFIX}", f"{module}.linear.bias"]
        own += [f"quantizer.{module}.linear.{part}" for part in ("scale", "zero", "maxq")]
        own += [f"{module}.clip_factor_w_{side}" for side in ("max", "min")]
        own += [f"{module}.act_quantizer.clip_factor_a_{side}" for side in ("max", "min")]
        stems = [m.transform] + [_FOLDED] * (m.name in ("self_attn.v_proj", "self_attn.o_proj"))
        ends = [f"matrix{side}{inv}" for side in ("", "_left", "_right") for inv in ("", "_inv")]
        parts = [f"{stem}.{end}" for stem in stems for end in (*ends, "diag_scale")]
        return [n for n in (*own, *(m.prefix + p for p in parts)) if n in self.index]

    def describe(self, module: str) -> LinearFormat:
        """The format, from shapes and dtypes, and the sizes of the matrices in flat_matrices.pth."""
        n, half = self.index.expect(f"{module}{_SUFFIX}", ("U8",), (None, None)).shape
        k, q = half * 2, f"quantizer.{module}.linear"
        self.index.expect(f"{q}.scale", ("F32",), (n, 1))
        self.index.expect(f"{q}.zero", ("F32",), (n, 1))
        self.index.expect(f"{q}.maxq", ("I64",), ())
        if f"{module}.linear.bias" in self.index:
            self.index.expect(f"{module}.linear.bias", tuple(WIDE), (n,))
        left, *right = self._sizes(module, k)
        return LinearFormat(
            name=module,
            n=n,
            k=k,
            weight=_WEIGHT,
            input=self._input(),
            clip=self._bits != 16 and bool(self._clips(module)),
            rotate_in=(("kronecker", left, right[0] if right else 0),),
            bias=f"{module}.linear.bias" in self.index,
        )

    def read(self, module: str) -> LinearSpec:
        """Codes and scales; the matrices are checked against their inverses and against the copies in the file."""
        f = self.describe(module)
        t = self.index.read_all(self.tensors(module))
        q = f"quantizer.{module}.linear"
        checks.scales(self.index, f"{q}.scale", t[f"{q}.scale"], positive=True)
        if bool((t[f"{q}.zero"] != 0).any()) or int(t[f"{q}.maxq"]) != 7:
            raise self.index.bad(f"{q}.zero", "0 and maxq 7, as symmetric is true", f"maxq {int(t[f'{q}.maxq'])}")
        self._check_copies(module, t)
        left, right = self._matrices(module)
        bias = t.get(f"{module}.linear.bias")
        if bias is not None:
            checks.finite(self.index, f"{module}.linear.bias", bias)
        return LinearSpec(
            QTensor(_WEIGHT, unpack_int4(t[f"{module}{_SUFFIX}"], 1), t[f"{q}.scale"]),
            input=None if f.input is None else Operand(f.input, clip=self._clip(module)),
            rotate_in=(Kronecker(left, right),),
            bias=None if bias is None else bias.float(),
            name=module,
        )

    # ---------------------------------------------------------------- parts

    def _place(self, name: str) -> _Linear:
        found = _LAYER.match(name.removesuffix(_SUFFIX))
        assert found is not None  # every part may be empty
        prefix, layer, rest = found[1] or "", int(found[2] or 0), found[3]
        if rest not in _TRANSFORMS:
            raise CheckpointError(
                f"{self.index.folder}: {name}: expected one of {', '.join(_TRANSFORMS)} of a decoder layer, whose "
                f"transforms have known names, found {rest[:200]}"
            )
        return _Linear(prefix, layer, rest, _TRANSFORMS[rest])

    def _value(self, m: _Linear, name: str, shape: tuple[int | None, ...]) -> tuple[Tensor, Path]:
        """A tensor of the transform or a clip, from flat_matrices.pth or else from the weight files, and its file."""
        if self._side is None:
            entry = self.index.expect(m.prefix + name, tuple(WIDE), shape)
            path = self.index.folder / entry.file
            return matrix(path, entry.name, self.index.read(entry.name), shape), path
        path = self.config.folder / _MATRICES
        layer = self._side.get(m.layer)
        if not isinstance(layer, Mapping) or name not in layer:
            raise CheckpointError(f"{path}: expected {name} of layer {m.layer}, found none")
        return matrix(path, f"layer {m.layer}: {name}", layer[name], shape), path

    def _names(self, m: _Linear) -> list[str]:
        """The matrices of a module's transform; heads alone are turned before o."""
        sides = ("",) if m.transform.endswith("o_trans") else ("_left", "_right")
        return [f"{m.transform}.matrix{side}" for side in sides]

    def _sizes(self, module: str, k: int) -> list[int]:
        """Sizes of the matrices, which make the K features of the input (the heads divide them)."""
        m, sizes = self._modules[module], []
        for name in self._names(m):
            if self._side is None:
                shape = self.index.expect(m.prefix + name, tuple(WIDE), (None, None)).shape
            else:
                shape = tuple(self._value(m, name, (None, None))[0].shape)
            if shape[0] != shape[1] or shape[0] < 1:
                raise CheckpointError(
                    f"{self.index.folder}: {m.prefix}{name}: expected a square matrix, found {list(shape)}"
                )
            sizes.append(shape[0])
        if k % prod(sizes) or (len(sizes) == 2 and prod(sizes) != k):
            raise CheckpointError(
                f"{self.index.folder}: {module}: {m.transform} has the sizes {' x '.join(map(str, sizes))}, expected "
                f"the {k} columns of the weight"
            )
        return sizes

    def _matrices(self, module: str) -> tuple[Tensor, Tensor | None]:
        """The factors of the input's transform, each checked against the transposed inverse beside it."""
        m, found = self._modules[module], []
        for name in self._names(m):
            value, path = self._value(m, name, (None, None))
            inverse, _ = self._value(m, f"{name}_inv", tuple(value.shape))
            check_inverse(path, name, value, inverse.t())
            found.append(value)
        return found[0], found[1] if len(found) == 2 else None

    def _input(self) -> Format | None:
        return None if self._bits == 16 else Format.parse(f"int{self._bits}.row*fp32")

    def _clip(self, module: str) -> tuple[float, float]:
        """(low, high): the fractions of a token's range that are kept; all of it where nothing was learned."""
        m = self._modules[module]
        names = self._clips(module)
        if not names:
            return 1.0, 1.0
        low, high = (float(torch.sigmoid(self._value(m, n, (1,))[0].float())) for n in names)
        return low, high

    def _clips(self, module: str) -> list[str]:
        """The names of both clips (min, max) where at least one was learned."""
        m = self._modules[module]
        names = [f"{m.name}.act_quantizer.clip_factor_a_{side}" for side in ("min", "max")]
        layer = None if self._side is None else self._side.get(m.layer)
        known = layer if isinstance(layer, Mapping) else {n for n in names if m.prefix + n in self.index}
        return names if any(n in known for n in names) else []

    def _check_copies(self, module: str, t: Mapping[str, Tensor]) -> None:
        """Tensors that both files hold are the same numbers, once rounded to the narrower type."""
        m = self._modules[module]
        layer = {} if self._side is None else self._side.get(m.layer)
        for name, value in t.items():
            other = layer.get(name.removeprefix(m.prefix)) if isinstance(layer, Mapping) else None
            if value.is_floating_point() and value.dtype.itemsize > 1:
                checks.finite(self.index, name, value)
            if isinstance(other, Tensor) and not torch.equal(other.to(value.dtype), value):
                raise self.index.bad(name, f"the numbers of layer {m.layer} in {_MATRICES}", "others")


scheme = MappingScheme(
    FlatQuantMapping,
    Family(
        "FlatQuant",
        "FlatQuant 9d88ffc",
        tuple(
            layout
            for name in dict.fromkeys(t.rpartition(".")[2] for t in _TRANSFORMS.values())
            for layout in variants(name, _ROUNDED)
        ),
        (
            "rotated or quantized caches and queries",
            "asymmetric weights, and widths other than 4 bits",
            "flat_matrices.pth beside weights that are neither transformed nor quantized",
        ),
    ),
)
