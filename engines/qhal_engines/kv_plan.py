"""Which cache every layer gets: the checkpoint's own, or the one asked for at start-up; decided before any weight is
read, as formats and requests that a plan can refuse. Imports no engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

import qhal
from qhal.elements import dtype_name, element
from qhal.errors import CheckpointError, FormatError
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.layer_formats import KVFormat, LayerFormat
from qhal.layers import attention_request, kv_request
from qhal.plan import Plan, Policy
from qhal.requests import AttentionRequest, Form, KVRequest, Request
from qhal.specs import KVSpec, Operand
from qhal_engines import EngineError, EngineWarning
from qhal_schemes import Checkpoint
from qhal_schemes.kv_words import parse_kv

PAGE = 16
"""Slots of a page; the same that `qhal.layers.requests` asks for."""
PHASES: tuple[Literal["prefill"], Literal["decode"]] = ("prefill", "decode")


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention: heads and features of Q, K and V, and what the softmax sees.

    window  keys that a query sees, its own included; None: all before it
    """

    name: str
    layer: int
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


@dataclass(frozen=True)
class CacheLayer:
    """The cache of one layer. stored: the parts ("k", "v") whose static scales the checkpoint holds."""

    attention: AttentionLayer
    format: KVFormat
    stored: tuple[str, ...] = ()

    @property
    def request(self) -> KVRequest:
        """The planes to allocate."""
        return kv_request(self.format, page=PAGE)

    def attention_request(self, phase: Literal["prefill", "decode"], dtype: torch.dtype) -> AttentionRequest:
        """Attention over this cache with activations of `dtype`; Q and P stay in it unless the checkpoint says else."""
        a = self.attention
        asked = attention_request(self.format, dtype, page=PAGE, heads=a.heads, scale=a.scale, phase=phase)
        return replace(asked, window=a.window, softcap=a.softcap, sinks=a.sinks)

    def read(self, checkpoint: Checkpoint) -> KVSpec:
        """Formats and static scales; a part whose scales are not stored has none, and its planes stay at 1."""
        f = self.format
        spec = checkpoint.kv_format(self.attention.layer) if self.stored or f.q or f.p else None
        k = spec.k if spec is not None and "k" in self.stored else Operand(f.k)
        v = spec.v if spec is not None and "v" in self.stored else Operand(f.v)
        q, p = (None, None) if spec is None else (spec.q, spec.p)
        return KVSpec(k, v, q, p, f.kind, f.heads, f.k_dim, f.v_dim, f.name)


