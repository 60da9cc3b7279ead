"""Tensors of quant_method fp8: found by name, and checked by dtype and shape, for one layer or for stacked experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.source import WIDE, TensorIndex

SCALES = ("weight_scale_inv", "weight_scale")
INPUT_SCALES = ("input_scale", "activation_scale")
PROJECTIONS = ("gate_up_proj", "down_proj")
_FP4_GROUP = 32

Tile = tuple[int, int] | None


@dataclass(frozen=True)
class Stored:
    """What a module's tensors are: [n, k] of one layer or one expert, and names by part: weight, scale, input, bias.

    grid        of the scale, as stored
    experts     how many are stacked, 0 for a layer of its own
    transposed  the file has [K, N]
    """

    n: int
    k: int
    format: Format
    grid: tuple[int, int]
    names: dict[str, str] = field(default_factory=dict)
    experts: int = 0
    transposed: bool = False
    fp4: bool = False
    input_dtype: str = ""


def locate(index: TensorIndex, module: str, tile: Tile, static: bool, scale_fmt: str, fp4: bool) -> Stored:
    """The tensors of one Linear module."""
    weight, scale = f"{module}.weight", _one_of(index, module, SCALES)
    n, k = index.expect(weight, ("I8", "U8") if fp4 else ("F8_E4M3",), (None, None)).shape
    k = 2 * k if fp4 else k
    tile = (1, _FP4_GROUP) if fp4 else tile
    grid = _grid(n, k, tile)
    single = tile is None and scale in index and index[scale].shape in ((), (1,))
    entry = index.expect(scale, _dtypes(scale_fmt), index[scale].shape if single else grid)
    names, given = {"weight": weight, "scale": scale}, ""
    if static:
        names["input"] = _one_of(index, module, INPUT_SCALES)
        shape = index[names["input"]].shape if names["input"] in index else ()
        given = ELEMENT_OF[index.expect(names["input"], tuple(WIDE), () if shape == () else (1,)).dtype]
    if f"{module}.bias" in index:
        names["bias"] = index.expect(f"{module}.bias", tuple(WIDE), (n,)).name
    return Stored(n, k, _format(tile, ELEMENT_OF[entry.dtype], fp4), grid, names, fp4=fp4, input_dtype=given)


def locate_stacked(
    index: TensorIndex, prefix: str, tile: Tile, static: bool, scale_fmt: str, fp4: bool
) -> dict[str, Stored]:
    """Both stacked modules of a layer's experts, [E, N, K] or [E, K, N]: their shapes together tell which."""
    dtypes = ("I8", "U8") if fp4 else ("F8_E4M3",)
    shapes = [index.expect(f"{prefix}.{p}", dtypes, (None, None, None)).shape for p in PROJECTIONS]
    (count, rows, cols), (other, down_rows, down_cols) = shapes
    wide = 2 if fp4 else 1
    straight = (rows, cols * wide) == (2 * down_cols * wide, down_rows)
    transposed = not fp4 and (rows, cols) == (down_cols, 2 * down_rows)
    if count != other or not (straight or transposed) or min(rows, cols) < 1:
        raise CheckpointError(
            f"{index.folder}: {prefix}: gate_up_proj {list(shapes[0])} and down_proj {list(shapes[1])} do not fit: "
            "expected [E, 2I, K] and [E, K, I], or [E, K, 2I] and [E, I, K]"
        )
    if transposed and tile is not None and tile[0] != tile[1]:
        raise CheckpointError(f"unsupported: {index.folder}: {prefix}: transposed experts with tiles {list(tile)}")
    tile = (1, _FP4_GROUP) if fp4 else tile
    found = {}
    for name, (_, a, b) in zip((f"{prefix}.{p}" for p in PROJECTIONS), shapes, strict=True):
        grid = _grid(a, b * wide, tile)
        entry = index.expect(f"{name}_scale_inv", _dtypes(scale_fmt), (count, *grid))
        names, given = {"weight": name, "scale": entry.name}, ""
        n, k = (b, a) if transposed else (a, b * wide)
        if static:
            names["input"] = f"{name}_activation_scale"
            given = ELEMENT_OF[index.expect(names["input"], tuple(WIDE), (count,)).dtype]
        if f"{name}_bias" in index:
            names["bias"] = index.expect(f"{name}_bias", tuple(WIDE), (count, n)).name
        fmt = _format(tile, ELEMENT_OF[entry.dtype], fp4)
        found[name] = Stored(n, k, fmt, grid, names, count, transposed, fp4, given)
    return found


def _one_of(index: TensorIndex, module: str, leaves: Sequence[str]) -> str:
    """The name that the file has; the first where it has none."""
    return next((name for leaf in leaves if (name := f"{module}.{leaf}") in index), f"{module}.{leaves[0]}")


def _grid(n: int, k: int, tile: Tile) -> tuple[int, int]:
    return (1, 1) if tile is None else (-(-n // tile[0]), -(-k // tile[1]))


def _dtypes(scale_fmt: str) -> tuple[str, ...]:
    """Dtypes of scales. Files of scale_fmt ue8m0 hold exponents, or floats that are powers of two."""
    return tuple(WIDE) if scale_fmt == "float" else (*sorted(WIDE), "F8_E8M0", "U8")


@lru_cache(maxsize=64)
def _format(tile: Tile, scale: str, fp4: bool) -> Format:
    block = "tensor" if tile is None else f"{tile[0]}x{tile[1]}"
    return Format.parse(f"{'e2m1' if fp4 else 'e4m3fn'}.{block}*{scale}")
