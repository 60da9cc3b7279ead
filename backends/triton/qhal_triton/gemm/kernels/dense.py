"""Device code that writes a weight out in 16 bits, or its codes in fp8: decoded in fp32 and rounded once."""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import narrow
from qhal_triton.gemm.kernels.values import code_of, decoded, plane, under


@triton.jit
def dense(
    w, y, sw, ow, zw, fw, table, index, n, k, w_row, sw_row, sw_col, zw_row, zw_col, fw_row, fw_col, ow_row,
    WKIND: tl.constexpr, SW: tl.constexpr, OW: tl.constexpr, OVERW: tl.constexpr, ZW: tl.constexpr, FW: tl.constexpr,
    GW: tl.constexpr, RW: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, APART: tl.constexpr,
    INDEXED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y [n, k] from the codes of one step in BN rows; the arguments are those of `product`."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    step, rn_in = tl.program_id(1), rn < n
    cols = tl.arange(0, CHUNK)
    here = rn_in[:, None] & (step * CHUNK + cols < k // PARTS)[None, :]
    word = tl.load(w + rn.to(tl.int64)[:, None] * w_row + step * CHUNK + cols[None, :], mask=here, other=0)
    for half in tl.static_range(PARTS):
        base = step * (CHUNK * PARTS)
        if APART == 1:
            columns = base + PARTS * cols + half
        else:
            base += half * CHUNK
            columns = base + cols
        valid = columns < k
        if INDEXED:
            g = tl.load(index + columns, mask=valid, other=0)[None, :]
            r, w_in = (rn // RW)[:, None], rn_in[:, None] & valid[None, :]
        else:
            g = base // GW if GW > 0 else 0
            r, w_in = (rn // RW), rn_in
        s, z, f = 1.0, 0.0, 0.0
        if SW != "":
            s = plane(sw, r * sw_row + g * sw_col, w_in, SW)
            if OW != "":
                outer = tl.where(rn_in, plane(ow, rn * ow_row, rn_in, OW), 1.0)
                s = under(s, outer[:, None] if INDEXED else outer, OW, OVERW)
        if ZW != "":
            z = plane(zw, r * zw_row + g * zw_col, w_in, ZW)
        if FW != "":
            f = plane(fw, r * fw_row + g * fw_col, w_in, "")
        value = decoded(code_of(word, WKIND, half, PARTS), WKIND, table, s, z, f, SW, ZW, FW, INDEXED)
        y_at = y + rn.to(tl.int64)[:, None] * k + columns[None, :]
        tl.store(y_at, narrow(value, y.dtype.element_ty), mask=rn_in[:, None] & valid[None, :])
