"""QTensor: quantized numbers in one canonical, device-neutral layout, whose dequantization is their value.

One code per element, scales row-major, planes nested as the format nests. How a device wants the same numbers is the
business of `QuantOps.prepare`; how a file packs them, of a scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhal import sharding
from qhal.blocks import Block
from qhal.elements import decode, element, values
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.parts import at, parts, stacked
from qhal.sharding import same_bits as same_bits  # bit equality of planes belongs to tensors; sharding compares planes


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor [..., N, K]; a leading axis may stack experts.

    codes        [..., N, K], one code per element: int8, uint8, a torch float8 dtype, or a plain float
    scale        [..., grid] of format.block (`Block.grid`), nested as the format nests
    zero         grid of `scale`, or one value [..., 1, 1]
    offset       grid of `scale`, or one value [..., 1, 1]
    table        [2**bits] float32, for lut elements
    group_index  int32 [K]: column k uses group group_index[k] of the scale's last axis; groups may be uneven
    layout       "canonical"; anything else is a backend's own and is read back by `QuantOps.restore`

    Construction checks dtypes and shapes (FormatError), never values: that would read the data.
    """

    format: Format
    codes: Tensor
    scale: Tensor | QTensor | None = None
    zero: Tensor | QTensor | None = None
    offset: Tensor | QTensor | None = None
    table: Tensor | None = None
    group_index: Tensor | None = None
    layout: str = "canonical"

    def __post_init__(self) -> None:
        if self.layout == "canonical":
            _check(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that this stands for."""
        return tuple(self.codes.shape)

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of every plane."""
        return sum(t.numel() * t.element_size() for t in self.planes().values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The value, [..., N, K]: (code - zero) * scale + offset in fp32, each step rounded once, then to `dtype`."""
        f = self.format
        numbers = {name: self._numbers(getattr(self, name), getattr(f, name)) for name in ("scale", "zero", "offset")}
        whole = {name: stacked(self._spanned(number)) for name, number in numbers.items() if number is not None}
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        # every step is by itself for every element: the parts change no bit
        for codes, place in parts(self.codes, f.block or Block("row")):
            value = self._values(codes, {name: at(number, place) for name, number in whole.items()}).to(dtype)
            if place is None:
                return value.reshape(self.shape)
            stacked(out)[place[:2]] = value
        return out

    def _values(self, codes: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        """float32 [l, n, K]: codes of whole blocks with the numbers on their grids."""
        f = self.format
        value = decode(f.element, codes, self.table)
        if "zero" in numbers:
            value = value - self._per_element(numbers["zero"], codes.shape)
        if "scale" in numbers:
            scale = self._per_element(numbers["scale"], codes.shape)
            value = value * scale if f.op == "*" else value / scale
        if "offset" in numbers:
            offset = self._per_element(numbers["offset"], codes.shape)
            value = value + offset if f.offset_sign > 0 else value - offset
        return value

    def _numbers(self, plane: Tensor | QTensor | None, fmt: Format | None) -> Tensor | None:
        if plane is None:
            return None
        assert fmt is not None
        return plane.dequantize() if isinstance(plane, QTensor) else decode(fmt.element, plane)

    def _spanned(self, number: Tensor) -> Tensor:
        """A grid with the leading axes of the codes, or with all of them 1."""
        lead = self.shape[:-2] if number.shape[:-2].numel() > 1 else number.shape[:-2]
        return number.expand(*lead, *number.shape[-2:])

    def _per_element(self, number: Tensor, shape: torch.Size) -> Tensor:
        if self.group_index is not None:
            picked = number.index_select(-1, self.group_index.long()) if number.shape[-1] > 1 else number
            return picked.expand(shape)
        if self.format.block is None or number.shape[-2:].numel() == 1:
            return number.expand(shape)
        return self.format.block.expand(number, shape)

    def planes(self) -> dict[str, Tensor]:
        """Every tensor by dotted name: "codes", "scale" or "scale.codes" and "scale.scale", "zero", "group_index"."""
        found: dict[str, Tensor] = {"codes": self.codes}
        for name in ("scale", "zero", "offset"):
            plane = getattr(self, name)
            if isinstance(plane, QTensor):
                found.update({f"{name}.{inner}": t for inner, t in plane.planes().items()})
            elif plane is not None:
                found[name] = plane
        if self.table is not None:
            found["table"] = self.table
        if self.group_index is not None:
            found["group_index"] = self.group_index
        return found

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor on another device."""
        moved = {
            name: plane.to(device)
            for name in ("codes", "scale", "zero", "offset", "table", "group_index")
            if (plane := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def equal(self, other: QTensor) -> bool:
        """Same format and the same bits in every plane."""
        mine, theirs = self.planes(), other.planes()
        return (
            self.format == other.format
            and mine.keys() == theirs.keys()
            and all(same_bits(mine[name], theirs[name]) for name in mine)
        )

    def shard(self, dim: int, rank: int, world: int) -> QTensor:
        """Part `rank` of `world` along N (dim 0) or K (dim 1); equals sharding `dequantize()`.

        ShardError names the block that the cut would go through.
        """
        return sharding.shard(self, dim, rank, world)

    def narrow(self, dim: int, start: int, stop: int) -> QTensor:
        """Rows (dim 0) or columns (dim 1) start:stop; ShardError where a block is cut."""
        return sharding.narrow(self, dim, start, stop)

    @staticmethod
    def concat(parts: Sequence[QTensor], dim: int) -> QTensor:
        """Fuse along N (dim 0) or K (dim 1). Unequal per-tensor scales become per-row: exact, or ShardError."""
        return sharding.concat(parts, dim)

    @staticmethod
    def stack(parts: Sequence[QTensor]) -> QTensor:
        """Stack equal formats and shapes on a new leading axis: experts [E, N, K]."""
        return sharding.stack(parts)

    def select(self, first: int, count: int) -> QTensor:
        """Experts first:first+count of the leading axis."""
        return sharding.select(self, first, count)

    def permute_rows(self, index: Tensor) -> QTensor:
        """Rows in the order of `index` [N]: exact for tensor, row, col, g<k>; ShardError for tiles and flat blocks."""
        return sharding.permute_rows(self, index)

    def transposed(self) -> QTensor:
        """[..., K, N] whose dequantization is that of this tensor transposed, to the bit.

        Blocks turn: row to col and back, g<k> to kx1, n x k to k x n, short last blocks too. ShardError for flat
        blocks, group_index and n:m sparsity: they have a direction. Planes may share memory with this tensor's.
        """
        return sharding.transposed(self)


def unchecked(f: Format, codes: Tensor, scale: Tensor | QTensor, zero: Tensor | QTensor | None = None) -> QTensor:
    """A QTensor without the checks of construction: for planes that were allocated by this format a moment ago."""
    t = object.__new__(QTensor)
    vars(t).update(
        format=f, codes=codes, scale=scale, zero=zero, offset=None, table=None, group_index=None, layout="canonical"
    )
    return t


def _check(t: QTensor) -> None:
    f, codes = t.format, t.codes
    e = element(f.element)
    if codes.dtype != e.storage and not (e.wide and codes.is_floating_point()):
        raise FormatError(f"{f}: codes are {codes.dtype}, must be {e.storage} (one code per element)")
    if codes.dim() < 2:
        raise FormatError(f"{f}: codes have shape {tuple(codes.shape)}, must be [..., N, K]")
    n, k = codes.shape[-2:]
    for name in ("scale", "zero", "offset"):
        plane, inner = getattr(t, name), getattr(f, name)
        if (plane is None) != (inner is None):
            verb = "needs" if plane is None else "has no"
            raise FormatError(f"{f}: the format {verb} a {name} plane")
        if plane is None:
            continue
        if isinstance(plane, QTensor) != (not inner.plain):
            raise FormatError(f"{f}: the {name} plane must be a {'tensor' if inner.plain else 'QTensor'} ({inner})")
        if isinstance(plane, QTensor) and plane.format.storage != inner.storage:
            raise FormatError(f"{f}: the {name} plane has format {plane.format}, must be {inner}")
        if isinstance(plane, Tensor):
            storage = element(inner.element)
            exponent = storage.kind == "exponent" and plane.dtype == torch.float8_e8m0fnu
            if plane.dtype != storage.storage and not exponent and not (storage.wide and plane.is_floating_point()):
                raise FormatError(f"{f}: the {name} plane is {plane.dtype}, must be {storage.storage}")
        shape = tuple(plane.shape)
        grid = f.block.grid(n, k) if f.block is not None else (1, 1)
        fits = len(shape) == codes.dim() and all(a in (1, b) for a, b in zip(shape[:-2], codes.shape[:-2], strict=True))
        fits = fits and (shape[-2:] == grid or (name != "scale" and shape[-2:] == (1, 1)))
        if t.group_index is not None:
            fits = len(shape) == codes.dim() and shape[-2] in (1, n)
        if not fits:
            raise FormatError(f"{f}: the {name} plane has shape {shape}, a {tuple(codes.shape)} tensor needs {grid}")
    if e.kind == "lut" and values(f.element) is None and (t.table is None or t.table.shape != (2**e.bits,)):
        raise FormatError(f"{f}: needs a table of {2**e.bits} values")
    if t.group_index is not None:
        gi = t.group_index
        if gi.shape != (k,) or gi.dtype != torch.int32:
            raise FormatError(f"{f}: group_index is {gi.dtype} {tuple(gi.shape)}, must be int32 [{k}]")
        if f.block is None or f.block.kind != "group":
            raise FormatError(f"{f}: group_index has a meaning only with g<k> blocks")
