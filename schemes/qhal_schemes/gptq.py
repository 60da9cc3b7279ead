"""GPTQ: codes packed along K, zero points along N, groups named by g_idx; format v1 stores zero points minus one.

qweight int32 [K*bits/32, N], qzeros int32 [G, N*bits/32], scales [G, N], g_idx int32 [K], optional bias [N]:
W[n, k] = (q - zero[g_idx[k]]) * scale[g_idx[k]]. Both packings are dense bit streams. Sources: AutoGPTQ and GPTQModel,
checkpoints written by GPTQModel 7.7.

Some files name one zero-point format and hold the other. Where sym is true every zero point must be the middle of the
codes, or reading is refused; `"qhal_zero_format": "v1"` or `"v2"` in the quantization section decides it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor

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
from qhal_schemes.matching import PathPatterns, compile_pattern
from qhal_schemes.modules import ModuleTable
from qhal_schemes.packing import unpack, unpack_down, words, wrap
from qhal_schemes.plain import ELEMENT_OF, BlockRules
from qhal_schemes.source import WIDE, TensorIndex

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WORD = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""What version 1 subtracts from a whole word of zero points; a zero point of 0 borrows from its neighbour."""


@dataclass(frozen=True)
class Settings:
    """How one module is quantized. group_size -1: one group of all K columns."""

    bits: int
    group_size: int
    desc_act: bool
    sym: bool


