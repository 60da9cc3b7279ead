"""The attention function "qhal" of transformers: quant_kv, then attention over the quantized pages.

Numbers: keys and values are rounded by the cache's format once, when they are written; the product is the backend's
`attention` with the request that the plan lists. Causal, sliding-window, soft-capped and sink attention of padded
batches run; every other pattern is refused by name. Rows of padding give zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qhal.elements import dtype_name
from qhal.formats import Format
from qhal.requests import AttentionRequest
from qhal_engines import EngineError
from qhal_engines.kv_cache import LayerKV, QhalLayer, Staged

NAME = "qhal"
_BLOCK = 2**22  # elements of a mask that are looked at together
_HARMLESS = {
    "position_ids",
    "position_embeddings",
    "use_cache",
    "cache",
    "past_key_values",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
    "num_items_in_batch",
}
"""Arguments that models pass on to attention functions and that change none of its numbers."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """What stands for a mask: causal, over columns that may be padding, in a window.

    real    bool [B, columns], None: no padding
    window  keys that a query sees, its own included; None: all before it
    """

    real: Tensor | None
    window: int | None


def register() -> None:
    """Makes "qhal" an attention implementation of transformers; harmless when called again."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, pattern)


def pattern(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Pattern:
    """The mask function of "qhal": what transformers wants to see, or an EngineError if that is no `Pattern`.

    A mask function is evaluated at every (query, key) unless it is the plain causal one: its name proves nothing.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise _no_pattern(f"an attention_mask of shape {tuple(attention_mask.shape)}")
    if kv_offset or kv_length != q_offset + q_length:
        raise _no_pattern(f"keys {kv_offset}:{kv_offset + kv_length} for queries {q_offset}:{q_offset + q_length}")
    if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, kv_length):
        raise EngineError(
            f"attention_mask is {tuple(attention_mask.shape)}, must be {(batch_size, kv_length)}: {q_offset} columns "
            f"are in the cache and {q_length} are new"
        )
    window = None
    if mask_function is not causal_mask_function:
        if use_vmap:
            raise _no_pattern("a mask function of its own")
        with torch.device(device):
            slides = _slides(mask_function, batch_size, q_offset, kv_length, local_size)
        if not slides:
            raise _no_pattern("a pattern other than causal or sliding (packed, chunked or bidirectional)")
        window = local_size
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if (
        attention_mask is not None
        and window is not None
        and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any())
    ):
        raise _no_pattern("a sliding window over padding that stands behind tokens")
    return Pattern(attention_mask, window)


def _slides(seen: Callable[..., Tensor], batch: int, first: int, length: int, window: int | None) -> bool:
    """Whether query i sees the keys i - window + 1 to i, for every i from `first`; in blocks of bounded memory."""
    sequence, head = torch.arange(batch)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    kv = torch.arange(length)[None, None, None, :]
    for rows in torch.arange(first, length).split(max(1, _BLOCK // length)):
        q = rows[None, None, :, None]
        expected = (kv <= q) if window is None else (kv <= q) & (kv > q - window)
        if not torch.equal(*torch.broadcast_tensors(seen(sequence, head, q, kv), expected)):
            return False
    return True


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Staged,
    value: Tensor | Staged,
    attention_mask: Pattern | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D] over the module's quantized cache -> [B, T, H, Dv], in the dtype of query.

    Without a cache (use_cache=False) the keys of this call pass through one that is thrown away: same numbers.
    """
    if isinstance(key, Staged):
        key.layer.staged = False  # it arrived: a refusal below is not the next call's fault
    kv: LayerKV | None = getattr(module, "qhal_kv", None)
    if kv is None:
        raise EngineError(f"{type(module).__name__}: attention 'qhal' without a cache format; load the model with one")
    odd = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
    if dropout or is_causal is False or kwargs.get("output_attentions") or odd:
        what = "dropout" if dropout else "attention to later tokens" if is_causal is False else ", ".join(odd)
        raise EngineError(f"unsupported: {kv.name}: {what or 'attention weights as a result'} over a quantized cache")
    if not isinstance(attention_mask, Pattern):
        raise _no_pattern(f"{kv.name}: a mask of its own making ({type(attention_mask).__name__})")
    if sliding_window is not None and sliding_window != attention_mask.window:
        raise _no_pattern(f"{kv.name}: a window of {sliding_window} under a mask of window {attention_mask.window}")
    staged = key if isinstance(key, Staged) else _once(kv, query, key, value)
    if staged.layer.kv is not kv:
        raise EngineError(f"unsupported: {kv.name} reads the cache of {staged.layer.kv.name} (shared keys)")
    batch, heads, columns, dim = query.shape
    step, cache = staged.layer.write(staged, attention_mask.real)
    request = _request(kv, query, "decode" if columns == 1 else "prefill", scaling, attention_mask, softcap, s_aux)
    rows = query.detach().transpose(1, 2).reshape(batch * columns, heads, dim)
    out = kv.ops.attention(
        rows if step.keep is None else rows[step.keep],
        cache,
        staged.layer.batches.get(request, step),
        sinks=None if s_aux is None else s_aux.detach().float(),
    )
    if step.keep is not None:
        padded = out.new_zeros(batch * columns, heads, out.shape[-1])
        padded[step.keep] = out
        out = padded
    return out.view(batch, columns, heads, -1), None


def _once(kv: LayerKV, query: Tensor, key: Tensor | Staged, value: Tensor | Staged) -> Staged:
    """A cache for this call only."""
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    if key.shape[2] != query.shape[2]:
        raise EngineError(
            f"{kv.name}: {query.shape[2]} queries, {key.shape[2]} keys: they come from a cache that is not qhal's.\n"
            "  do: pass no cache, or one that the model made itself"
        )
    return QhalLayer(kv).update(key, value)[0]


def _request(
    kv: LayerKV,
    query: Tensor,
    phase: Literal["prefill", "decode"],
    scaling: float | None,
    mask: Pattern,
    softcap: float | None,
    sinks: Tensor | None,
) -> AttentionRequest:
    """What the module asks for, which must be what the plan has."""
    planned = next(r for r in kv.planned if r.phase == phase)
    plain = Format(dtype_name(query.dtype))
    request = AttentionRequest(
        kv=kv.request,
        heads=query.shape[1],
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        phase=phase,
        q=kv.spec.q.format if kv.spec.q else plain,
        p=kv.spec.p.format if kv.spec.p else plain,
        out=query.dtype,
        window=mask.window,
        softcap=softcap,
        sinks=sinks is not None,
    )
    if request != planned:
        asked = [
            f"{name}={getattr(request, name)} (planned {getattr(planned, name)})"
            for name in ("heads", "scale", "q", "p", "out", "window", "softcap", "sinks")
            if getattr(request, name) != getattr(planned, name)
        ]
        raise EngineError(f"unsupported: {kv.name} asks for attention with {', '.join(asked)}")
    return request


def _no_pattern(what: str) -> EngineError:
    return EngineError(
        f"unsupported over a quantized cache: {what}; causal and sliding-window attention with 2-D padding masks run.\n"
        "  do: load the model without a cache format"
    )
