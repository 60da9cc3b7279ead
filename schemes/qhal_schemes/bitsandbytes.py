"""bitsandbytes: NF4 and FP4 in blocks over the flattened matrix, with or without quantized scales, and LLM.int8.

4 bit  weight U8 [N*K/2, 1], the even element in the high nibble; weight.absmax F32 [blocks], or U8 with
       weight.nested_absmax, weight.nested_quant_map and an offset (double quantization); weight.quant_map F32 [16];
       weight.quant_state.bitsandbytes__nf4 or __fp4: JSON with the shape and the block sizes
8 bit  weight I8 [N, K], SCB F32 [N]: W = code * (SCB / 127). bitsandbytes computes (code * SCB) * (1 / 127), which
       differs in the last bit
Source: bitsandbytes 0.50 (functional.py, QuantState). What was compared with its numbers: compared/bitsandbytes.txt.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhal.elements import values
from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.base import CheckpointWarning, MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.matching import PathPatterns
from qhal_schemes.modules import ModuleTable
from qhal_schemes.packing import unpack_nibbles
from qhal_schemes.plain import BlockRules
from qhal_schemes.source import WIDE, TensorIndex

_STATE = re.compile(r"(.+)\.weight\.quant_state\.bitsandbytes__(nf4|fp4)$")
_INT8, _INT8_INPUT = Format.parse("int8.row*(fp32.tensor/fp32)"), Format.parse("int8.row*fp32")
_KEYS = frozenset({
    "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold",
})  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """What one module's tensors are, from the index and the JSON beside them."""

    n: int
    k: int
    format: Format
    names: tuple[str, ...]
    bias: bool
    offset: float | None = None