class GPTQMapping(SchemeMapping):
    """A GPTQ checkpoint: the settings, overridden per module by `dynamic`. Relatives of the format derive from it.

    bits       widths of codes that the format has
    indexed    whether every module has a g_idx; otherwise columns without one are in order
    overrides  the key of the settings of single modules
    """

    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    indexed: bool = True
    overrides: ClassVar[str] = "dynamic"

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        section = config.quantization
        self._v1 = self._minus_one()
        self._default = self._settings(section, None, "")
        self._dynamic = self._overrides(section.get(self.overrides))
        table = ModuleTable(index)
        self._modules = {m: self._of(m) for m in table.having(_PARTS)}
        for module, settings in self._modules.items():
            if settings is None:
                raise CheckpointError(
                    f"{index.folder}: {module} is skipped by {self._skipped(module)}, but the file holds it quantized"
                )
        if not self._modules:
            raise CheckpointError(f"{index.folder}: quant_method {config.method}, but no module has a qweight")
        skipped = PathPatterns("modules_to_not_convert", config.names("modules_to_not_convert"))
        rules = BlockRules(config, self._modules, skipped, self._skipped)
        self._excluded = rules.exclude(table.plain_linears())
        skipped.warn_unused(list(table))

    @property
    def modules(self) -> Sequence[str]:
        """Modules with packed weights."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain modules: heads, routers, other towers, `dynamic` skips."""
        return self._excluded

    def layout(self, module: str) -> str:
        """The version of its zero points."""
        return "gptq" if self._v1 else "gptq_v2"

    def tensors(self, module: str) -> Sequence[str]:
        """qweight, qzeros, scales, g_idx and a bias if there is one."""
        names = [f"{module}.{part}" for part in _PARTS if part != "g_idx" or self._has_index(module)]
        return [*names, f"{module}.bias"] if f"{module}.bias" in self.index else names

    def describe(self, module: str) -> LinearFormat:
        """The format, from shapes and dtypes alone."""
        s = self._modules[module]
        assert s is not None
        columns = self._columns(module, s.bits)
        packed = self.index.expect(f"{module}.qweight", ("I32",), (words(columns, s.bits), None))
        rows = packed.shape[1]
        if columns * s.bits % 32 or rows * s.bits % 32:
            raise self.index.bad(
                f"{module}.qweight", f"K and N that fill whole words of {s.bits}-bit codes", f"N={rows}, K={columns}"
            )
        size = columns if s.group_size == -1 else s.group_size
        groups = -(-columns // max(size, 1))
        scale = self.index.expect(f"{module}.scales", tuple(WIDE), (groups, rows))
        self.index.expect(f"{module}.qzeros", ("I32",), (groups, words(rows, s.bits)))
        bias = f"{module}.bias" in self.index
        if bias:
            self.index.expect(f"{module}.bias", tuple(WIDE), (rows,))
        return LinearFormat(
            name=module,
            n=rows,
            k=columns,
            weight=_format(s.bits, s.group_size, ELEMENT_OF[scale.dtype]),
            bias=bias,
            group_index=s.desc_act and groups > 1,
        )

    def read(self, module: str) -> LinearSpec:
        """Unpack codes and zero points; g_idx becomes group_index where the file is in activation order."""
        f, s = self.describe(module), self._modules[module]
        assert s is not None and isinstance(f.weight, Format)
        t = self.index.read_all(self.tensors(module))
        scale, g_idx = t[f"{module}.scales"], t.get(f"{module}.g_idx")
        checks.scales(self.index, f"{module}.scales", scale)
        if g_idx is not None:
            self._check_index(f, g_idx, scale.shape[0], f.k if s.group_size == -1 else s.group_size)
        bias = t.get(f"{module}.bias")
        if bias is not None:
            checks.finite(self.index, f"{module}.bias", bias)
        weight = QTensor(
            format=f.weight,
            codes=unpack_down(t[f"{module}.qweight"], s.bits, f.k),
            scale=transpose(scale),
            zero=transpose(self._zeros(module, t[f"{module}.qzeros"], s, f.n)),
            group_index=g_idx.contiguous() if g_idx is not None and f.group_index else None,
        )
        return LinearSpec(weight, bias=None if bias is None else bias.float(), name=module)

    def _has_index(self, module: str) -> bool:
        return self.indexed or f"{module}.g_idx" in self.index

    def _columns(self, module: str, bits: int) -> int:
        """K: one entry of g_idx a column; without it the words must be whole runs of 32 codes."""
        if self._has_index(module):
            return self.index.expect(f"{module}.g_idx", ("I32",), (None,)).shape[0]
        name = f"{module}.qweight"
        count = self.index.expect(name, ("I32",), (None, None)).shape[0]
        if count % bits:
            raise self.index.bad(name, f"runs of {bits} words, as there is no g_idx", f"{count} words")
        return count * 32 // bits

    def _check_index(self, f: LinearFormat, g_idx: Tensor, groups: int, size: int) -> None:
        if checks.sequential(g_idx, size):
            return
        name = f"{f.name}.g_idx"
        checks.group_index(self.index, name, g_idx, groups)
        if not f.group_index:
            raise self.index.bad(name, f"column k in group k // {size}, as desc_act is false", "another order")
        checks.equal_groups(self.index, name, g_idx, groups, size)

    def _minus_one(self) -> bool:
        """Whether zero points are stored minus one (version 1)."""
        return _zero_format(self.config)

    def _zeros(self, module: str, stored: Tensor, s: Settings, rows: int) -> Tensor:
        """uint8 zero points [G, N]. Version 1 is undone per word (2, 4, 8 bits) or per field (3 bits)."""
        raw = unpack(stored, s.bits, rows)
        zeros = unpack(wrap(stored.long() + _WORD[s.bits]), s.bits, rows) if self._v1 and s.bits in _WORD else raw
        if self._v1 and s.bits not in _WORD:
            zeros = (raw + 1) & ((1 << s.bits) - 1)
        middle = 1 << (s.bits - 1)
        other = middle + 1 if self._v1 else middle - 1
        if not s.sym or "qhal_zero_format" in self.config.quantization or bool((zeros == middle).all()):
            return zeros
        if bool((zeros == other).all()):
            raise CheckpointError(
                f"{self.index.folder}: {module}.qzeros: sym is true, so every zero point must be {middle}; read as "
                f"{'gptq (v1)' if self._v1 else 'gptq_v2'} all are {other}, read as "
                f"{'gptq_v2' if self._v1 else 'gptq (v1)'} all are {middle}. The file probably names the wrong format: "
                f'set "qhal_zero_format": "{"v2" if self._v1 else "v1"}" (or, to keep the reading as it is, '
                f'"{"v1" if self._v1 else "v2"}") in the quantization section of {self.config.file}'
            )
        low, high = int(zeros.min()), int(zeros.max())
        raise self.index.bad(
            f"{module}.qzeros", f"{middle} everywhere, as sym is true (false, if the file is right)", f"{low}..{high}"
        )

    def _settings(self, section: Mapping[str, Any], base: Settings | None, path: str) -> Settings:
        bits = integer(self.config, section, "bits", self.bits, base.bits if base else None, path)
        size = section.get("group_size", base.group_size if base else None)
        if size != -1 or type(size) is not int:
            size = integer(self.config, {"group_size": size}, "group_size", path=path)
        flags = []
        for key, default in (("desc_act", base.desc_act if base else False), ("sym", base.sym if base else True)):
            value = section.get(key, default)
            if not isinstance(value, bool):
                raise self.config.bad(f"{path}{key}", "true or false", value)
            flags.append(value)
        return Settings(bits, size, *flags)

    def _overrides(self, section: object) -> list[tuple[str, re.Pattern[str], Settings | None]]:
        """(rule as written, pattern, settings or None to skip), in order: the first that matches wins."""
        if section is None:
            return []
        if not isinstance(section, dict):
            raise self.config.bad("dynamic", "an object of patterns", section)
        rules = []
        for rule, values in section.items():
            skip, pattern = rule.startswith("-:"), rule.removeprefix("-:").removeprefix("+:")
            if not isinstance(values, dict):
                raise self.config.bad(f"dynamic[{rule!r}]", "an object of settings", values)
            try:
                compiled = compile_pattern(pattern)
            except (re.error, RecursionError, OverflowError) as bad:
                raise self.config.bad(f"dynamic[{rule!r}]", "a regular expression", str(bad)) from None
            settings = None if skip else self._settings(values, self._default, f"dynamic[{rule!r}].")
            rules.append((rule, compiled, settings))
        return rules

    def _rule_of(self, module: str) -> tuple[str, Settings | None] | None:
        """The rule that overrides a module's settings, and to what (None: the module is skipped)."""
        return next(((rule, s) for rule, pattern, s in self._dynamic if pattern.match(module)), None)

    def _of(self, module: str) -> Settings | None:
        rule = self._rule_of(module)
        return self._default if rule is None else rule[1]

    def _skipped(self, module: str) -> str | None:
        """The rule that leaves a module plain, if there is one."""
        rule = self._rule_of(module)
        return f"{self.overrides} {rule[0]!r}" if rule is not None and rule[1] is None else None


@lru_cache(maxsize=256)
def _format(bits: int, group_size: int, scale: str) -> Format:
    block = "row" if group_size == -1 else f"g{group_size}"
    return Format.parse(f"uint{bits}-uint{bits}.{block}*{scale}")


def _zero_format(config: CheckpointConfig) -> bool:
    """Whether zero points are stored minus one (version 1)."""
    section = config.quantization
    named = [n for key in ("checkpoint_format", "format") if (n := section.get(key)) is not None]
    name = "marlin" if config.boolean("is_marlin_format", False) else (named or ["gptq"])[0]
    other = next((n for n in (name, *named) if n not in ("gptq", "gptq_v2")), None)
    if other is not None:
        raise CheckpointError(
            f"unsupported: {config.folder / config.file}: GPTQ format {str(other)[:80]!r}; gptq and gptq_v2 can be "
            f"read, gptq_p (planar) and marlin layouts are planned"
        )
    if section.get("pack_dtype", "int32") != "int32":
        raise config.bad("pack_dtype", "int32, the words of every GPTQ file that can be read", section["pack_dtype"])
    if len(set(named)) > 1 and "qhal_zero_format" not in section:
        raise config.bad("format", f"{name}, as checkpoint_format says (zero points differ by one)", named[1])
    override = section.get("qhal_zero_format", "v1" if name == "gptq" else "v2")
    if override not in ("v1", "v2"):
        raise config.bad("qhal_zero_format", "v1 or v2", override)
    return bool(override == "v1")


scheme = MappingScheme(
    GPTQMapping,
    Family(
        "GPTQ",
        "AutoGPTQ, GPTQModel 7.7",
        ("gptq", "gptq_v2"),
        (
            "formats other than gptq and gptq_v2 (marlin, bitblas)",
            "symmetric files whose zero points are not the middle",
        ),
    ),
)
