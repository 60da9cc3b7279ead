"""Writing a plain checkpoint: every weight as bf16, fp16 or fp32, with its online parts multiplied in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def goal(self, f: LinearFormat) -> Goal:
        """The plain type."""
        return Goal(Format(self.name), losses=unquantized_input(f, "the file has no quantization"))

    def layout(self, layer: Layer) -> dict[str, TensorLayout]:
        """weight and bias."""
        f = layer.format
        return {"weight": TensorLayout(STORED[self.name], (f.n, f.k)), **self.bias_layout(f)}

    def tensors(self, layer: Layer, spec: LinearSpec) -> dict[str, Tensor]:
        """The weight and the bias."""
        assert isinstance(spec.weight, Tensor)
        return {"weight": spec.weight, **self.bias_tensors(spec)}

    def written(self, layers: Sequence[Layer], plain: Mapping[str, str], cache: KVFormat | None) -> Written:
        """No quantization section."""
        return Written(None)

    def cache_goal(self, f: KVFormat) -> None:
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
