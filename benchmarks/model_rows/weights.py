"""Random weights of one layer, quantized where they are needed: every product keeps the size of what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from model_rows.rows import Row
from model_rows.shape import Shape
from qhal.codebooks import CodebookSegment, CodebookTensor
from qhal.elements import element
from qhal.encoding import encode
from qhal.formats import Format
from qhal.rotations import Diagonal, Hadamard, Kronecker, hadamard_for
from qhal.specs import LinearSpec, Operand


def specs(row: Row, shape: Shape, device: torch.device) -> dict[str, LinearSpec]:
    """The products of a layer. Layers share these numbers: each gets a copy of its own when it is prepared."""
    make = partial(_FAMILIES.get(row.family, _quantized), row)
    found = {}
    for i, (name, (n, k)) in enumerate(shape.products(fused=row.fused).items()):
        generator = torch.Generator(device=device).manual_seed(i)
        found[name] = replace(make(name, n, k, generator), name=name)
    return found


def normal(n: int, k: int, g: torch.Generator) -> Tensor:
    """bf16 [n, k] of variance 1 / k."""
    return (torch.randn(n, k, generator=g, device=g.device) * k**-0.5).bfloat16()


def _quantized(row: Row, name: str, n: int, k: int, g: torch.Generator) -> LinearSpec:
    f, x = Format.parse(row.w), Format.parse(row.x)
    w = normal(n, k, g)
    if f.plain:
        return LinearSpec(w)
    quantized = encode(w, f)
    if row.order:
        groups = torch.arange(k, device=g.device, dtype=torch.int32) // f.block.cols  # type: ignore[union-attr]
        quantized = replace(quantized, group_index=groups[torch.randperm(k, generator=g, device=g.device)])
    return LinearSpec(quantized, None if x.plain else Operand(x))


def _quarot(row: Row, name: str, n: int, k: int, g: torch.Generator) -> LinearSpec:
    """A Hadamard transform before `down`; the others are folded into the model."""
    spec = _quantized(row, name, n, k, g)
    return replace(spec, rotate_in=(_hadamard(k, "quarot"),)) if name == "down" else spec


def _flatquant(row: Row, name: str, n: int, k: int, g: torch.Generator) -> LinearSpec:
    """Two small matrices before every product."""
    left = next(d for d in range(int(k**0.5), 0, -1) if k % d == 0)
    factors = (torch.linalg.qr(torch.randn(d, d, generator=g, device=g.device))[0].float() for d in (left, k // left))
    return replace(_quantized(row, name, n, k, g), rotate_in=(Kronecker(*factors),))


def _codes(rows: int, vectors: int, entries: tuple[int, ...], g: torch.Generator) -> Tensor:
    parts = [torch.randint(0, e, (rows, vectors), generator=g, device=g.device, dtype=torch.int32) for e in entries]
    return torch.stack(parts, -1)


def _aqlm(books: tuple[int, ...], row: Row, name: str, n: int, k: int, g: torch.Generator) -> LinearSpec:
    """Sums of entries of eight columns, and a scale per row."""
    tables = tuple(torch.randn(v, 1, 8, generator=g, device=g.device).half() for v in books)
    scale = torch.full((n,), (len(books) * k) ** -0.5, device=g.device).half()
    segment = CodebookSegment(_codes(n, k // 8, books, g), tables)
    return LinearSpec(CodebookTensor((n, k), (segment,), scale=scale))


def _vptq(row: Row, name: str, n: int, k: int, g: torch.Generator) -> LinearSpec:
    """Entries of eight rows and a residual stage; columns permuted, scaled and shifted."""
    books = (1 << 16, 256)
    sizes = (k**-0.5, 0.25 * k**-0.5)
    tables = tuple(
        (torch.randn(v, 8, 1, generator=g, device=g.device) * size).half() for v, size in zip(books, sizes, strict=True)
    )
    segment = CodebookSegment(_codes(-(-n // 8), k, books, g), tables)
    order = torch.randperm(k, generator=g, device=g.device)
    scale = (1 + 0.1 * torch.randn(k, generator=g, device=g.device)).half()
    bias = (0.1 * k**-0.5 * torch.randn(k, generator=g, device=g.device)).half()
    weight = CodebookTensor((n, k), (segment,), permutation=order, column_scale=scale, column_bias=bias)
    return LinearSpec(weight)


def _quip(stages: int, row: Row, name: str, n: int, k: int, g: torch.Generator) -> LinearSpec:
    """Points of the E8 lattice between two Hadamard transforms with signs; two stages are four bits."""
    codes = _codes(n, k // 8, (1 << 16,) * stages, g)
    segment = CodebookSegment(codes, ("e8p12",) * stages, (1.0, 3.45)[:stages] if stages > 1 else ())
    scale = torch.full((1,), 0.9 * k**-0.5, device=g.device).half()  # entries of the lattice have a size near 1.1
    signs = [torch.randint(0, 2, (d,), generator=g, device=g.device).float() * 2 - 1 for d in (k, n)]
    before, after = _hadamard(k, "quip"), _hadamard(n, "quip").inverse()
    weight = CodebookTensor((n, k), (segment,), scale=scale)
    return LinearSpec(weight, rotate_in=(Diagonal(signs[0]), before), rotate_out=(after, Diagonal(signs[1])))


def _hadamard(n: int, family: str) -> Hadamard:
    return hadamard_for(n, family)


_FAMILIES: dict[str, Callable[..., LinearSpec]] = {
    "quarot": _quarot,
    "flatquant": _flatquant,
    "aqlm": partial(_aqlm, (1 << 16,)),
    "aqlm-2x8": partial(_aqlm, (256, 256)),
    "vptq": _vptq,
    "quip": partial(_quip, 1),
    "quip-4bit": partial(_quip, 2),
}


def bits(row: Row, given: dict[str, LinearSpec]) -> float:
    """Bits per weight of the format, scales counted, tables not."""
    formats = [spec.format.weight for spec in given.values()]
    sizes = [spec.format.n * spec.format.k for spec in given.values()]
    each = [element(f.element).bits if isinstance(f, Format) and f.plain else f.bits for f in formats]
    return sum(b * s for b, s in zip(each, sizes, strict=True)) / sum(sizes)
