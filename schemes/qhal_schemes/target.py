"""Target: a checkpoint format that specs can be written to. What `SchemeMapping` is for reading, this is for writing.

A target never sees a source format: it gets LinearFormats and LinearSpecs, says in which Format it would hold each
weight and what it cannot hold, and packs what it is given. Whether a weight reaches that Format without changing a
number is decided once for all targets, in `convert.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.errors import FormatError
from qhal.formats import Format
from qhal.layer_formats import KVFormat, LinearFormat
from qhal.specs import KVSpec, LinearSpec
from qhal_schemes.writing import TensorLayout

STORED = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""Header names of wide floats, the inverse of `plain.ELEMENT_OF` for them."""


@dataclass(frozen=True)
class Goal:
    """What a Linear module becomes.

    weight  the format of its weight in the file; a rule after @ is used only if the weight must be quantized again
    input   the format of its input, as a reader of the file finds it
    losses  what the file cannot say of this module, in words; empty for an exact conversion
    """

    weight: Format
    input: Format | None = None
    losses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A module with its goal, as targets see it."""

    module: str
    format: LinearFormat
    goal: Goal
    experts: int = 0
    """Experts that the module stacks, 0 for a single layer; `format` is that of one of them."""

    def name(self, leaf: str) -> str:
        """The full name of one of its tensors. Stacked experts are parameters of their parent: no `.weight`."""
        if not self.experts:
            return f"{self.module}.{leaf}"
        return self.module if leaf == "weight" else f"{self.module}_{leaf}"


@dataclass(frozen=True)
class Written:
    """The configuration of a written checkpoint.

    section  quantization_config of config.json; None for a checkpoint without quantization
    files    further JSON files by name
    """

    section: Mapping[str, Any] | None
    files: Mapping[str, Any] = field(default_factory=dict)


class Target(ABC):
    """One checkpoint format that can be written."""

    name: ClassVar[str]
    """The word after `--to`."""
    folds: ClassVar[bool] = False
    """Whether online rotations, pre-scales and low-rank branches are multiplied into the weights."""

    stacks: ClassVar[Collection[str]] = ()
    """The model types whose stacked experts it can write; the others' layouts are not known."""

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: of the model's activations."""
        self.dtype = dtype

    @abstractmethod
    def goal(self, f: LinearFormat) -> Goal:
        """The nearest thing that the file format has; FormatError with the reason where it has none."""

    @abstractmethod
    def layout(self, layer: Layer) -> dict[str, TensorLayout]:
        """Last names, dtypes and shapes of the module's tensors, bias included; FormatError for shapes without one."""

    @abstractmethod
    def tensors(self, layer: Layer, spec: LinearSpec) -> dict[str, Tensor]:
        """The tensors that `layout` announces; spec.weight has the goal's storage."""

    @abstractmethod
    def written(self, layers: Sequence[Layer], plain: Mapping[str, str], cache: KVFormat | None) -> Written:
        """The configuration; plain: the Linear modules that stay plain, with the rule of the source."""

    def cache_goal(self, f: KVFormat, projections: Mapping[str, bool]) -> None:
        """FormatError with the reason where the file format cannot say this cache.

        projections: k_proj and v_proj of every attention module -> whether its weight is quantized
        """
        raise FormatError(f"{self.name} files say nothing of caches; {f} is lost")

    def cache_tensors(self, module: str, spec: KVSpec) -> dict[str, Tensor]:
        """Full names and values of the static scales of one attention module's cache."""
        return {}

    def bias_layout(self, f: LinearFormat) -> dict[str, TensorLayout]:
        """The bias in the model's dtype, where there is one."""
        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        return {"bias": TensorLayout(names[self.dtype], (f.n,))} if f.bias else {}

    def bias_tensors(self, spec: LinearSpec) -> dict[str, Tensor]:
        """The bias as `bias_layout` announces it."""
        return {} if spec.bias is None else {"bias": spec.bias.to(self.dtype)}


def only_online(f: LinearFormat) -> str:
    """What of a module happens beside its weight, in words; "" if nothing does."""
    parts = [f"{len(f.rotate_in)} rotations of its input"] if f.rotate_in else []
    parts += [f"{len(f.rotate_out)} rotations of its output"] if f.rotate_out else []
    parts += [f"a low-rank branch of rank {f.low_rank}"] if f.low_rank else []
    return ", ".join(parts)


def only_weights(f: LinearFormat, name: str) -> Format:
    """The weight's format; FormatError for a codebook and for anything that happens beside or after the weight."""
    if only_online(f):
        raise FormatError(f"{name} files cannot say {only_online(f)}; --to bf16 multiplies them into the weight")
    if f.operand is not None:
        raise FormatError(f"{name} files cannot say that the weight is rounded to {f.operand} before the product")
    if not isinstance(f.weight, Format):
        raise FormatError(f"{name} files hold no codebooks")
    return f.weight


def changed_input(f: LinearFormat, given: Format | None) -> tuple[str, ...]:
    """The losses of a module whose input the file quantizes to `given`; a static scale may be of a wider type."""
    losses = []
    if not _same_input(f, given):
        was, to = (f"is quantized to {i}" if i is not None else "is not quantized" for i in (f.input, given))
        losses.append(f"its input {was}; a reader of the file takes that it {to}")
    if f.decode_input is not None and f.decode_input != f.input:
        losses.append(f"while decoding its input is quantized to {f.decode_input}; the file has one input format")
    return tuple(losses)


def _same_input(f: LinearFormat, given: Format | None) -> bool:
    old = f.input
    if old is None or given is None or not f.static_input or old.scale is None or given.scale is None:
        return old == given
    wider = given.scale.element == "fp32" and old.scale.plain and old.scale.element in STORED
    return old == given or (wider and replace(old, scale=given.scale) == given)


def unquantized_input(f: LinearFormat, what: str) -> tuple[str, ...]:
    """The losses of a module whose input stays plain in the file."""
    given = dict.fromkeys(str(i) for i in (f.input, f.decode_input) if i is not None)
    return tuple(f"its input is no longer quantized to {i}: {what}" for i in given)


def positive(what: str, scale: Tensor | None) -> Tensor:
    """The scales; FormatError if one is not a positive number, which the file format does not allow."""
    assert scale is not None
    if scale.dtype != torch.uint8 and not bool((scale.isfinite() & (scale > 0)).all()):
        raise FormatError(f"{what} of these files is positive, here it reaches down to {float(scale.min()):g}")
    return scale
