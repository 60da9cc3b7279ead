"""The same model by definition, in float32: weights as they decode, inputs and cache rows quantized by `qhal.encoding`.

Nothing here calls an operation of a backend, so a path that multiplies other numbers shows. What stays different are
the roundings of activations to bf16 between operations, and codes that flip because of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from model_rows.decoder import Decoder
from qhal.encoding import encode
from qhal.formats import Format
from qhal.rotations import Diagonal, Hadamard, Kronecker, Rotation
from qhal.specs import LinearSpec


def hidden(model: Decoder, given: dict[str, LinearSpec], kv: Format, ids: Tensor) -> Tensor:
    """Rows after the last norm of one sequence, float32 [T, hidden]. Takes the weights of one layer in float32."""
    shape, count = model.shape, len(ids)
    products = {name: _Product(spec) for name, spec in given.items()}
    x = model.embedding[ids].float()
    position = torch.arange(count, device=ids.device)
    later = position[:, None] < position[None]
    share = shape.heads // shape.kv_heads
    for norms in model.norms:
        h = _norm(x, norms[0], shape.eps)
        first = [products[name](h) for name in ("qkv", "q", "k", "v") if name in products]
        heads = torch.cat(first, -1).view(count, -1, shape.head_dim)
        q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        k, v = _held(_turned(k, model), kv), _held(v, kv)
        scores = torch.einsum("thd,shd->hts", _turned(q, model), k.repeat_interleave(share, 1)) * shape.head_dim**-0.5
        p = scores.masked_fill(later, float("-inf")).softmax(-1)
        a = torch.einsum("hts,shd->thd", p, v.repeat_interleave(share, 1)).reshape(count, -1)
        x = x + products["o"](a)
        h = _norm(x, norms[1], shape.eps)
        wide = torch.cat([products[name](h) for name in ("gate_up", "gate", "up") if name in products], -1)
        gate, up = wide.chunk(2, -1)
        x = x + products["down"](silu(gate) * up)
    return _norm(x, model.last, shape.eps)


def error(found: Tensor, value: Tensor) -> float:
    """Relative root mean square of the difference."""
    return float((found.float() - value).norm() / value.norm())


class _Product:
    """rotate_out(Q(rotate_in(x)) @ W.T)."""

    def __init__(self, spec: LinearSpec) -> None:
        self.weight = spec.stored()
        self.format = None if spec.input is None else spec.input.format
        self.before = [_turn(r, self.weight.device) for r in spec.rotate_in]
        self.after = [_turn(r, self.weight.device) for r in spec.rotate_out]

    def __call__(self, x: Tensor) -> Tensor:
        for turn in self.before:
            x = turn(x)
        if self.format is not None:
            x = encode(x.bfloat16(), self.format).dequantize()
        y = x @ self.weight.T
        for turn in self.after:
            y = turn(y)
        return y


def _turn(r: Rotation, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A rotation in float32; one of n features as the two factors whose Kronecker product its matrix is."""
    if isinstance(r, Diagonal):
        return lambda x: x * r.values
    if isinstance(r, Hadamard):
        m = r.n // r.k
        left, right = Hadamard(r.k, r.k, r.table, r.transpose).matrix(r.k), Hadamard(m).matrix(m)
    else:
        assert isinstance(r, Kronecker) and r.left is not None and r.right is not None
        left, right = r.left, r.right
    left, right = left.to(device, torch.float32), right.to(device, torch.float32)

    def turn(x: Tensor) -> Tensor:
        parts = x.view(len(x), len(left), len(right))
        return (left.T @ parts @ right).reshape(x.shape)

    return turn


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, (x.shape[-1],), weight.float(), eps)


def _turned(x: Tensor, model: Decoder) -> Tensor:
    low, high = x.chunk(2, -1)
    c, s = model.cos[: len(x), None], model.sin[: len(x), None]
    return torch.cat([low * c - high * s, high * c + low * s], -1)


def _held(x: Tensor, kv: Format) -> Tensor:
    """Rows as the cache holds them; static scales are 1 there."""
    x = x.bfloat16()
    if kv.plain:
        return x.float()
    assert kv.block is not None and kv.scale is not None
    computed = kv.block.kind in ("row", "group") and kv.scale.plain
    scale = None if computed else torch.ones(1, device=x.device)
    return encode(x.reshape(-1, x.shape[-1]), kv, scale=scale).dequantize().view(x.shape)
