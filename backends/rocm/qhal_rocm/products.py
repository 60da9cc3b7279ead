"""gemm through AITER's products: which request takes which call, and the calls.

    gemm_a8w8              int8 x int8, fp8 x fp8, one scale per row or tensor on both sides. int8: exact int32 sums,
                           class fp32-acc, without split-K, which would add 16-bit results. fp8: class reduced-acc
    gemm_a8w8_blockscale   fp8 x fp8, scales per 128 columns of x and per 128 x 128 of the weight. Class reduced-acc
    gemm_afp4wfp4          MXFP4 x MXFP4 on gfx950. Class reduced-acc

All of them round once, to bf16 or fp16. So a bias, which is added before that rounding, is not theirs, and a result in
fp32 is computed by the portable product: `Support.executes` says so. Quantization stays ours (`quantize`), to the bit.
Contract-tested against a stand-in of the library only: no AMD GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qhal.elements import WIDE
from qhal.formats import Format
from qhal.requests import GemmRequest, NumericsClass, Support, minimum_class
from qhal.tensors import QTensor
from qhal_portable import gemm
from qhal_portable.gemm import quantized, write
from qhal_portable.prepared import PreparedWeight, Run
from qhal_portable.support import layout
from qhal_rocm import fnuz
from qhal_rocm.aiter_calls import BLOCKS, MXFP4, ROWS, Call
from qhal_triton import paths
from qhal_triton.target import Target

HALVES = (torch.bfloat16, torch.float16)
_FP8 = ("e4m3fn", "e4m3fnuz")


@dataclass(frozen=True)
class Path:
    """A call for a request. element: of both operands; foreign: its bytes are read as the other flavour."""

    call: Call
    element: str
    numerics: NumericsClass
    foreign: bool = False

    @property
    def executes(self) -> str:
        """For people, with the function's name."""
        sums = "exact int32 sums" if self.element == "int8" else "fp32 sums"
        flavour = ", bytes read as the fnuz flavour, scales doubled" if self.foreign else ""
        return (
            f"{self.element} x {self.element}: {self.call.module.partition('.')[0]}.{self.call.name}, {sums}{flavour}, "
            "one rounding to bf16 or fp16; fp32 results by the portable product"
        )

    def answer(self, request: GemmRequest) -> Support:
        """The answer to a request that takes this call."""
        sums = "int32" if self.element == "int8" else "fp32"
        graph = False  # whether the library allocates or tunes in a first call is not known without a GPU
        return paths.Path(
            kernel=self.call.name,
            executes=self.executes,
            numerics=self.numerics,
            accumulate=sums,
            graph=graph,
            layouts=(layout(request),),
        ).answer(request)


def choose(r: GemmRequest, target: Target, usable: frozenset[str]) -> Path | None:
    """The call for a request whose formats are known to be executable; None: no call does exactly this."""
    if not usable or len(r.x) != 1 or r.operand is not None or r.bias or r.group_index or r.batch_invariant:
        return None
    if not isinstance(r.w, Format) or r.out == torch.float32 or r.w.element != r.x[0].element:
        return None
    path = _rows(r, target) or _blocks(r, target) or _mxfp4(r, target)
    known = path is not None and path.call.name in usable and path.numerics <= minimum_class(r)
    return path if known else None


def _rows(r: GemmRequest, target: Target) -> Path | None:
    assert isinstance(r.w, Format)
    if not (_plain(r.w, "row", "tensor") and _plain(r.x[0], "row", "tensor")) or r.n % 16 or r.k % 16:
        return None
    if r.w.element == "int8" and r.k <= 1 << 16:  # 2^16 * 2^14 sums to 2^30: no int32 overflows
        return Path(ROWS, "int8", NumericsClass.FP32_ACC)
    return _fp8(r.w.element, ROWS, target)


def _blocks(r: GemmRequest, target: Target) -> Path | None:
    assert isinstance(r.w, Format)
    tile, group = r.w.block, r.x[0].block
    if not (_plain(r.w, "tile") and _plain(r.x[0], "group")) or r.n % 128 or r.k % 128:
        return None
    if tile is None or group is None or (tile.rows, tile.cols, group.cols) != (128, 128, 128):
        return None
    return _fp8(r.w.element, BLOCKS, target)


def _mxfp4(r: GemmRequest, target: Target) -> Path | None:
    mx = Format.parse("e2m1.g32*e8m0")
    if not target.mx or r.w.storage != mx or r.x[0].storage != mx or r.n % 32 or r.k % 256:  # type: ignore[union-attr]
        return None
    return Path(MXFP4, "e2m1", NumericsClass.REDUCED_ACC)


def _fp8(name: str, call: Call, target: Target) -> Path | None:
    other = fnuz.foreign(name, target.fp8)
    if name not in _FP8 or not (name in target.fp8 or other):
        return None
    return Path(call, name, NumericsClass.REDUCED_ACC, foreign=other)


def _plain(f: Format, *blocks: str) -> bool:
    """Whether one plain wide scale per block is all that stands beside the codes."""
    if f.scale is None or not f.scale.plain or f.scale.element not in WIDE or f.op != "*" or f.block is None:
        return False
    return f.block.kind in blocks and f.zero is None and f.offset is None and f.sparsity is None


def bind(p: PreparedWeight, path: Path) -> Run:
    """The product of one weight through the call: the body of `gemm`."""
    request = p.request
    assert isinstance(request, GemmRequest) and isinstance(p.stored, QTensor) and isinstance(p.stored.scale, Tensor)
    function, portable = path.call.function(), gemm.bind(p)
    codes = fnuz.weight(p.stored.codes, path.element) if path.foreign else p.stored.codes
    given = {ROWS: _given_rows, BLOCKS: _given_blocks, MXFP4: _given_mxfp4}[path.call]
    more = {"bias": None, "splitK": 0} if path.call is ROWS else {}

    def run(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        q, dtype = quantized(x, request, p, index)
        if dtype not in HALVES:
            return portable(x, index, out)
        assert isinstance(q, QTensor) and isinstance(q.scale, Tensor) and isinstance(p.stored, QTensor)
        if not q.codes.shape[0]:
            return write(torch.empty(0, request.n, dtype=dtype, device=p.device), out)
        left = fnuz.activation(q.codes, path.element) if path.foreign else q.codes
        factor = fnuz.FACTOR**2 if path.foreign else 1.0
        assert isinstance(p.stored.scale, Tensor)
        a, b, sx, sw = given(left.contiguous(), codes, q.scale, p.stored.scale, request)
        y = function(a, b, sx * factor if factor != 1 else sx, sw, dtype=dtype, **more)
        return write(y, out)

    return run


def _given_rows(x: Tensor, w: Tensor, sx: Tensor, sw: Tensor, r: GemmRequest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales [M, 1] and [1, N] in float32; one value serves all rows of a tensor."""
    rows = sx.float().reshape(-1, 1).expand(x.shape[0], 1).contiguous()
    return x, w, rows, sw.float().reshape(1, -1).expand(1, r.n).contiguous()


def _given_blocks(
    x: Tensor, w: Tensor, sx: Tensor, sw: Tensor, r: GemmRequest
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales [M, K / 128] and [N / 128, K / 128] in float32."""
    return x, w, sx.float().contiguous(), sw.float().contiguous()


def _given_mxfp4(x: Tensor, w: Tensor, sx: Tensor, sw: Tensor, r: GemmRequest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two codes to a byte, the even column low; the weight is kept so ("nibble")."""
    assert w.shape[-1] * 2 == r.k
    return x[:, 0::2] | (x[:, 1::2] << 4), w, sx, sw
