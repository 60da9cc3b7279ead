"""Quark: records matched to modules, and every quantized module read into a LinearSpec.

The file decides what a module holds, the configuration what it should hold; where they disagree it is an error that
names the module and the rule. Keys: `quark_config.py`; weights: `quark_weights.py`; caches: `quark_kv.py`. Experts have
modules of their own; of gpt-oss a module holds gate and up in turns. Source: amd-quark 0.13, whose importer
has the names of older versions (weight_quantizer.scale, ...; export/constants.py). Compared forms: compared/quark.txt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from torch import Tensor

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec, Operand
from qhal_schemes import checks, quark_weights
from qhal_schemes.base import MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.matching import EMBEDDING, is_router, module_class
from qhal_schemes.modules import ModuleTable
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.quark_config import QuarkConfig, Record, TensorSpec, unsupported
from qhal_schemes.quark_kv import CacheScales
from qhal_schemes.quark_weights import Stored
from qhal_schemes.source import WIDE, TensorIndex

_OLD = re.compile(r"(.+)\.(weight|input|output)_quantizer(?:\.([01]))?\.(scale|zero_point)$")
_CODES = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8", "I32"})
_TOP_EXPONENT = {"e2m1": 2, "e3m2": 4, "e2m3": 2, "e4m3fn": 8, "e5m2": 15}
Leaves = dict[str, str]


class QuarkMapping(SchemeMapping):
    """A Quark checkpoint."""

    cache: CacheScales

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        self._quark = QuarkConfig(config)
        self._leaves = _leaves(index)
        self._records: dict[str, Record] = {}
        self._stored: dict[str, Stored] = {}
        self._excluded: dict[str, str] = {}
        self._match(ModuleTable(index))
        quantized = {m: (self._records[m], self._leaves[m]) for m in self._stored}
        self.cache = CacheScales.read(self._quark, index, quantized)

    @property
    def modules(self) -> Sequence[str]:
        """Modules with a quantized weight."""
        return tuple(self._stored)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain Linear modules: excluded, or of a record without a weight."""
        return self._excluded

    def layout(self, module: str) -> str:
        """The nibble order of 4-bit integers, and the older names of tensors."""
        s = self._stored[module]
        order = ("reorder" if self._quark.reorder else "order") if s.spec.dtype in ("int4", "uint4") else "any order"
        return order + (", older names" if any(_OLD.match(name) for name in s.names.values()) else "")

    def tensors(self, module: str) -> Sequence[str]:
        """Codes, scales, zero points, a static input's scale and zero point, and a bias."""
        names = [*self._stored[module].names.values(), *self._input_names(module).values()]
        return [*names, f"{module}.bias"] if f"{module}.bias" in self.index else names

    def describe(self, module: str) -> LinearFormat:
        """The format, from the configuration and the index."""
        s, spec = self._stored[module], self._records[module].inputs
        return LinearFormat(
            name=module,
            n=s.n,
            k=s.k,
            weight=s.format,
            input=None if spec is None else self._input_format(module, spec),
            static_input=spec is not None and not spec.dynamic,
            bias=f"{module}.bias" in self.index,
        )

    def read(self, module: str) -> LinearSpec:
        """Read and check one module."""
        stored = self._stored[module]
        weight = quark_weights.read(self.index, stored, stored.nibbles and self._quark.reorder)
        bias = f"{module}.bias"
        t = self.index.read_all([*self._input_names(module).values(), *([bias] if bias in self.index else [])])
        if bias in t:
            checks.finite(self.index, bias, t[bias])
        return LinearSpec(
            weight, input=self._operand(module, t), bias=t[bias].float() if bias in t else None, name=module
        )

    # ---------------------------------------------------------------- matching

    def _match(self, table: ModuleTable) -> None:
        quantized = [m for m, leaves in self._leaves.items() if self._is_quantized(m, leaves)]
        for module in quantized:
            self._claim(module)
        for module in table.plain_linears():
            if module not in self._stored:
                self._excluded[module] = self._why(module)
        self._refuse_plain_experts()
        if not self._stored:
            raise CheckpointError(f"{self.index.folder}: quant_method quark, but no module has a quantized weight")
        if self.config.tied:  # the output head shares the embedding: the file has none, but may exclude it
            self._quark.exclude.find("lm_head")
        self._quark.warn_unused(quantized, list(table))

    def _is_quantized(self, module: str, leaves: Leaves) -> bool:
        weight = self.index.entries.get(f"{module}.weight")
        return "weight_scale" in leaves or (weight is not None and weight.dtype in _CODES)

    def _claim(self, module: str) -> None:
        where = f"{self.index.folder}: {module}"
        if module_class(module) == EMBEDDING:
            raise CheckpointError(f"unsupported: {where}: a quantized embedding; planned")
        record, rule = self._quark.find(module)
        if record is None:
            raise CheckpointError(f"{where}: excluded by {rule}, but the file holds quantized tensors of it")
        if not record.weight:
            raise CheckpointError(f"{where}: {rule} quantizes no weight, but the file holds quantized tensors of it")
        self._records[module] = record
        self._stored[module] = stored = quark_weights.locate(self.index, module, record, self._leaves[module])
        if f"{module}.bias" in self.index:
            self.index.expect(f"{module}.bias", tuple(WIDE), (stored.n,))
        spec = record.inputs
        if spec is not None:
            self._check_input(record, spec, stored.k)
            for part, name in self._input_names(module).items():
                scalar = name in self.index and self.index[name].shape == ()
                self.index.expect(name, tuple(WIDE) if part == "scale" else ("I8", "U8", "I32"), () if scalar else (1,))

    def _check_input(self, record: Record, spec: TensorSpec, columns: int) -> None:
        path = f"{record.path}.input_tensors"
        known = spec.qscheme == "per_tensor" or (spec.dynamic and spec.qscheme == "per_channel" and spec.axis == 1)
        known = known or (spec.dynamic and spec.qscheme == "per_group" and spec.axis == 1)
        if not known or spec.dtype in ("int4", "uint4") or (spec.exponent_scale and spec.qscheme != "per_group"):
            raise unsupported(
                self.config, path, f"inputs {spec}; static per tensor, dynamic per tensor, token and group can be read"
            )
        if spec.qscheme == "per_group" and columns % spec.group_size:
            raise self.config.bad(f"{path}.group_size", f"a divisor of {columns} columns (K)", spec.group_size)

    def _why(self, module: str) -> str:
        record, rule = self._quark.find(module)
        if record is None:
            return rule
        if not record.weight:
            return f"{rule} quantizes no weight"
        if is_router(module):
            return "a router with a class of its own is no Linear"
        raise CheckpointError(
            f"{self.index.folder}: {module}: {rule} quantizes it, but the file holds a plain weight and no exclude "
            f"entry is its whole name or a pattern that matches it{self._quark.exclude.partial(module)}"
        )

    def _refuse_plain_experts(self) -> None:
        """Experts in one plain parameter: some versions leave them so although the configuration quantizes them."""
        for name, entry in self.index.entries.items():
            prefix = name.rpartition(".")[0]
            if len(entry.shape) == 3 and prefix.endswith(".experts") and entry.dtype in WIDE:
                record, rule = self._quark.find(name)
                if record is not None and record.weight and self._quark.find(prefix)[0] is not None:
                    raise CheckpointError(
                        f"{self.index.folder / entry.file}: {name} {list(entry.shape)} holds plain experts, but {rule} "
                        f"quantizes them; add {prefix!r} to exclude to keep them plain"
                    )

    # ---------------------------------------------------------------- inputs

    def _input_names(self, module: str) -> Leaves:
        """Names of a static input's scale and zero point."""
        spec = self._records[module].inputs
        if spec is None or spec.dynamic:
            return {}
        leaves = self._leaves[module]
        names = {"scale": leaves.get("input_scale", f"{module}.input_scale")}
        if "input_zero_point" in leaves or not spec.symmetric:  # int8 files carry a zero point of 0
            names["zero"] = leaves.get("input_zero_point", f"{module}.input_zero_point")
        return names

    def _input_format(self, module: str, spec: TensorSpec) -> Format:
        if spec.dynamic:
            return dynamic_format(spec)
        stored = ELEMENT_OF[self.index[self._input_names(module)["scale"]].dtype]
        zero = "" if spec.symmetric else f"-{spec.element}"
        return Format.parse(f"{spec.element}{zero}.tensor*{stored}")

    def _operand(self, module: str, t: Mapping[str, Tensor]) -> Operand | None:
        spec = self._records[module].inputs
        if spec is None:
            return None
        fmt, names = self._input_format(module, spec), self._input_names(module)
        if spec.dynamic:
            return Operand(fmt)
        checks.scales(self.index, names["scale"], t[names["scale"]], positive=True)
        zero = t[names["zero"]] if "zero" in names else None
        if zero is not None and spec.symmetric:
            if bool(zero.ne(0).any()):
                raise self.index.bad(names["zero"], "0, as symmetric is true", str(zero.flatten().tolist()))
            zero = None
        return Operand(fmt, t[names["scale"]].reshape(1), None if zero is None else zero.reshape(1))


