"""The modules that stand in a model of transformers where the checkpoint has quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qhal.groups import Indexed
from qhal.prepared import PreparedExperts, PreparedLinear
from qhal_engines import EngineError

_M = TypeVar("_M", bound="_Placed")


class _Placed(nn.Module):
    """A module whose weight lives in a backend: it serves one dtype on one device, and does not move."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._prepared: Any = None  # a PreparedLinear or PreparedExperts
        self._placed: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the prepared layer keeps."""
        return 0 if self._prepared is None else int(self._prepared.nbytes)

    def _apply(self: _M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _M:
        if self._placed is not None:
            moved = fn(self._placed)
            if (moved.device, moved.dtype) != (self._placed.device, self._placed.dtype):
                raise EngineError(
                    f"{self.name}: asked to move a quantized layer from {self._placed.dtype} on {self._placed.device} "
                    f"to {moved.dtype} on {moved.device}; prepared weights stay where they were prepared.\n"
                    "  do: load the model again with install(backend=...) and from_pretrained(dtype=...)"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def _not_loaded(self, *_: Tensor) -> Tensor:
        raise EngineError(f"{self.name}: called before its weight was loaded")


class QhalLinear(_Placed):
    """A linear layer whose weight lives in a backend. It has no parameters: `layer` holds everything.

    x [..., in] -> [..., out], in the model's dtype; the numbers are those of the plan's entry for `name`.
    """

    def __init__(self, name: str, in_features: int, out_features: int) -> None:
        super().__init__(name)
        self.in_features, self.out_features = in_features, out_features
        self.layer: Callable[[Tensor], Tensor] = self._not_loaded

    def forward(self, x: Tensor) -> Tensor:
        """The prepared layer on x."""
        return self.layer(x)

    def place(self, layer: PreparedLinear, device: torch.device, dtype: torch.dtype) -> None:
        """Takes the prepared layer, which serves activations of `dtype` on `device` only."""
        self._prepared, self._placed = layer, torch.empty(0, dtype=dtype, device=device)
        # Few layers quantize their input in another way while decoding; the others are called with nothing in between.
        self.layer = self._by_phase if layer.decode_index else layer

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _by_phase(self, x: Tensor) -> Tensor:
        """One new token per sequence, [batch, 1, in], is decoding."""
        y: Tensor = self._prepared(x, decode=x.dim() == 3 and x.shape[1] == 1)
        return y


class QhalExperts(_Placed):
    """All experts of one layer: x [T, K], indices [T, top_k], weights [T, top_k] -> the weighted sum [T, K].

    The numbers are `QuantOps.experts` with Indexed groups: each product rounded once to the model's dtype, the sum over
    experts too, where transformers' own loop rounds after every expert.
    """

    def __init__(self, name: str, num_experts: int) -> None:
        super().__init__(name)
        self.num_experts = num_experts

    def place(self, layer: PreparedExperts, device: torch.device, dtype: torch.dtype) -> None:
        """Takes the prepared experts, which serve activations of `dtype` on `device` only."""
        self._prepared, self._placed = layer, torch.empty(0, dtype=dtype, device=device)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The prepared experts on x; an index of num_experts, as expert parallelism writes it, is no expert here."""
        if self._prepared is None:
            return self._not_loaded()
        ids = torch.where(top_k_index < self.num_experts, top_k_index, -1).to(torch.int32)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        top_k = ids.shape[-1]
        groups = Indexed(ids.reshape(-1, top_k), top_k_weights.reshape(-1, top_k).float())
        y: Tensor = self._prepared(flat, groups)
        return y.view(hidden_states.shape)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"num_experts={self.num_experts}"
