"""The operator table of attention: which fused operator serves which requests, and why we think so.

`attention.choose` takes the lines in their order and answers from them and from the demands below; `docs/npu.md` prints
both. A line says what the wheel's own documents and checks say. None was measured on a device.

Q_S is the number of queries of a sequence, B of sequences, N of heads, KV_N of key-value heads, D of features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_DOCUMENT = "wheel's document for A2 and A3"
_HOST = "A5 by the wheel's host code, which has an entry point for it"
_V1, _V2 = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
_ALL, _OLD = ("A2", "A3", "A5"), ("A2", "A3")
ROW_LIMIT = 65535
"""KV_N * D of pages [blocks, block, KV_N * D], and N * D of BSND."""
PAGES_LIMIT = 2**31
"""Numbers in all pages of a plane."""
SEQUENCES, TOKENS, KEYS = 4096, 2**20, 262144
"""Of TND: sequences and queries; keys of a sequence with one query."""
TND_WIDTHS = ((128, 128), (192, 128), (192, 192))
"""D of queries and keys, D of values."""
LATENT, ROPE, LATENT_PAGES = 512, 64, (16, 128)
LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)

Rows = Literal["pages", "int8 pages", "gathered"]


@dataclass(frozen=True)
class FusedAttention:
    """One way through a fused operator.

    kind     its name in plans
    on       generations that it is documented for
    kv       the kind of cache
    phases   of a request
    rows     what the operator reads: the pages of the cache (16-bit, or int8 with scales), or rows that are gathered
             from the pages of any format, decoded and rounded to the type of q
    layout   the operator's word for it; shapes: of q, and of keys and values
    blocks   int8 pages: kinds of blocks of the cache; the operator's word is antiquant mode `mode`
    options  of a request that it has
    aclnn    the entry point of CANN that its host code reaches on a generation (level L1 host)
    """

    kind: str
    op: str
    on: tuple[str, ...]
    kv: Literal["mha", "mla"]
    phases: tuple[str, ...]
    rows: Rows
    layout: Literal["BNSD", "BSND", "TND"]
    shapes: str
    options: tuple[str, ...]
    aclnn: dict[str, str]
    source: str
    blocks: tuple[str, ...] = ()
    mode: int = 0
    scales: str = "none"


_DECODE, _ANY = ("decode",), ("prefill", "decode", "mixed")
_NAME = "aclnnFusedInferAttentionScore"
_ACLNN_V1 = {"A2": f"{_NAME}V3", "A3": f"{_NAME}V3", "A5": f"{_NAME}V5"}
_ACLNN_V2 = {"A2": f"{_NAME}V4", "A3": f"{_NAME}V4", "A5": f"{_NAME}V5"}
_DECODED = "q [B, N, 1, D]; pages [blocks, block, KV_N D]"

FUSED: tuple[FusedAttention, ...] = (
    FusedAttention(
        "decode, 16-bit pages", _V1, _ALL, "mha", _DECODE, "pages", "BNSD", _DECODED, ("window", "lse"),
        _ACLNN_V1, f"{_DOCUMENT}; {_HOST}",
    ),
    FusedAttention(
        "decode, int8 pages by head", _V1, _OLD, "mha", _DECODE, "int8 pages",
        "BNSD", _DECODED, ("window", "lse"),
        _ACLNN_V1, _DOCUMENT, ("head", "tensor"), 2, "(code + offset) scale, [KV_N] in the type of q",
    ),
    FusedAttention(
        "decode, int8 pages by channel", _V1, _OLD, "mha", _DECODE, "int8 pages",
        "BNSD", _DECODED, ("window", "lse"),
        _ACLNN_V1, _DOCUMENT, ("col",), 0, "(code + offset) scale, [1, KV_N, 1, D] in the type of q",
    ),
    FusedAttention(
        "decode, int8 pages by token and head", _V1, _OLD, "mha", _DECODE, "int8 pages",
        "BNSD", _DECODED, ("window", "lse"),
        _ACLNN_V1, _DOCUMENT, ("row", "head", "tensor"), 3, "(code + offset) scale, [B, KV_N, pages block] fp32",
    ),
    FusedAttention(
        "prefill, 16-bit pages", _V2, _ALL, "mha", ("prefill",), "pages",
        "BSND", "q [B, Q_S, N, D], padded; pages [blocks, block, KV_N D]", ("window", "full", "lse"),
        _ACLNN_V2, f"{_DOCUMENT}; {_HOST}",
    ),
    FusedAttention(
        "rows one after the other", _V2, _ALL, "mha", _ANY, "gathered",
        "TND", "q [T, N, D], keys and values [sum of lengths, KV_N, D], D padded with zeros",
        ("window", "full", "sinks", "lse"), _ACLNN_V2, f"{_DOCUMENT}; {_HOST}",
    ),
    FusedAttention(
        "rows side by side", _V1, _ALL, "mha", _ANY, "gathered",
        "BSND", "q [B, Q_S, N, D], keys and values [B, KV_S, KV_N, D], padded", ("window", "full", "lse"),
        _ACLNN_V1, f"{_DOCUMENT}; {_HOST}",
    ),
    FusedAttention(
        "decode, latent pages", _V2, _ALL, "mla", _DECODE, "pages",
        "BNSD", "q [B, N, 1, 512], [B, N, 1, 64]; pages [blocks, block, 512], also values, and [blocks, block, 64]",
        (), _ACLNN_V2, f"{_DOCUMENT}; {_HOST}",
    ),
    FusedAttention(
        "decode, latent rows", _V2, _ALL, "mla", _DECODE, "gathered",
        "BNSD", "the same; rows gathered to pages of 128", (), _ACLNN_V2, f"{_DOCUMENT}; {_HOST}",
    ),
)  # fmt: skip

DEMANDS: dict[str, str] = {
    "attention-generation": "the operator is documented for this generation",
    "attention-types": "Q, P and the result are of one 16-bit type, and so is what the cache holds unquantized",
    "attention-options": "no operator has a soft cap, nor a tree over these caches; windows, sinks and lse as its line "
    "says",
    "decode-page": "pages are multiples of 16 rows, of 32 for int8, and at most 512",
    "prefill-page": "with more than one query pages are multiples of 128 rows, at most 512",
    "head-dims": "D of keys and values is one multiple of 16, of 32 for int8, at most 512",
    "head-count": "at most 256 heads, at most 64 of them to a key-value head",
    "row-width": "KV_N D (BSND: N D) is at most 65535",
    "antiquant-pair": "keys and values are quantized alike",
    "tnd-type": "TND takes bf16",
    "tnd-width": "TND takes D of 128, or 192 with values of 128 or 192; narrower rows are padded",
    "sink-width": "with sinks values are at most 128 wide",
    "sink-lse": "whether the operator's lse has the sink in it is not documented",
    "latent-sizes": "latent rows are 512 wide, their rope 64, heads a power of two up to 128",
    "latent-page": "pages of latent rows are 16 or 128",
    "latent-queries": "over latent rows a sequence has 1 to 16 queries; of the phases, decode alone promises it",
    "latent-lse": "of the documents of latent attention one refuses the lse and one is silent",
    "quantized-queries": "how the operators quantize P beside quantized queries is not documented",
}
"""What the operators ask of a request, by name: checked before anything is called, and named where one is broken."""

AT_THE_CALL: dict[str, str] = {
    "lengths": "some query sees a key; without a causal mask a sequence has at least as many keys as queries",
    "sizes": "TND: at most 4096 sequences and 2^20 queries; one query: at most 262144 keys",
    "planes": "pages that are read as they are: contiguous, and fewer than 2^31 numbers",
    "scale-type": "scales by head and channel, which are given in the type of q, are numbers of it, and their zero "
    "points of int8",
    "sink-type": "learnable_sink is bf16: sinks are numbers of it",
    "lse": "lse= is given only if the request says so",
}
"""What is known only when attention is called: the first line of which a batch breaks nothing runs it, else torch."""


def operator(kind: str) -> FusedAttention:
    """The line of that name."""
    return next(line for line in FUSED if line.kind == kind)
