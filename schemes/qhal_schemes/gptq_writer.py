"""Writing GPTQ: the inverse of `gptq.py`. Unsigned codes around zero points, one setting per module.

Files without zero points to tell (every one in the middle) are written as format `gptq` (v1, zero points minus one),
which every reader knows; others as `gptq_v2`, since v1 cannot hold a zero point of 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.blocks import Block
from qhal.elements import element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.layer_formats import KVFormat, LinearFormat
from qhal.specs import LinearSpec
from qhal.tensors import QTensor
from qhal_schemes.packing import pack, words
from qhal_schemes.target import STORED, Goal, Layer, Target, Written, only_weights, unquantized_input
from qhal_schemes.writing import TensorLayout

_BITS = (2, 3, 4, 8)


class GPTQTarget(Target):
    """AutoGPTQ and GPTQModel checkpoints: 2, 3, 4 and 8 bits, per group or per channel, weights only."""

    name: ClassVar[str] = "gptq"

    def goal(self, f: LinearFormat) -> Goal:
        """uint<b>-uint<b> with the source's blocks; scales in 16 bits, bf16 if the source has them so."""
        weight = integer_goal(f, _BITS, self.dtype, self.name)
        return Goal(weight, losses=unquantized_input(f, "gptq is a format for weights"))

    def layout(self, layer: Layer) -> dict[str, TensorLayout]:
        """qweight, qzeros, scales, g_idx and a bias."""
        f, fmt = layer.format, layer.goal.weight
        bits, (_, groups) = element(fmt.element).bits, _grid(fmt, f)
        if f.k * bits % 32 or f.n * bits % 32:
            raise FormatError(f"gptq packs {bits}-bit codes into whole words; [{f.n}, {f.k}] does not fill them")
        assert fmt.scale is not None
        return {
            "qweight": TensorLayout("I32", (words(f.k, bits), f.n)),
            "qzeros": TensorLayout("I32", (groups, words(f.n, bits))),
            "scales": TensorLayout(STORED[fmt.scale.element], (groups, f.n)),
            "g_idx": TensorLayout("I32", (f.k,)),
            **self.bias_layout(f),
        }

    def tensors(self, layer: Layer, spec: LinearSpec) -> dict[str, Tensor]:
        """Codes packed along K, zero points along N."""
        w, fmt = spec.weight, layer.goal.weight
        assert isinstance(w, QTensor) and isinstance(w.zero, Tensor) and isinstance(w.scale, Tensor)
        bits, k = element(fmt.element).bits, w.shape[1]
        zero = w.zero - 1 if symmetric(layer) else w.zero  # v1 or v2, see `written`
        index = w.group_index if w.group_index is not None else torch.arange(k, dtype=torch.int32) // _size(fmt, k)
        return {
            "qweight": pack(w.codes, bits).t().contiguous(),
            "qzeros": pack(zero.t().contiguous(), bits),
            "scales": w.scale.t().contiguous(),
            "g_idx": index.to(torch.int32),
            **self.bias_tensors(spec),
        }

    def written(self, layers: Sequence[Layer], plain: Mapping[str, str], cache: KVFormat | None) -> Written:
        """The commonest setting for all, the others and the plain modules of the blocks under `dynamic`."""
        settings = {layer.module: _setting(layer) for layer in layers}
        if len({s["sym"] for s in settings.values()}) > 1:
            raise FormatError("gptq: one file has zero points or has none; convert to compressed-tensors instead")
        common = Counter(tuple(s.items()) for s in settings.values()).most_common(1)[0][0]
        section: dict[str, Any] = {"quant_method": "gptq", **dict(common), "lm_head": _has_head(settings)}
        section["checkpoint_format"] = section["format"] = "gptq" if section["sym"] else "gptq_v2"
        dynamic: dict[str, Any] = {f"-:^{re.escape(m)}$": {} for m in plain if any(p.isdigit() for p in m.split("."))}
        for module, s in settings.items():
            if tuple(s.items()) != common:
                dynamic[f"+:^{re.escape(module)}$"] = {k: s[k] for k in ("bits", "group_size", "desc_act")}
        if dynamic:
            section["dynamic"] = dynamic
        return Written(section, {"quantize_config.json": section})


def _has_head(modules: Iterable[str]) -> bool:
    """Whether the output head is quantized: engines choose its loader by this key."""
    return any(module.rpartition(".")[2] == "lm_head" for module in modules)


def integer_goal(f: LinearFormat, bits: Sequence[int], dtype: torch.dtype, name: str) -> Format:
    """uint<b>-uint<b> as weight-only integer files hold it; FormatError with what such files hold."""
    w = only_weights(f, name)
    held = f"{name} holds int and uint of {', '.join(map(str, bits))} bits in groups or rows"
    if w.block is None or w.scale is None:
        raise FormatError(f"{held}, not {w}")
    e = element(w.element)
    if not e.integer or w.offset is not None or w.block.kind not in ("row", "group", "tensor") or w.op != "*":
        raise FormatError(f"{held}, not {w}")
    width = next((b for b in bits if b >= e.bits), None)
    if width is None:
        raise FormatError(f"{held}, not {w}")
    block = Block("row") if w.block.kind == "tensor" else w.block
    sixteen = w.scale.element if w.scale.plain and w.scale.element in ("fp16", "bf16") else ""
    scale = sixteen or ("bf16" if dtype == torch.bfloat16 else "fp16")
    rule = "" if w.zero is None else "@domain=minmax"
    return Format.parse(f"uint{width}-uint{width}.{block}*{scale}{rule}")


def _setting(layer: Layer) -> dict[str, Any]:
    fmt = layer.goal.weight
    assert fmt.block is not None
    return {
        "bits": element(fmt.element).bits,
        "group_size": -1 if fmt.block.kind == "row" else fmt.block.cols,
        "desc_act": layer.format.group_index,
        "sym": symmetric(layer),
    }


def symmetric(layer: Layer) -> bool:
    """Whether every zero point is the middle code, as far as the formats tell."""
    w, goal = layer.format.weight, layer.goal.weight
    return isinstance(w, Format) and w.zero is None and element(w.element).bits == element(goal.element).bits


def _size(fmt: Format, k: int) -> int:
    assert fmt.block is not None
    return k if fmt.block.kind == "row" else fmt.block.cols


def _grid(fmt: Format, f: LinearFormat) -> tuple[int, int]:
    assert fmt.block is not None
    return fmt.block.grid(f.n, f.k)
