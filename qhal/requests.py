"""Requests: what an engine will ask of a backend, said before any weight is allocated; and the backend's answers.

Requests are frozen, hashable, hold no tensors and need no device. `QuantOps.supports(request)` answers with a Support.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch

from qhal.codebooks import CodebookFormat
from qhal.codecs import Codec, Collective
from qhal.elements import ELEMENTS, element
from qhal.formats import Format
from qhal.layer_formats import Activation
from qhal.rules import Rule


def _shown(dtype: torch.dtype) -> str:
    """A dtype in a request's text: its element name, or torch's own for one that no format has (it will be refused)."""
    return next((name for name, e in ELEMENTS.items() if e.kind == "float" and e.storage == dtype), str(dtype))


class NumericsClass(IntEnum):
    """How a product is summed. A looser class never satisfies a stricter request; the suite's bound follows from it."""

    EXACT = 0
    """float64 accumulation or exact integers, rounded once to the output"""
    FP32_ACC = 1
    """products exact, fp32 accumulation in any order"""
    REDUCED_ACC = 2
    """aligned or truncated accumulation inside a matrix instruction, fp32 between instructions"""
    DEQUANT_16 = 3
    """operands rounded to a 16-bit float before the product, fp32 accumulation"""

    @property
    def label(self) -> str:
        """The name in tables and reports: exact, fp32-acc, reduced-acc, dequant-16."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class GemmRequest:
    """y [m, n] = Q(x [m, k]) @ W.T + bias.

    m            smallest and largest row count that will occur
    x            every input format the weight will meet; the first is the default. A plain float stands for itself
    static       for each of x whether its scale is given to `prepare`; empty: every scale is computed from the data. A
                 given scale is one number or one per feature, and in a GroupedRequest these for all experts or for each
    clip         inputs may keep a part of their range (`Operand.clip`)
    out          result dtype; None: the dtype of x
    operand      the weight is rounded to this format before the product
    numerics     the loosest class accepted; None: the format's own minimum, see `minimum_class`
    """

    w: Format | CodebookFormat
    n: int
    k: int
    x: tuple[Format, ...]
    static: tuple[bool, ...] = ()
    clip: bool = False
    m: tuple[int, int] = (1, 8192)
    out: torch.dtype | None = None
    operand: Format | None = None
    bias: bool = False
    group_index: bool = False
    graph: bool = False
    batch_invariant: bool = False
    numerics: NumericsClass | None = None

    def __str__(self) -> str:
        given = (*self.static, *(False for _ in self.x))
        words = (f"{f} static" if fixed else str(f) for f, fixed in zip(self.x, given, strict=False))
        x = "|".join(dict.fromkeys(words)) + (" clipped" if self.clip else "")
        out = "as x" if self.out is None else _shown(self.out)
        extra = "".join(f" {flag}" for flag in ("bias", "group_index", "graph") if getattr(self, flag))
        operand = f" as {self.operand}" if self.operand else ""
        return f"gemm x={x} w={self.w}{operand} n={self.n} k={self.k} out={out}{extra}"


Form = Literal["offsets", "masked", "indexed"]
"""How the rows of a grouped product are given: `groups.Offsets`, `groups.Masked`, `groups.Indexed`."""


@dataclass(frozen=True, kw_only=True)
class GroupedRequest:
    """`gemm` per expert. With `activation` the result is act(gate) * up; with `quantize` it is a QTensor."""

    gemm: GemmRequest
    experts: int
    groups: Form
    top_k: int = 1
    activation: Activation | None = None
    quantize: Format | None = None

    def __str__(self) -> str:
        act = f" act={self.activation.name}" if self.activation else ""
        return f"grouped_gemm[{self.groups}] experts={self.experts} top_k={self.top_k}{act} of {self.gemm}"


@dataclass(frozen=True, kw_only=True)
class KVRequest:
    """A paged cache. mha: `heads` key-value heads of k_dim and v_dim; mla: heads = 1, latent k_dim and rope v_dim."""

    kind: Literal["mha", "mla"]
    k: Format
    v: Format
    heads: int
    k_dim: int
    v_dim: int
    page: int

    def __str__(self) -> str:
        return (
            f"kv[{self.kind}] k={self.k} v={self.v} heads={self.heads} dims={self.k_dim},{self.v_dim} page={self.page}"
        )


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """Attention over a paged cache.

    q       how Q is held for Q.K: a plain float; `row` or `g<k>` scales, computed per (token, head); or static `tensor`
            or `head` scales, which are planes of the cache ("q.scale", "q.zero")
    q_rope  mla: the format of q's rope part where it differs, then q is that of the latent part; None: q is one row of
            R + P. Plain, or scales computed per (token, head)
    p       how exp(s - max), in [0, 1], is held for P.V: a plain float, or any element with one static scale, the plane
            "p.scale": `int8.tensor*fp32`, `uint8.tensor*fp32`, `e4m3fn.tensor*fp32`
    out     the result's dtype
    window  the last w keys, the query's own included
    tree    the new tokens see each other as the plan's `tree` says (`AttentionBatch.plan`), and every earlier key; with
            causal, without window
    """

    kv: KVRequest
    heads: int
    scale: float
    phase: Literal["prefill", "decode", "mixed"]
    q: Format
    p: Format
    out: torch.dtype
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    lse: bool = False
    graph: bool = False
    batch_invariant: bool = False
    q_rope: Format | None = None
    tree: bool = False

    def __str__(self) -> str:
        flags = [f for f in ("causal", "window", "softcap", "sinks", "lse", "tree") if getattr(self, f)]
        q = f"{self.q}" if self.q_rope is None else f"{self.q} q_rope={self.q_rope}"
        return f"attention[{self.phase}] heads={self.heads} q={q} p={self.p} {','.join(flags)} over {self.kv}"


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """`quantize(x, format)`: x [.., k] of dtype `x`, computed or static scale, in the canonical or a private layout."""

    x: torch.dtype
    format: Format
    static: bool = False
    layout: str = "canonical"

    def __str__(self) -> str:
        return f"quantize {_shown(self.x)} to {self.format}{' static' if self.static else ''}"


@dataclass(frozen=True, kw_only=True)
class HadamardRequest:
    """A chain of rotations (`rotations.kinds`) of n features of dtype x, optionally quantized in the same pass."""

    kinds: tuple[tuple[object, ...], ...]
    n: int
    x: torch.dtype
    quantize: Format | None = None

    def __str__(self) -> str:
        chain = ", ".join("(" + " ".join(str(part) for part in kind) + ")" for kind in self.kinds)
        return f"hadamard [{chain}] n={self.n} x={_shown(self.x)}" + (f" to {self.quantize}" if self.quantize else "")


@dataclass(frozen=True, kw_only=True)
class VQRequest:
    """`vq_decode` of a codebook weight [n, k] to rows of dtype `out`."""

    w: CodebookFormat
    n: int
    k: int
    out: torch.dtype

    def __str__(self) -> str:
        return f"vq_decode {self.w} n={self.n} k={self.k} out={_shown(self.out)}"


@dataclass(frozen=True, kw_only=True)
class CommRequest:
    """A quantized collective over `world` ranks of tensors of `numel` elements of dtype x; decode: see `comm_quant`."""

    collective: Collective
    codec: Codec
    world: int
    x: torch.dtype
    numel: int
    decode: bool = True

    def __str__(self) -> str:
        kept = "" if self.decode else " decode=False"
        return f"{self.collective} {_shown(self.x)} as {self.codec} world={self.world} numel={self.numel}{kept}"


Request = (
    GemmRequest
    | GroupedRequest
    | KVRequest
    | AttentionRequest
    | QuantizeRequest
    | HadamardRequest
    | VQRequest
    | CommRequest
)


@dataclass(frozen=True)
class Arithmetic:
    """Which quantizations a product performs: the formats of its two operands (attention: of Q.K and P.V) and the sum.

    A downgrade is a difference in `x` or `w` from `Arithmetic.of(request)`, or a numerics class looser than
    `minimum_class(request)`. Decoding exactly and multiplying at higher precision is none.
    """

    x: str
    w: str
    accumulate: str = "fp32"

    @staticmethod
    def of(request: Request) -> Arithmetic | None:
        """The arithmetic that the request asks for; None for operations that are no product."""
        if isinstance(request, GroupedRequest):
            return Arithmetic.of(request.gemm)
        if isinstance(request, GemmRequest):
            w = str(request.w.storage if isinstance(request.w, Format) else request.w)
            operand = f">{request.operand.storage}" if request.operand else ""
            return Arithmetic(str(request.x[0].storage), w + operand)
        if isinstance(request, AttentionRequest):
            rope = "" if request.q_rope is None else f"+{request.q_rope.storage}"
            return Arithmetic(
                f"{request.q.storage}{rope}.{request.kv.k.storage}", f"{request.p.storage}.{request.kv.v.storage}"
            )
        return None

    def __str__(self) -> str:
        return f"{self.x} x {self.w} -> {self.accumulate}"


_HALVES = ("bf16", "fp16")


def minimum_class(request: Request) -> NumericsClass:
    """The loosest numerics class that still means what the format says.

    A request's own `numerics` wins. Otherwise: a weight-only product may round decoded weights to 16 bits (that is what
    W4A16 means everywhere), and attention with plain 16-bit Q and P may so round the decoded rows of a quantized cache;
    a product of two quantized operands, and all other attention, may use a matrix instruction's reduced accumulation,
    but must not round its operands again; a collective sums in its codec's type; everything else is exact or fp32.
    """
    if isinstance(request, GroupedRequest):
        return minimum_class(request.gemm)
    if isinstance(request, GemmRequest):
        if request.numerics is not None:
            return request.numerics
        plain = all(f.plain and element(f.element).wide for f in request.x)
        return NumericsClass.DEQUANT_16 if plain and request.operand is None else NumericsClass.REDUCED_ACC
    if isinstance(request, AttentionRequest):
        halves = all(f.plain and f.element in _HALVES for f in (request.q, request.p, request.q_rope or request.q))
        held = all(f.plain and element(f.element).wide for f in (request.kv.k, request.kv.v))
        return NumericsClass.DEQUANT_16 if halves and not held else NumericsClass.REDUCED_ACC
    if isinstance(request, QuantizeRequest | KVRequest):
        return NumericsClass.EXACT
    if isinstance(request, CommRequest) and request.codec.accumulate != "fp32":
        return NumericsClass.REDUCED_ACC
    return NumericsClass.FP32_ACC


Level = Literal["full", "conditional", "not_implemented", "unsupported"]


@dataclass(frozen=True)
class Support:
    """A backend's answer to one request. Checked both ways: a claim that fails and a refusal that works are findings.

    level        full | conditional (see `rule` or `reason`) | not_implemented (not written yet) | unsupported (cannot)
    reason       cannot here | not written yet | needs package X >= v | shape rule; with what to do
    nearest      the closest request whose level is "full"
    arithmetic   what runs; see Arithmetic
    rule         the rule that a quantization really follows when it isn't the requested one
    executes     the same for people, with the kernel's name
    layouts      weight, input scale, cache
    workspace    bytes at the largest m
    row_multiple contiguous groups must start at multiples of this
    """

    level: Level
    reason: str = ""
    nearest: Request | None = None
    arithmetic: Arithmetic | None = None
    rule: Rule | None = None
    executes: str = ""
    numerics: NumericsClass | None = None
    layouts: tuple[str, ...] = ()
    workspace: int = 0
    graph: bool = False
    deterministic: bool = False
    batch_invariant: bool = False
    concurrent: bool = False
    row_multiple: int = 1

    def __bool__(self) -> bool:
        """Whether the request can be executed."""
        return self.level in ("full", "conditional")
