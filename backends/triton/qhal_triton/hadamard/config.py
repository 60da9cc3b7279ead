"""How one transform is cut into two matrix products, by its order: a pure function."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qhal_triton.target import Target

DIRECT = 256
"""Order up to which one product is considered."""
HEIGHTS = (64, 128, 256)
"""Rows of the left factor that are tried."""
WIDTHS = (16, 32, 64, 128)
"""Columns of the right factor that are tried."""


MOST = 16384
"""Features of a tile above which its sums do not fit the registers of a program."""
MANY = 8192
"""Features of a tile above which some of its sums are spilled."""
LEAST = 4096
"""Features of a tile below which its steps cost more than their work."""


@dataclass(frozen=True)
class Plan:
    """A transform of `order` features, seen as `group` rows of `width`: left @ X @ right.

    A program has a tile of `rows` x `columns` (powers of two), of which `used` x `width` are features: used // group
    transforms at once. left: False where the right product is the whole transform. stages: tiles in flight.
    """

    order: int
    group: int
    width: int
    rows: int
    columns: int
    used: int
    left: bool
    warps: int
    stages: int = 2

    @property
    def cost(self) -> tuple[bool, float, int]:
        """Small and large tiles last, then the multiplications for a feature.

        The right product is taken twice after a left one, and what is between them costs about 64 more.
        """
        work = (self.rows + 2 * self.columns + 64 if self.left else self.columns) * self.rows * self.columns
        size = self.rows * self.columns
        return not LEAST <= size <= MANY, work / (self.used * self.width), self.rows

    @property
    def deep(self) -> bool:
        """Whether one more tile in flight pays, and fits beside the factor and its scaled copy."""
        return not self.left and self.columns <= 128

    @property
    def programs(self) -> int:
        """The most programs of a launch: each loads the factors once, then takes tile after tile."""
        return 1056 if self.rows * self.columns <= 8192 else 264

    def shared(self, before: bool) -> int:
        """Bytes of the operands in fast memory: both factors, and the tile, again for every one in flight.

        before: the tile's second part, and what it is multiplied by in fp32.
        """
        tile = self.rows * self.columns
        return 2 * (self.rows**2 * self.left + self.columns**2 + tile * (self.stages + 3 * before))


@dataclass(frozen=True)
class Chip:
    """What bounds a tile: bytes of fast memory, columns of a right factor, sums of a program that a warp has.

    fused: there are registers for a quantization in the same pass. deep: one tile more is in flight where one product
    is the whole transform. low: rows of a left factor above which features in two parts do not fit the registers; such
    a tile is taken where no other holds the transform.
    """

    shared: int
    columns: int
    sums: int
    fused: bool = True
    deep: bool = False
    low: int = 256

    @staticmethod
    def of(target: Target) -> Chip:
        """AMD's compiler keeps the right factor in registers, all of it for every warp."""
        if target.kind == "cuda":
            return Chip(target.shared, 256, 1024, deep=True, low=256 if target.from_memory else 64)
        return Chip(target.shared, 64, 2048) if target.warp == 64 else Chip(target.shared, 32, 512, fused=False)

    def warps(self, rows: int, columns: int) -> int:
        """Warps of a tile: at most 8, or a thread has too few registers for its operands."""
        return min(max(rows * columns // self.sums, 4), 8)


def plan(order: int, k: int, before: bool, chip: Chip) -> Plan | None:
    """The cheapest plan for a table of order k times a power of two; None: no program holds one.

    before: the features are multiplied by something first, so they are operands in two parts.
    """
    found = []
    if order <= DIRECT:
        columns = max(_power(order), 16)
        rows = max(64, LEAST // columns)
        found.append(Plan(order, 1, order, rows, columns, rows, False, chip.warps(rows, columns)))
    for width in WIDTHS:
        group = order // width
        if (order // k) % width or group < 2:
            continue
        for rows in HEIGHTS:
            used = rows // group * group
            found.append(Plan(order, group, width, rows, width, used, True, chip.warps(rows, width)))
    found = [p for p in found if p.used and p.columns <= chip.columns and p.rows * p.columns <= MOST]
    for stages in (2, 1):
        staged = [replace(p, stages=stages + (chip.deep and p.deep and not before)) for p in found]
        fits = [p for p in staged if p.shared(before) <= chip.shared]
        if fits:
            low = [p for p in fits if not (p.left and before) or p.rows <= chip.low]
            return min(low or fits, key=lambda p: p.cost)
    return None


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