def _leaves(index: TensorIndex) -> dict[str, Leaves]:
    """module -> canonical last part of a tensor's name -> name in the file."""
    found: dict[str, Leaves] = {}
    for name in index:
        old = _OLD.match(name)
        if old is None:
            module, _, leaf = name.rpartition(".")
        else:
            module, leaf = old[1], f"{old[2]}_{old[4]}" + ("_2" if old[3] == "1" else "")
        leaves = found.setdefault(module, {})
        if leaf in leaves:
            raise CheckpointError(f"{index.folder}: {name} and {leaves[leaf]} are the same thing under two names")
        leaves[leaf] = name
    return found


@lru_cache(maxsize=64)
def dynamic_format(spec: TensorSpec) -> Format:
    """The format of inputs whose scales are computed.

    Symmetric integers divide by half the span of the codes (127.5), floats by the largest code. MX exponents: `even`
    rounds amax to the element's mantissa, `floor` takes the exponent of amax, `ceil` that of the next power of two.
    """
    block = {"per_tensor": "tensor", "per_channel": "row"}.get(spec.qscheme, f"g{spec.group_size}")
    if spec.exponent_scale:
        rule = {"even": "e8m0=even", "floor": "", "ceil": f"qmax={2 ** _TOP_EXPONENT[spec.element]},e8m0=ceil"}[
            spec.mode
        ]
        return Format.parse(f"{spec.element}.{block}*e8m0{'@' + rule if rule else ''}")
    if not spec.symmetric:
        return Format.parse(f"{spec.element}-{spec.element}.{block}*fp32@domain=minmax")
    rule = "@qmax=127.5" if spec.dtype == "int8" else ""
    return Format.parse(f"{spec.element}.{block}*fp32{rule}")


scheme = MappingScheme(
    QuarkMapping,
    Family(
        "Quark",
        "amd-quark 0.13",
        ("any order", "reorder", "order", "any order, older names"),
        (
            "rotations that are applied online",
            "quantized embeddings",
            "quantized biases, outputs and softmax",
            "float zero points, quantized scales, more than two stages",
            "caches that are quantized after the rotary embedding",
            "static inputs per token or group",
        ),
    ),
)
