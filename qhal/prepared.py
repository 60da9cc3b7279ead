"""What `prepare` makes: weights in a device's own layout, and whole layers built from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qhal import compiling
from qhal.errors import FormatError
from qhal.groups import Groups, Indexed
from qhal.layer_formats import ExpertsFormat, LinearFormat
from qhal.requests import GemmRequest, GroupedRequest, HadamardRequest, Support, VQRequest
from qhal.specs import Operand

if TYPE_CHECKING:
    from qhal.interface import QuantOps


@dataclass(eq=False)
class Prepared:
    """A weight (or a rotation chain) re-laid by one backend; other backends refuse it. Backends subclass it.

    backend       name of the backend that made it
    request       what it was prepared for
    support       what runs
    inputs        how a plain x is quantized, by the index that `gemm(input=)` takes; empty: not at all
    input_layout  for producers outside (a fused norm) that hand over a QTensor
    handle        a number unique in this process: what a registered operator and a compiler see

    Its values may be read by one stream at a time unless `support.concurrent`.
    """

    backend: str
    request: GemmRequest | GroupedRequest | HadamardRequest | VQRequest
    support: Support
    inputs: Sequence[Operand] = ()
    input_layout: str = "canonical"
    handle: int = field(default_factory=compiling.new_handle)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor it keeps, by name: for memory accounts and address checks. Backends override."""
        raise NotImplementedError(f"{type(self).__name__} must list its tensors")

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor it keeps."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


@dataclass(eq=False)
class PreparedLinear:
    """A whole layer on a device: y = layer(x), x [..., K] -> [..., N]. Made by `qhal.layers.prepare_linear`.

    `direct` layers have neither rotations nor a low-rank branch: one gemm is all, and the bias is bound in it. In
    `torch.compile` a layer is one operator (`qhal.compiling`), which knows it by `handle`.
    """

    ops: QuantOps
    format: LinearFormat
    weight: Prepared
    rotate_in: Prepared | None = None
    rotate_out: Prepared | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        self.direct = self.rotate_in is None and self.rotate_out is None and self.low_rank is None
        self.decode_index = 1 if len(self.weight.inputs) > 1 else 0
        self.handle = compiling.handle(self)

    def __call__(self, x: Tensor, *, decode: bool = False) -> Tensor:
        """[..., K] -> [..., N]. decode: every sequence of this step decodes one token (selects `decode_input`).

        Rows may have any stride, the last axis must have stride 1: FormatError, nothing is copied silently.
        """
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.qhal.linear(x, self.handle, decode)
            return y
        try:
            shape = x.shape
        except AttributeError:
            raise FormatError(f"{self.format.name}: x is a {type(x).__name__}, must be a tensor [..., K]") from None
        if len(shape) == 2 and self.direct:  # gemm looks at the strides itself
            return self.ops.linear(x, self, decode=decode)
        if len(shape) == 0 or (x.stride(-1) != 1 and shape[-1] > 1 and x.numel()):
            found = f"{tuple(shape)} with strides {x.stride()}"
            raise FormatError(f"{self.format.name}: x is {found}, must be [..., K] with 1 as its last stride")
        if len(shape) == 2:
            return self.ops.linear(x, self, decode=decode)
        y = self.ops.linear(x.reshape(-1, shape[-1]), self, decode=decode)
        if len(shape) == 3:  # what engines call; building a general shape costs a microsecond
            return y.view(shape[0], shape[1], y.shape[1])
        return y.view(*shape[:-1], y.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the layer, by dotted name."""
        found = {f"weight.{k}": t for k, t in self.weight.tensors().items()}
        for name in ("rotate_in", "rotate_out"):
            part = getattr(self, name)
            if part is not None:
                found.update({f"{name}.{k}": t for k, t in part.tensors().items()})
        if self.low_rank is not None:
            found.update({"low_rank.down": self.low_rank[0], "low_rank.up": self.low_rank[1]})
        if self.bias is not None:
            found["bias"] = self.bias
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor of the layer."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


@dataclass(eq=False)
class PreparedExperts:
    """The experts of one MoE layer on a device. Made by `qhal.layers.prepare_experts`."""

    ops: QuantOps
    format: ExpertsFormat
    gate_up: Prepared
    down: Prepared

    def __post_init__(self) -> None:
        self.handle = compiling.handle(self)

    def __call__(self, x: Tensor, groups: Groups) -> Tensor:
        """x [T, K] -> [T, K]; see `QuantOps.experts`. In `torch.compile` with `Indexed` groups."""
        if torch.compiler.is_compiling() and isinstance(groups, Indexed):
            y: Tensor = torch.ops.qhal.experts(x, self.handle, groups.ids, groups.weights)
            return y
        return self.ops.experts(x, self, groups)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the layer, by dotted name."""
        parts = {"gate_up": self.gate_up, "down": self.down}
        return {f"{name}.{k}": t for name, part in parts.items() for k, t in part.tensors().items()}

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor of the layer."""
        return self.gate_up.nbytes + self.down.nbytes
