"""Writing ModelOpt: the inverse of `modelopt.py`. Every module gets the quant_algo that holds its weight and input.

One algorithm for all modules, or `quantized_layers` with one for each; the same is said in hf_quant_config.json and in
config.json, which engines read by turns. Numbers that ModelOpt stores in the model's dtype (pre_quant_scale, low-rank
factors) are written in float32, so that none is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.elements import element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.layer_formats import KVFormat, LinearFormat
from qhal.rotations import Diagonal
from qhal.specs import KVSpec, LinearSpec
from qhal.tensors import QTensor
from qhal_schemes.modelopt_algorithms import ALGORITHMS, CACHES, Algorithm
from qhal_schemes.modelopt_config import MIXED, SIDE_FILE
from qhal_schemes.packing import pack_int4, pack_nibbles
from qhal_schemes.target import STORED, Goal, Layer, Target, Written, changed_input, only_weights, positive
from qhal_schemes.writing import TensorLayout

VERSION = "0.47.0"  # of ModelOpt: the layout that is written
_PRE_SCALED = ("NVFP4_AWQ", "NVFP4_SVD", "W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL")
"""What ModelOpt stores with a pre_quant_scale. Other loaders would not look for one elsewhere."""
_SCALED_FORM = {"NVFP4": "NVFP4_AWQ"}
"""Algorithms that go by another name as soon as one module of the model has a pre_quant_scale."""
_LOWER = ("FP8_PB_WO", "MXFP4")
"""What ModelOpt spells in lower case."""


class ModelOptTarget(Target):
    """ModelOpt checkpoints, as version 0.47 lays them out."""

    name: ClassVar[str] = "modelopt"

    def goal(self, f: LinearFormat) -> Goal:
        """The weight in the words of an algorithm that has its input too, or else of the one that loses least."""
        algo, group = _choose(f)
        a = ALGORITHMS[algo]
        given = a.input_format(group)
        return Goal(a.format(group), given, changed_input(f, given))

    def layout(self, layer: Layer) -> dict[str, TensorLayout]:
        """Codes, scales, a static input's scale, pre_quant_scale, low-rank factors and a bias."""
        f, (algo, group) = layer.format, _choose(layer.format)
        a, n, k = ALGORITHMS[algo], f.n, f.k
        block, inner = a.format(group).block, a.format(group).scale
        assert block is not None and inner is not None
        width = {"int4": 2, "e2m1": 1}.get(a.format().element)
        if (width == 2 and n % 2) or (block.kind == "group" and k % block.cols):
            raise FormatError(f"modelopt's {algo} needs pairs of rows and whole groups; [{n}, {k}] does not divide so")
        shape = {2: (n // 2, k), 1: (n, k // 2), None: (n, k)}[width]
        codes = {"e4m3fn": "F8_E4M3", "int8": "I8"}.get(a.format().element, "U8")
        rows, columns = block.grid(n, k)
        grid = {"tensor": (), "row": (n,), "group": (n, columns), "tile": (rows, 1, columns, 1)}[block.kind]
        scale = {"e8m0": "U8", "e4m3fn": "F8_E4M3"}.get(inner.element, "F32")
        found = {"weight": TensorLayout(codes, shape), "weight_scale": TensorLayout(scale, grid)}
        one = TensorLayout("F32", ())
        if not inner.plain or a.operand:
            found["weight_scale_2"] = one
        if a.static:
            found["input_scale"] = one
        if f.rotate_in:
            found["pre_quant_scale"] = TensorLayout("F32", (k,))
        if f.low_rank:
            found["svdquant_lora_a"] = TensorLayout("F32", (f.low_rank, k))
            found["svdquant_lora_b"] = TensorLayout("F32", (n, f.low_rank))
        return found | self.bias_layout(f)

    def tensors(self, layer: Layer, spec: LinearSpec) -> dict[str, Tensor]:
        """Codes of four bits in pairs, scales in the shapes of `layout`."""
        w, announced = spec.weight, self.layout(layer)
        assert isinstance(w, QTensor)
        codes, scale = w.codes, w.scale
        if w.format.element == "e2m1":
            codes = pack_nibbles(codes)
        elif w.format.element == "int4":
            codes = pack_int4(codes, 0).view(torch.uint8)
        found = {"weight": codes}
        if isinstance(scale, QTensor):
            assert isinstance(scale.scale, Tensor)
            found["weight_scale_2"], scale = scale.scale.reshape(()), scale.codes
        else:
            positive("weight_scale", scale)
        assert scale is not None
        found["weight_scale"] = scale.reshape(announced["weight_scale"].shape)
        if spec.operand is not None:
            assert spec.operand.scale is not None
            found["weight_scale_2"] = spec.operand.scale.reshape(())
        if "input_scale" in announced:
            assert spec.input is not None and spec.input.scale is not None
            scale, source = spec.input.scale.float().reshape(()), spec.input.format.scale
            found["input_scale"] = 1 / scale if source is not None and source.op == "/" else scale
        for diagonal in spec.rotate_in:
            assert isinstance(diagonal, Diagonal)
            found["pre_quant_scale"] = positive("pre_quant_scale", diagonal.values.float())
        if spec.low_rank is not None:
            found["svdquant_lora_a"], found["svdquant_lora_b"] = spec.low_rank
        return found | self.bias_tensors(spec)

    def written(self, layers: Sequence[Layer], plain: Mapping[str, str], cache: KVFormat | None) -> Written:
        """One algorithm, or MIXED_PRECISION with one for every module; both files."""
        chosen = {layer.module: _choose(layer.format) for layer in layers}
        scaled = {chosen[layer.module][0] for layer in layers if layer.format.rotate_in}
        for module, (algo, group) in chosen.items():
            if _SCALED_FORM.get(algo) in scaled:
                chosen[module] = _SCALED_FORM[algo], group
        if len(set(chosen.values())) == 1:
            said = _entry(*next(iter(chosen.values())))
            if scaled:
                said |= {"has_zero_point": False, "pre_quant_scale": True}
        else:
            said = {"quant_algo": MIXED, "quantized_layers": {m: _entry(*one) for m, one in chosen.items()}}
        kept = None if cache is None else _cache(cache)
        producer = {"name": self.name, "version": VERSION}
        inner = {**said, "kv_cache_quant_algo": kept, "exclude_modules": list(plain)}
        section = {
            **said,
            "ignore": list(plain),
            "kv_cache_scheme": {"FP8": {"dynamic": False, "num_bits": 8, "type": "float"}}.get(kept or "", kept),
            "producer": producer,
            "quant_method": self.name,
        }
        return Written(section, {SIDE_FILE: {"producer": producer, "quantization": inner}})

    def cache_goal(self, f: KVFormat, projections: Mapping[str, bool]) -> None:
        """Static e4m3fn per tensor, or e2m1 with two levels of scales."""
        _cache(f)

    def cache_tensors(self, module: str, spec: KVSpec) -> dict[str, Tensor]:
        """k_scale on k_proj and v_scale on v_proj."""
        found = {}
        for part, operand in (("k", spec.k), ("v", spec.v)):
            assert operand.scale is not None
            found[f"{module}.{part}_proj.{part}_scale"] = operand.scale.float().reshape(())
        return found


def _choose(f: LinearFormat) -> tuple[str, int]:
    """The algorithm and its group size; FormatError with what ModelOpt has where none holds the weight."""
    scaled = len(f.rotate_in) == 1 and f.rotate_in[0] == ("diagonal", f.k) and not f.rotate_out
    w = only_weights(replace(f, rotate_in=() if scaled else f.rotate_in, low_rank=0, operand=None), "modelopt")
    if f.group_index:
        raise FormatError("modelopt files have no activation order (g_idx); --to gptq keeps it")
    group = w.block.cols if w.block is not None and w.block.kind in ("group", "tile") else 0
    holding = {n: a for n, a in ALGORITHMS.items() if _holds(a, w, group) and (n in _PRE_SCALED or not f.rotate_in)}
    fitting = {
        n: a
        for n, a in holding.items()
        if a.low_rank == bool(f.low_rank)
        and a.operand_format == f.operand
        and (f.rotate_in or n not in _SCALED_FORM.values())
    }
    exact = [n for n, a in fitting.items() if _input_kept(f, a, a.group or group)]
    divided = [n for n, a in fitting.items() if a.static and _divided(f, a.input_format(a.group or group))]
    poorer = [n for n, a in fitting.items() if not a.static]  # a static input needs a scale that is not there
    poorer.sort(key=lambda n: bool(ALGORITHMS[n].input))  # a plain input is nearer than one of another format
    for algo in (*exact, *divided, *poorer):
        return algo, ALGORITHMS[algo].group or group
    parts = [f"a weight of {w}"]
    parts += ["a scale of its input"] if f.rotate_in else []
    parts += [f"a low-rank branch of rank {f.low_rank}"] if f.low_rank else []
    parts += [f"a rounding of the weight to {f.operand}"] if f.operand is not None else []
    given = "a plain input" if f.input is None else f"{'a static' if f.static_input else 'an'} input of {f.input}"
    near = f"; nearest: {', '.join(holding)}" if holding else ""
    raise FormatError(f"modelopt has no quant_algo with {', '.join([*parts, given])}{near}")


def _holds(a: Algorithm, w: Format, group: int) -> bool:
    """Whether the algorithm's weights have the codes, blocks and levels of scales of `w`, scales' types aside."""
    mine, block, scale = a.format(a.group or group), w.block, w.scale
    assert mine.block is not None and mine.scale is not None
    if block is None or scale is None or w.op != "*" or w.offset is not None:
        return False
    old, new = element(w.element), element(mine.element)
    if not (old.name == new.name or (old.integer and new.integer and _width(old.bits) == new.bits)):
        return False
    wider = {"row": ("row", "tensor")}.get(mine.block.kind, (mine.block.kind,))
    if block.kind not in wider or (mine.block.kind in ("group", "tile") and block != mine.block):
        return False
    if mine.scale.plain and not new.integer:
        return scale.plain and (scale.element == "e8m0") == (mine.scale.element == "e8m0")
    return mine.scale.plain or (not scale.plain and scale.element == mine.scale.element)


def _width(bits: int) -> int:
    return 4 if bits <= 4 else 8


def _input_kept(f: LinearFormat, a: Algorithm, group: int) -> bool:
    given = a.input_format(group)
    return f.static_input == a.static and not changed_input(replace(f, decode_input=None), given)


def _divided(f: LinearFormat, given: Format | None) -> bool:
    """Whether the input's two levels of scales differ from the file's in dividing by the outer one alone."""
    old, new = (None if i is None else i.scale for i in (f.input, given))
    if f.input is None or given is None or old is None or new is None or old.plain or new.plain:
        return False
    return f.static_input and replace(f.input, scale=replace(old, op=new.op)) == given


def _entry(algo: str, group: int) -> dict[str, Any]:
    """What the configuration says of modules of this algorithm."""
    name = algo.lower() if algo in _LOWER else algo
    return {"quant_algo": name, **({"group_size": group} if group and algo != "FP8_PB_WO" else {})}


def _cache(f: KVFormat) -> str:
    """kv_cache_quant_algo; FormatError for caches that have none."""
    kept = {Format.parse(text): name for name, text in CACHES.items()}
    wide = f.k if f.k.scale is None or f.k.scale.element not in STORED else replace(f.k, scale=Format("fp32"))
    if f.kind != "mha" or f.k != f.v or f.q is not None or f.p is not None or wide not in kept:
        raise FormatError(f"modelopt holds caches of e4m3fn or e2m1 with static scales per tensor, not {f}")
    return kept[wide]
