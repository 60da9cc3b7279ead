"""AWQ, gemm layout: 4-bit codes and zero points packed along N in an interleaved nibble order.

qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N], optional bias [N]: W[n, k] = (q - zero) * scale, nothing
added to the zero points. Symmetric files store zero points too. Sources: AutoAWQ's WQLinear_GEMM, GPTQModel 7.7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.base import MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig, integer
from qhal_schemes.evidence import Family
from qhal_schemes.lanes import transpose
from qhal_schemes.matching import PathPatterns
from qhal_schemes.modules import ModuleTable
from qhal_schemes.packing import unpack_awq
from qhal_schemes.plain import ELEMENT_OF, BlockRules
from qhal_schemes.source import WIDE, TensorIndex

_PARTS = ("qweight", "qzeros", "scales")


class AWQMapping(SchemeMapping):
    """An AWQ checkpoint: one group size for every quantized module."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        section = config.quantization
        named = (section.get(key) for key in ("version", "checkpoint_format", "format"))
        layout = next((n for n in named if n is not None and str(n).lower() != "gemm"), "gemm")
        if layout != "gemm":
            raise CheckpointError(
                f"unsupported: {config.folder / config.file}: AWQ layout {str(layout)[:80]!r}; gemm can be "
                f"read, gemv and others are planned"
            )
        bits, size = (k if k in section else old for k, old in (("bits", "w_bit"), ("group_size", "q_group_size")))
        config.integer(bits, (4,))
        self._symmetric = not config.boolean("zero_point", True)
        group_size = section.get(size)
        self._group = -1 if group_size == -1 else integer(config, section, size)
        table = ModuleTable(index)
        self._modules = tuple(table.having(_PARTS))
        if not self._modules:
            raise CheckpointError(f"{index.folder}: quant_method {config.method}, but no module has a qweight")
        skipped = PathPatterns("modules_to_not_convert", config.names("modules_to_not_convert"))
        self._excluded = BlockRules(config, self._modules, skipped, self._skipped).exclude(table.plain_linears())
        skipped.warn_unused(list(table))

    def _skipped(self, module: str) -> str | None:
        """A rule of a relative of the format that leaves a module plain."""
        return None

    @property
    def modules(self) -> Sequence[str]:
        """Modules with packed weights."""
        return self._modules

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain modules: modules_to_not_convert, heads, routers, other towers."""
        return self._excluded

    def layout(self, module: str) -> str:
        """Always gemm."""
        return "gemm"

    def tensors(self, module: str) -> Sequence[str]:
        """qweight, qzeros, scales and a bias if there is one."""
        names = [f"{module}.{part}" for part in _PARTS]
        return [*names, f"{module}.bias"] if f"{module}.bias" in self.index else names

    def describe(self, module: str) -> LinearFormat:
        """The format, from shapes and dtypes alone."""
        columns, packed = self.index.expect(f"{module}.qweight", ("I32",), (None, None)).shape
        rows = packed * 8
        size = columns if self._group == -1 else self._group
        if size < 1 or columns % size:
            raise self.index.bad(
                f"{module}.qweight", f"columns that divide into groups of {size}", f"{columns} columns (K)"
            )
        scale = self.index.expect(f"{module}.scales", tuple(WIDE), (columns // size, rows))
        self.index.expect(f"{module}.qzeros", ("I32",), (columns // size, packed))
        bias = f"{module}.bias" in self.index
        if bias:
            self.index.expect(f"{module}.bias", tuple(WIDE), (rows,))
        return LinearFormat(module, rows, columns, _format(self._group, ELEMENT_OF[scale.dtype]), bias=bias)

    def read(self, module: str) -> LinearSpec:
        """Unpack codes and zero points to [N, K] and [N, G]."""
        f = self.describe(module)
        assert isinstance(f.weight, Format)
        t = self.index.read_all(self.tensors(module))
        scale, bias = t[f"{module}.scales"], t.get(f"{module}.bias")
        checks.scales(self.index, f"{module}.scales", scale)
        if bias is not None:
            checks.finite(self.index, f"{module}.bias", bias)
        zero = unpack_awq(t[f"{module}.qzeros"])
        if self._symmetric and bool((zero != 8).any()):  # some readers would leave them out, others apply them
            raise self.index.bad(f"{module}.qzeros", "8 everywhere, as zero_point is false", "other zero points")
        weight = QTensor(
            format=f.weight,
            codes=unpack_awq(t[f"{module}.qweight"]),
            scale=transpose(scale),
            zero=zero,
        )
        return LinearSpec(weight, bias=None if bias is None else bias.float(), name=module)


@lru_cache(maxsize=64)
def _format(group_size: int, scale: str) -> Format:
    return Format.parse(f"uint4-uint4.{'row' if group_size == -1 else f'g{group_size}'}*{scale}")


scheme = MappingScheme(
    AWQMapping,
    Family("AWQ", "AutoAWQ, GPTQModel 7.7", ("gemm",), ("the layouts gemv, gemv_fast and marlin",)),
)