class BitsAndBytesMapping(SchemeMapping):
    """A bitsandbytes checkpoint: all quantized modules in 4 bits, or all in 8."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        four, eight = (config.boolean(f"load_in_{n}bit", config.boolean(f"_load_in_{n}bit", False)) for n in (4, 8))
        if four == eight:
            raise config.bad("load_in_4bit", "either load_in_4bit or load_in_8bit", f"{four} and {eight}")
        unknown = [key for key in config.quantization if key not in _KEYS]
        if unknown:
            warnings.warn(
                f"{config.folder / config.file}: {unknown[0][:80]}: no key of bitsandbytes that is known here; it is "
                f"not looked at",
                CheckpointWarning,
                stacklevel=2,
            )
        table = ModuleTable(index)
        self._input = None if four else self._int8_input()
        self._modules = self._four() if four else {m: self._eight(m) for m in table.having(("SCB",))}
        if not self._modules:
            what = "weight.quant_state.bitsandbytes__nf4" if four else "SCB"
            raise CheckpointError(f"{index.folder}: quant_method bitsandbytes, but no module has a {what}")
        skipped = PathPatterns("llm_int8_skip_modules", config.names("llm_int8_skip_modules"))
        self._excluded = BlockRules(config, self._modules, skipped).exclude(table.plain_linears())
        skipped.warn_unused(list(table))

    @property
    def modules(self) -> Sequence[str]:
        """Modules with a quantization state, or with SCB."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain modules: llm_int8_skip_modules, heads, routers, other towers."""
        return self._excluded

    def layout(self, module: str) -> str:
        """The kind of its codes, and whether scales are quantized."""
        m = self._modules[module]
        if m.format == _INT8:
            return "int8"
        return ("nf4" if m.format.element == "nf4" else "fp4") + (", double quantized" if m.offset is not None else "")

    def tensors(self, module: str) -> Sequence[str]:
        """Codes, scales, tables, the state and a bias."""
        return self._modules[module].names

    def describe(self, module: str) -> LinearFormat:
        """The format; its shape is in the JSON of the state."""
        m = self._modules[module]
        return LinearFormat(module, m.n, m.k, m.format, self._input, bias=m.bias)

    def read(self, module: str) -> LinearSpec:
        """Read and check one module."""
        m = self._modules[module]
        t = {name.removeprefix(f"{module}."): value for name, value in self.index.read_all(m.names).items()}
        weight = self._read_eight(module, t) if m.format == _INT8 else self._read_four(module, m, t)
        if m.bias:
            checks.finite(self.index, f"{module}.bias", t["bias"])
        operand = None if self._input is None else Operand(self._input)
        return LinearSpec(weight, input=operand, bias=t["bias"].float() if m.bias else None, name=module)

    # ---------------------------------------------------------------- 4 bit

    def _four(self) -> dict[str, _Stored]:
        kind, section = self.config.quantization.get("bnb_4bit_quant_type", "fp4"), self.config.quantization
        if kind not in ("nf4", "fp4"):
            raise self.config.bad("bnb_4bit_quant_type", "nf4 or fp4", kind)
        if section.get("bnb_4bit_quant_storage", "uint8") != "uint8":
            raise CheckpointError(
                f"unsupported: {self.config.folder / self.config.file}: bnb_4bit_quant_storage "
                f"{str(section['bnb_4bit_quant_storage'])[:80]!r}: bytes in the clothes of another dtype; planned"
            )
        double = self.config.boolean("bnb_4bit_use_double_quant", False)
        found = {}
        for name in self.index:
            match = _STATE.match(name)
            if match is None:
                continue
            if match[2] != kind:
                raise self.index.bad(name, f"a state of {kind}, as bnb_4bit_quant_type says", match[2])
            found[match[1]] = self._locate(match[1], name, kind, double)
        return found

    def _locate(self, module: str, state: str, kind: str, double: bool) -> _Stored:
        said, weight = self.index.read_object(state), f"{module}.weight"
        shape = said.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(v) is int and 0 < v < 1 << 31 for v in shape):
            raise self.index.bad(state, "shape: [rows, columns]", str(shape)[:80])
        if said.get("quant_type") != kind:
            raise self.index.bad(state, f"quant_type {kind}", str(said.get("quant_type"))[:80])
        (n, k), size = shape, self._size(state, said, "blocksize")
        blocks = -(-n * k // size)
        index = self.index
        index.expect(weight, ("U8",), (-(-n * k // 2), 1))
        index.expect(f"{weight}.absmax", ("U8",) if double else ("F32",), (blocks,))
        index.expect(f"{weight}.quant_map", ("F32",), (16,))
        names, scale, offset = [weight, state, f"{weight}.absmax", f"{weight}.quant_map"], "fp32", None
        if double:
            inner, offset = self._size(state, said, "nested_blocksize"), said.get("nested_offset")
            if type(offset) is not float or not math.isfinite(offset):
                raise index.bad(state, "nested_offset: a number", str(offset)[:80])
            index.expect(f"{weight}.nested_absmax", ("F32",), (-(-blocks // inner),))
            index.expect(f"{weight}.nested_quant_map", ("F32",), (256,))
            names += [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"]
            scale = f"(lut8.flat{inner}*fp32+fp32)"
        fmt = Format.parse(f"{'nf4' if kind == 'nf4' else 'lut4'}.flat{size}*{scale}")
        bias = self._bias(module, n)
        return _Stored(n, k, fmt, (*names, *bias), bool(bias), offset)

    def _size(self, state: str, said: Mapping[str, Any], key: str) -> int:
        value = said.get(key)
        if type(value) is not int or not 0 < value <= 1 << 20:
            raise self.index.bad(state, f"{key}: a positive integer", str(value)[:80])
        return value

    def _read_four(self, module: str, m: _Stored, t: dict[str, Tensor]) -> QTensor:
        table = t["weight.quant_map"]
        checks.finite(self.index, f"{module}.weight.quant_map", table)
        if m.format.element == "nf4" and not torch.equal(table, values("nf4")):  # type: ignore[arg-type]
            raise self.index.bad(f"{module}.weight.quant_map", "the table of NF4", f"{table.tolist()[:4]}...")
        codes = unpack_nibbles(t["weight"].flatten(), high_first=True)[: m.n * m.k]
        scale: Tensor | QTensor = t["weight.absmax"].reshape(1, -1)
        if m.offset is None:
            self._scales(f"{module}.weight.absmax", t["weight.absmax"], codes, table, m.format)
        else:
            assert m.format.scale is not None and isinstance(scale, Tensor)
            outer, inner = t["weight.nested_absmax"], t["weight.nested_quant_map"]
            checks.finite(self.index, f"{module}.weight.nested_quant_map", inner)
            if not bool((inner.diff() > 0).all()):
                raise self.index.bad(f"{module}.weight.nested_quant_map", "increasing numbers", "others")
            self._scales(f"{module}.weight.nested_absmax", outer, t["weight.absmax"], inner, m.format.scale)
            scale = QTensor(m.format.scale, scale, outer.reshape(1, -1), offset=torch.tensor([[m.offset]]), table=inner)
        codes = codes.reshape(m.n, m.k)
        return QTensor(m.format, codes, scale, table=None if m.format.element == "nf4" else table)

    def _scales(self, name: str, scale: Tensor, codes: Tensor, table: Tensor, fmt: Format) -> None:
        """Finite, and 0 only where every code of the block stands for 0."""
        checks.scales(self.index, name, scale, zero_ok=True)
        if bool((scale == 0).any()):
            assert fmt.block is not None
            empty = (scale == 0).repeat_interleave(fmt.block.cols)[: codes.numel()]
            if bool((table[codes.long()][empty] != 0).any()):
                raise self.index.bad(name, "finite scales, 0 for blocks of zeros only", "0 for other blocks")

    # ---------------------------------------------------------------- 8 bit

    def _int8_input(self) -> Format | None:
        """Rows of the input are int8 too, unless columns with large elements are left out: then the batch decides."""
        config, threshold = self.config, self.config.quantization.get("llm_int8_threshold", 6.0)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
            raise config.bad("llm_int8_threshold", "a number that is not negative", threshold)
        if config.boolean("llm_int8_has_fp16_weight", False):
            raise CheckpointError(
                f"unsupported: {config.folder / config.file}: llm_int8_has_fp16_weight: such weights are not quantized"
            )
        if threshold == 0:
            return _INT8_INPUT
        warnings.warn(
            f"{config.folder / config.file}: llm_int8_threshold {threshold}: bitsandbytes quantizes inputs to int8 too,"
            f" but for the columns in which some row of the batch reaches the threshold; inputs stay unquantized here",
            CheckpointWarning,
            stacklevel=2,
        )
        return None

    def _eight(self, module: str) -> _Stored:
        n, k = self.index.expect(f"{module}.weight", ("I8",), (None, None)).shape
        self.index.expect(f"{module}.SCB", ("F32",), (n,))
        names, bias = [f"{module}.weight", f"{module}.SCB"], self._bias(module, n)
        if f"{module}.weight_format" in self.index:
            self.index.expect(f"{module}.weight_format", ("U8",), ())
            names.append(f"{module}.weight_format")
        return _Stored(n, k, _INT8, (*names, *bias), bool(bias))

    def _read_eight(self, module: str, t: dict[str, Tensor]) -> QTensor:
        checks.scales(self.index, f"{module}.SCB", t["SCB"], zero_ok=True)
        if "weight_format" in t and int(t["weight_format"]) != 0:
            found = f"{int(t['weight_format'])} (tiles of one generation of kernels)"
            raise self.index.bad(f"{module}.weight_format", "0, rows", found)
        assert _INT8.scale is not None
        return QTensor(_INT8, t["weight"], QTensor(_INT8.scale, t["SCB"].reshape(-1, 1), torch.full((1, 1), 127.0)))

    def _bias(self, module: str, n: int) -> tuple[str, ...]:
        if f"{module}.bias" not in self.index:
            return ()
        self.index.expect(f"{module}.bias", tuple(WIDE), (n,))
        return (f"{module}.bias",)


scheme = MappingScheme(
    BitsAndBytesMapping,
    Family(
        "bitsandbytes",
        "bitsandbytes 0.50",
        ("nf4, double quantized", "nf4", "fp4, double quantized", "fp4", "int8"),
        ("bnb_4bit_quant_storage other than uint8", "llm_int8_has_fp16_weight: such weights are not quantized"),
    ),
)
