"""Writing Quark: the inverse of `quark.py`. The commonest record for all modules, the others in layer_quant_config.

Codes of four bits are packed in the order `reorder`, as Quark's exporter does. A cache is an output_tensors of k_proj
and v_proj, whose records stand under the patterns that engines look for (`export.kv_cache_group`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from qhal.errors import FormatError
from qhal.layer_formats import KVFormat, LinearFormat
from qhal.specs import KVSpec, LinearSpec
from qhal.tensors import QTensor
from qhal_schemes.packing import pack_nibbles, pack_order, pack_six
from qhal_schemes.quark import dynamic_format
from qhal_schemes.quark_config import INTEGERS, MX
from qhal_schemes.quark_kv import PROJECTION
from qhal_schemes.quark_specs import Weight, cache_words, input_words, spec_json, weight_words
from qhal_schemes.quark_weights import STORED as CODES
from qhal_schemes.target import STORED, Goal, Layer, Target, Written, changed_input, only_weights
from qhal_schemes.writing import TensorLayout

VERSION = "0.13"  # of Quark: the layout that is written
_PROJECTIONS = ("*k_proj", "*v_proj")
Record = dict[str, Any]


class QuarkTarget(Target):
    """Quark checkpoints, as amd-quark 0.13 exports them."""

    name: ClassVar[str] = "quark"

    def goal(self, f: LinearFormat) -> Goal:
        """The same weight and input in this file format's words."""
        if f.group_index:
            raise FormatError("quark files have no activation order (g_idx); --to gptq keeps it")
        words = weight_words(only_weights(f, self.name))
        spec = input_words(f)
        given = None if spec is None else f.input if f.static_input else dynamic_format(spec)
        return Goal(words.format, given, changed_input(f, given))

    def layout(self, layer: Layer) -> dict[str, TensorLayout]:
        """Codes, scales, zero points (zeros for symmetric integers), a static input's scale and zero point, a bias."""
        f, words = layer.format, _words(layer.format)
        spec, block, n, k = words.specs[-1], layer.goal.weight.block, layer.format.n, layer.format.k
        assert block is not None
        across, four = _transposed(words), spec.dtype in ("int4", "uint4")
        if (
            (four and not across and k % 8)
            or (spec.dtype in MX and k % 4)
            or (block.kind == "group" and k % block.cols)
        ):
            raise FormatError(f"quark packs whole words and groups of {spec}; [{n}, {k}] does not fill them")
        grid = block.grid(n, k)
        scales = {"per_tensor": (), "per_channel": (n,)}.get(spec.qscheme, grid[::-1] if across else grid)
        found = {"weight": TensorLayout(CODES.get(spec.dtype, "I32"), _shape(words, n, k))}
        suffix = "_2" if words.outer else ""
        found[f"weight_scale{suffix}"] = TensorLayout("U8" if spec.exponent_scale else STORED[words.scale], scales)
        if words.outer:
            rows = (n,) if words.specs[0].qscheme == "per_channel" else ()
            found["weight_scale"] = TensorLayout(STORED[words.outer], rows)
        if spec.dtype in INTEGERS:
            zeros = (*scales[:-1], -(-n // 8)) if four and scales else scales
            found[f"weight_zero_point{suffix}"] = TensorLayout("I32" if four else CODES[spec.dtype], zeros)
        given = f.input
        if f.static_input and given is not None:
            assert given.scale is not None
            found["input_scale"] = TensorLayout(STORED[given.scale.element], ())
            if given.element in ("int8", "uint8"):
                found["input_zero_point"] = TensorLayout(CODES[given.element], ())
        return found | self.bias_layout(f)

    def tensors(self, layer: Layer, spec: LinearSpec) -> dict[str, Tensor]:
        """Codes packed, integers in groups transposed."""
        w, words, announced = spec.weight, _words(layer.format), self.layout(layer)
        assert isinstance(w, QTensor)
        how, across = words.specs[-1], _transposed(words)
        codes = w.codes.t().contiguous() if across else w.codes
        found = {"weight": _packed(codes, how.dtype)}
        suffix = "_2" if words.outer else ""
        scale, zero = w.scale, w.zero
        if isinstance(scale, QTensor):
            assert isinstance(scale.scale, Tensor)
            found["weight_scale"], scale = scale.scale.reshape(announced["weight_scale"].shape), scale.codes
        assert scale is not None and not isinstance(zero, QTensor)
        found[f"weight_scale{suffix}"] = _plane(scale, announced[f"weight_scale{suffix}"], across)
        name = f"weight_zero_point{suffix}"
        if name in announced:
            zero = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero
            four = announced[name].dtype == "I32" and bool(announced[name].shape)
            zero = (zero.t() if across else zero.flatten()).contiguous() if four else zero.to(w.codes.dtype)
            found[name] = _packed(zero, how.dtype) if four else _plane(zero, announced[name], across)
            if announced[name].dtype == "I32":
                found[name] = found[name].to(torch.int32)
        if "input_scale" in announced:
            assert spec.input is not None and spec.input.scale is not None
            found["input_scale"] = spec.input.scale.reshape(())
        if "input_zero_point" in announced:
            assert spec.input is not None
            given = torch.zeros(1, dtype=torch.int8) if spec.input.zero is None else spec.input.zero
            dtype = torch.int8 if announced["input_zero_point"].dtype == "I8" else torch.uint8
            found["input_zero_point"] = given.to(dtype).reshape(())
        return found | self.bias_tensors(spec)

    def written(self, layers: Sequence[Layer], plain: Mapping[str, str], cache: KVFormat | None) -> Written:
        """The section of config.json."""
        records = {layer.module: _record(layer, cache) for layer in layers}
        common = _commonest(list(records.values()))
        overrides: dict[str, Record] = {}
        for pattern in _PROJECTIONS if cache is not None else ():
            leaf = pattern.removeprefix("*")
            overrides[pattern] = _commonest([r for m, r in records.items() if m.endswith(leaf) and r["output_tensors"]])
        shared = dict(overrides)
        for module, record in records.items():
            general = next((r for pattern, r in shared.items() if module.endswith(pattern[1:])), common)
            if record != general:
                overrides[module] = record
        section = {
            "quant_method": self.name,
            "quant_mode": "eager_mode",
            "version": VERSION,
            "global_quant_config": common,
            "layer_quant_config": overrides,
            "layer_type_quant_config": {},
            "exclude": list(plain),
            "algo_config": None,
            "softmax_quant_spec": None,
            "kv_cache_quant_config": shared,
            "kv_cache_post_rope": False,
            "export": {
                "kv_cache_group": list(shared),
                "min_kv_scale": 0.0,
                "pack_method": "reorder",
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
        }
        return Written(section)

    def cache_goal(self, f: KVFormat, projections: Mapping[str, bool]) -> None:
        """Static e4m3fn or int8 with one scale, as outputs of quantized projections."""
        if f.kind != "mha" or f.q is not None or f.p is not None:
            raise FormatError(f"quark holds caches of keys and values alone, not {f}")
        for part in (f.k, f.v):
            cache_words(part)
        plain = [name for name, quantized in projections.items() if not quantized or PROJECTION.match(name) is None]
        if plain:
            raise FormatError(f"quark's caches are outputs of quantized layers, and {plain[0]} is none")

    def cache_tensors(self, module: str, spec: KVSpec) -> dict[str, Tensor]:
        """output_scale of k_proj and v_proj."""
        found = {}
        for part, operand in (("k", spec.k), ("v", spec.v)):
            assert operand.scale is not None
            found[f"{module}.{part}_proj.output_scale"] = operand.scale.reshape(())
        return found


def _words(f: LinearFormat) -> Weight:
    return weight_words(only_weights(f, QuarkTarget.name))


def _transposed(words: Weight) -> bool:
    """Whether codes, scales and zero points are stored [K, N]."""
    return words.specs[-1].dtype in INTEGERS and words.specs[-1].qscheme == "per_group"


def _shape(words: Weight, n: int, k: int) -> tuple[int, int]:
    dtype, across = words.specs[-1].dtype, _transposed(words)
    if dtype in ("int4", "uint4"):
        return (k, -(-n // 8)) if across else (n, k // 8)
    if dtype in MX:
        return (n, k // 2) if dtype == "fp4" else (n, k // 4 * 3)
    return (k, n) if across else (n, k)


def _packed(codes: Tensor, dtype: str) -> Tensor:
    if dtype in ("int4", "uint4"):
        return pack_order(pad(codes, (0, -codes.shape[-1] % 8)))
    if dtype in MX:
        return pack_nibbles(codes) if dtype == "fp4" else pack_six(codes)
    return codes


def _plane(plane: Tensor, announced: TensorLayout, across: bool) -> Tensor:
    return (plane.t().contiguous() if across else plane).reshape(announced.shape)


def _record(layer: Layer, cache: KVFormat | None) -> Record:
    words, given, found = _words(layer.format), input_words(layer.format), PROJECTION.match(layer.module)
    outputs = None
    if cache is not None and found is not None:
        outputs = spec_json(cache_words(cache.k if found[3] == "k" else cache.v))
    weight = [spec_json(s) for s in words.specs]
    return {
        "weight": weight if len(weight) > 1 else weight[0],
        "input_tensors": None if given is None else spec_json(given),
        "output_tensors": outputs,
        "bias": None,
        "target_device": None,
    }


def _commonest(records: Sequence[Record]) -> Record:
    count = Counter(json.dumps(r) for r in records)
    found: Record = json.loads(count.most_common(1)[0][0])
    return found
