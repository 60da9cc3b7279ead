"""Every row: how the weights, the inputs of products and the cache are held, by the names that formats have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["", "torch", "aqlm", "aqlm-2x8", "vptq", "quip", "quip-4bit", "quarot", "flatquant"]


@dataclass(frozen=True)
class Row:
    """w, x: formats of weights and of the inputs of products; kv: of the cache.

    family  what a format does not say: torch (weights in bf16 multiplied by torch itself), a codebook, rotations
    order   columns in the order of their activations (GPTQ's g_idx)
    """

    name: str
    w: str = "bf16"
    x: str = "bf16"
    kv: str = "bf16"
    family: Family = ""
    order: bool = False

    @property
    def fused(self) -> bool:
        """Whether q, k, v and gate, up are one product: codebooks and rotations after the product belong to one."""
        return self.family in ("", "torch", "quarot", "flatquant")


BASE = Row("w/bf16-torch", family="torch")
"""What every row is compared with: torch's own products, the cache in bf16."""

_FP8, _INT8 = "e4m3fn.row*fp32", "int8.row*fp32"
WEIGHTS = (
    BASE,
    Row("w/bf16"),
    Row("w/int4-g128", "int4.g128*bf16"),
    Row("w/int4-zero-g128", "uint4-uint4.g128*bf16@domain=minmax"),
    Row("w/int4-g128-order", "int4.g128*bf16", order=True),
    Row("w/int3-g128", "int3.g128*bf16"),
    Row("w/int2-zero-g128", "uint2-uint2.g128*bf16@domain=minmax"),
    Row("w/int8-row", "int8.row*bf16"),
    Row("w/int8-a8", _INT8, _INT8),
    Row("w/fp8-tensor-a8", "e4m3fn.tensor*fp32", "e4m3fn.tensor*fp32"),
    Row("w/fp8-row-a8", _FP8, _FP8),
    Row("w/fp8-block-a8", "e4m3fn.128x128*fp32", "e4m3fn.g128*fp32"),
    Row("w/mxfp4", "e2m1.g32*e8m0"),
    Row("w/mxfp6", "e3m2.g32*e8m0"),
    Row("w/mxfp8-a8", "e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0"),
    Row("w/nvfp4", "e2m1.g16*(e4m3fn.tensor*fp32)"),
    Row("w/nvfp4-a4", "e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor*fp32)"),
    Row("w/nf4", "nf4.flat64*fp32"),
    Row("w/nf4-double", "nf4_dq"),
    Row("w/q4_k", "uint4.g32*(uint6.g8*fp16)-(uint6.g8*fp16)@domain=minmax"),
    Row("w/int4-a8-int8", "int4.g128*bf16", _INT8),
    Row("w/int4-a8-fp8", "int4.g128*bf16", _FP8),
    Row("w/quarot-int4-a4", "int4.row*bf16", "int4.row*fp32", family="quarot"),
    Row("w/flatquant-int4-a4", "int4.row*bf16", "int4.row*fp32", family="flatquant"),
    Row("w/aqlm-1x16", family="aqlm"),
    Row("w/aqlm-2x8", family="aqlm-2x8"),
    Row("w/vptq-16+8", family="vptq"),
    Row("w/quip-2bit", family="quip"),
    Row("w/quip-4bit", family="quip-4bit"),
)
CACHES = {
    "fp8-tensor": "e4m3fn.tensor*fp32",
    "fp8-row": "e4m3fn.row*fp32",
    "int8-row": "int8.row*fp32",
    "int4-g32": "int4.g32*fp16",
    "nvfp4": "e2m1.g16*(e4m3fn.tensor*fp32)",
    "mxfp8": "e4m3fn.g32*e8m0",
}
ROWS = (
    *WEIGHTS,
    *(
        row
        for name, kv in CACHES.items()
        for row in (
            Row(f"kv/{name}/w-bf16", kv=kv, family="torch"),
            Row(f"kv/{name}/w-int4", "int4.g128*bf16", kv=kv),
        )
    ),
)