def attention_layers(config: Mapping[str, Any]) -> list[AttentionLayer]:
    """Every layer's attention as config.json describes it; CheckpointError for keys that are missing.

    EngineError for layers that have no such cache: latent (MLA), linear, chunked or shared ones.
    """
    text = config.get("text_config") or config
    count, heads, hidden = (_count(text, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    kv_heads, dim = _count(text, "num_key_value_heads", heads), _count(text, "head_dim", hidden // heads)
    if text.get("kv_lora_rank"):
        raise EngineError(
            "unsupported: a model with latent attention (MLA, kv_lora_rank) under a quantized cache: transformers "
            "expands the latent rows before they reach its cache.\n  do: leave the cache format out"
        )
    kinds = text.get("layer_types") or [None] * count
    if not isinstance(kinds, list) or len(kinds) != count:
        raise CheckpointError(f"config.json: layer_types is {str(kinds)[:80]}, must name each of {count} layers")
    wanted = {"full_attention", "sliding_attention", None}
    odd = next((f"layer {i} is {kind!r}" for i, kind in enumerate(kinds) if kind not in wanted), None)
    if odd or text.get("num_kv_shared_layers"):
        raise EngineError(
            f"unsupported: {odd or 'layers that share their keys (num_kv_shared_layers)'}; a quantized cache serves "
            "full and sliding attention.\n  do: leave the cache format out"
        )
    slides = text.get("sliding_window") is not None and text.get("use_sliding_window", True) is not False
    window = _count(text, "sliding_window") if slides else None
    scale = _real(text, "attention_multiplier") or (_real(text, "query_pre_attn_scalar") or dim) ** -0.5
    return [
        AttentionLayer(
            name=f"model.layers.{i}.self_attn",
            layer=i,
            heads=heads,
            kv_heads=kv_heads,
            k_dim=dim,
            v_dim=dim,
            scale=scale,
            window=window if kind != "full_attention" else None,
            softcap=_real(text, "attn_logit_softcapping"),
            sinks=text.get("model_type") == "gpt_oss",
        )
        for i, kind in enumerate(kinds)
    ]


def cache_layers(
    checkpoint: Checkpoint,
    kv_format: str | None,
    attention: list[AttentionLayer] | None = None,
    dtype: torch.dtype | None = None,
) -> list[CacheLayer]:
    """The cache of every layer; [] where nobody asks for a quantized one.

    kv_format  None or "auto": what the checkpoint says. Else one format for K and V or "K,V", words or names (see
               qhal_schemes.kv_words); static scales of the same element and block still come from the checkpoint
    attention  the layers of the loaded model; default: what config.json says
    dtype      of the activations, which layers that the checkpoint leaves out keep in their cache; default its own

    FormatError for a static integer format without scales in the checkpoint. Static scales of float formats are 1 then,
    and one EngineWarning says so.
    """
    said = checkpoint.kv_formats()
    asked = None if kv_format in (None, "auto") else parse_kv(str(kv_format))
    if not said and asked is None:
        return []
    layers = attention_layers(checkpoint.config) if attention is None else attention
    unknown = sorted(set(said) - {a.layer for a in layers})
    if unknown:
        raise CheckpointError(f"{checkpoint.path}: a cache of layer {unknown[0]}, but the model has {len(layers)}")
    plain = Format(dtype_name(dtype or checkpoint.dtype))
    found = []
    for a in layers:
        wanted = asked or (None if a.layer in said else (plain, plain))
        found.append(_cache_layer(a, said.get(a.layer), wanted, checkpoint))
    ones = {str(f) for c in found for part, f in _parts(c.format) if part not in c.stored and _given(f)}
    if ones:
        warnings.warn(
            f"the cache format {', '.join(sorted(ones))} has static scales and the checkpoint holds none: they are 1. "
            "fp8_row, int8 and the group formats compute theirs",
            EngineWarning,
            stacklevel=2,
        )
    return found


def plan_with_caches(
    checkpoint: Checkpoint,
    ops: QuantOps,
    policy: Policy,
    kv_format: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    world: int = 1,
) -> Plan:
    """The plan of a checkpoint with the caches of `cache_layers` and the attention over them, without a model.

    Caches of latent attention stand in it as the checkpoint describes them, without their attention.
    """
    text = checkpoint.config.get("text_config") or checkpoint.config
    if kv_format in (None, "auto") and text.get("kv_lora_rank"):
        return qhal.resolve(checkpoint, ops, policy, dtype=dtype, world=world)
    return resolve_with_caches(
        checkpoint, ops, policy, cache_layers(checkpoint, kv_format, None, dtype), dtype=dtype, world=world
    )


def cache_requests(checkpoint: Checkpoint, kv_format: str | None = None) -> list[tuple[str, Request]]:
    """(layer, request) of every cache, and of the attention over it, that `plan_with_caches` has. Asks no backend."""
    text = checkpoint.config.get("text_config") or checkpoint.config
    if kv_format in (None, "auto") and text.get("kv_lora_rank"):
        said = [f for f in checkpoint.layer_formats() if isinstance(f, KVFormat)]
        return [(f.name, kv_request(f, page=PAGE)) for f in said]
    caches = cache_layers(checkpoint, kv_format)
    found: list[tuple[str, Request]] = [(c.format.name, c.request) for c in caches]
    for cache in caches:
        found += [(cache.attention.name, cache.attention_request(phase, checkpoint.dtype)) for phase in PHASES]
    return found


def resolve_with_caches(
    checkpoint: Checkpoint,
    ops: QuantOps,
    policy: Policy,
    caches: list[CacheLayer],
    *,
    dtype: torch.dtype | None = None,
    world: int = 1,
    experts_top_k: int | None = None,
) -> Plan:
    """`qhal.resolve` of the checkpoint with these caches instead of its own, and with the attention over them.

    experts_top_k  the engine calls experts with Indexed groups of so many experts per token
    """
    dtype = dtype or checkpoint.dtype
    layers = [f for f in checkpoint.layer_formats() if not isinstance(f, KVFormat)]
    also: list[tuple[str, Request]] = []
    for cache in caches:
        also += [(cache.attention.name, cache.attention_request(phase, dtype)) for phase in PHASES]
    model = _Layers(dtype, (*layers, *(c.format for c in caches)))
    groups: Form = "offsets" if experts_top_k is None else "indexed"
    return qhal.resolve(
        model, ops, policy, world=world, dtype=dtype, groups=groups, top_k=experts_top_k or 1, also=also
    )


@dataclass(frozen=True)
class _Layers:
    """What `qhal.resolve` wants of a model."""

    dtype: torch.dtype
    formats: tuple[LayerFormat, ...]

    def layer_formats(self) -> tuple[LayerFormat, ...]:
        return self.formats


def _cache_layer(
    a: AttentionLayer, said: KVFormat | None, asked: tuple[Format, Format] | None, checkpoint: Checkpoint
) -> CacheLayer:
    own = {} if said is None else {"k": said.k, "v": said.v}
    wanted = own if asked is None else dict(zip("kv", asked, strict=True))
    base = said or KVFormat("mha", wanted["k"], wanted["v"], name=a.name)
    if base.kind != "mha":
        raise EngineError(f"unsupported: {base.name}: a cache of kind {base.kind}; transformers keeps keys and values")
    sizes = (a.kv_heads, a.k_dim, a.v_dim)
    if any(x not in (0, y) for x, y in zip((base.heads, base.k_dim, base.v_dim), sizes, strict=True)):
        raise CheckpointError(
            f"{checkpoint.path}: {base.name}: a cache of {base.heads} heads of {base.k_dim} and {base.v_dim} features; "
            f"the model's attention has {a.kv_heads} of {a.k_dim} and {a.v_dim}"
        )
    stored = []
    for part, f in wanted.items():
        mine = own.get(part)
        if mine is not None and (mine.element, mine.block, mine.op) == (f.element, f.block, f.op):
            wanted[part] = mine
            stored.append(part)
        elif _given(f) and element(f.element).kind in ("int", "uint"):
            raise FormatError(
                f"cache format {f} of {part} needs scales that the checkpoint does not hold; formats with row or g<k> "
                "blocks compute theirs, for example int8.row*fp32"
            )
    filled = replace(base, k=wanted["k"], v=wanted["v"], heads=sizes[0], k_dim=sizes[1], v_dim=sizes[2])
    return CacheLayer(replace(a, name=base.name), filled, tuple(stored))


def _parts(f: KVFormat) -> Iterator[tuple[str, Format]]:
    yield "k", f.k
    yield "v", f.v


def _given(f: Format) -> bool:
    """Whether something of the format is no function of the row: a static scale, or the outer one of two levels."""
    static = f.block is not None and f.block.kind in ("tensor", "head", "col")
    return static or (f.scale is not None and not f.scale.plain)


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}; a cache needs to know it, as a number from 1")
    return value


def _real(config: Mapping[str, Any], key: str) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not value > 0:
        raise CheckpointError(f"config.json: {key} is {value!r}, must be a positive number")
    return float(value)
