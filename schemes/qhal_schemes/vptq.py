"""VPTQ: vectors along the output axis, from codebooks per group of columns, and a codebook of their own for outliers.

W[v*n + t, j] = centroids[g][index[n, j], t] (+ res_centroids[g][res_index[n, j], t]), cut to N rows. Stored columns:
outliers first, then group by group; stored column j is input perm[j]. Then W * weight_scale + weight_bias per input
column. Tensors of one module, G groups of s columns, R = ceil(N / v) rows of vectors:

    centroids.weight [G, V*v], res_centroids.weight [G, V2*v]
    indices            int32 [G, R, ceil(s*(b+b2)/32)]: a bit stream of b bits of index, then b2 of residual index
                       or (not packed) int16 [G, R, s], uint16 bits, with res_indices of the same shape
    outlier_centroids.weight [1, V0*v0], outlier_indices int16 [1, ceil(N/v0), outliers], uint16 bits
    perm               int16 (uint16 bits; int64 if not packed) [K], weight_scale, weight_bias [K], bias [N]

The sizes of a module are in config_for_layers by its name, or in shared_layer_config by the last part of its name.
Source: Y. Liu et al., VPTQ: Extreme Low-bit Vector Post-Training Quantization (2024); compared with modules of vptq
0.0.5. Residuals that are not packed, int64 permutations and indices_as_float are from its description, not compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qhal.codebooks import CodebookFormat, CodebookSegment, CodebookTensor, SegmentFormat
from qhal.errors import CheckpointError
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec
from qhal_schemes import checks
from qhal_schemes.base import CheckpointWarning, MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family, variants
from qhal_schemes.indices import from_containers, from_stream
from qhal_schemes.lanes import interleave
from qhal_schemes.matching import SkipPatterns
from qhal_schemes.modules import ModuleTable
from qhal_schemes.packing import words
from qhal_schemes.plain import BlockRules
from qhal_schemes.source import WIDE, TensorIndex
from qhal_schemes.vptq_config import Layer, layer_of

_LEAVES = ("indices", "res_indices", "outlier_indices", "perm")
_TABLES = ("centroids", "res_centroids", "outlier_centroids")
_TABLE_ENDS = tuple(f".{table}" for table in _TABLES)
_KEYS = frozenset({
    "quant_method", "config_for_layers", "shared_layer_config", "modules_to_not_convert", "enable_proxy_error",
})  # fmt: skip


class VPTQMapping(SchemeMapping):
    """A VPTQ checkpoint: sizes by module."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        for key in (k for k in config.quantization if k not in _KEYS):
            text = f"{config.folder / config.file}: {key[:80]}: no key of VPTQ that is known here; it is not looked at"
            warnings.warn(text, CheckpointWarning, stacklevel=2)
        table = ModuleTable(index)
        owners = [m.rpartition(".")[0] for m in table if m.endswith(_TABLE_ENDS)]
        found = dict.fromkeys([*owners, *table.having(_LEAVES)])
        self._modules = {m: layer_of(config, m) for m in found}
        if not self._modules:
            raise CheckpointError(f"{index.folder}: quant_method vptq, but no module has indices")
        named = config.quantization.get("config_for_layers") or {}
        absent = next((m for m in named if m not in self._modules), None)
        if absent is not None:
            raise CheckpointError(
                f"{index.folder}: {absent} is in config_for_layers, but the file has no {absent}.indices"
            )
        skipped = SkipPatterns("modules_to_not_convert", config.names("modules_to_not_convert"))
        tables = {f"{m}.{t}" for m in self._modules for t in _TABLES}
        plain = [m for m in table.plain_linears() if m not in tables]
        self._excluded = BlockRules(config, self._modules, skipped).exclude(plain)
        skipped.warn_unused(list(table), also=table)

    @property
    def modules(self) -> Sequence[str]:
        """Modules with indices."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain modules: modules_to_not_convert, heads, routers, other towers."""
        return self._excluded

    def layout(self, module: str) -> str:
        """How indices, and the permutation beside plain ones, are stored."""
        s = self._modules[module]
        traits = ["indices as float"] * s.floats
        if not s.packed:
            wide = s.perm and self.index.expect(f"{module}.perm", ("I64", "I16"), (s.k,)).dtype == "I64"
            traits = ["residuals"] * bool(s.residual) + ["int64 permutation"] * wide + traits
        return ", ".join(["packed" if s.packed else "not packed", *traits])

    def tensors(self, module: str) -> Sequence[str]:
        """Codebooks, indices, permutation, norm and bias, as the configuration says."""
        return [name for name, _, _ in self._expected(module)]

    def describe(self, module: str) -> LinearFormat:
        """The format, from the configuration; every tensor has the shape and dtype that it says."""
        s = self._modules[module]
        for name, dtypes, shape in self._expected(module):
            self.index.expect(name, dtypes, shape)
        main = [(s.centroids, "")] + [(s.residual, "")] * (s.residual > 0)
        segments = [SegmentFormat(s.group_size, (s.vector, 1), tuple(main))] * s.groups
        if s.outliers:
            segments.insert(0, SegmentFormat(s.outliers, (s.outlier_vector, 1), ((s.outlier_centroids, ""),)))
        fmt = CodebookFormat(tuple(segments), False, s.perm, s.norm, s.norm)
        return LinearFormat(module, s.n, s.k, fmt, bias=s.bias)

    def read(self, module: str) -> LinearSpec:
        """Unpack the bit stream; every index is checked against its codebook, the permutation against its columns."""
        f, s = self.describe(module), self._modules[module]
        t = {n.removeprefix(f"{module}."): v for n, v in self.index.read_all(self.tensors(module)).items()}
        for leaf in ("centroids.weight", "res_centroids.weight", "outlier_centroids.weight", "weight_bias", "bias"):
            if leaf in t:
                checks.finite(self.index, f"{module}.{leaf}", t[leaf])
        if s.norm:
            checks.scales(self.index, f"{module}.weight_scale", t["weight_scale"])
        segments = []
        if s.outliers:
            outliers = self._indices(module, "outlier_indices", t["outlier_indices"], s.outlier_centroids)
            book = t["outlier_centroids.weight"].reshape(-1, s.outlier_vector, 1)
            segments.append(CodebookSegment(outliers[0].unsqueeze(-1), (book,)))
        codes = self._codes(module, s, t)
        books = [t[f"{name}.weight"].unflatten(1, (-1, s.vector, 1)) for name in _TABLES[: codes.shape[-1]]]
        segments += [CodebookSegment(codes[g], tuple(book[g] for book in books)) for g in range(s.groups)]
        weight = CodebookTensor(
            (f.n, f.k),
            tuple(segments),
            permutation=self._permutation(module, t["perm"], s.k) if s.perm else None,
            column_scale=t.get("weight_scale"),
            column_bias=t.get("weight_bias"),
        )
        return LinearSpec(weight, bias=t["bias"].float() if s.bias else None, name=module)

    def _codes(self, module: str, s: Layer, t: Mapping[str, Tensor]) -> Tensor:
        """int32 [G, R, s, C]: indices into the main codebooks and, where there are some, into those of the residual."""
        entries = (s.centroids, s.residual) if s.residual else (s.centroids,)
        if not s.packed:
            leaves = zip(("indices", "res_indices"), entries, strict=False)
            return interleave([self._indices(module, leaf, t[leaf], count) for leaf, count in leaves])
        bits = (s.bits, s.residual_bits)[: len(entries)]
        codes = from_stream(t["indices"].view(torch.int32), bits, s.group_size)
        for c, count in enumerate(entries):
            if count < 1 << bits[c]:
                checks.indices(self.index, f"{module}.indices", codes[..., c], 0, count - 1)
        return codes

    def _indices(self, module: str, leaf: str, stored: Tensor, entries: int) -> Tensor:
        codes = from_containers(stored.view(torch.int16), 16)
        checks.indices(self.index, f"{module}.{leaf}", codes, 0, entries - 1)
        return codes

    def _permutation(self, module: str, stored: Tensor, k: int) -> Tensor:
        perm = stored.long() & 0xFFFF if stored.dtype == torch.int16 else stored
        if not torch.equal(perm.sort().values, torch.arange(k)):
            raise self.index.bad(f"{module}.perm", f"a permutation of {k} columns", "repeated or missing columns")
        return perm

    def _expected(self, module: str) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
        """(name, dtypes, shape) of every tensor that the configuration gives the module."""
        s, wide = self._modules[module], tuple(WIDE)
        rows, short = -(-s.n // s.vector), ("F16",) if s.floats else ("I16",)
        found: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = [
            ("centroids.weight", wide, (s.groups, s.centroids * s.vector))
        ]
        if s.residual:
            found.append(("res_centroids.weight", wide, (s.groups, s.residual * s.vector)))
        if s.packed:
            width = words(s.group_size, s.bits + s.residual_bits)
            found.append(("indices", ("F32",) if s.floats else ("I32",), (s.groups, rows, width)))
        else:
            found += [(leaf, short, (s.groups, rows, s.group_size)) for leaf in ("indices", "res_indices")]
            found = found if s.residual else found[:-1]
        if s.outliers:
            found.append(("outlier_centroids.weight", wide, (1, s.outlier_centroids * s.outlier_vector)))
            found.append(("outlier_indices", short, (1, -(-s.n // s.outlier_vector), s.outliers)))
        if s.perm:
            found.append(("perm", ("I16",) if s.packed else ("I64", "I16"), (s.k,)))
        if s.norm:
            found += [("weight_scale", wide, (s.k,)), ("weight_bias", wide, (s.k,))]
        if s.bias:
            found.append(("bias", wide, (s.n,)))
        return [(f"{module}.{leaf}", dtypes, shape) for leaf, dtypes, shape in found]


scheme = MappingScheme(
    VPTQMapping,
    Family(
        "VPTQ",
        "vptq 0.0.5",
        (
            *variants("packed", "indices as float"),
            *variants("not packed", "residuals", "int64 permutation", "indices as float"),
        ),
        (
            "vectors along the input axis",
            "residuals of outliers",
            "permuted columns in groups that do not fill the input",
            "modules that the configuration does not describe",
        ),
    ),
)
