"""How this backend keeps a canonical weight: codes of 4 bits and fewer two to a byte, everything else as it is.

Layout "nibble": byte j of a row holds the codes of columns 2j (low half) and 2j + 1 (high half). Layout "nibble64": in
every run of 128 columns byte j holds those of columns j and j + 64. Layout "word32": in every run of 256 columns the
four bytes of word j, the lowest first, hold those of columns j, j + 32, ... j + 224, so that a kernel reads runs of
neighbours; any power of two may stand for 64 and 32. Signed codes keep four bits of their two's complement. Weights
whose columns are no whole runs stay canonical. "-sorted" behind any of these: columns whose groups an index names
(act-order) stand by group, in their old order within one, where every group has its full number of columns; `order`
says which column went where. Decoding goes a few rows at a time, so that a large weight never exists twice in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qhal.codebooks import CodebookTensor
from qhal.elements import Element, element
from qhal.errors import FormatError, ShardError
from qhal.rotations import Permutation
from qhal.tensors import QTensor

Stored = QTensor | CodebookTensor | Tensor
NIBBLE = "nibble"
SORTED = "-sorted"
_WORD = "word"
_PART = 1 << 20  # elements that are decoded at a time: 4 MB of float32, which stays in the cache


def keep(w: Stored, device: torch.device, layout: str = NIBBLE) -> Stored:
    """A copy of a canonical weight that belongs to us, on the device, in the compact layout where it has one.

    FormatError where codes are no codes.
    """
    if isinstance(w, Tensor):
        return _own(w.detach(), device)
    if isinstance(w, CodebookTensor):
        _check_codebooks(w)
        return _keep_codebooks(w, device)
    check_values(w)
    own = _each(w, lambda t: _own(t, device))
    apart, size = packing(layout)
    narrow = w.layout == "canonical" and element(w.format.element).bits <= 4
    columns = order(own) if layout.endswith(SORTED) else None
    if columns is not None:
        own = replace(own, codes=own.codes[..., columns], layout=own.layout + SORTED)
    if apart and narrow and w.codes.shape[-1] % (2 * size * apart) == 0:
        kept = layout if columns is not None else layout.removesuffix(SORTED)
        return replace(own, codes=_pack(own.codes, apart, size), layout=kept)
    return own


def order(w: QTensor) -> Tensor | None:
    """int64 [K]: the columns of an indexed weight by group, those of a group in their order.

    None where a group has more or fewer columns than its block, or without an index. Waits for the device.
    """
    block, index = w.format.block, w.group_index
    if index is None or block is None or block.kind != "group" or index.numel() % block.cols:
        return None
    counts = torch.bincount(index, minlength=index.numel() // block.cols)
    return index.argsort(stable=True) if bool((counts == block.cols).all()) else None


def packing(layout: str) -> tuple[int, int]:
    """(columns between two codes of a word, bytes of a word): (1, 1) of "nibble", (32, 4) of "word32".

    (0, 1) where every code has a byte.
    """
    layout = layout.removesuffix(SORTED)
    if layout.startswith(_WORD):
        return int(layout.removeprefix(_WORD)), 4
    return (int(layout.removeprefix(NIBBLE) or 1) if layout.startswith(NIBBLE) else 0), 1


def canonical(w: Stored) -> Stored:
    """The canonical form of what `keep` made; bits are those that went in. Codes are put back, the rest is shared."""
    if not isinstance(w, QTensor):
        return w
    laid, moved = packing(w.layout), w.layout.endswith(SORTED)
    if not (laid[0] or moved):  # as it was, or in a layout of a backend's own
        return w
    codes = _unpack(w.codes, element(w.format.element), *laid) if laid[0] else w.codes
    if moved:
        columns = order(w)
        assert columns is not None
        codes = torch.empty_like(codes).index_copy_(-1, columns, codes)
    return replace(w, codes=codes, layout="canonical")


def copied(w: Stored) -> Stored:
    """The canonical form, in tensors of its own."""
    back = canonical(w)
    if isinstance(back, Tensor):
        return back.clone()
    if isinstance(back, CodebookTensor):
        return _keep_codebooks(back, back.device)
    return _each(back, Tensor.clone)


def planes(w: Stored) -> dict[str, Tensor]:
    """Every tensor of a kept weight by dotted name; a plain weight is "values"."""
    return {"values": w} if isinstance(w, Tensor) else w.planes()


def parts(w: Stored) -> Iterator[Tensor]:
    """The float32 value of a kept weight [N, K], a few rows at a time, in order."""
    if isinstance(w, CodebookTensor):
        yield w.dequantize()
        return
    rows, columns = w.shape[-2], w.shape[-1]
    if isinstance(w, QTensor) and packing(w.layout)[0]:
        columns *= 2
    step = max(_PART // max(columns, 1), 1)
    if isinstance(w, Tensor):
        for start in range(0, max(rows, 1), step):
            yield w[start : start + step].float()
        return
    for part in _row_parts(w, rows, step):
        whole = canonical(part)
        assert isinstance(whole, QTensor)
        yield whole.dequantize()


def expert(w: Stored, index: int) -> Stored:
    """Expert `index` of a stacked weight [E, N, K], as [N, K] (views)."""
    if isinstance(w, Tensor):
        return w[index]
    if isinstance(w, CodebookTensor):
        raise FormatError("codebook weights cannot be stacked; prepare one per expert")
    return _each(w.select(index, 1), lambda t: t[0], shared=False)


def decode_into(w: Stored, out: Tensor) -> Tensor:
    """Write the value of a kept weight, rounded once to the dtype of `out`, into `out` of its canonical shape."""
    if out.dim() == 3:
        for index in range(out.shape[0]):
            decode_into(expert(w, index), out[index])
        return out
    row = 0
    for value in parts(w):
        target = out[row : row + value.shape[0]]
        target.copy_(value)
        if out.dtype == torch.float16 and bool((torch.isinf(target) & torch.isfinite(value)).any()):
            raise FormatError(
                f"a weight of magnitude {value.abs().nan_to_num(0, 0, 0).amax():.6g} overflows fp16; "
                "use bf16 activations, or ask for numerics=NumericsClass.EXACT"
            )
        row += value.shape[0]
    return out


def check_values(w: QTensor) -> None:
    """FormatError for codes outside their element and for group indices outside the scale's groups."""
    e = element(w.format.element)
    if w.codes.numel() and e.bits < 8:
        lo, hi = (int(v) for v in torch.aminmax(w.codes))
        low, high = (int(e.smallest), int(e.largest)) if e.integer else (0, (1 << e.bits) - 1)
        if lo < low or hi > high:
            raise FormatError(f"{w.format}: codes reach from {lo} to {hi}; {e.name} has {low} to {high}")
    if w.group_index is not None and w.scale is not None and w.group_index.numel():
        lo, hi = (int(v) for v in torch.aminmax(w.group_index))
        if lo < 0 or hi >= w.scale.shape[-1] > 1:
            raise FormatError(f"{w.format}: group_index reaches from {lo} to {hi}; the scale has {w.scale.shape[-1]}")


