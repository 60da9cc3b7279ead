"""Writing AWQ (gemm layout): the inverse of `awq.py`. Four bits, one group size, no activation order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from qhal.errors import FormatError
from qhal.layer_formats import KVFormat, LinearFormat
from qhal.specs import LinearSpec
from qhal.tensors import QTensor
from qhal_schemes.gptq_writer import integer_goal, symmetric
from qhal_schemes.packing import pack_awq
from qhal_schemes.target import STORED, Goal, Layer, Target, Written, unquantized_input
from qhal_schemes.writing import TensorLayout


class AWQTarget(Target):
    """AutoAWQ's gemm layout."""

    name: ClassVar[str] = "awq"

    def goal(self, f: LinearFormat) -> Goal:
        """uint4-uint4 with the source's groups; scales in 16 bits."""
        if f.group_index:
            raise FormatError("awq files have no activation order (g_idx); --to gptq keeps it")
        return Goal(integer_goal(f, (4,), self.dtype, self.name), losses=unquantized_input(f, "awq keeps x in 16 bits"))

    def layout(self, layer: Layer) -> dict[str, TensorLayout]:
        """qweight, qzeros, scales and a bias."""
        f, fmt = layer.format, layer.goal.weight
        assert fmt.block is not None and fmt.scale is not None
        groups = fmt.block.grid(f.n, f.k)[1]
        if f.n % 8 or f.k % groups:
            raise FormatError(f"awq packs 8 rows to a word and whole groups; [{f.n}, {f.k}] does not divide so")
        return {
            "qweight": TensorLayout("I32", (f.k, f.n // 8)),
            "qzeros": TensorLayout("I32", (groups, f.n // 8)),
            "scales": TensorLayout(STORED[fmt.scale.element], (groups, f.n)),
            **self.bias_layout(f),
        }

    def tensors(self, layer: Layer, spec: LinearSpec) -> dict[str, Tensor]:
        """Codes and zero points packed along N."""
        w = spec.weight
        assert isinstance(w, QTensor) and isinstance(w.zero, Tensor) and isinstance(w.scale, Tensor)
        return {
            "qweight": pack_awq(w.codes),
            "qzeros": pack_awq(w.zero),
            "scales": w.scale.t().contiguous(),
            **self.bias_tensors(spec),
        }

    def written(self, layers: Sequence[Layer], plain: Mapping[str, str], cache: KVFormat | None) -> Written:
        """One section; FormatError for groups of different sizes, which the file format cannot name."""
        sizes = {layer.goal.weight.block for layer in layers}
        if len(sizes) > 1:
            raise FormatError(f"awq files have one group size, this model has {', '.join(sorted(map(str, sizes)))}")
        block = sizes.pop()
        assert block is not None
        zeros = not all(symmetric(layer) for layer in layers)
        within = [m for m in plain if any(part.isdigit() for part in m.split("."))]
        section = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": -1 if block.kind == "row" else block.cols,
            "zero_point": zeros,
            "version": "gemm",
            "modules_to_not_convert": within or None,
        }
        return Written(section)
