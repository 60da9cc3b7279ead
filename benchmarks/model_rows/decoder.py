"""The model on `QuantOps`: products, caches and attention are qhal's, norms, rotary embedding and silu are torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from model_rows.rows import Row
from model_rows.shape import Shape
from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.layers import prepare_linear
from qhal.requests import AttentionRequest, KVRequest
from qhal.specs import LinearSpec

BF16 = Format("bf16")
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Glue:
    """What stands between the products; compiled where torch compiles for the device, so that it is few kernels."""

    norm: Callable[..., tuple[Tensor, Tensor]]
    rotate: Callable[..., tuple[Tensor, Tensor]]
    gate: Callable[[Tensor, Tensor], Tensor]


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its norm, both in bf16."""
    total = x + y
    return total, rms_norm(total.float(), (total.shape[-1],), weight.float(), eps).to(total.dtype)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Queries [T, H, D] and keys [T, G, D] with their rotary embedding, from [T, (H + 2 G) D]."""
    both = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)[:, : heads + kv_heads].float()
    c, s = cos[positions][:, None], sin[positions][:, None]
    low, high = both.chunk(2, -1)
    turned = torch.cat([low * c - high * s, high * c + low * s], -1).to(qkv.dtype)
    return turned[:, :heads].contiguous(), turned[:, heads:].contiguous()


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return (silu(gate.float()) * up.float()).to(gate.dtype)


@cache
def glue(*, compiled: bool) -> Glue:
    if not compiled:
        return Glue(add_norm, rotate, gated)
    torch._dynamo.config.recompile_limit = 64  # rows differ in the strides of what the glue reads
    make = partial(torch.compile, fullgraph=True)
    return Glue(make(add_norm), make(rotate), make(gated))


class Caches:
    """The caches of all layers in one format, filled with random rows, and the pages of every sequence."""

    def __init__(self, ops: QuantOps, shape: Shape, name: str) -> None:
        self.ops, self.shape = ops, shape
        f = Format.parse(name)
        self.kv = KVRequest(
            kind="mha", k=f, v=f, heads=shape.kv_heads, k_dim=shape.head_dim, v_dim=shape.head_dim, page=shape.page
        )
        self.most = max(shape.batches)
        pages = max(self.most * shape.pages, -(-shape.prompt // shape.page))
        layout, planes = ops.kv_planes(self.kv, attention=[self.request("decode"), self.request("prefill")])
        allocate = partial(KVCache.allocate, self.kv, pages, ops.device, planes=planes, layout=layout)
        self.layers = [allocate() for _ in range(shape.layers)]
        g = torch.Generator().manual_seed(0)
        self.flat = torch.randperm(pages, generator=g).int().to(ops.device)
        self.table = self.flat[: self.most * shape.pages].reshape(self.most, shape.pages)
        self._fill()

    def _fill(self) -> None:
        first, step = self.layers[0], 1 << 14
        total = first.pages * self.shape.page
        for start in range(0, total, step):
            slots = torch.arange(start, min(start + step, total), device=self.ops.device)
            rows = (2, len(slots), self.shape.kv_heads, self.shape.head_dim)
            k, v = torch.randn(rows, device=self.ops.device, dtype=torch.bfloat16)
            self.ops.quant_kv(k, v, first, slots)
        for layer in self.layers[1:]:
            for name, plane in layer.planes.items():
                plane.copy_(first.planes[name])

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def request(self, phase: Literal["prefill", "decode"]) -> AttentionRequest:
        """bf16 queries and weights over the cache; in a graph where the operations stand in one."""
        asked = AttentionRequest(
            kv=self.kv, heads=self.shape.heads, scale=self.shape.head_dim**-0.5, phase=phase, q=BF16, p=BF16,
            out=torch.bfloat16,
        )  # fmt: skip
        captured = replace(asked, graph=True)
        return captured if phase == "decode" and self.ops.supports(captured) else asked

    def batch(self, phase: Literal["prefill", "decode"], sequences: int, tokens: int) -> AttentionBatch:
        """Not planned yet."""
        pages = self.shape.pages if phase == "decode" else -(-tokens // self.shape.page)
        return self.ops.attention_batch(self.request(phase), Limits(sequences, tokens, pages))


class Decoder:
    """One model: every layer's weights in memory of their own.

    products  of every layer, by name
    norms     of every layer, two: random signs, so that no two layers turn the same way though they share numbers
    """

    def __init__(self, ops: QuantOps, shape: Shape, row: Row, given: dict[str, LinearSpec]) -> None:
        self.ops, self.shape, self.row = ops, shape, row
        self.glue = glue(compiled=ops.device.type == "cuda")
        self.products: list[dict[str, Product]] = []
        self.nbytes = 0
        for _ in range(shape.layers):
            self.products.append({name: self._prepared(spec) for name, spec in given.items()})
        g = torch.Generator(device=ops.device).manual_seed(7)
        draw = partial(torch.randint, 0, 2, generator=g, device=ops.device)
        self.norms = [(2.0 * draw((2, shape.hidden)) - 1).bfloat16() for _ in range(shape.layers)]
        self.last = torch.ones(shape.hidden, dtype=torch.bfloat16, device=ops.device)
        normal = partial(torch.randn, generator=g, device=ops.device, dtype=torch.bfloat16)
        self.embedding = normal((shape.vocab, shape.hidden))
        self.head = normal((shape.vocab, shape.hidden)) * shape.hidden**-0.5
        positions = torch.arange(max(shape.context, shape.prompt, shape.checked + 1), device=ops.device)
        turns = 10000.0 ** -(torch.arange(0, shape.head_dim, 2, device=ops.device) / shape.head_dim)
        angles = positions[:, None] * turns
        self.cos, self.sin = angles.cos(), angles.sin()

    def _prepared(self, spec: LinearSpec) -> Product:
        if self.row.family == "torch":
            assert isinstance(spec.weight, Tensor)
            own = spec.weight.clone()
            self.nbytes += own.numel() * own.element_size()
            return partial(linear, weight=own)
        layer = prepare_linear(spec, self.ops, m=(1, max(*self.shape.batches, self.shape.prompt)))
        parts = (layer.weight, layer.rotate_in, layer.rotate_out)
        self.nbytes += sum(p.nbytes for p in parts if p is not None)
        return partial(self.ops.linear, layer=layer)

    def hidden(self, ids: Tensor, positions: Tensor, slots: Tensor, caches: Caches, batch: AttentionBatch) -> Tensor:
        """Rows after the last norm, [T, hidden]: keys and values are written first, then attended over."""
        shape, g = self.shape, self.glue
        x = self.embedding[ids]
        y = torch.zeros_like(x)
        for own, norms, held in zip(self.products, self.norms, caches.layers, strict=True):
            x, h = g.norm(x, y, norms[0], shape.eps)
            qkv = own["qkv"](h) if "qkv" in own else torch.cat([own[name](h) for name in "qkv"], -1)
            q, k = g.rotate(qkv, self.cos, self.sin, positions, shape.heads, shape.kv_heads)
            v = qkv.view(len(ids), -1, shape.head_dim)[:, shape.heads + shape.kv_heads :]
            self.ops.quant_kv(k, v, held, slots)
            y = own["o"](self.ops.attention(q, held, batch).reshape(len(ids), -1))
            x, h = g.norm(x, y, norms[1], shape.eps)
            gate, up = own["gate_up"](h).chunk(2, -1) if "gate_up" in own else (own["gate"](h), own["up"](h))
            y = own["down"](g.gate(gate, up))
        return g.norm(x, y, self.last, shape.eps)[1]

    def next(self, hidden: Tensor) -> Tensor:
        """The likeliest token of every row."""
        return linear(hidden, self.head).argmax(-1)
