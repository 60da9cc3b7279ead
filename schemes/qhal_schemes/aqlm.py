"""AQLM: every vector of a weight is a sum of entries of the module's codebooks, times a scale per row of vectors.

codes int8 or int16 [N/og, K/ig, C], codebooks [C, 2^b, og, ig], scales [N/og, 1, 1, 1], optional bias [N]:
W[og*i + a, ig*j + t] = scales[i] * sum over c of codebooks[c, codes[i, j, c], a, t], with og, ig, C and b of the
configuration for all modules. A code is stored modulo 2^b as a signed number of b bits: 63 of 6 bits is -1, in a
container of 8 bits (b up to 8) or 16 (b from 9 on, 15 among them). Source: V. Egiazarian et al., Extreme Compression of
Large Language Models via Additive Quantization (2024); compared with files of aqlm 1.1.7.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from qhal.codebooks import CodebookFormat, CodebookSegment, CodebookTensor, SegmentFormat
from qhal.errors import CheckpointError
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec
from qhal_schemes import checks
from qhal_schemes.base import CheckpointWarning, MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.indices import from_containers
from qhal_schemes.matching import PathPatterns
from qhal_schemes.modules import ModuleTable
from qhal_schemes.plain import BlockRules
from qhal_schemes.source import WIDE, TensorIndex

_PARTS = ("codes", "codebooks", "scales")
_KEYS = frozenset({
    "quant_method", "nbits_per_codebook", "num_codebooks", "in_group_size", "out_group_size",
    "linear_weights_not_to_quantize",
})  # fmt: skip
_AGREE = (
    *((("K", a), ("K", b)) for a, b in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj"))),
    *((("K", a), ("N", b)) for a, b in (("down_proj", "up_proj"), ("w2", "w3"))),
    (("K", "w3"), ("K", "w1")),
)
"""Sizes of neighbours that agree, as they share an input or follow each other: nothing in a module repeats its K."""


class AQLMMapping(SchemeMapping):
    """An AQLM checkpoint: one shape of codebooks for all modules."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        for key in (k for k in config.quantization if k not in _KEYS):
            text = f"{config.folder / config.file}: {key[:80]}: no key of AQLM that is known here; it is not looked at"
            warnings.warn(text, CheckpointWarning, stacklevel=2)
        self._bits = config.integer("nbits_per_codebook", range(1, 17), 16)
        self._books = config.integer("num_codebooks", default=1)
        self._vector = (config.integer("out_group_size", default=1), config.integer("in_group_size", default=8))
        table = ModuleTable(index)
        self._modules = table.having(_PARTS)
        if not self._modules:
            raise CheckpointError(f"{index.folder}: quant_method aqlm, but no module has codes and codebooks")
        self._check_columns(table)
        listed = config.names("linear_weights_not_to_quantize")
        skipped = PathPatterns("linear_weights_not_to_quantize", [n.removesuffix(".weight") for n in listed])
        self._excluded = BlockRules(config, self._modules, skipped).exclude(table.plain_linears())
        skipped.warn_unused(list(table), also=table)

    @property
    def modules(self) -> Sequence[str]:
        """Modules with codes."""
        return self._modules

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain modules: linear_weights_not_to_quantize, heads, routers, other towers."""
        return self._excluded

    def layout(self, module: str) -> str:
        """The container of its codes."""
        return "int8 codes" if self._bits <= 8 else "int16 codes"

    def tensors(self, module: str) -> Sequence[str]:
        """codes, codebooks, scales and a bias if there is one."""
        names = [f"{module}.{part}" for part in _PARTS]
        return [*names, f"{module}.bias"] if f"{module}.bias" in self.index else names

    def describe(self, module: str) -> LinearFormat:
        """The format, from shapes and dtypes alone."""
        (a, b), container = self._vector, "I8" if self._bits <= 8 else "I16"
        rows = self.index.expect(f"{module}.scales", tuple(WIDE), (None, 1, 1, 1)).shape[0]
        entry = self.index.expect(f"{module}.codes", (container,), (None, None, self._books))
        if entry.shape[0] != rows:
            turned = "; their first two axes are swapped, as aqlm leaves them after a forward on the CPU"
            raise self.index.bad(
                entry.name,
                f"{container} [{rows}, *, {self._books}], a row for each of the scales",
                f"{entry.dtype} {list(entry.shape)}{turned if entry.shape[1] == rows else ''}",
            )
        self.index.expect(f"{module}.codebooks", tuple(WIDE), (self._books, 1 << self._bits, a, b))
        n, k, bias = rows * a, entry.shape[1] * b, f"{module}.bias" in self.index
        if bias:
            self.index.expect(f"{module}.bias", tuple(WIDE), (n,))
        segment = SegmentFormat(k, self._vector, ((1 << self._bits, ""),) * self._books)
        return LinearFormat(module, n, k, CodebookFormat((segment,), scale=True), bias=bias)

    def read(self, module: str) -> LinearSpec:
        """Codes without their sign, checked against the size of a codebook."""
        f = self.describe(module)
        t = {part.rpartition(".")[2]: value for part, value in self.index.read_all(self.tensors(module)).items()}
        for part in ("codebooks", "bias"):
            if part in t:
                checks.finite(self.index, f"{module}.{part}", t[part])
        checks.scales(self.index, f"{module}.scales", t["scales"])
        entries = 1 << self._bits
        if self._bits < 8 * t["codes"].itemsize:
            checks.indices(self.index, f"{module}.codes", t["codes"], -entries // 2, entries - 1)
        codes = from_containers(t["codes"].flatten(1), self._bits).view(t["codes"].shape)
        segment = CodebookSegment(codes, tuple(t["codebooks"]))
        weight = CodebookTensor((f.n, f.k), (segment,), scale=t["scales"].reshape(-1))
        return LinearSpec(weight, bias=t["bias"].float() if f.bias else None, name=module)

    def _check_columns(self, table: ModuleTable) -> None:
        """Codes that were cut or padded along K show only beside the module's neighbours."""
        quantized = set(self._modules)
        for module in self._modules:
            head = module.rpartition(".")[0]
            for pair in _AGREE:
                one, other = (f"{head}.{leaf}" for _, leaf in pair)
                if module not in (one, other) or one not in table or other not in table or "cross" in head:
                    continue
                sizes = [self._size(m, axis, m in quantized) for m, (axis, _) in zip((one, other), pair, strict=True)]
                if None not in sizes and sizes[0] != sizes[1]:
                    raise CheckpointError(
                        f"{self.index.folder}: {pair[0][0]} of {one} is {sizes[0]} and {pair[1][0]} of {other} is "
                        f"{sizes[1]}: expected one size, as they are joined in the model"
                    )

    def _size(self, module: str, axis: str, quantized: bool) -> int | None:
        """K or N of a module by the shapes of its tensors; None where they have other shapes, which is said later."""
        entry = self.index.entries.get(f"{module}.{'codes' if quantized else 'weight'}")
        if entry is None or len(entry.shape) != 2 + quantized:
            return None
        n, k = entry.shape[:2]
        unit = self._vector if quantized else (1, 1)
        return n * unit[0] if axis == "N" else k * unit[1]


scheme = MappingScheme(
    AQLMMapping,
    Family(
        "AQLM",
        "aqlm 1.1.7",
        ("int8 codes", "int16 codes"),
        (
            "codes with their first two axes swapped, as aqlm leaves them after a forward on the CPU",
            "modules with codebooks of another shape than the configuration says",
        ),
    ),
)
