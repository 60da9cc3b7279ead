"""Writing a plain checkpoint: every weight as bf16, fp16 or fp32, with its online parts multiplied in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from qhal.errors import FormatError
from qhal.formats import Format
from qhal.layer_formats import KVFormat, LinearFormat
from qhal.specs import LinearSpec
from qhal_schemes.target import STORED, Goal, Layer, Target, Written, unquantized_input
from qhal_schemes.writing import TensorLayout


class FloatTarget(Target):
    """A checkpoint without quantization. The weight is rounded once to the model's new dtype."""

    folds: ClassVar[bool] = True
    stacks: ClassVar[Collection[str]] = ("gpt_oss",)

    def goal(self, f: LinearFormat) -> Goal:
        """The plain type."""
        losses = unquantized_input(f, "the file has no quantization")
        if f.operand is not None:
            losses = (*losses, f"its weight is no longer rounded to {f.operand} before the product")
        return Goal(Format(self.name), losses=losses)

    def layout(self, layer: Layer) -> dict[str, TensorLayout]:
        """weight and bias; stacked experts as gpt-oss has them, [E, K, N] and [E, N]."""
        f, e = layer.format, layer.experts
        shapes = {"weight": (e, f.k, f.n) if e else (f.n, f.k), "bias": (e, f.n) if e else (f.n,)}
        leaves = ("weight", "bias") if f.bias else ("weight",)
        return {leaf: TensorLayout(STORED[self.name], shapes[leaf]) for leaf in leaves}

    def tensors(self, layer: Layer, spec: LinearSpec) -> dict[str, Tensor]:
        """The weight and the bias."""
        assert isinstance(spec.weight, Tensor)
        weight = spec.weight.mT.contiguous() if layer.experts else spec.weight
        return {"weight": weight, **self.bias_tensors(spec)}

    def written(self, layers: Sequence[Layer], plain: Mapping[str, str], cache: KVFormat | None) -> Written:
        """No quantization section."""
        return Written(None)

    def cache_goal(self, f: KVFormat, projections: Mapping[str, bool]) -> None:
        """A plain checkpoint has no cache scales."""
        raise FormatError(f"a {self.name} checkpoint says nothing of caches; {f} is lost")


class BF16Target(FloatTarget):
    """bfloat16."""

    name: ClassVar[str] = "bf16"


class FP16Target(FloatTarget):
    """float16."""

    name: ClassVar[str] = "fp16"


class FP32Target(FloatTarget):
    """float32: the effective weight without a rounding."""

    name: ClassVar[str] = "fp32"
