"""What compile checks ask for: the kernel that writes, with every pair of formats that engines have caches in."""

from __future__ import annotations

from collections.abc import Iterator

from qhal.elements import element
from qhal.formats import Format
from qhal_triton.kv.kernels.write import write
from qhal_triton.kv.launch import size
from qhal_triton.kv.paths import encoding
from qhal_triton.kv.rows import WIDE, Row
from qhal_triton.target import Target
from qhal_triton.tiles import Tile

MHA = (
    ("bf16", "bf16"),
    ("e4m3fn.tensor*fp32", "e4m3fn.tensor*fp32"),
    ("e4m3fn.head*fp32", "e4m3fn.row*fp32"),
    ("e5m2.tensor*fp32", "e4m3fnuz.tensor*fp32"),
    ("int8.row*fp32", "int8.row*fp32"),
    ("int8-int8.tensor*fp32", "int8.col*fp32"),
    ("int4.row*fp32", "int4.g32*fp16"),
    ("uint4-fp16.row*fp16@domain=minmax", "uint8-uint8.row*fp32@domain=minmax"),
    ("e4m3fn.g32*e8m0", "e2m1.g32*e8m0"),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor*fp32)"),
)
"""(k, v) of 8 heads of 128."""
MLA = (
    ("bf16", "bf16"),
    ("e4m3fn.tensor*fp32", "e4m3fn.tensor*fp32"),
    ("e4m3fn.g128*fp32", "bf16"),
    ("int8.row*fp32", "int8.row*fp32"),
    ("int4.g32*fp16", "e4m3fn.row*fp32"),
)
"""(latent, rope) of 512 and 64."""

_SIZES = ("slot_stride", "count", "limit", "heads", "in_page")


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    for heads, dims, pairs in ((8, (128, 128), MHA), (1, (512, 64), MLA)):
        for k, v in pairs:
            yield _tile(Format.parse(k), Format.parse(v), heads, dims, target)


def _tile(k: Format, v: Format, heads: int, dims: tuple[int, int], target: Target) -> Tile:
    found = [encoding(f, dim, element("bf16").storage, target) for f, dim in zip((k, v), dims, strict=True)]
    assert found[0] is not None and found[1] is not None
    (kr, kf), (vr, vf) = found[0], found[1]
    s = size(1 << 16, *dims)
    constants = {"K": kr, "KF": kf, "V": vr, "VF": vf, "DK": dims[0], "DV": dims[1]}
    constants |= {"ROWS": s.rows, "BK": s.k, "BV": s.v}
    known = {"k": "*bf16", "v": "*bf16", "slots": "*i64"} | dict.fromkeys(_SIZES, "i32")
    known |= pointers(kr, "kc", "ks", "kz", "k_outer") | pointers(vr, "vc", "vs", "vz", "v_outer")
    return Tile(
        name=f"kv.write[{'mla' if heads == 1 else 'mha'} {k} {v}]",
        fn=write,
        signature={n: known.get(n, "i32:16") for n in write.arg_names if n not in constants},
        constants=constants,
        options={"num_warps": s.warps, "enable_fp_fusion": False},
    )


def pointers(row: Row, codes: str, scale: str, zero: str, outer: str) -> dict[str, str]:
    """Triton's types of a row's planes, under the arguments' names."""
    planes = {codes: row.element, scale: row.scale or row.element, zero: row.zero or row.element}
    return {name: kind(e) for name, e in planes.items()} | {outer: "*fp32"}


def kind(e: str) -> str:
    """Triton's type of a plane with codes of an element: bytes, or the wide float."""
    return f"*{e}" if e in WIDE else "*u8"
