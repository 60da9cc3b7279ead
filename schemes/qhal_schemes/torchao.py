"""torchao: tensor subclasses taken apart, `<module>._weight_<part>`, described in the metadata of safetensors files.

  Int8Tensor    qdata I8 [N, K], scale and zero_point on the grid of block_size: W = (code - zero_point) * scale
  Float8Tensor  qdata F8_E4M3 [N, K], scale on the grid of block_size: W = code * scale
  Int4Tensor    qdata [N, K/2], even column in the low nibble, scale and zero_point [K/g, N]:
                W = code * scale + zero_point
`act_quant_kwargs` says how inputs are quantized (null: not at all), `act_pre_scale` multiplies the input before. Int8
inputs divide by 127.5 and are multiplied by the reciprocal of their scale. Source: torchao 0.18
(quantize_/workflows). What was compared with its numbers: compared/torchao.txt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.rotations import Diagonal
from qhal.specs import LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.base import MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.lanes import transpose
from qhal_schemes.matching import EMBEDDING, PathPatterns, module_class
from qhal_schemes.modules import ModuleTable
from qhal_schemes.packing import unpack_int4
from qhal_schemes.plain import ELEMENT_OF, BlockRules
from qhal_schemes.source import WIDE, TensorIndex
from qhal_schemes.strict_json import parse_json

_CONFIGS = {
    "Int8WeightOnlyConfig": "Int8Tensor",
    "Int8DynamicActivationInt8WeightConfig": "Int8Tensor",
    "Int8StaticActivationInt8WeightConfig": "Int8Tensor",
    "Float8WeightOnlyConfig": "Float8Tensor",
    "Float8DynamicActivationFloat8WeightConfig": "Float8Tensor",
    "Int4WeightOnlyConfig": "Int4Tensor",
    "Float8DynamicActivationInt4WeightConfig": "Int4Tensor",
}
"""Configurations and the class that their weights have; a mapping of modules to configurations may hold any."""

_PARTS: dict[str, tuple[str, ...]] = {
    "Int8Tensor": ("qdata", "scale"),
    "Float8Tensor": ("qdata", "scale"),
    "Int4Tensor": ("qdata", "scale", "zero_point"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "Int8Tensor": ("zero_point", "act_quant_scale", "act_pre_scale"),
    "Int4Tensor": ("act_pre_scale",),
}


@dataclass(frozen=True)
class _Stored:
    """What one module's tensors are, from the index and the metadata."""

    kind: str
    n: int
    k: int
    format: Format
    input: Format | None
    parts: tuple[str, ...]
    bias: bool


