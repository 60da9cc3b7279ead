"""SpinQuant: a float checkpoint with rotations beside it in R.bin; its linears are read as SpinQuant rotates them.

R.bin is a dictionary of torch.save: R1 [d, d] for the residual stream, model.layers.<i>.self_attn.R2 [h, h] for the
heads of v; R4 is SpinQuant's Hadamard transform of down_proj's input and is stored nowhere. With g the weight of the
norm that a linear follows, blk(R2) a block for each head, and x, y row vectors:

    q, k, gate, up, lm_head   stored W diag(g) R1,                 read x / g R1
    v                         stored blk(R2)^T W diag(g) R1,       the same input; its output stays turned by R2
    o                         stored R1^T W blk(R2),               gives y R1^T
    down                      stored R1^T W H^T,                   reads x H^T (that is, H x), gives y R1^T

SpinQuant itself turns embeddings and norms too, so that R1 costs nothing at run time; here each linear turns its own
input or output, because a reader of linears cannot change the rest of a model: every layer keeps its meaning, weights
have the rotated values that are easy to quantize, and an engine that turns the residual stream may drop both R1 and 1/g
from all chains. SpinQuant also subtracts the mean of every embedding row, which changes a model with RMSNorm: not done.

Weights are rotated in float64 and rounded once to the dtype of the file. Source: Z. Liu et al., SpinQuant: LLM
Quantization with Learned Rotations (2024); compared with SpinQuant 8f47aa3 on a Llama model. Biases are turned like the
rows of their weights, which was not compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhal.errors import CheckpointError, FormatError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.rotations import Dense, Diagonal, Hadamard, Rotation, hadamard_for, hadamard_table
from qhal.specs import LinearSpec
from qhal_schemes import checks
from qhal_schemes.base import MappingScheme, SchemeMapping
from qhal_schemes.claims import Claimed
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family, variants
from qhal_schemes.modules import ModuleTable
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.side_files import check_orthogonal, load_pickle, matrix, without
from qhal_schemes.source import WIDE, TensorIndex

_FILE = "R.bin"
_LINEAR = re.compile(r"((.*?)layers\.(\d+)\.)(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj$")
_NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}


def claim(files: Sequence[Path], model: Mapping[str, Any]) -> Claimed:
    """R.bin beside a float checkpoint."""
    return Claimed("spinquant", {}, files[0].name)


@dataclass(frozen=True)
class _Place:
    """A linear by its role (q, k, v, o, gate, up, down, head): the norm it follows ("" for none), and its R2 ("")."""

    role: str
    norm: str
    r2: str


class SpinQuantMapping(SchemeMapping):
    """A Llama-like float checkpoint with R.bin."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        index = without(index, _FILE)
        super().__init__(config, index)
        if "gemma" in str(config.value("model_type", "")):  # their norms multiply by 1 + weight
            raise CheckpointError(
                f"unsupported: {config.folder}: SpinQuant with a model whose norms multiply by 1 + weight; "
                "norms as Llama's can be read"
            )
        self._path = config.folder / _FILE
        self._rotations = load_pickle(config.folder, _FILE)
        self._checked: dict[str, Tensor] = {}
        self._hidden = matrix(self._path, "R1", self._rotations.get("R1"), (None, None)).shape[0]
        self._modules = {m: self._place(m) for m in ModuleTable(index).plain_linears()}
        if not any(p.role != "head" for p in self._modules.values()):
            raise CheckpointError(f"{config.folder}: {_FILE} is there, but no linear of a decoder layer")
        known = {"R1", *(p.r2 for p in self._modules.values())}
        unknown = sorted(str(key)[:80] for key in self._rotations if key not in known)
        if unknown:
            raise CheckpointError(f"{self._path}: {unknown[0]}: expected R1 and an R2 for each layer of the model")

    @property
    def modules(self) -> Sequence[str]:
        """Every linear of decoder layers, and the head."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """None: what SpinQuant does not rotate is refused."""
        return {}

    def layout(self, module: str) -> str:
        """The rotations that its weight takes, and whether it has a bias."""
        place = self._modules[module]
        name = "R1 and R4" if place.role == "down" else "R1 and R2" if place.r2 else "R1"
        return f"{name}, bias" if f"{module}.bias" in self.index else name

    def tensors(self, module: str) -> Sequence[str]:
        """weight and bias; the norm that it follows stays a tensor of the model."""
        names = [f"{module}.weight"]
        return [*names, f"{module}.bias"] if f"{module}.bias" in self.index else names

    def describe(self, module: str) -> LinearFormat:
        """The format, from shapes and dtypes, and the size of R1."""
        place, bias = self._modules[module], f"{module}.bias" in self.index
        weight = self.index.expect(f"{module}.weight", tuple(WIDE), (None, None))
        n, k = weight.shape
        residual = n if place.role in ("o", "down") else k
        if residual != self._hidden:
            raise self.index.bad(weight.name, f"{self._hidden} features on the side that R1 turns", f"{residual}")
        if bias:
            self.index.expect(f"{module}.bias", tuple(WIDE), (n,))
        if place.norm:
            self.index.expect(place.norm, tuple(WIDE), (k,))
        dense = ("dense", self._hidden)
        before: tuple[tuple[object, ...], ...] = (("diagonal", k), dense) if place.norm else ()
        if place.role == "down":
            before = (self._hadamard(module, k).kind,)
        return LinearFormat(
            name=module,
            n=n,
            k=k,
            weight=Format(ELEMENT_OF[weight.dtype]),
            rotate_in=before,
            rotate_out=(dense,) if place.role in ("o", "down") else (),
            bias=bias,
        )

    def read(self, module: str) -> LinearSpec:
        """Rotate the weight."""
        f, place = self.describe(module), self._modules[module]
        names = [*self.tensors(module), *([place.norm] if place.norm else [])]
        t = self.index.read_all(names)
        for name in names:
            checks.finite(self.index, name, t[name])
        stored = t[f"{module}.weight"]
        w, bias = stored.double(), t[f"{module}.bias"].double() if f.bias else None
        r1 = self._orthogonal("R1", self._hidden)
        before: tuple[Rotation, ...] = ()
        after: tuple[Rotation, ...] = ()
        if place.norm:
            gain = t[place.norm].float()
            checks.scales(self.index, place.norm, gain)
            w = w * gain.double() @ r1.double()
            before = (Diagonal(1 / gain), Dense(r1))
        else:
            w, after = r1.double().t() @ w, (Dense(r1.t().contiguous()),)
        if place.role == "down":
            h = self._hadamard(module, f.k)
            w, before = transformed(w, h), (h,)
        if place.r2:
            w, bias = self._heads(module, place, w, bias)
        weight = w.to(stored.dtype).contiguous()
        bias = None if bias is None else bias.float()
        return LinearSpec(weight, rotate_in=before, rotate_out=after, bias=bias, name=module)

    def _place(self, module: str) -> _Place:
        found = _LINEAR.match(module)
        if found is None:
            if module.rpartition(".")[2] == "lm_head":
                return _Place("head", self._final_norm(), "")
            raise CheckpointError(
                f"unsupported: {self.index.folder}: {module}: SpinQuant rotates q, k, v, o, gate, up and down "
                "projections of Llama's layers and lm_head; of other linears it does not say what they become"
            )
        layer, _, number, block, role = found.groups()
        norm = "" if role in ("o", "down") else f"{layer}{_NORMS[block]}.weight"
        r2 = f"model.layers.{number}.self_attn.R2" if role in ("v", "o") else ""
        return _Place(role, norm, r2)

    def _final_norm(self) -> str:
        found = [n for n in self.index if f".{n}".endswith(".norm.weight") and "layers." not in n]
        if len(found) != 1:
            names = ", ".join(found) or "none"
            raise CheckpointError(f"{self.index.folder}: expected one final norm, which lm_head follows, found {names}")
        return found[0]

    def _orthogonal(self, name: str, size: int) -> Tensor:
        """A rotation of R.bin, checked: R R^T is the identity to n eps of its own dtype."""
        if name not in self._checked:
            r = matrix(self._path, name, self._rotations.get(name), (size, size))
            check_orthogonal(self._path, name, r)
            self._checked[name] = r.float()
        return self._checked[name]

    def _heads(self, module: str, place: _Place, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Turn the rows of v, or the columns of o, head by head."""
        size = matrix(self._path, place.r2, self._rotations.get(place.r2), (None, None)).shape[0]
        axis = w.shape[0] if place.role == "v" else w.shape[1]
        if size < 1 or axis % size:
            raise CheckpointError(
                f"{self._path}: {place.r2}: expected a size that divides the {axis} of {module}, found {size}"
            )
        r2 = self._orthogonal(place.r2, size).double()
        if place.role == "o":
            return (w.unflatten(1, (-1, size)) @ r2).flatten(1), bias
        w = (r2.t() @ w.unflatten(0, (-1, size))).flatten(0, 1)
        return w, None if bias is None else (bias.unflatten(0, (-1, size)) @ r2).flatten()

    def _hadamard(self, module: str, k: int) -> Hadamard:
        try:
            return hadamard_for(k, "spinquant")
        except FormatError as unknown:
            raise CheckpointError(f"unsupported: {self.index.folder}: {module}: {unknown}") from None


def transformed(w: Tensor, h: Hadamard) -> Tensor:
    """float64 [N, K]: every row of `w` through the transform, K log K steps instead of a [K, K] matrix."""
    n, k = w.shape
    x = w.double().reshape(n * h.k, k // h.k)
    step = 1
    while step < x.shape[1]:
        a, b = x.unflatten(1, (-1, 2, step)).unbind(2)
        x = torch.stack([a + b, a - b], 2).flatten(1)
        step *= 2
    x = x.reshape(n, h.k, k // h.k)
    if h.k > 1:
        table = hadamard_table(h.table, h.k).double()
        x = (table.t() if h.transpose else table) @ x
    return x.reshape(n, k) / math.sqrt(k)


scheme = MappingScheme(
    SpinQuantMapping,
    Family(
        "SpinQuant",
        "SpinQuant 8f47aa3: R.bin beside a float checkpoint",
        tuple(layout for name in ("R1", "R1 and R2", "R1 and R4") for layout in variants(name, "bias")),
        (
            "norms that multiply by 1 + weight",
            "linears of other names than Llama's",
            "sizes for which SpinQuant has no Hadamard table",
        ),
    ),
)
