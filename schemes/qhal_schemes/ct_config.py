"""The configuration of compressed-tensors: config groups, quantization arguments, and the formats they spell.

Keys as in compressed_tensors/quantization/quant_args.py and quant_config.py, versions 0.13 to 0.20. Anything that is
valid there but not read here is refused by name, never passed over.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal_schemes.base import CheckpointWarning
from qhal_schemes.config import CheckpointConfig, integer, names

PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4, MXFP8, MXFP6 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "mxfp6-pack-quantized"
FORMATS = (PACKED, INT, FLOAT, NAIVE, NVFP4, MXFP4, MXFP8, MXFP6)
_WHOLE = ("mixed-precision", "dense")
"""What stands for a whole file whose groups have formats of their own."""
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_SCALE_DTYPES = ("float32", "float16", "bfloat16", "uint8", "float8_e8m0fnu", "float8_e4m3fn")
_KEYS = frozenset({
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
})  # fmt: skip
_BITS = {"int": (2, 3, 4, 5, 6, 7, 8), "float": (4, 6, 8)}


@dataclass(frozen=True)
class Arguments:
    """One QuantizationArgs: how weights, inputs or a cache are quantized."""

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]
    dynamic: bool | str
    actorder: bool
    exponent_scale: bool

    @property
    def element(self) -> str:
        """The element of the codes."""
        if self.kind == "int":
            return f"int{self.bits}"
        return {8: "e4m3fn", 6: "e2m3", 4: "e2m1"}[self.bits]

    @property
    def block_name(self) -> str:
        """The block of one scale, in the grammar of formats."""
        if self.strategy in ("group", "tensor_group"):
            return f"g{self.group_size}"
        if self.strategy == "block":
            return f"{self.block[0]}x{self.block[1]}"
        return {"tensor": "tensor", "channel": "row", "token": "row", "attn_head": "head"}[self.strategy]


@dataclass(frozen=True)
class Group:
    """One entry of config_groups."""

    name: str
    targets: tuple[str, ...]
    weights: Arguments
    inputs: Arguments | None
    format: str


def read_groups(config: CheckpointConfig) -> list[Group]:
    """Every config group, its arguments checked."""
    section = config.quantization
    status = section.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):  # old versions write frozen for compressed files
        raise _unsupported(config, "quantization_status", f"{str(status)[:80]!r}: the weights are not compressed")
    groups = section.get("config_groups", {})
    if not isinstance(groups, dict):
        raise config.bad("config_groups", "an object of groups", groups)
    return [_group(config, name, value) for name, value in groups.items()]


def _group(config: CheckpointConfig, name: str, value: object) -> Group:
    path = f"config_groups.{name}."
    if not isinstance(value, dict):
        raise config.bad(path[:-1], "an object", value)
    if value.get("output_activations") is not None:
        raise _unsupported(config, path + "output_activations", "quantized outputs")
    weights = arguments(config, value.get("weights"), path + "weights.")
    if weights is None:
        raise _unsupported(config, path + "weights", "a group that quantizes inputs only")
    whole = config.quantization.get("format")
    if whole is not None and whole not in (*FORMATS, *_WHOLE):
        raise _unsupported(config, "format", f"{str(whole)[:80]!r}; can be read: {', '.join((*FORMATS, *_WHOLE))}")
    fmt = value.get("format")
    fmt = whole if fmt is None else fmt
    if fmt is None or fmt == "mixed-precision":
        raise config.bad(path + "format", f"one of {', '.join(FORMATS)}", fmt)
    if fmt not in FORMATS:
        raise _unsupported(config, path + "format", f"{str(fmt)[:80]!r}; can be read: {', '.join(FORMATS)}")
    targets = names(config, value, "targets", path)
    if not targets:
        raise config.bad(path + "targets", "a list of names", value.get("targets"))
    if weights.strategy in ("token", "attn_head") or weights.dynamic:
        raise config.bad(path + "weights", "static weights per tensor, channel, group or block", weights.strategy)
    _fits(config, path, fmt, weights)
    return Group(name, targets, weights, _inputs(config, value.get("input_activations"), fmt, path), fmt)


def _inputs(config: CheckpointConfig, value: object, fmt: str, path: str) -> Arguments | None:
    path += "input_activations."
    a = arguments(config, value, path)
    if a is None:
        return None
    if not a.symmetric and a.kind == "float":
        raise config.bad(path + "symmetric", "true for floats", False)
    known = {"tensor": (True, False), "token": (True,), "group": (True,), "tensor_group": (True, "local")}
    if a.kind == "int" and fmt not in (PACKED, INT, NAIVE):
        raise _unsupported(config, path + "type", f"integer inputs of {fmt} weights")
    if a.dynamic not in known.get(a.strategy, ()):
        raise _unsupported(config, path + "strategy", f"inputs {a.strategy} with dynamic {a.dynamic}")
    if a.strategy == "tensor_group" and (a.kind, a.bits) != ("float", 4):
        raise _unsupported(config, path + "strategy", f"tensor_group inputs of {a.kind}{a.bits}")
    if a.kind == "float" and a.bits != 8 and a.strategy not in ("group", "tensor_group"):
        raise _unsupported(config, path + "num_bits", f"{a.kind}{a.bits} inputs per {a.strategy}")
    mx = fmt in (MXFP4, MXFP8, MXFP6) and a.kind == "float" and a.strategy == "group"
    return replace(a, exponent_scale=True) if mx else a


def arguments(config: CheckpointConfig, value: object, path: str) -> Arguments | None:
    """One QuantizationArgs, or None for null."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise config.bad(path[:-1], "an object", value)
    kind = str(value.get("type", "int")).lower()
    if kind not in _BITS:
        raise config.bad(path + "type", "int or float", value.get("type"))
    bits = integer(config, value, "num_bits", _BITS[kind], 8, path)
    size = value.get("group_size")
    if size is not None and size != -1:
        size = integer(config, value, "group_size", path=path)
    strategy = value.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else ("channel" if size == -1 else "group")
    if strategy not in _STRATEGIES:
        raise config.bad(path + "strategy", f"one of {', '.join(_STRATEGIES)}", strategy)
    grouped = strategy in ("group", "tensor_group")
    if grouped and size in (None, -1):
        raise config.bad(path + "group_size", "a positive integer with strategy group", size)
    if not grouped and size not in (None, -1):
        raise config.bad(path + "strategy", "group where group_size is given", strategy)
    symmetric, dynamic = value.get("symmetric", True), value.get("dynamic", False)
    if not isinstance(symmetric, bool):
        raise config.bad(path + "symmetric", "true or false", symmetric)
    if not isinstance(dynamic, bool) and dynamic != "local":
        raise config.bad(path + "dynamic", "true, false or local", dynamic)
    order = value.get("actorder")
    if not (order is None or isinstance(order, bool) or order in ("group", "dynamic", "weight", "static")):
        raise config.bad(path + "actorder", "group, weight or null", order)
    dtype = str(value.get("scale_dtype") or "").removeprefix("torch.")
    if value.get("scale_dtype") is not None and dtype not in _SCALE_DTYPES:
        raise config.bad(path + "scale_dtype", f"null or one of {', '.join(_SCALE_DTYPES)}", value["scale_dtype"])
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        warnings.warn(
            f"{config.folder / config.file}: {path}{unknown[0][:80]}: no argument of compressed-tensors that is known "
            f"here; it is not looked at",
            CheckpointWarning,
            stacklevel=2,
        )
    block = _block_structure(config, value, path) if strategy == "block" else (1, 1)
    in_order = order in (True, "group", "dynamic")
    return Arguments(bits, kind, symmetric, strategy, size or -1, block, dynamic, in_order, dtype == "uint8")


