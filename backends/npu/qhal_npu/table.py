"""The operator table: which torch_npu operator runs which kind of product, on which generations, and why we think so.

`products.choose` answers from it and from the demands below; `docs/npu.md` prints both. A line says what documents and
the wheel's own checks say. None was measured on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

_DOCUMENT = "op-plugin document"
_META = "wheel's Meta kernel"
_USED = "vllm-ascend, SGLang"


@dataclass(frozen=True)
class Operator:
    """One operator for one kind of product.

    kind    what the request must be: bits of the weight, bits of the activation
    on      generations that it is documented for
    x, w    elements of the operands as the operator gets them
    scales  how scales reach it, and in which order they are applied
    layout  of the weight
    aclnn   entry points of CANN that its host code reaches (level L1 host)
    """

    kind: str
    op: str
    on: tuple[str, ...]
    x: str
    w: str
    scales: str
    layout: str
    aclnn: tuple[str, ...]
    source: str


OPERATORS: tuple[Operator, ...] = (
    Operator(
        "W8A8", "npu_quant_matmul", ("A2", "A3", "A5"), "int8", "int8",
        "int32 sums and quant_bias, times scale [N] fp32, times pertoken_scale [M] fp32, plus bias fp32",
        "[K, N] FRACTAL_NZ where K % 16 = N % 32 = 0, else [K, N]",
        ("aclnnQuantMatmulWeightNz", "aclnnQuantMatmulV5"), f"{_DOCUMENT}; {_USED}",
    ),
    Operator(
        "W4A8", "npu_grouped_matmul", ("A2", "A3"), "int8", "int4 as int32",
        "x as two planes of 4 bits less 8; scale [1, N] int64 words, plus scale_bias 8 sum_k(w scale), times pertoken",
        "[1, K, N/8]", ("aclnnGroupedMatmulV5",), f"{_DOCUMENT}; {_USED}",
    ),
    Operator(
        "W4A4", "npu_quant_matmul", ("A2", "A3"), "int4 as int32", "int4 as int32",
        "int32 sums, times scale [N] fp32, times pertoken_scale [M] fp32",
        "[N, K/8], seen transposed", ("aclnnQuantMatmulV5",), f"{_DOCUMENT}; {_USED}",
    ),
    Operator(
        "W8A16", "npu_weight_quant_batchmatmul", ("A2", "A3"), "bf16, fp16", "int8",
        "(w + offset) * scale in the type of x, then the product", "[K, N]",
        ("aclnnWeightQuantBatchMatmulV2",), f"{_DOCUMENT}; {_USED}",
    ),
    Operator(
        "W4A16", "npu_weight_quant_batchmatmul", ("A2", "A3"), "bf16, fp16", "int4 as int32",
        "(w + offset) * scale in the type of x, then the product", "[K, N/8]",
        ("aclnnWeightQuantBatchMatmulV2",), f"{_DOCUMENT}; {_USED}",
    ),
    Operator(
        "FP8", "npu_quant_matmul", ("A5",), "e4m3fn", "e4m3fn",
        "sums times scale [N] fp32, times pertoken_scale [M] fp32, plus bias fp32", "[N, K], seen transposed",
        ("aclnnQuantMatmulV5",), _META,
    ),
    Operator(
        "MXFP8", "npu_quant_matmul", ("A5",), "e4m3fn", "e4m3fn",
        "E8M0 bytes in pairs, groups [1, 1, 32], plus bias fp32", "[N, K], seen transposed",
        ("aclnnQuantMatmulV5",), f"{_DOCUMENT}; {_USED}",
    ),
    Operator(
        "FP8 blocks", "npu_quant_matmul", ("A5",), "e4m3fn", "e4m3fn",
        "scale [K/128, N/128] fp32, pertoken_scale [M, K/128] fp32, groups [1, 128, 128], plus bias fp32",
        "[N, K], seen transposed", ("aclnnQuantMatmulV5",), _META,
    ),
    Operator(
        "MXFP4 x MXFP8", "npu_quant_matmul", ("A5",), "e4m3fn", "e2m1, two to a byte",
        "E8M0 bytes in pairs, groups [1, 1, 32], plus bias fp32 [1, N]", "[N, K/2] FRACTAL_NZ, seen transposed",
        ("aclnnQuantMatmulWeightNz",), f"{_META}; {_USED}",
    ),
    Operator(
        "MXFP4", "npu_quant_matmul", ("A5",), "e2m1, two to a byte", "e2m1, two to a byte",
        "E8M0 bytes in pairs, groups [1, 1, 32], plus bias fp32", "[N, K/2], seen transposed",
        ("aclnnQuantMatmulV5",), f"{_DOCUMENT}; {_USED}",
    ),
    Operator(
        "16 bits", "torch.mm", ("A2", "A3", "A5", "310P"), "bf16, fp16", "bf16, fp16", "none", "[N, K]",
        ("aclnnMatmul", "aclnnMm", "aclnnAddmm"), "torch",
    ),
    Operator(
        "fp32", "torch.mm", ("A2", "A3", "A5"), "fp32", "fp32", "none", "[N, K]",
        ("aclnnMatmul", "aclnnMm", "aclnnAddmm"), "torch; torch.npu.matmul.allow_hf32 must stay False",
    ),
)  # fmt: skip

DEMANDS: dict[str, str] = {
    "generation": "the operator is documented for this generation",
    "one-scale-each": "products of codes take one scale per row or tensor of either operand, w no zero point",
    "last-axis": "K and N are at most 65535",
    "int4-eights": "int4 codes travel eight to an int32: the packed axes are multiples of 8",
    "antiquant-scale-type": "weight-only products take scales and offsets in the type of x",
    "antiquant-group": "groups of weight-only products are multiples of 32 and divide K",
    "antiquant-int4-group": "int4 groups are 32, 64 or 128; others were refused by tiling in users' reports",
    "antiquant-bias": "with fp16 activations a weight-only product takes its bias in fp16 only",
    "antiquant-out": "a weight-only product returns the type of x",
    "int4-out": "products with int4 weights and quantized inputs return bf16 or fp16",
    "scale-bias": "int8 x int4 has one bias, and it must hold 8 sum_k(w scale): no room for another",
    "no-bias": "int4 x int4 takes no float bias",
    "mx-even": "E2M1 codes travel two to a byte: K is even",
    "group-index": "operators read consecutive groups: no group_index",
    "integer-zero": "quant_bias is int32: static zero points are whole numbers",
}
"""What operators ask of a request, by name: checked before anything is called, and named in a refusal."""


def operator(kind: str) -> Operator:
    """The line of a kind of product."""
    return next(o for o in OPERATORS if o.kind == kind)
