"""Gives a loaded transformers model its quantized cache: finds the attention modules, and sees that calls use it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from qhal.interface import QuantOps
from qhal.specs import KVSpec
from qhal_engines import EngineError
from qhal_engines.kv_attention import NAME, register
from qhal_engines.kv_cache import LayerKV, QhalCache
from qhal_engines.kv_plan import PHASES, AttentionLayer, CacheLayer, attention_layers

_NAMES = ("cache", "past_key_values")  # transformers 5.24 calls it by the first name, before by the second


def attention_modules(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Layer number -> (name, module) of every self-attention of the model's text decoder; EngineError if one lacks.

    Those are the modules that have a `layer_idx` and a `scaling` and share the decoder's config.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise EngineError(f"unsupported: {type(model).__name__} has an encoder; quantized caches serve decoders")
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and hasattr(module, "scaling") and getattr(module, "config", None) is text:
            if layer in found:
                raise EngineError(f"unsupported: {found[layer][0]} and {name} both are the attention of layer {layer}")
            found[layer] = (name, module)
    lacking = [layer for layer in range(text.num_hidden_layers) if layer not in found]
    if lacking or not getattr(model, "_supports_attention_backend", False):
        what = f"no self-attention module in layer {lacking[0]}" if lacking else "attention that cannot be replaced"
        raise EngineError(
            f"unsupported: {type(model).__name__} with a quantized cache: {what}.\n  do: load it without a cache format"
        )
    return dict(sorted(found.items()))


def model_attention(model: nn.Module) -> list[AttentionLayer]:
    """Every layer's attention, from the model's config and, where they know better, from its modules."""
    config: Any = model.config
    modules = attention_modules(model)
    layers = []
    for described in attention_layers(config.get_text_config(decoder=True).to_dict()):
        name, module = modules[described.layer]
        if getattr(module, "is_causal", True) is not True:
            raise EngineError(f"unsupported: {name} is not causal; quantized caches serve causal attention")
        scaling: Any = module.scaling
        scale = described.scale if scaling is None else float(scaling)
        layers.append(replace(described, name=name, scale=scale, sinks=hasattr(module, "sinks")))
    return layers


def attach(
    model: nn.Module, ops: QuantOps, caches: Iterable[CacheLayer], specs: Mapping[int, KVSpec], dtype: torch.dtype
) -> None:
    """From now on the model attends over caches of these formats, with and without use_cache, alone and in `generate`.

    caches, specs: of every layer; specs by layer number. A second call replaces the first.
    """
    modules, found = attention_modules(model), {c.attention.layer: c for c in caches}
    detach(model)
    register()
    layers = []
    for layer, (name, module) in modules.items():
        cache = found[layer]
        planned = frozenset(cache.attention_request(phase, dtype) for phase in PHASES)
        kv = LayerKV(name, layer, ops, cache.request, specs[layer], planned)
        module.qhal_kv = kv  # type: ignore[assignment]  # a plain attribute: neither a parameter nor a module
        layers.append(kv)
    text = next(iter(modules.values()))[1].config
    hooks = [
        part.register_forward_pre_hook(_UsesCache(part, tuple(layers)), with_kwargs=True)
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and part.config.get_text_config(decoder=True) is text
    ]
    model._qhal_attached = (text, text._attn_implementation, hooks)  # type: ignore[assignment,union-attr]
    text._attn_implementation = NAME  # type: ignore[union-attr]


def detach(model: nn.Module) -> None:
    """Gives the model back transformers' own cache and attention; nothing happens without a cache of ours."""
    attached: Any = model.__dict__.pop("_qhal_attached", None)
    if attached is None:
        return
    text, implementation, hooks = attached
    text._attn_implementation = implementation
    for hook in hooks:
        hook.remove()
    for module in model.modules():
        module.__dict__.pop("qhal_kv", None)


def new_cache(model: nn.Module) -> QhalCache:
    """An empty cache for `model(cache=...)`, to be kept between calls; EngineError for a model without ours."""
    found = _attached(model)
    if not found:
        raise EngineError(f"{type(model).__name__} has no quantized cache; load it with install(kv_format=...)")
    return QhalCache(found)


def cache_name(model: nn.Module) -> str | None:
    """The formats of the attached caches, as the plan writes them; None without one."""
    return "; ".join(dict.fromkeys(f"k={kv.request.k} v={kv.request.v}" for kv in _attached(model))) or None


def _attached(model: nn.Module) -> list[LayerKV]:
    found = (module.__dict__.get("qhal_kv") for module in model.modules())
    return sorted((kv for kv in found if kv is not None), key=lambda kv: kv.layer)


class _UsesCache:
    """A hook before forward: a call that wants a cache gets ours, and another kind of cache is refused.

    An empty DynamicCache is what `generate` makes by itself, so ours takes its place.
    """

    def __init__(self, part: nn.Module, layers: tuple[LayerKV, ...]) -> None:
        parameters = list(inspect.signature(part.forward).parameters)
        self.name = next((name for name in _NAMES if name in parameters), "")
        self.position = parameters.index(self.name) if self.name else -1
        self.layers = layers

    def __call__(self, part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.name:
            return None
        text = part.config.get_text_config(decoder=True)
        if text._attn_implementation != NAME:
            raise EngineError(
                f"unsupported: attention {text._attn_implementation!r} for a model whose cache is quantized by qhal; "
                f"it would read keys that are not.\n  do: leave {NAME!r}, or kv_attach.detach(model)"
            )
        name = next((n for n in _NAMES if kwargs.get(n) is not None), self.name)
        positional = len(args) > self.position
        given: Any = args[self.position] if positional else kwargs.get(name)
        if isinstance(given, QhalCache):
            if [layer.kv for layer in given.layers] != list(self.layers):
                raise EngineError("the cache belongs to another model, or to another cache format of this one")
            return None
        fresh = type(given) is DynamicCache and given.get_seq_length() == 0
        if given is not None and not fresh:
            raise EngineError(
                f"unsupported: a {type(given).__name__} for a model whose cache is quantized by qhal.\n"
                "  do: pass none (and no cache_implementation), or what kv_attach.new_cache(model) makes"
            )
        use = kwargs.get("use_cache")
        if given is None and not (text.use_cache if use is None else use):
            return None
        ours = QhalCache(self.layers)
        if positional:
            return (*args[: self.position], ours, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, name: ours}