def _row_parts(w: QTensor, rows: int, step: int) -> list[QTensor]:
    block = w.format.block
    if block is not None and block.kind == "flat":  # a block may straddle rows
        return [w]
    step = -(-step // block.rows) * block.rows if block is not None else step
    if step >= rows:
        return [w]
    try:
        return [w.narrow(0, start, min(start + step, rows)) for start in range(0, rows, step)]
    except ShardError:  # a nested scale has blocks of its own; then the weight is decoded in one piece
        return [w]


def _each(w: QTensor, change: Callable[[Tensor], Tensor], *, shared: bool = True) -> QTensor:
    """The same tensor with every plane changed; shared=False leaves the table and group_index: they have no [E]."""

    def inner(plane: Tensor | QTensor | None) -> Tensor | QTensor | None:
        if isinstance(plane, QTensor):
            return _each(plane, change, shared=shared)
        return None if plane is None else change(plane)

    def common(t: Tensor | None) -> Tensor | None:
        return change(t) if shared and t is not None else t

    return replace(
        w,
        codes=change(w.codes),
        scale=inner(w.scale),
        zero=inner(w.zero),
        offset=inner(w.offset),
        table=common(w.table),
        group_index=common(w.group_index),
    )


def _check_codebooks(w: CodebookTensor) -> None:
    """FormatError for codes that no table has an entry for, and for a permutation that is none."""
    for i, s in enumerate(w.segments):
        for c, (entries, _) in enumerate(s.format.codebooks):
            lo, hi = (int(v) for v in torch.aminmax(s.codes[..., c])) if s.codes.numel() else (0, 0)
            if lo < 0 or hi >= entries:
                raise FormatError(
                    f"{w.format}: codes of codebook {c} in segment {i} reach from {lo} to {hi} of {entries}"
                )
    if w.permutation is not None:
        Permutation(w.permutation).checked()


def _keep_codebooks(w: CodebookTensor, device: torch.device) -> CodebookTensor:
    def own(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device, copy=True)

    segments = tuple(
        replace(
            s,
            codes=s.codes.to(device, copy=True),
            tables=tuple(t.to(device, copy=True) if isinstance(t, Tensor) else t for t in s.tables),
        )
        for s in w.segments
    )
    planes = (own(t) for t in (w.scale, w.permutation, w.column_scale, w.column_bias))
    return CodebookTensor(w.shape, segments, *planes)


def _own(t: Tensor, device: torch.device) -> Tensor:
    return t.to(device, copy=True, memory_format=torch.contiguous_format)


def _pack(codes: Tensor, apart: int, size: int) -> Tensor:
    runs = codes.reshape(*codes.shape[:-1], -1, size, 2, apart).to(torch.uint8) & 15
    both: Tensor = runs[..., 0, :] | (runs[..., 1, :] << 4)
    return both.transpose(-1, -2).flatten(-3)


def _unpack(packed: Tensor, e: Element, apart: int, size: int) -> Tensor:
    runs = packed.reshape(*packed.shape[:-1], -1, apart, size).transpose(-1, -2).unsqueeze(-2)
    codes = torch.cat([runs & 15, runs >> 4], -2).flatten(-4)
    return ((codes ^ 8).to(torch.int8) - 8) if e.kind == "int" else codes
