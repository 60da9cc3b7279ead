"""QuaRot: int4 weights in a rotated basis; down_proj turns its input by a Hadamard transform, all clip and quantize it.

<m>.weight uint8 [N, K/2], two int4 a byte with the even column in the low half, <m>.weight_scales [N, 1], optional
<m>.bias: W = code * scale, stored as W H^T. The layer computes Q(H x) W^T with H as QuaRot chooses it for K features,
Q symmetric per token with the scale clip * amax / 7.

QuaRot saves whole models with torch.save, which can run code and is never opened. Read are its tensors in safetensors
beside `quarot.json`: {w_bits 4, a_bits 4 | 8 | 16, a_sym true, a_clip_ratio, online_full_had, had_dim -1}, with K and
in_features of the rotated layers, if they are there, checked. Of QuaRot's two online transforms that of down_proj is
read; the one over heads of o_proj is refused, as this description has no word for it. Source: S. Ashkboos et al.,
QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (2024); compared with a layer of QuaRot 5008669.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qhal.errors import CheckpointError, FormatError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.rotations import Hadamard, hadamard_for
from qhal.specs import LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.base import MappingScheme, SchemeMapping
from qhal_schemes.claims import Claimed
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.matching import PathPatterns
from qhal_schemes.modules import ModuleTable
from qhal_schemes.packing import unpack_int4
from qhal_schemes.plain import ELEMENT_OF, BlockRules
from qhal_schemes.source import WIDE, TensorIndex
from qhal_schemes.strict_json import load_json

_KEYS = frozenset({
    "quant_method", "w_bits", "a_bits", "a_sym", "a_clip_ratio", "online_full_had", "had_dim", "K", "in_features",
})  # fmt: skip


def claim(files: Sequence[Path], model: Mapping[str, Any]) -> Claimed:
    """quarot.json."""
    return Claimed("quarot", load_json(files[0]), files[0].name, None if model else {})


class QuaRotMapping(SchemeMapping):
    """Linear4bit layers of QuaRot."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        section = config.quantization
        unknown = sorted(set(section) - _KEYS)
        if unknown:
            raise config.bad(unknown[0], "no such key: its meaning for the tensors is not known", "it")
        config.integer("w_bits", (4,))
        self._bits = config.integer("a_bits", (4, 8, 16))
        if not config.boolean("a_sym", True):
            raise CheckpointError(f"unsupported: {config.bad('a_sym', 'true, the only form compared', False)}")
        clip = section.get("a_clip_ratio", 1.0)
        if type(clip) not in (int, float) or not 0 < clip <= 1:
            raise config.bad("a_clip_ratio", "a ratio above 0 and at most 1", clip)
        self._clip = float(clip)
        self._rotated = config.boolean("online_full_had", False)
        if section.get("had_dim", -1) != -1:
            raise CheckpointError(f"unsupported: {config.bad('had_dim', '-1, the whole input', section['had_dim'])}")
        table = ModuleTable(index)
        self._modules = table.having(("weight_scales",))
        if not self._modules:
            raise CheckpointError(f"{index.folder}: quarot.json is there, but no module has weight_scales")
        heads = next((m for m in self._modules if self._rotated and m.rpartition(".")[2] == "o_proj"), None)
        if heads is not None:
            raise CheckpointError(
                f"unsupported: {index.folder}: {heads}: o_proj of QuaRot has a Hadamard transform over heads, which "
                "quarot.json does not describe; leave it plain"
            )
        rules = BlockRules(config, self._modules, PathPatterns("quarot.json", ()))
        self._excluded = rules.exclude(table.plain_linears())

    @property
    def modules(self) -> Sequence[str]:
        """Modules with weight_scales."""
        return self._modules

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain modules outside the quantized blocks."""
        return self._excluded

    def layout(self, module: str) -> str:
        """Always int4 with a scale per row."""
        return "weight_scales"

    def tensors(self, module: str) -> Sequence[str]:
        """weight, weight_scales and a bias if there is one."""
        names = [f"{module}.weight", f"{module}.weight_scales"]
        return [*names, f"{module}.bias"] if f"{module}.bias" in self.index else names

    def describe(self, module: str) -> LinearFormat:
        """The format, from shapes and dtypes alone."""
        n, half = self.index.expect(f"{module}.weight", ("U8",), (None, None)).shape
        scale = self.index.expect(f"{module}.weight_scales", tuple(WIDE), (n, 1))
        bias = f"{module}.bias" in self.index
        if bias:
            self.index.expect(f"{module}.bias", tuple(WIDE), (n,))
        return LinearFormat(
            name=module,
            n=n,
            k=half * 2,
            weight=Format.parse(f"int4.row*{ELEMENT_OF[scale.dtype]}"),
            input=None if self._bits == 16 else Format.parse(f"int{self._bits}.row*fp32"),
            clip=self._bits != 16 and self._clip != 1.0,
            rotate_in=tuple(r.kind for r in self._rotation(module, half * 2)),
            bias=bias,
        )

    def read(self, module: str) -> LinearSpec:
        """Codes and scales."""
        f = self.describe(module)
        assert isinstance(f.weight, Format)
        t = self.index.read_all(self.tensors(module))
        checks.scales(self.index, f"{module}.weight_scales", t[f"{module}.weight_scales"], positive=True)
        bias = t.get(f"{module}.bias")
        if bias is not None:
            checks.finite(self.index, f"{module}.bias", bias)
        return LinearSpec(
            QTensor(f.weight, unpack_int4(t[f"{module}.weight"], 1), t[f"{module}.weight_scales"]),
            input=None if f.input is None else Operand(f.input, clip=(self._clip, self._clip)),
            rotate_in=self._rotation(module, f.k),
            bias=None if bias is None else bias.float(),
            name=module,
        )

    def _rotation(self, module: str, k: int) -> tuple[Hadamard, ...]:
        """H of down_proj's input; its order and size are those of quarot.json, where it names them."""
        if not self._rotated or module.rpartition(".")[2] != "down_proj":
            return ()
        try:
            found = hadamard_for(k, "quarot")
        except FormatError as unknown:
            raise CheckpointError(f"unsupported: {self.index.folder}: {module}: {unknown}") from None
        for key, value in (("K", found.k), ("in_features", k)):
            if self.config.quantization.get(key, value) != value:
                raise self.config.bad(key, f"{value}, by the shape of {module}", self.config.quantization[key])
        return (found,)


scheme = MappingScheme(
    QuaRotMapping,
    Family(
        "QuaRot",
        "QuaRot 5008669, its tensors in safetensors",
        ("weight_scales",),
        (
            "whole models of torch.save, which can run code",
            "the transform over heads of o_proj",
            "asymmetric inputs, transforms of a part of the input",
        ),
    ),
)