def _block_structure(config: CheckpointConfig, value: Mapping[str, Any], path: str) -> tuple[int, int]:
    block = value.get("block_structure")
    if isinstance(block, str):  # "128x128", written by old versions
        block = [int(n) if n.isdigit() else n for n in block.split("x")]
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise config.bad(path + "block_structure", "[rows, columns]", value.get("block_structure"))
    return block[0], block[1]


def _fits(config: CheckpointConfig, path: str, fmt: str, a: Arguments) -> None:
    """Whether a file format can hold such weights."""
    if fmt == NAIVE:
        fmt = INT if a.kind == "int" else FLOAT
    wanted = {PACKED: ("int", None), INT: ("int", None), FLOAT: ("float", 8), NVFP4: ("float", 4)} | {
        MXFP4: ("float", 4), MXFP8: ("float", 8), MXFP6: ("float", 6)
    }  # fmt: skip
    kind, bits = wanted[fmt]
    if a.kind != kind or bits not in (None, a.bits):
        raise config.bad(path + "format", f"{kind}{bits or ''} weights for {fmt}", f"{a.kind}{a.bits}")
    if not a.symmetric and kind == "float":
        raise config.bad(path + "weights.symmetric", f"true for {fmt}", False)
    if fmt == NVFP4 and a.strategy != "tensor_group":
        raise config.bad(path + "weights.strategy", f"tensor_group for {fmt}", a.strategy)
    if fmt in (MXFP4, MXFP8, MXFP6) and a.strategy != "group":
        raise config.bad(path + "weights.strategy", f"group for {fmt}", a.strategy)
    if fmt in (PACKED, INT, FLOAT) and a.strategy == "tensor_group":
        raise config.bad(path + "weights.strategy", f"tensor, channel, group or block for {fmt}", a.strategy)
    if a.actorder and (fmt != PACKED or a.strategy != "group"):
        raise config.bad(path + "weights.actorder", f"null for {fmt} with strategy {a.strategy}", "group")


@lru_cache(maxsize=256)
def weight_format(fmt: str, a: Arguments, scale: str, sparsity: str = "") -> Format:
    """The Format of weights; `scale` is the element of the stored scale. Rules are left out: nothing re-quantizes."""
    if fmt == NVFP4:
        return Format.parse(f"e2m1.{a.block_name}*({scale}.tensor/fp32)")
    zero = "" if a.symmetric else f"-{a.element}"
    return Format.parse(f"{a.element}{zero}.{a.block_name}*{scale}{sparsity}")


@lru_cache(maxsize=256)
def input_format(a: Arguments, scale: str) -> Format:
    """The Format of inputs, in the serving rule: fp32 arithmetic, dynamic scales stored in `scale`.

    Dynamic symmetric integers divide by half the span of the codes (127.5 for int8), not by the largest code; MX
    exponents go up at a mantissa of 1.75. Asymmetric inputs take the range of the data with 0 in it.
    """
    if a.strategy == "tensor_group":
        return Format.parse(f"{a.element}.{a.block_name}*(e4m3fn.tensor/fp32)")
    if a.exponent_scale:
        return Format.parse(f"{a.element}.{a.block_name}*e8m0@e8m0=up1.75")
    if not a.symmetric:
        rule = "@domain=minmax" if a.dynamic else ""
        return Format.parse(f"{a.element}-{a.element}.{a.block_name}*{scale}{rule}")
    rule = f"@qmax={(2**a.bits - 1) / 2:.17g}" if a.dynamic and a.kind == "int" else ""
    return Format.parse(f"{a.element}.{a.block_name}*{scale}{rule}")


def _unsupported(config: CheckpointConfig, key: str, what: str) -> CheckpointError:
    return CheckpointError(f"unsupported: {config.folder / config.file}: {key}: {what}; planned")
