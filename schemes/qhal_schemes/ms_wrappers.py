"""What ModelSlim wraps around a Linear module: smoothing, rotations, a low-rank branch, and clipped inputs.

`<m>.div.mul_scale` multiplies the input of the linear under `<m>.linear`; FlatQuant's left_trans [l, l] and right_trans
[r, r] give left^T X right with x viewed [l, r] (either may be absent); heads_rotation and kronecker_rotation do the
same. `svd_lowrank_l1` [r, K] and `_l2` [N, r] add a branch that reads the input before it is quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qhal.errors import CheckpointError
from qhal.rotations import Diagonal, Kronecker, Rotation
from qhal_schemes import checks
from qhal_schemes.source import WIDE, TensorIndex

FLAT = ("left_trans", "right_trans")
_ROTATIONS = (FLAT, ("heads_rotation", ""), ("kronecker_rotation_m", "kronecker_rotation_n"))
_SVD = ("svd_lowrank_l1", "svd_lowrank_l2")
_MATRIX = ("F64", *WIDE)
CLIP = "clip_ratio"


@dataclass(frozen=True)
class Wrappers:
    """The wrappers of one module by the names of their tensors ("" for none), from the index.

    stem  what the names of the module's own tensors start with
    """

    stem: str
    smooth: str = ""
    left: str = ""
    right: str = ""
    low_rank: int = 0
    clip: str = ""
    kinds: tuple[tuple[object, ...], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor they read."""
        svd = [f"{self.stem}.{part}" for part in _SVD] if self.low_rank else []
        return tuple(n for n in (self.smooth, self.left, self.right, self.clip, *svd) if n)

    def rotations(self, index: TensorIndex) -> tuple[Rotation, ...]:
        """The chain, in the order of its application."""
        chain: list[Rotation] = []
        if self.smooth:
            values = index.read(self.smooth).float().flatten()
            checks.scales(index, self.smooth, values)
            chain.append(Diagonal(values))
        if self.left or self.right:
            left, right = (_matrix(index, name) for name in (self.left, self.right))
            chain.append(Kronecker(left, right))
        return tuple(chain)

    def branch(self, index: TensorIndex) -> tuple[Tensor, Tensor] | None:
        """The low-rank branch: down [r, K], up [N, r]."""
        if not self.low_rank:
            return None
        names = [f"{self.stem}.{part}" for part in _SVD]
        down, up = index.read_all(names).values()
        for name, values in zip(names, (down, up), strict=True):
            checks.finite(index, name, values)
        return down, up

    def ratio(self, index: TensorIndex) -> tuple[float, float]:
        """The fractions of an input's range that are kept, 0 < r <= 1."""
        if not self.clip:
            return 1.0, 1.0
        value = float(index.read(self.clip).float().item())
        if not 0 < value <= 1:
            raise index.bad(self.clip, "a ratio above 0 and at most 1", f"{value}")
        return value, value


def smoothed(index: TensorIndex, stem: str) -> str:
    """`<m>` for the linear `<m>.linear` of a smoothing wrapper, else the stem itself."""
    module = stem.removesuffix(".linear")
    return module if module != stem and f"{module}.div.mul_scale" in index else stem


def locate(index: TensorIndex, stem: str, n: int, k: int) -> Wrappers:
    """Find and check the wrappers of a module by names, dtypes and shapes; two whose order no file says are refused."""
    module = smoothed(index, stem)
    smooth = "" if module == stem else f"{module}.div.mul_scale"
    kinds: list[tuple[object, ...]] = []
    if smooth:
        index.expect(smooth, _MATRIX, (k,))
        kinds.append(("diagonal", k))
    pairs = [tuple(f"{stem}.{p}" if p and f"{stem}.{p}" in index else "" for p in pair) for pair in _ROTATIONS]
    found = [pair for pair in pairs if any(pair)]
    svd = any(f"{stem}.{part}" in index for part in _SVD)
    if len(found) + svd > 1:
        both = " and ".join([next(n for n in pair if n) for pair in found] + ([f"{stem}.{_SVD[0]}"] if svd else []))
        raise CheckpointError(f"unsupported: {index.folder}: {both}: the files do not say which is applied first")
    left, right = found[0] if found else ("", "")
    if found:
        sizes = [_square(index, name) for name in (left, right)]
        if (left and right and sizes[0] * sizes[1] != k) or (not (left and right) and k % max(sizes)):
            shown = " x ".join(str(s) for s in sizes if s)
            raise index.bad(left or right, f"sizes that make the {k} columns (K) of the weight", shown)
        kinds.append(("kronecker", *sizes))
    rank = 0
    if svd:
        rank = index.expect(f"{stem}.{_SVD[0]}", tuple(WIDE), (None, k)).shape[0]
        index.expect(f"{stem}.{_SVD[1]}", tuple(WIDE), (n, rank))
        if rank < 1:
            raise index.bad(f"{stem}.{_SVD[0]}", "at least one row", "none")
    clip = f"{stem}.{CLIP}" if f"{stem}.{CLIP}" in index else ""
    if clip:
        index.expect(clip, _MATRIX, () if index[clip].shape == () else (1,))
    return Wrappers(stem, smooth, left, right, rank, clip, tuple(kinds))


def _square(index: TensorIndex, name: str) -> int:
    """The size of a square matrix; 0 for none."""
    if not name:
        return 0
    size = index.expect(name, _MATRIX, (None, None)).shape[0]
    index.expect(name, _MATRIX, (size, size))
    if size < 1:
        raise index.bad(name, "a matrix", "an empty one")
    return size


def _matrix(index: TensorIndex, name: str) -> Tensor | None:
    if not name:
        return None
    matrix = index.read(name)
    checks.finite(index, name, matrix)
    return matrix
