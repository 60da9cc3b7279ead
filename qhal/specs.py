"""Specs: what a checkpoint says a layer is. Values without any device, and without code of any checkpoint format.

A spec holds tensors; its `.format` (`qhal/layer_formats.py`) is the frozen summary without them, which is all that
planning needs. Integer biases, correction sums and re-ordered scales that files carry are a device's folding of these
fields: a reader checks such a plane against the spec, counts it as consumed and drops it; `prepare` makes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qhal import rotations
from qhal.codebooks import CodebookTensor
from qhal.elements import dtype_name
from qhal.errors import FormatError, ShardError
from qhal.formats import Format
from qhal.layer_formats import Activation, ExpertsFormat, KVFormat, LinearFormat
from qhal.operands import Operand as Operand  # the field of a spec; its home for importers is here
from qhal.operands import cut_heads, cut_operand, cut_weight_operand, same_operand
from qhal.rotations import Rotation
from qhal.sharding import bounds, check_axis
from qhal.tensors import QTensor

Weight = QTensor | CodebookTensor | Tensor


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """y = rotate_out( Q(x') @ W.T + low_rank(x') ) + bias, with x' = rotate_in(x).

    weight        QTensor or CodebookTensor [N, K] (or stacked [E, N, K]), or a plain float tensor
    input         how x' is quantized; None: it stays in its own dtype
    decode_input  used when every sequence of the step decodes one token; None: the same as `input`
    operand       the weight is rounded to this before the product (int4 stored, fp8 multiplied)
    low_rank      (down [r, K], up [N, r]); reads x' before Q
    bias          float32 [N], in real units, added once
    name          the module's name in its checkpoint
    """

    weight: Weight
    input: Operand | None = None
    decode_input: Operand | None = None
    operand: Operand | None = None
    rotate_in: tuple[Rotation, ...] = ()
    rotate_out: tuple[Rotation, ...] = ()
    low_rank: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.decode_input is not None and self.input is None:
            raise FormatError(f"{self.name}: a decode_input without an input would leave prefill unquantized")
        if self.low_rank is not None and any(part.dim() != 2 for part in self.low_rank):
            raise FormatError(f"{self.name}: a low-rank branch is (down [r, K], up [N, r]), the same for every expert")

    @property
    def format(self) -> LinearFormat:
        """The frozen summary that plans and requests are made from."""
        w = self.weight
        return LinearFormat(
            name=self.name,
            n=w.shape[-2],
            k=w.shape[-1],
            weight=Format(dtype_name(w.dtype)) if isinstance(w, Tensor) else w.format,
            input=None if self.input is None else self.input.format,
            static_input=self.input is not None and self.input.static,
            decode_input=None if self.decode_input is None else self.decode_input.format,
            static_decode=self.decode_input is not None and self.decode_input.static,
            clip=any(o is not None and o.clipped for o in (self.input, self.decode_input)),
            operand=None if self.operand is None else self.operand.format,
            rotate_in=rotations.kinds(self.rotate_in),
            rotate_out=rotations.kinds(self.rotate_out),
            low_rank=0 if self.low_rank is None else self.low_rank[0].shape[0],
            bias=self.bias is not None,
            group_index=isinstance(w, QTensor) and w.group_index is not None,
        )

    def stored(self) -> Tensor:
        """float32 weight as stored, in its rotated or scaled basis."""
        return self.weight.float() if isinstance(self.weight, Tensor) else self.weight.dequantize()

    def effective(self) -> Tensor:
        """float32 [N, K]: the weight with every online rotation, scale and low-rank branch folded in.

        y = x @ effective().T + bias before activation quantization. The folding is done in float64 and rounded once.
        """
        w = self.stored()
        if not (self.rotate_in or self.rotate_out or self.low_rank):
            return w
        total = w.double()
        if self.low_rank is not None:
            total = total + self.low_rank[1].double() @ self.low_rank[0].double()
        n, k = w.shape[-2:]
        if self.rotate_in:
            total = total @ rotations.matrix(self.rotate_in, k).T
        if self.rotate_out:
            total = rotations.matrix(self.rotate_out, n).T @ total
        return total.float()

    def shard(self, dim: int, rank: int, world: int) -> LinearSpec:
        """Column-parallel (dim 0) or row-parallel (dim 1) part; under dim 1 the bias stays on rank 0 only.

        ShardError where a block of the weight or a rotation straddles the cut.
        """
        check_axis(dim)
        n, k = self.weight.shape[-2:]
        size = (n, k)[dim]
        start, stop = bounds(size, rank, world, f"{self.name}: {'rows' if dim == 0 else 'columns'}")
        weight = (
            self.weight.narrow(dim - 2, start, stop - start)
            if isinstance(self.weight, Tensor)
            else (self.weight.shard(dim, rank, world))
        )
        low_rank = self.low_rank
        if low_rank is not None:
            down, up = low_rank
            low_rank = (down, up[start:stop]) if dim == 0 else (down[:, start:stop], up)
        bias = self.bias
        if bias is not None:
            bias = bias[..., start:stop] if dim == 0 else (bias if rank == 0 else None)
        rotate_in, rotate_out = self.rotate_in, self.rotate_out
        if dim == 1 and rotate_out:
            raise ShardError(f"{self.name}: an output rotation must follow the sum over ranks; columns cannot be cut")
        if dim == 0:
            rotate_out = tuple(rotations.narrow(r, size, start, stop) for r in rotate_out)
        else:
            rotate_in = tuple(rotations.narrow(r, size, start, stop) for r in rotate_in)
        return replace(
            self,
            weight=weight,
            low_rank=low_rank,
            bias=bias,
            input=self.input if dim == 0 else cut_operand(self.input, size, start, stop),
            decode_input=self.decode_input if dim == 0 else cut_operand(self.decode_input, size, start, stop),
            operand=cut_weight_operand(self.operand, (n, k), dim, start, stop, self.name),
            rotate_in=rotate_in,
            rotate_out=rotate_out,
        )

    @staticmethod
    def concat(parts: Sequence[LinearSpec]) -> LinearSpec:
        """Fuse projections that read the same input (q, k, v; gate, up); ShardError if their input sides differ."""
        if not parts:
            raise ShardError("nothing to fuse: no parts were given")
        first = parts[0]
        if len(parts) == 1:
            return first
        names = [p.name for p in parts]
        for what, same in (
            ("input quantization", all(same_operand(p.input, first.input) for p in parts)),
            ("decode input", all(same_operand(p.decode_input, first.decode_input) for p in parts)),
            ("weight operand", all(same_operand(p.operand, first.operand) for p in parts)),
            ("input rotation", all(rotations.same(p.rotate_in, first.rotate_in) for p in parts)),
        ):
            if not same:
                raise ShardError(f"cannot fuse {names}: their {what} differs, and one product has one")
        if any(p.rotate_out or p.low_rank for p in parts):
            raise ShardError(f"cannot fuse {names}: an output rotation or low-rank branch belongs to one projection")
        weights = [p.weight for p in parts]
        joined: Weight
        if all(isinstance(w, QTensor) for w in weights):
            joined = QTensor.concat([w for w in weights if isinstance(w, QTensor)], 0)
        elif all(isinstance(w, Tensor) for w in weights):
            kinds = {(w.dtype, *w.shape[:-2], w.shape[-1]) for w in weights if isinstance(w, Tensor)}
            if len(kinds) > 1:
                found = ", ".join(f"{w.dtype} {tuple(w.shape)}" for w in weights if isinstance(w, Tensor))
                raise ShardError(f"cannot fuse {names}: weights of one dtype and one K join, not {found}")
            joined = torch.cat([w for w in weights if isinstance(w, Tensor)], -2)
        elif all(isinstance(w, CodebookTensor) for w in weights):
            joined = CodebookTensor.concat([w for w in weights if isinstance(w, CodebookTensor)], 0)
        else:
            raise ShardError(f"cannot fuse {names}: some weights are quantized and some are not")
        bias, given = None, [p.bias for p in parts if p.bias is not None]
        if given:
            none = [torch.zeros(p.weight.shape[-2], device=given[0].device) for p in parts]
            bias = torch.cat([zero if p.bias is None else p.bias for p, zero in zip(parts, none, strict=True)])
        return replace(first, weight=joined, bias=bias, name="+".join(names))


@dataclass(frozen=True, eq=False)
class ExpertsSpec:
    """y = sum over chosen experts of weight_e * down_e( act(gate_e(x)) * up_e(x) ).

    gate_up     weight [E, 2I, K], gate rows first then up (readers de-interleave); ungated: [E, I, K]
    down        weight [E, K, I]
    """

    gate_up: LinearSpec
    down: LinearSpec
    activation: Activation = Activation()  # noqa: RUF009 - frozen value
    name: str = ""

    @property
    def format(self) -> ExpertsFormat:
        """The frozen summary that plans and requests are made from."""
        gate_up, down = self.gate_up.format, self.down.format
        return ExpertsFormat(self.name, self.gate_up.weight.shape[0], gate_up, down, self.activation)

    def experts(self, first: int, count: int) -> ExpertsSpec:
        """Experts first:first+count, for expert parallelism."""
        parts = []
        for spec in (self.gate_up, self.down):
            part = replace(
                spec,
                weight=_select(spec.weight, first, count, spec.name),
                bias=None if spec.bias is None else spec.bias[first : first + count],
                input=spec.input and spec.input.experts(first, count),
                decode_input=spec.decode_input and spec.decode_input.experts(first, count),
                operand=spec.operand and spec.operand.experts(first, count),
            )
            parts.append(part)
        return replace(self, gate_up=parts[0], down=parts[1])

    def shard(self, rank: int, world: int) -> ExpertsSpec:
        """Tensor-parallel part: gate and up by rows (each half by itself), down by columns."""
        inner = self.down.weight.shape[-1]
        start, stop = bounds(inner, rank, world, f"{self.name}: intermediate features")
        spec = self.gate_up
        fixed = None if spec.operand is None else spec.operand.expert(0).scale
        if fixed is not None and fixed.numel() > 1:
            raise ShardError(
                f"{spec.name}: {fixed.numel()} static scales of the weight operand cannot follow gate and up"
            )
        runs = [(start, stop)] + [(inner + start, inner + stop)] * self.activation.gated
        bias = None if spec.bias is None else torch.cat([spec.bias[..., a:b] for a, b in runs], -1)
        low_rank = spec.low_rank and (spec.low_rank[0], torch.cat([spec.low_rank[1][a:b] for a, b in runs]))
        if spec.rotate_out:
            raise ShardError(f"{spec.name}: an output rotation over gate and up cannot be cut")
        gate_up = replace(spec, weight=_row_runs(spec.weight, runs, spec.name), bias=bias, low_rank=low_rank)
        return replace(self, gate_up=gate_up, down=self.down.shard(1, rank, world))


def _select(w: Weight, first: int, count: int, name: str) -> Weight:
    """Experts first:first+count of a stacked weight."""
    if isinstance(w, CodebookTensor):
        raise ShardError(f"{name}: codebook weights are not stacked ({w.format}); there are no experts to select")
    if isinstance(w, QTensor):
        return w.select(first, count)
    if w.dim() < 3 or not 0 <= first <= first + count <= w.shape[0]:
        raise ShardError(f"{name}: {w.dtype} {tuple(w.shape)}: no experts {first}:{first + count}")
    return w[first : first + count]


def _row_runs(w: Weight, runs: Sequence[tuple[int, int]], name: str) -> Weight:
    """The rows of several runs, one after another."""
    if isinstance(w, CodebookTensor):
        raise ShardError(f"{name}: codebook weights are not stacked ({w.format}); experts of them cannot be cut")
    if isinstance(w, QTensor):
        return QTensor.concat([w.narrow(0, a, b) for a, b in runs], 0)
    return torch.cat([w[..., a:b, :] for a, b in runs], -2)


@dataclass(frozen=True, eq=False)
class KVSpec:
    """How a cache is quantized. MLA: k is the latent row, v the rope key. q, p: None keeps their own dtype."""

    k: Operand
    v: Operand
    q: Operand | None = None
    p: Operand | None = None
    kind: Literal["mha", "mla"] = "mha"
    heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    name: str = ""

    def shard(self, rank: int, world: int) -> KVSpec:
        """Tensor-parallel part: heads are cut, and static scales and zero points per head or feature with them.

        mla: every rank has the latent cache; only scales of Q are cut. ShardError where heads do not divide.
        """
        latent = self.kind == "mla"
        first, last = (0, self.heads) if latent else bounds(self.heads, rank, world, f"{self.name}: key-value heads")
        k, v = (o if latent else cut_heads(o, rank, world, self.name) for o in (self.k, self.v))
        q = None if self.q is None else cut_heads(self.q, rank, world, self.name)
        return replace(self, k=k, v=v, q=q, heads=last - first)

    @property
    def format(self) -> KVFormat:
        """The frozen summary."""
        q, p = (None if o is None else o.format for o in (self.q, self.p))
        return KVFormat(self.kind, self.k.format, self.v.format, q, p, self.heads, self.k_dim, self.v_dim, self.name)
