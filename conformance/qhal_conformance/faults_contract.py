"""Planted faults around a call: buffers, `out=`, order, threads, surroundings, shared settings, memory."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache
from qhal.formats import Format
from qhal.groups import Groups
from qhal.prepared import Prepared
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance.faults_claims import CLAIM_FAULTS
from qhal_conformance.faults_graphs import GRAPH_FAULTS
from qhal_conformance.wrapping import Wrapped

Inner = Callable[[Any, Any], Any]


class _Around(Wrapped):
    """Every operation goes through `_do`, which may spoil x, out, or what comes back.

    `_op` is the operation that is spoiled; the others are handed over.
    """

    _op = "gemm"

    def _do(self, x: Any, out: Any, inner: Inner) -> Any:
        return inner(x, out)

    def _through(self, op: str, x: Any, out: Any, inner: Inner) -> Any:
        return self._do(x, out, inner) if op == self._op else inner(x, out)

    def quantize(self, x: Tensor, to: Operand | Format, *, out: QTensor | None = None, **how: Any) -> QTensor:
        """Through `_do`."""
        return self._through("quantize", x, out, lambda x, out: self._inner.quantize(x, to, out=out, **how))  # type: ignore[no-any-return]

    def gemm(self, x: Tensor | QTensor, w: Prepared, *, out: Tensor | None = None, **how: Any) -> Tensor:
        """Through `_do`."""
        return self._through("gemm", x, out, lambda x, out: self._inner.gemm(x, w, out=out, **how))  # type: ignore[no-any-return]

    def grouped_gemm(
        self, x: Tensor | QTensor, w: Prepared, groups: Groups, *, out: Tensor | QTensor | None = None
    ) -> Tensor | QTensor:
        """Through `_do`."""
        return self._through("grouped_gemm", x, out, lambda x, out: self._inner.grouped_gemm(x, w, groups, out=out))  # type: ignore[no-any-return]

    def attention(
        self, q: Tensor, cache: KVCache, batch: AttentionBatch, *, out: Tensor | None = None, **how: Any
    ) -> Tensor:
        """Through `_do`."""

        def inner(q: Any, out: Any) -> Any:
            return self._inner.attention(q, cache, batch, out=out, **how)

        return self._through("attention", q, out, inner)  # type: ignore[no-any-return]

    def hadamard(
        self, x: Tensor, rotation: Prepared | Sequence[Rotation], *, out: Tensor | QTensor | None = None, **how: Any
    ) -> Tensor | QTensor:
        """Through `_do`."""

        def inner(x: Any, out: Any) -> Any:
            return self._inner.hadamard(x, rotation, out=out, **how)

        return self._through("hadamard", x, out, inner)  # type: ignore[no-any-return]

    def vq_decode(self, w: Prepared, *, out: Tensor | None = None, **how: Any) -> Tensor:
        """Through `_do`."""
        return self._through("vq_decode", None, out, lambda _, out: self._inner.vq_decode(w, out=out, **how))  # type: ignore[no-any-return]


def _around(op: str, do: Callable[[Any, Any, Any, Inner], Any]) -> type[Wrapped]:
    return type("ContractFault", (_Around,), {"_op": op, "_do": do})


def _codes(y: Any) -> Tensor:
    found = y.codes if isinstance(y, QTensor) else y
    assert isinstance(found, Tensor)
    return found


def _reused(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    """Results of one shape lie in one buffer."""
    y = inner(x, out)
    if out is not None:
        return y
    buffers = self.__dict__.setdefault("_buffers", {})
    codes = _codes(y)
    buffer = buffers.setdefault((codes.shape, codes.dtype), torch.empty_like(codes))
    buffer.view(torch.uint8).copy_(codes.view(torch.uint8))
    return replace(y, codes=buffer) if isinstance(y, QTensor) else buffer


def _ignored(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    return inner(x, None)


def _not_returned(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    y = inner(x, out)
    return y if out is None else replace(y, codes=y.codes.clone()) if isinstance(y, QTensor) else y.clone()


def _dense_out(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    """Rows of `out` are written one after the other, whatever its strides are."""
    if out is None or out.shape != inner(x, None).shape:
        return inner(x, out)
    out.as_strided(out.shape, [out[0].numel(), *out.stride()[1:]], out.storage_offset()).copy_(inner(x, None))
    return out


def _resized(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    y = inner(x, None)
    return y if out is None else out.resize_(y.shape).copy_(y) if out.shape != y.shape else inner(x, out)


def _in_place(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    y = inner(x, out)
    if out is None and isinstance(x, Tensor) and x.shape == y.shape:
        return x.copy_(y)
    return y


def _accepts_integers(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    return inner(x.bfloat16() if isinstance(x, Tensor) and not x.is_floating_point() else x, out)


def _every_second(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    calls = self.__dict__.setdefault("_calls", itertools.count())
    y = inner(x, out)
    return _nudged(y) if next(calls) % 2 else y


def _nudged(y: Any) -> Any:
    _codes(y).view(torch.uint8).view(-1)[:1].bitwise_xor_(1) if _codes(y).is_contiguous() else None
    return y


def _own_thread(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    """What is set up in the thread that came first is missing in the others."""
    first = self.__dict__.setdefault("_thread", threading.get_ident())
    y = inner(x, out)
    return y if threading.get_ident() == first else _nudged(y)


def _shared_workspace(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    """x is copied to a workspace that all threads share."""
    self.__dict__["_workspace"] = x
    time.sleep(0.002)
    return inner(self.__dict__["_workspace"], out)


def _single_row(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    y = inner(x, out)
    return _nudged(y) if isinstance(x, Tensor) and x.shape[0] == 1 else y


def _under_inference(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    y = inner(x, out)
    return _nudged(y) if torch.is_inference_mode_enabled() else y


def _on_default_device(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    """A result is made without saying where."""
    y = inner(x, out)
    return torch.zeros(y.shape, dtype=y.dtype).copy_(y) if out is None else y


def _seeds(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    torch.manual_seed(0)
    return inner(x, out)


def _seeds_numpy(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    np.random.seed(0)
    return inner(x, out)


def _leaves_threads(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    torch.set_num_threads(3 - min(torch.get_num_threads(), 2))
    return inner(x, out)


def _leaves_dtype(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    torch.set_default_dtype(torch.bfloat16)
    return inner(x, out)


def _keeps(self: Any, x: Any, out: Any, inner: Inner) -> Any:
    y = inner(x, out)
    self.__dict__.setdefault("_kept", []).append(y)
    return y


class ResultLate(_Around):
    """gemm returns before the result is there; only `synchronize` waits for it."""

    def _do(self, x: Any, out: Any, inner: Inner) -> Any:
        y = inner(x, None)
        target = torch.zeros_like(y) if out is None else out
        if target.shape != y.shape:
            return inner(x, out)

        def write() -> None:
            with torch.inference_mode(target.is_inference()):
                target.copy_(y)

        later = threading.Timer(0.02, write)
        later.start()
        self.__dict__.setdefault("_late", []).append(later)
        return target

    def synchronize(self) -> None:
        """Wait for what is late."""
        for later in self.__dict__.pop("_late", []):
            later.join()


class InputReadLate(ResultLate):
    """gemm reads x after it returned; the result is waited for wherever it is read, the input is not."""

    def _do(self, x: Any, out: Any, inner: Inner) -> Any:
        self.synchronize()
        y = inner(x, out)

        def read() -> None:
            with torch.inference_mode(y.is_inference()):
                y.copy_(inner(x, None))

        later = threading.Timer(0.02, read)
        later.start()
        self.__dict__.setdefault("_late", []).append(later)
        return y


_OPERATIONS = ("gemm", "quantize", "hadamard", "grouped_gemm", "attention")
Named = tuple[str, str, type[Wrapped]]
_RESULTS: tuple[Named, ...] = tuple(
    (f"{word}-{op.replace('_', '-')}", f"{op}: {fault}", _around(op, do))
    for op in _OPERATIONS
    for word, fault, do in (
        ("buffer-reused", "results of one shape lie in one buffer", _reused),
        ("out-ignored", "out= is not written", _ignored),
        ("out-copied", "out= is written, a copy is returned", _not_returned),
    )
)
_CALLS: tuple[Named, ...] = (
    ("buffer-reused-vq-decode", "vq_decode: results of one shape lie in one buffer",
     _around("vq_decode", _reused)),
    ("out-dense", "hadamard writes out= without its row stride", _around("hadamard", _dense_out)),
    ("out-resized", "hadamard resizes an out= of another shape", _around("hadamard", _resized)),
    ("rotates-in-place", "hadamard writes its result over x", _around("hadamard", _in_place)),
    ("integers-accepted", "hadamard takes an integer x", _around("hadamard", _accepts_integers)),
    ("integers-quantized", "quantize takes an integer x", _around("quantize", _accepts_integers)),
    ("every-second-attention", "every second attention differs in a bit", _around("attention", _every_second)),
    ("every-second-grouped", "every second grouped_gemm differs in a bit",
     _around("grouped_gemm", _every_second)),
    ("own-thread", "gemm differs in a bit in every thread but the first", _around("gemm", _own_thread)),
    ("shared-workspace", "threads share the workspace of gemm, though concurrent is claimed",
     _around("gemm", _shared_workspace)),
    ("row-alone", "one row alone takes another path of gemm", _around("gemm", _single_row)),
    ("row-alone-rotated", "one row alone takes another path of hadamard", _around("hadamard", _single_row)),
    ("inference-differs", "gemm differs in a bit under inference mode", _around("gemm", _under_inference)),
    ("default-device", "gemm makes its result on the default device", _around("gemm", _on_default_device)),
    ("seed-changed", "gemm seeds torch", _around("gemm", _seeds)),
    ("seed-numpy", "hadamard seeds numpy", _around("hadamard", _seeds_numpy)),
    ("threads-left", "attention changes the number of threads", _around("attention", _leaves_threads)),
    ("dtype-left", "quantize leaves another default dtype", _around("quantize", _leaves_dtype)),
    ("results-kept", "every result of gemm is kept for ever", _around("gemm", _keeps)),
    ("result-late", "gemm's result is there only after synchronize", ResultLate),
    ("input-read-late", "gemm reads x after it returned", InputReadLate),
)  # fmt: skip
CONTRACT_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    *((name, "core", fault, kind) for name, fault, kind in (*_RESULTS, *_CALLS)),
    *CLAIM_FAULTS,
    *GRAPH_FAULTS,
)
"""(name, profile, what is wrong, class)"""
