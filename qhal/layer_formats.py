"""The frozen summaries of layers: formats and sizes without tensors. Plans, requests and tables are made from these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qhal.codebooks import CodebookFormat
from qhal.formats import Format


@dataclass(frozen=True)
class Activation:
    """The function between the two products of an expert (or of an MLP).

    name   silu | gelu (erf) | gelu_tanh | relu2 (relu squared) | swiglu: g * sigmoid(alpha * g), g = min(gate, limit)
    gated  act(gate) * up, gate rows first; otherwise act(up). swiglu: u = clamp(up, -limit, limit) + shift takes up's
           place (shift is 1 in gpt-oss)
    """

    name: Literal["silu", "gelu", "gelu_tanh", "relu2", "swiglu"] = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class LinearFormat:
    """Summary of a LinearSpec: y = rotate_out(Q(rotate_in(x)) @ W.T + low_rank) + bias, W [n, k].

    static_input, static_decode  the scale of `input`, of `decode_input`, is given
    clip                         an input may keep a part of its range only (`Operand.clip`)
    """

    name: str
    n: int
    k: int
    weight: Format | CodebookFormat
    input: Format | None = None
    static_input: bool = False
    decode_input: Format | None = None
    static_decode: bool = False
    clip: bool = False
    operand: Format | None = None
    rotate_in: tuple[tuple[object, ...], ...] = ()
    rotate_out: tuple[tuple[object, ...], ...] = ()
    low_rank: int = 0
    bias: bool = False
    group_index: bool = False

    @property
    def quantized(self) -> bool:
        """Whether anything about this layer is quantized or transformed."""
        plain = isinstance(self.weight, Format) and self.weight.plain
        return not plain or self.input is not None or bool(self.rotate_in or self.rotate_out)


@dataclass(frozen=True)
class ExpertsFormat:
    """Summary of an ExpertsSpec; gate_up.n counts gate and up rows together."""

    name: str
    experts: int
    gate_up: LinearFormat
    down: LinearFormat
    activation: Activation = Activation()


@dataclass(frozen=True)
class KVFormat:
    """Summary of a KVSpec: the formats of K and V rows (MLA: latent and rope), and of Q and P if they are quantized.

    heads, k_dim, v_dim are those of KVRequest; 0 where the checkpoint does not say.
    """

    kind: Literal["mha", "mla"]
    k: Format
    v: Format
    q: Format | None = None
    p: Format | None = None
    heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    name: str = ""

    def __str__(self) -> str:
        names = ("latent", "rope") if self.kind == "mla" else ("k", "v")
        parts = [f"{n}={f}" for n, f in (*zip(names, (self.k, self.v), strict=True), ("q", self.q), ("p", self.p)) if f]
        return f"{self.kind}({', '.join(parts)})"


LayerFormat = LinearFormat | ExpertsFormat | KVFormat
