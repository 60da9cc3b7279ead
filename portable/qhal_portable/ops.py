"""PortableOps: every operation of the interface, each one line to the file that defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.codebooks import CodebookTensor
from qhal.codecs import Codec, Collective
from qhal.encoding import encode
from qhal.errors import FormatError, QhalError, UnsupportedError
from qhal.formats import Format
from qhal.groups import Groups
from qhal.interface import QuantOps
from qhal.prepared import Prepared
from qhal.requests import (
    AttentionRequest,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    QuantizeRequest,
    Request,
    Support,
    VQRequest,
)
from qhal.rotations import Rotation, kinds
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_portable import (
    attention,
    gemm,
    grouped,
    hadamard,
    kv,
    prepared,
    process_group,
    quantize,
    storage,
)
from qhal_portable.prepared import PreparedRotation, PreparedWeight
from qhal_portable.support import support


class PortableOps(QuantOps):
    """The meaning of every operation; see each file's first lines for its numerics. Backends give name and device."""

    interface: ClassVar[tuple[int, int]] = (1, 0)
    _copies: ClassVar[tuple[torch.dtype, ...]] = gemm.FLOATS
    """Types in which a weight may be kept decoded too, and multiplied by `torch.nn.functional.linear`."""

    def supports(self, request: Request) -> Support:
        """See `support.py`."""
        return support(request, self._copies)

    def quantize(
        self, x: Tensor, to: Operand | Format, *, for_: Prepared | None = None, out: QTensor | None = None
    ) -> QTensor:
        """See `quantize.py`. Every weight here reads canonical scales, so `for_` changes nothing."""
        fmt, static = (to.format, to.static) if isinstance(to, Operand) else (to, False)
        if isinstance(x, Tensor):
            self._require(QuantizeRequest(x=x.dtype, format=fmt, static=static))
        if for_ is not None:
            self._weight(for_)
        return quantize.quantize(x, to, self.device, out)

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
        """See `prepared.py`."""
        answer = self._require(request)
        if isinstance(request, HadamardRequest) or not isinstance(w, QTensor | CodebookTensor | Tensor):
            if not isinstance(request, HadamardRequest) or isinstance(w, QTensor | CodebookTensor | Tensor):
                raise FormatError(f"a {type(w).__name__} does not fit the request {request}")
            return prepared.build_rotation(w, request, answer, self, into)
        for o in (*inputs, *([] if operand is None else [operand])):  # refuse now, not in the first product
            self._require(QuantizeRequest(x=torch.float32, format=o.format, static=o.static))
        if into is not None:
            made = self._weight(into)
            rounded = self._rounded(request)
            prepared.refit(made, w, request, inputs=inputs, operand=operand, bias=bias, rounded=rounded)
        else:
            copy = gemm.copy_class(request, self._copies) if isinstance(request, GemmRequest) else None
            made = prepared.build_weight(
                w,
                request,
                answer,
                self,
                copy_dtype=None if copy is None else copy[0],
                inputs=inputs,
                operand=operand,
                bias=bias,
                layout=self._layout(request),
                rounded=self._rounded(request),
                made=self._made(request),
            )
        if isinstance(request, GemmRequest):
            made.run = self._bind(made)
        return made

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """The canonical form, in tensors of its own (a canonical cache or QTensor is returned as it is)."""
        if isinstance(thing, KVCache):
            kv.rows_of(thing)
            return thing
        if isinstance(thing, QTensor):
            back = storage.canonical(thing)
            assert isinstance(back, QTensor)
            if back.layout != "canonical":
                raise FormatError(f"layout {thing.layout!r} is not this backend's; its own backend restores it")
            return back
        if isinstance(thing, PreparedRotation):
            raise UnsupportedError(Support("unsupported", "a chain of rotations has no canonical weight"), "restore")
        return storage.copied(self._weight(thing).stored)

    def gemm(self, x: Tensor | QTensor, w: Prepared, *, input: int = 0, out: Tensor | None = None) -> Tensor:
        """See `gemm.py`."""
        run = w.run if type(w) is PreparedWeight and w.backend == self.name else self._weight(w).run
        if run is None:
            raise FormatError(f"the weight was prepared for {w.request}; gemm needs a GemmRequest")
        return run(x, input, out)

    def grouped_gemm(
        self, x: Tensor | QTensor, w: Prepared, groups: Groups, *, out: Tensor | QTensor | None = None
    ) -> Tensor | QTensor:
        """See `grouped.py`."""
        return grouped.grouped_gemm(x, self._weight(w), groups, out)

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """See `kv.py`."""
        self._require(cache.request)
        kv.quant_kv(k, v, cache, slots)

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
        """See `attention.py`."""
        if not isinstance(batch, attention.PagedBatch):
            raise FormatError(f"the batch is a {type(batch).__name__}; make it with attention_batch of these ops")
        return attention.attend(q, cache, batch, sinks, out, lse)

    def hadamard(
        self,
        x: Tensor,
        rotation: Prepared | Sequence[Rotation],
        *,
        quantize: Operand | None = None,
        for_: Prepared | None = None,
        out: Tensor | QTensor | None = None,
    ) -> Tensor | QTensor:
        """See `hadamard.py`."""
        if isinstance(rotation, PreparedRotation):
            chain: Sequence[Rotation] = rotation.chain
        elif isinstance(rotation, Prepared):
            raise FormatError(f"hadamard: {rotation.backend} prepared this for {rotation.request}, not as a rotation")
        else:
            chain = rotation
            if isinstance(x, Tensor) and x.dim():
                self._require(HadamardRequest(kinds=kinds(chain), n=x.shape[-1], x=x.dtype))
        y = self._rotate(x, chain)
        if quantize is not None:
            if isinstance(out, Tensor):
                raise FormatError(f"out is a plain tensor, the result is {quantize.format}")
            return self.quantize(y, quantize, for_=for_, out=out)
        if isinstance(out, QTensor):
            raise FormatError("out is a QTensor, but nothing is quantized")
        return gemm.write(y, out)

    def vq_decode(self, w: Prepared, *, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """See `gemm.vq_decode`."""
        return gemm.vq_decode(self._weight(w), rows, out)

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
        """See `qhal/collectives.py` (numerics), `qhal/wire.py` (bytes) and `process_group.py` (errors and time)."""
        pending = process_group.start(x, collective, codec, group, splits, decode, out, self.device, self._encode)
        return pending if async_op else pending.wait()

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """See `attention.PagedBatch`."""
        self._require(request)
        return attention.PagedBatch(request, limits, self.device)

    def _layout(self, request: Request) -> str:
        """What `storage.keep` is asked for."""
        return storage.NIBBLE

    def _rounded(self, request: Request) -> torch.dtype | None:
        """What products of this request round the whole weight to."""
        return None

    def _made(self, request: Request) -> tuple[str, ...]:
        """Planes of the weight that products of this request read decoded."""
        return ()

    def _rotate(self, x: Tensor, chain: Sequence[Rotation]) -> Tensor:
        """What `hadamard` applies."""
        return hadamard.rotate(x, chain)

    def _encode(self, x: Tensor, to: Format) -> QTensor:
        """What collectives encode their parts with."""
        return encode(x, to)

    def _bind(self, w: PreparedWeight) -> prepared.Run:
        """What `gemm` calls for this weight."""
        return gemm.bind(w)

    def _weight(self, w: object) -> PreparedWeight:
        """`w` if these operations prepared it; FormatError otherwise."""
        owner = getattr(w, "backend", type(w).__name__)
        if isinstance(w, PreparedWeight) and owner == self.name:
            return w
        raise FormatError(
            f"this weight was prepared by {owner!r}, {self.name} reads only its own; prepare it with these ops"
        )

    def _require(self, request: Request) -> Support:
        answer = self.supports(request)
        if not answer:
            raise UnsupportedError(answer, _words(request))
        return answer


def _words(request: Request) -> str:
    """The request in its own words; field by field where a field has none (a dtype that is no element)."""
    try:
        return str(request)
    except QhalError:
        return repr(request)
