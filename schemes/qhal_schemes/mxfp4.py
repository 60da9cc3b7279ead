"""MXFP4 of gpt-oss: the experts of a layer stacked in two modules, everything else plain.

`<prefix>.gate_up_proj_blocks` uint8 [E, 2I, K/32, 16] holds two e2m1 codes in a byte, the even column in the low
nibble; `_scales` uint8 [E, 2I, K/32] are exponents of two with a bias of 127; `_bias` [E, 2I]. `<prefix>.down_proj_*`
likewise [E, K, I/32, 16]. W[e, n, k] = code * 2^(scale - 127). Gate and up rows alternate. Activations stay in their
own dtype. Sources: transformers 5.23 (integrations/mxfp4.py), OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.base import MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.experts import StackedExperts
from qhal_schemes.matching import SkipPatterns
from qhal_schemes.modules import ModuleTable
from qhal_schemes.packing import unpack_nibbles
from qhal_schemes.source import WIDE, TensorIndex

_FORMAT = Format.parse("e2m1.g32*e8m0")
_BLOCK_BYTES = 16
_PROJECTIONS = ("gate_up_proj", "down_proj")
_PARTS = ("blocks", "scales", "bias")
_PACKED = tuple(f"{p}_{part}" for p in _PROJECTIONS for part in ("blocks", "scales"))


class MXFP4Mapping(SchemeMapping):
    """A gpt-oss checkpoint: every layer's experts are quantized, and nothing else is."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        skipped = SkipPatterns("modules_to_not_convert", config.names("modules_to_not_convert"))
        table = ModuleTable(index)
        self._stacked = {prefix: self._group(prefix) for prefix in table.having(_PACKED)}
        if not self._stacked:
            raise CheckpointError(f"{index.folder}: quant_method mxfp4, but no module has {_PACKED[0]}")
        for prefix in self._stacked:
            entry = skipped.find(prefix)
            if entry is not None:
                raise CheckpointError(
                    f"{index.folder}: {prefix} is excluded by {skipped.what} {entry!r}, but the file holds it quantized"
                )
        self._excluded = {m: self._rule(m, skipped) for m in table.plain_linears()}
        skipped.warn_unused(list(table), also=table)

    @property
    def modules(self) -> Sequence[str]:
        """Both stacked modules of every layer's experts."""
        return tuple(m for group in self._stacked.values() for m in group.modules())

    @property
    def excluded(self) -> Mapping[str, str]:
        """Every Linear module: attention, routers, the head."""
        return self._excluded

    @property
    def stacked(self) -> Mapping[str, StackedExperts]:
        """The experts of every layer."""
        return self._stacked

    def layout(self, module: str) -> str:
        """Blocks of 16 bytes."""
        return "blocks"

    def tensors(self, module: str) -> Sequence[str]:
        """Blocks, scales and biases."""
        return [f"{module}_{part}" for part in _PARTS]

    def describe(self, module: str) -> LinearFormat:
        """The format of one expert, from shapes alone."""
        name = f"{module}_blocks"
        experts, rows, blocks, _ = self.index.expect(name, ("U8",), (None, None, None, _BLOCK_BYTES)).shape
        self.index.expect(f"{module}_scales", ("U8", "F8_E8M0"), (experts, rows, blocks))
        self.index.expect(f"{module}_bias", tuple(WIDE), (experts, rows))
        return LinearFormat(module, rows, blocks * 2 * _BLOCK_BYTES, _FORMAT, bias=True)

    def read(self, module: str) -> LinearSpec:
        """Not called: every quantized module is stacked."""
        raise CheckpointError(f"{module} holds stacked experts")

    def read_experts(self, module: str, first: int, count: int) -> LinearSpec:
        """Unpack experts first:first+count to [count, N, K]; rows stay in the order of the file."""
        t = self.index.read_all(self.tensors(module), (first, count))
        scales, bias = t[f"{module}_scales"], t[f"{module}_bias"]
        checks.scales(self.index, f"{module}_scales", scales)
        checks.finite(self.index, f"{module}_bias", bias)
        codes = unpack_nibbles(t[f"{module}_blocks"].flatten(-2))
        return LinearSpec(QTensor(_FORMAT, codes, scales), bias=bias.float(), name=module)

    def _group(self, prefix: str) -> StackedExperts:
        gate_up, down = (f"{prefix}.{p}" for p in _PROJECTIONS)
        experts = self.index.expect(f"{gate_up}_blocks", ("U8",), (None, None, None, _BLOCK_BYTES)).shape[0]
        self.index.expect(f"{down}_blocks", ("U8",), (experts, None, None, _BLOCK_BYTES))
        counted = self.config.count("num_local_experts")
        if counted not in (None, experts):
            raise self.index.bad(f"{gate_up}_blocks", f"{counted} experts, as config.json says", f"{experts}")
        return StackedExperts(prefix, experts, gate_up, down)

    def _rule(self, module: str, skipped: SkipPatterns) -> str:
        entry = skipped.find(module)
        return "mxfp4 quantizes experts only" if entry is None else f"{skipped.what} {entry!r}"


scheme = MappingScheme(
    MXFP4Mapping,
    Family("gpt-oss", "gpt-oss, transformers 5.23", ("blocks",), ("quantized modules other than experts",)),
)
