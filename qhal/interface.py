"""QuantOps: the one interface between quantized checkpoints and accelerators. The docstrings are the contract.

Axes: T tokens, N output features, K input features, E experts, B sequences, H query heads, G key-value heads, D head
dim, R latent dim, P rope dim, L pages, S slots in a page. Codes and scales are row-major; the last axis of a weight and
of an activation is the one that a product contracts. `docs/interface.md` is generated from this file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits, Plane, canonical_planes
from qhal.codebooks import CodebookTensor
from qhal.codecs import Codec as Codec  # part of this interface; requests carry it too
from qhal.codecs import Collective as Collective
from qhal.contract import check_class
from qhal.errors import UnsupportedError
from qhal.formats import Format
from qhal.groups import Groups, Indexed
from qhal.prepared import Prepared, PreparedExperts, PreparedLinear
from qhal.requests import (
    AttentionRequest,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    KVRequest,
    Request,
    Support,
    VQRequest,
)
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal.versions import known_fields_only

INTERFACE_VERSION = (1, 0)
"""(major, minor). Append-only; backends of this and of the previous major version are accepted, see `qhal.versions`."""


@dataclass(frozen=True)
class MemoryStats:
    """Bytes in use now, the peak since start, and the total of the device (0 if unknown)."""

    used: int
    peak: int
    total: int


@dataclass(frozen=True)
class Tuned:
    """What was measured for one problem.

    problem   the request and the row counts it holds for
    chosen    the candidate that was fastest, in words
    us        its microseconds
    rejected  the others, with theirs; None for one that does not run
    """

    problem: str
    chosen: str
    us: float
    rejected: tuple[tuple[str, float | None], ...] = ()


class QuantOps(ABC):
    """Quantized operations on one device.

    Rules for every call. Functions of tensors, never of modules. Inputs are never changed. `x` may have any row stride;
    its last stride is 1. `out` is written and returned; without it the result may be a view of a larger buffer. Steady
    state: no host sync, no compilation, no measuring, no allocation outside the caching allocator. Zero rows are legal.
    What `supports` refuses raises UnsupportedError with that Support; nothing falls back. Every NaN in an operand gives
    NaN in the results that depend on it, but for one that is quantized with a static scale to an element without NaN
    (`quantize`); +0 and -0 are equal unless an operation says otherwise.

    Subclassing checks the class body against this one (`qhal.contract`): unknown public names and changed signatures
    are one InterfaceError.
    """

    name: ClassVar[str] = ""
    """The backend's name in plans and reports."""
    interface: ClassVar[tuple[int, int]] = INTERFACE_VERSION
    """The interface version that this class was written against; every backend states it in its class body."""
    fusions: ClassVar[frozenset[str]] = frozenset()
    """Composites ("linear", "experts") that are overridden by a fusion of equal class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls, QuantOps)
        if "supports" in vars(cls):
            cls.supports = known_fields_only(cls.supports)  # type: ignore[assignment, method-assign]

    # ---- device

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where results live and where inputs must live."""

    def synchronize(self) -> None:  # noqa: B027 - a device whose calls are synchronous has nothing to wait for
        """Wait until everything that was asked for is done. The default does nothing: calls are synchronous."""

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Run `fn` once and record it; the result replays it with the same addresses and returns the same tensors.

        Unsupported by default: Support.graph says which operations may stand inside.
        """
        raise UnsupportedError(Support("unsupported", f"{self.name} has no graph capture; call the function itself"))

    def memory_stats(self) -> MemoryStats:
        """Bytes in use on this device by this process."""
        return MemoryStats(0, 0, 0)

    # ---- verbs

    @abstractmethod
    def supports(self, request: Request) -> Support:
        """What would happen. Total (never raises), pure, the same on every rank, and needs no device.

        The answer depends on the request and on the named tables (`named_tables.revision`) alone.
        """

    def quantize(
        self, x: Tensor, to: Operand | Format, *, for_: Prepared | None = None, out: QTensor | None = None
    ) -> QTensor:
        """[..., K] to codes and scales, bit-exact by the format's Rule (`qhal.encoding` is the definition).

        A Format (or an Operand without scale) computes scales from the data; an Operand's scale fixes the outermost
        level. Scales are computed in fp32 unless the rule says bf16: amax over the block, divided by qmax (`scale=rcp`:
        times its reciprocal), rounded once to the scale's type. Codes: x / scale, rounded half to even, saturated to
        the element's range. All-zero blocks get scale 1 (`empty`). NaN and Inf propagate (`special`) by the computed
        scale or the element's own NaN; under a static scale an integer has neither: NaN is code 0, Inf saturates.
        for_: scales come in the layout that weight's kernel reads; same values.
        """
        raise self._refusal("quantize")

    def prepare(
        self,
        w: QTensor | CodebookTensor | Tensor | Sequence[Rotation],
        request: GemmRequest | GroupedRequest | HadamardRequest | VQRequest,
        *,
        inputs: Sequence[Operand] = (),
        operand: Operand | None = None,
        bias: Tensor | None = None,
        into: Prepared | None = None,
    ) -> Prepared:
        """Re-lay a weight [N, K] (experts [E, N, K]) for the device; fold, compile, choose kernels for all request.m.

        inputs   how a plain x is quantized, by the index that `gemm(input=)` takes; per expert if Operand.per_expert.
                 None if every x will be quantized already; otherwise formats, static scales and clips are those of the
                 request (`operands.check_inputs`)
        operand  the weight is rounded to this before the product
        bias     float32 [N] (experts [E, N]), added once, in fp32, before the result is rounded
        into     new values at the old addresses, for refits under live graphs; a changed host scale is refused there

        Peak memory is one copy above the result. UnsupportedError if `supports(request)` refuses.
        """
        raise self._refusal("prepare")

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """The canonical form: restore(prepare(w)) equals w in every plane, bit for bit.

        Only a float code for -0 may come back as +0.
        """
        raise self._refusal("restore")

    # ---- operations

    def gemm(self, x: Tensor | QTensor, w: Prepared, *, input: int = 0, out: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N] = Q(x) @ W.T + bias, W by its dequantization.

        A plain x is quantized with inputs[input] exactly as `quantize` would, or not at all if there are none; a
        QTensor is used as it is, and then request.out must be given. Bias and output dtype are the request's (None: the
        dtype of x). The sum's order is free within the numerics class; the result is rounded once (half to even) and
        overflows to Inf of the output dtype.
        """
        raise self._refusal("gemm")

    def grouped_gemm(
        self, x: Tensor | QTensor, w: Prepared, groups: Groups, *, out: Tensor | QTensor | None = None
    ) -> Tensor | QTensor:
        """`gemm` per expert; the forms of x and of the result are those of Offsets, Masked and Indexed.

        With request.activation the result is act(gate) * up in fp32, rounded once; with request.quantize it is a
        QTensor for the next product. Row order does not change a row's bits. An expert without rows is legal. Reads no
        count on the host.
        """
        raise self._refusal("grouped_gemm")

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Quantize k [T, G, D] and v [T, G, Dv] (MLA: latent [T, R], rope [T, P]) and write them into the paged cache.

        slots int32 or int64 [T] = page * S + position; -1 is skipped. Codes and computed scales are bit-exact as in
        `quantize`. A computed scale never spans tokens: formats whose dynamic blocks do are refused. k and v are not
        changed; nothing else of the cache is.
        """
        raise self._refusal("quant_kv")

    def attention(
        self,
        q: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        *,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        """q [T, H, D] -> [T, H, Dv] over the cache; MLA: q [T, H, R+P], absorbed, latent first -> [T, H, R].

        Head h reads key-value head h // (H // G). s = scale * q.k, soft-capped c * tanh(s / c) if asked; causal masks
        align bottom right; window w keeps the last w keys, the query's own included; with request.tree the batch's tree
        says which of the new tokens see each other. p = softmax(s) with the maximum subtracted; `sinks` float32 [H]
        join the denominator (and so the lse) only.
        Q is quantized to request.q with the bits of `quantize`: `row` and `g<k>` scales are computed per (token, head),
        `tensor` and `head` scales and zero points are the cache's planes "q.scale" and "q.zero".
        P: e = exp(s - max) in fp32 is rounded to request.p before P.V; under a static scale to the code of e / p.scale,
        half to even, saturated (1 / largest code, where the plane starts, saturates nothing). The denominator sums the
        unrounded e. A kernel that subtracts a running maximum rounds other numbers, by no larger steps.
        lse float32 [T, H], natural log, is written if given. A row without keys gives zeros and lse -inf. Entries past
        a length or in unused pages, NaN included, do not leak.
        """
        raise self._refusal("attention")

    def hadamard(
        self,
        x: Tensor,
        rotation: Prepared | Sequence[Rotation],
        *,
        quantize: Operand | None = None,
        for_: Prepared | None = None,
        out: Tensor | QTensor | None = None,
    ) -> Tensor | QTensor:
        """[..., n] -> the chain applied left to right in fp32, rounded once to the dtype of x.

        quantize: the rounded result is quantized in the same pass, with the bits of the two-step form.
        """
        raise self._refusal("hadamard")

    def vq_decode(self, w: Prepared, *, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """Dense rows [n, K] of a codebook weight, summed in fp32 in codebook order, rounded once to request.out."""
        raise self._refusal("vq_decode")

    def comm_quant(
        self,
        x: Tensor,
        collective: Collective,
        codec: Codec,
        group: Any,
        *,
        splits: Sequence[int] | None = None,
        decode: bool = True,
        out: Tensor | None = None,
        async_op: bool = False,
    ) -> Any:
        """A collective over a torch.distributed group whose wire format is `codec`. Every rank ends bit-identical.

        x [T, K]; a part is whole rows, quantized on its own with the bits of `quantize`, and rank r gets part r.

        all_reduce      [..., K] -> the shape of x: reduce_scatter of the rows, then all_gather of the unrounded sums,
                        quantized again if codec.requantize
        reduce_scatter  [T, K] -> [part of this rank, K]
        all_gather      [T, K] -> the ranks' rows, rank 0 first; one part
        all_to_all      [T, K] -> the rows that each rank has for this one, rank 0's first

        Sums are of the dequantized codes of every rank, in rank order, in codec.accumulate; results have the dtype of x
        and are rounded to it once. One rank is no exception: its numbers pass the codec too. NaN and Inf pass it as
        `quantize` says: under a computed scale their block is NaN, on every rank that gets it or its sum.
        splits: host counts of rows per part (all_gather: per rank); None is T / N each, the first T % N parts one row
        longer, and then nothing is read back. Parts may be empty. decode=False leaves all_gather and all_to_all as a
        QTensor: scales travel with their rows. async_op: the result is a handle, wait() gives the result or the error;
        handles of a group are waited for in the same order on every rank.
        Ranks that disagree on shape, dtype, splits, codec or version all raise the same CommError before data travels;
        a rank that dies or does not answer within the group's timeout is a CommError on those that wait for it.
        """
        raise self._refusal("comm_quant")

    # ---- made once, outside capture

    def kv_planes(
        self, request: KVRequest, *, attention: Sequence[AttentionRequest] = ()
    ) -> tuple[str, tuple[Plane, ...]]:
        """The layout and every plane of a cache that those attentions can read, static scales of Q and P included.

        Needs no device. UnsupportedError for what `supports` refuses.
        """
        requests: tuple[Request, ...] = (request, *attention)
        for asked in requests:
            answer = self.supports(asked)
            if not answer:
                raise UnsupportedError(answer, asked)
        return "canonical", canonical_planes(request, attention)

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """Buffers and workspace for one AttentionRequest; see AttentionBatch."""
        raise self._refusal("attention_batch")

    # ---- composites: these bodies are the definition; a fusion of equal class is declared in `fusions`

    def linear(self, x: Tensor, layer: PreparedLinear, *, decode: bool = False, out: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]: rotate_out(gemm(Q(rotate_in(x))) + low_rank(rotate_in(x))) + bias.

        Every step rounds to the dtype of x; the low-rank branch and the late bias are added in fp32 and rounded once.
        """
        index = layer.decode_index if decode else 0
        if layer.direct:
            return self.gemm(x, layer.weight, input=index, out=out)
        turned = x if layer.rotate_in is None else self.hadamard(x, layer.rotate_in)
        assert isinstance(turned, Tensor)
        y = self.gemm(turned, layer.weight, input=index)
        if layer.low_rank is not None:
            down, up = layer.low_rank
            branch = (turned.float() @ down.float().T) @ up.float().T
            y = (y.float() + branch).to(y.dtype)
        if layer.rotate_out is not None:
            back = self.hadamard(y, layer.rotate_out)
            assert isinstance(back, Tensor)
            y = back
        if layer.bias is not None:
            y = (y.float() + layer.bias).to(y.dtype)
        return y if out is None else out.copy_(y)

    def experts(self, x: Tensor, layer: PreparedExperts, groups: Groups, *, out: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, K]: the first product with its activation (and quantization), the second, then the weights.

        With Indexed groups the first product expands tokens to pairs and the second sums them with their weights.
        """
        hidden = self.grouped_gemm(x, layer.gate_up, _pairs_in(groups))
        y = self.grouped_gemm(hidden, layer.down, _pairs_out(groups))
        assert isinstance(y, Tensor)
        return y if out is None else out.copy_(y)

    def tune(self, request: Request, *, seen: Callable[[str], None] | None = None) -> Sequence[Tuned]:
        """Measure the candidates for this request on this device; keep the choice for operations that are loaded later.

        Takes minutes and memory of its own, so nothing here calls it: `qhal tune` does. seen is told the name of each
        problem before it is measured. UnsupportedError where nothing is chosen by measuring, which is the default.
        """
        raise self._refusal("tune")

    def _refusal(self, operation: str) -> UnsupportedError:
        reason = (
            f"{self.name or type(self).__name__} has no {operation} yet; `qhal plan` lists what this backend executes"
        )
        return UnsupportedError(Support("not_implemented", reason), operation)


def _pairs_in(groups: Groups) -> Groups:
    """The groups of the first product: tokens in, one row per (token, expert) pair out."""
    return Indexed(groups.ids, None, False, groups.cache) if isinstance(groups, Indexed) else groups


def _pairs_out(groups: Groups) -> Groups:
    """The groups of the second product: pairs in, weighted tokens out."""
    return Indexed(groups.ids, groups.weights, True, groups.cache) if isinstance(groups, Indexed) else groups
