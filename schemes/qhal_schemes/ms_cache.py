"""Caches and attention operands of ModelSlim.

C8: `k_proj.kv_cache_scale` and `_offset` [G * D], int8 per feature: round(x / scale + offset), (code - offset) * scale.
FA quantization: `<attention>.quant_type` names what is quantized, acts (q, k, v, p) before each format and _DYNAMIC
where scales are computed: INT8, FP8_DYNAMIC, Q_FP8_DYNAMIC_KV_FP8. Static scales are `fa_q.scale` [heads, 1] and so on,
with offsets of zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qhal.elements import dtype_name
from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import KVFormat
from qhal.specs import KVSpec, Operand
from qhal_schemes import checks
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.ms_description import Description
from qhal_schemes.source import WIDE, TensorIndex

_LAYER = re.compile(r"(?:^|.*?\.)(\d+)\.")
_C8 = re.compile(r"(.*)\.([kv])_proj\.kv_cache_(?:scale|offset)$")
_FA = re.compile(r"(.*)\.fa_([qkvp])\.(?:scale|offset)$")
_PART = re.compile(r"(?:([QKVP]+)_)?(INT8|FP8|MXFP4|MXFP8)(_DYNAMIC)?(?:_|$)")
_ELEMENT = {"INT8": "int8", "FP8": "e4m3fn"}
_DYNAMIC = {
    "INT8": "int8.row*fp32",
    "FP8": "e4m3fn.row*fp32",
    "MXFP4": "e2m1.g32*e8m0@e8m0=over1.75,round=away",
    "MXFP8": "e4m3fn.g32*e8m0@round=away",
}


@dataclass(frozen=True)
class _Side:
    """One operand: its format and, if static, the tensors of its scale and offset."""

    format: Format
    scale: str = ""
    offset: str = ""


class Caches:
    """The quantized caches of a checkpoint. layers: layer number -> attention module."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex, description: Description) -> None:
        self.config, self.index, self.description = config, index, description
        c8 = dict.fromkeys(m[1] for name in index if (m := _C8.match(name)))
        fa = dict.fromkeys([*description.attention, *(m[1] for name in index if (m := _FA.match(name)))])
        self._sides: dict[int, dict[str, _Side]] = {}
        self.layers: dict[int, str] = {}
        for module in [*c8, *fa]:
            found = _LAYER.match(f"{module}.")
            number = int(found[1]) if found else -1
            if number < 0 or number in self.layers:
                other = f"{self.layers[number]} has the same layer number" if found else "it has no layer number"
                raise CheckpointError(f"{index.folder}: {module}: the cache of an attention module, but {other}")
            if config.value("kv_lora_rank") is not None:
                raise CheckpointError(
                    f"unsupported: {index.folder}: {module}: quantized latent attention (MLA), where a part of the "
                    f"query is quantized; planned"
                )
            self.layers[number] = module
            self._sides[number] = self._feature_wise(module) if module in c8 else self._attention(module)
        said = config.quantization.get("kv_cache_type") or config.quantization.get("kv_quant_type")
        if said is not None and not c8:
            raise config.bad("kv_cache_type", "no such key, as no k_proj has a kv_cache_scale", said)

    def tensors(self, layer: int) -> list[str]:
        """The tensors of one layer's cache."""
        return [n for side in self._sides[layer].values() for n in (side.scale, side.offset) if n]

    def describe(self, layer: int) -> KVFormat:
        """The formats of one layer's cache and attention operands."""
        sides = {name: side.format for name, side in self._sides[layer].items()}
        plain = Format(dtype_name(self.config.dtype))
        dim = self.config.head_dim
        return KVFormat(
            "mha", sides.get("k", plain), sides.get("v", plain), sides.get("q"), sides.get("p"),
            heads=self.config.kv_heads, k_dim=dim, v_dim=dim, name=self.layers[layer],
        )  # fmt: skip

    def spec(self, layer: int) -> KVSpec:
        """Formats and static scales of one layer's cache and attention operands."""
        sides = {name: self._operand(side) for name, side in self._sides[layer].items()}
        plain = Operand(Format(dtype_name(self.config.dtype)))
        dim = self.config.head_dim
        return KVSpec(
            sides.get("k", plain), sides.get("v", plain), sides.get("q"), sides.get("p"),
            heads=self.config.kv_heads, k_dim=dim, v_dim=dim, name=self.layers[layer],
        )  # fmt: skip

    def _feature_wise(self, module: str) -> dict[str, _Side]:
        """C8: one scale and offset for every feature of every head."""
        features, sides = self.config.kv_heads * self.config.head_dim, {}
        for part in "kv":
            scale, offset = (f"{module}.{part}_proj.kv_cache_{what}" for what in ("scale", "offset"))
            shape = self.index.expect(scale, tuple(WIDE), (features or None,)).shape
            self.index.expect(offset, tuple(WIDE), shape)
            sides[part] = _Side(Format.parse("int8-fp32.col*fp32"), scale, offset)
        return sides

    def _attention(self, module: str) -> dict[str, _Side]:
        """FA quantization: what quant_type says, with the tensors of static operands."""
        text = self.description.attention.get(module, "INT8")  # the older writer has static int8 only, and no key
        where = f"{self.config.folder / self.config.file}: {module}.quant_type"
        sides: dict[str, _Side] = {}
        at = 0
        while at < len(text):
            found = _PART.match(text, at)
            acts = (found[1] or "QKV").lower() if found else ""
            if not found or found.end() == at or set(acts) & set(sides) or len(set(acts)) != len(acts):
                raise CheckpointError(
                    f"{where}: {text[:80]!r} is no list of formats such as INT8 or Q_FP8_DYNAMIC_KV_FP8; "
                    f"known: {', '.join(_DYNAMIC)}"
                )
            static = not found[3] and found[2] in _ELEMENT
            if not static and not found[3]:
                raise CheckpointError(f"unsupported: {where}: static {found[2]}; it has computed scales only")
            for act in acts:
                fmt = Format.parse(_DYNAMIC[found[2]])
                sides[act] = self._static(module, act, _ELEMENT[found[2]]) if static else _Side(fmt)
            at = found.end()
        return sides

    def _static(self, module: str, act: str, element: str) -> _Side:
        """One scale per head; a single one serves every head."""
        heads = self.config.kv_heads if act in "kv" else self.config.count("num_attention_heads") or 0
        scale, offset = (f"{module}.fa_{act}.{what}" for what in ("scale", "offset"))
        count = self.index.expect(scale, tuple(WIDE), (None, 1)).shape[0]
        self.index.expect(offset, ("I8", *WIDE), (count, 1))
        if count not in (1, heads):
            raise self.index.bad(scale, f"[{heads}, 1], one scale per head, or [1, 1]", f"[{count}, 1]")
        block = "head" if count == heads and heads > 1 else "tensor"
        return _Side(Format.parse(f"{element}.{block}*fp32"), scale, offset)

    def _operand(self, side: _Side) -> Operand:
        if not side.scale:
            return Operand(side.format)
        scale, offset = self.index.read_all((side.scale, side.offset)).values()
        checks.scales(self.index, side.scale, scale, positive=True)
        checks.finite(self.index, side.offset, offset)
        if side.format.zero is not None:
            return Operand(side.format, scale.flatten(), offset.flatten())
        if bool((offset != 0).any()):
            raise self.index.bad(side.offset, "zeros: attention operands are symmetric", "other values")
        return Operand(side.format, scale.flatten())