class TorchAOMapping(SchemeMapping):
    """A torchao checkpoint."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        whole = self._configured()
        self._modules: dict[str, _Stored] = {}
        for name, text in index.metadata().items():
            module, _, leaf = name.rpartition(".")
            if module and text.startswith("{"):
                said = self._object(name, text)
                if said.get("_type") not in ("Tensor", None):
                    self._modules[module] = self._locate(module, leaf, said, whole)
        table = ModuleTable(index)
        lost = [m for m, t in table.items() if "_weight_qdata" in t and m not in self._modules]
        if lost or not self._modules:
            what = f"{lost[0]}._weight_qdata is there" if lost else "no module has a _weight_qdata"
            raise CheckpointError(
                f"{index.folder}: {what}, but the metadata of the safetensors file describe no weight"
            )
        skipped = PathPatterns("modules_to_not_convert", config.names("modules_to_not_convert"))
        self._excluded = BlockRules(config, self._modules, skipped).exclude(table.plain_linears())
        skipped.warn_unused(list(table))

    @property
    def modules(self) -> Sequence[str]:
        """Modules whose weight is a tensor subclass."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain modules: modules_to_not_convert, heads, routers, other towers."""
        return self._excluded

    def layout(self, module: str) -> str:
        """The class of its tensor."""
        return self._modules[module].kind

    def tensors(self, module: str) -> Sequence[str]:
        """The parts of the weight and a bias."""
        m = self._modules[module]
        return [*(_name(module, part) for part in m.parts), *([f"{module}.bias"] if m.bias else [])]

    def describe(self, module: str) -> LinearFormat:
        """The format, from the metadata and the index."""
        m = self._modules[module]
        turned = (("diagonal", m.k),) if "act_pre_scale" in m.parts else ()
        static = "act_quant_scale" in m.parts
        return LinearFormat(module, m.n, m.k, m.format, m.input, static, rotate_in=turned, bias=m.bias)

    def read(self, module: str) -> LinearSpec:
        """Read and check one module."""
        m = self._modules[module]
        t = self.index.read_all(self.tensors(module))
        part = {name: t[_name(module, name)] for name in m.parts}
        for name in ("scale", "act_quant_scale", "act_pre_scale"):
            if name in part:
                checks.scales(self.index, _name(module, name), part[name], positive=True)
        if m.kind == "Float8Tensor":
            checks.float8_codes(self.index, _name(module, "qdata"), part["qdata"])
        if m.bias:
            checks.finite(self.index, f"{module}.bias", t[f"{module}.bias"])
        operand = None
        if m.input is not None:
            static = part.get("act_quant_scale")
            operand = Operand(m.input, None if static is None else static.float().reshape(1))
        pre = part.get("act_pre_scale")
        return LinearSpec(
            self._weight(module, m, part),
            input=operand,
            rotate_in=() if pre is None else (Diagonal(pre.float().flatten()),),
            bias=t[f"{module}.bias"].float() if m.bias else None,
            name=module,
        )

    def _weight(self, module: str, m: _Stored, part: dict[str, Tensor]) -> QTensor:
        if m.kind != "Int4Tensor":
            return QTensor(m.format, part["qdata"], part["scale"], part.get("zero_point"))
        checks.finite(self.index, _name(module, "zero_point"), part["zero_point"])
        codes = unpack_int4(part["qdata"], 1)
        scale, offset = (transpose(part[name]) for name in ("scale", "zero_point"))
        return QTensor(m.format, codes, scale, offset=offset)

    # ---------------------------------------------------------------- metadata

    def _configured(self) -> str | None:
        """The class that quant_type promises for every weight, None if it may differ from module to module."""
        said = self.config.quantization.get("quant_type")
        inner = said.get("default", said) if isinstance(said, dict) else None
        name = inner.get("_type") if isinstance(inner, dict) else None
        if not isinstance(name, str):
            raise self.config.bad("quant_type", "an object with the _type of a configuration", said)
        if name in ("FqnToConfig", "ModuleFqnToConfig"):
            return None
        if name not in _CONFIGS:
            raise CheckpointError(
                f"unsupported: {self.config.folder / self.config.file}: quant_type {name[:80]!r}; can be read: "
                f"{', '.join(_CONFIGS)}"
            )
        return _CONFIGS[name]

    def _object(self, name: str, text: str) -> dict[str, Any]:
        try:
            value = parse_json(text.encode())
        except ValueError as bad:
            raise self._bad(name, "a JSON object", f"no JSON: {bad}") from None
        if not isinstance(value, dict):
            raise self._bad(name, "a JSON object", value)
        return value

    def _bad(self, name: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"{self.index.folder}: metadata of {name}: expected {expected}, found {str(found)[:160]}"
        )

    def _locate(self, module: str, leaf: str, said: Mapping[str, Any], whole: str | None) -> _Stored:
        name, kind = f"{module}.{leaf}", said.get("_type")
        if not isinstance(kind, str) or kind not in _PARTS:
            raise CheckpointError(
                f"unsupported: {self.index.folder}: {name} is a {str(kind)[:80]}; can be read: {', '.join(_PARTS)}"
            )
        if leaf != "weight" or module_class(module) == EMBEDDING:
            raise CheckpointError(f"unsupported: {self.index.folder}: {name}: only weights of Linear modules; planned")
        if whole is not None and kind != whole:
            raise self._bad(name, f"{whole}, as quant_type says", kind)
        data, listed = said.get("_data"), said.get("_tensor_data_names")
        known = (*_PARTS[kind], *_OPTIONAL.get(kind, ()))
        if not isinstance(listed, list) or not set(_PARTS[kind]) <= {str(v) for v in listed} <= set(known):
            raise self._bad(
                name, f"_tensor_data_names: {', '.join(_PARTS[kind])} and some of {', '.join(known)}", listed
            )
        parts = tuple(part for part in known if part in listed)
        if not isinstance(data, dict):
            raise self._bad(name, "_data: an object", data)
        return self._checked(module, kind, parts, data)

    def _checked(self, module: str, kind: str, parts: tuple[str, ...], data: Mapping[str, Any]) -> _Stored:
        index, name = self.index, f"{module}.weight"
        dtypes = {"Int8Tensor": ("I8",), "Float8Tensor": ("F8_E4M3",), "Int4Tensor": ("U8", "I8")}[kind]
        n, k = index.expect(_name(module, "qdata"), dtypes, (None, None)).shape
        k = k * 2 if kind == "Int4Tensor" else k
        size = data.get("block_size")
        good = isinstance(size, list) and len(size) == 2 and all(type(v) is int and v > 0 for v in size)
        if not good or n % size[0] or k % size[1]:  # type: ignore[index]
            raise self._bad(name, f"block_size: divisors of [{n}, {k}]", size)
        rows, columns = size  # type: ignore[misc]
        grid = (n // rows, k // columns)
        block = {(1, k): "row", (n, k): "tensor"}.get((rows, columns), f"{rows}x{columns}")
        if kind == "Int4Tensor":
            if rows != 1:
                raise self._bad(name, "block_size: [1, group]", size)
            grid, block = grid[::-1], f"g{columns}"
        scale = ELEMENT_OF[index.expect(_name(module, "scale"), tuple(WIDE), grid).dtype]
        zero = offset = ""
        if kind == "Int4Tensor":
            offset = "+" + ELEMENT_OF[index.expect(_name(module, "zero_point"), tuple(WIDE), grid).dtype]
        elif "zero_point" in parts:
            index.expect(_name(module, "zero_point"), ("I8",), grid)
            zero = "-int8"
        for part, count in (("act_quant_scale", 1), ("act_pre_scale", k)):
            if part in parts:
                entry = index.expect(_name(module, part), tuple(WIDE), (None,) * len(self._shape(module, part)))
                if torch.Size(entry.shape).numel() != count:
                    raise index.bad(entry.name, f"{count} values", f"{list(entry.shape)}")
        bias = f"{module}.bias" in index
        if bias:
            index.expect(f"{module}.bias", tuple(WIDE), (n,))
        element = {"Int8Tensor": "int8", "Float8Tensor": "e4m3fn", "Int4Tensor": "int4"}[kind]
        fmt = _format(f"{element}{zero}.{block}*{scale}{offset}")
        return _Stored(kind, n, k, fmt, self._input(name, kind, parts, data), parts, bias)

    def _shape(self, module: str, part: str) -> tuple[int, ...]:
        entry = self.index.entries.get(_name(module, part))
        return () if entry is None else entry.shape

    def _input(self, name: str, kind: str, parts: tuple[str, ...], data: Mapping[str, Any]) -> Format | None:
        """The format of inputs: act_quant_kwargs, or for Int4Tensor activation_dtype."""
        if kind == "Int4Tensor":
            dtype = _tag(data.get("activation_dtype"), "_data") or "bfloat16"
            if dtype not in ("bfloat16", "float8_e4m3fn"):
                raise self._bad(name, "activation_dtype: bfloat16 or float8_e4m3fn", dtype)
            return _format("e4m3fn.row*fp32") if dtype == "float8_e4m3fn" else None
        said = data.get("act_quant_kwargs")
        static = "act_quant_scale" in parts
        if said is None:
            if static:
                raise self._bad(name, "no act_quant_scale without act_quant_kwargs", "one")
            return None
        inner = said.get("_data") if isinstance(said, dict) else None
        wanted = {"Int8Tensor": "QuantizeTensorToInt8Kwargs", "Float8Tensor": "QuantizeTensorToFloat8Kwargs"}[kind]
        if not isinstance(inner, dict) or said.get("_type") != wanted:
            raise self._bad(name, f"act_quant_kwargs: a {wanted}", said)
        rows = _tag(inner.get("granularity"))
        mapping = _tag(inner.get("mapping_type"), "_data") or "SYMMETRIC"
        limits = [key for key in ("hp_value_lb", "hp_value_ub", "reduce_range") if inner.get(key)]
        if rows not in ("PerRow", "PerTensor") or mapping != "SYMMETRIC" or limits or (static and rows == "PerRow"):
            found = ", ".join((str(rows), str(mapping), *limits, *(["a static scale"] if static else [])))
            raise CheckpointError(
                f"unsupported: {self.index.folder}: metadata of {name}: act_quant_kwargs {found[:160]}; symmetric "
                f"inputs per row or tensor can be read, others are planned"
            )
        block = "row" if rows == "PerRow" else "tensor"
        if kind == "Float8Tensor":
            return _format(f"e4m3fn.{block}*fp32")
        return _format(f"int8.{block}*fp32@{'' if static else 'qmax=127.5,'}apply=rcp{'' if static else ',empty=eps'}")


def _tag(value: object, key: str = "_type") -> object:
    return value.get(key) if isinstance(value, dict) else value


def _name(module: str, part: str) -> str:
    return f"{module}._weight_{part}"


@lru_cache(maxsize=64)
def _format(name: str) -> Format:
    return Format.parse(name)


scheme = MappingScheme(
    TorchAOMapping,
    Family(
        "torchao",
        "torchao 0.18, safetensors files",
        tuple(_PARTS),
        ("other tensor classes and configurations", "weights of modules that are no Linear layers"),
    ),
)
