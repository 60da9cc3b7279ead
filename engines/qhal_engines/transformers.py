"""Runs every checkpoint that qhal_schemes reads inside Hugging Face transformers, through one quantizer class.

    import qhal_engines.transformers
    qhal_engines.transformers.install()                   # before from_pretrained; a wrong plan stops the load
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(model.qhal_plan.explain())

The adapter knows no checkpoint format. It opens the folder with qhal_schemes, resolves the plan before any weight is
read, puts a `QhalLinear` in place of every quantized linear and a `QhalExperts` in place of a layer's quantized
experts, lets transformers load the rest, then prepares one module at a time, so that at no time more than one module's
packed tensors are held beside the prepared ones. A quantized cache, the checkpoint's or the one asked for with
install(kv_format="fp8"), is attached last.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import qhal
import qhal_schemes
from qhal.errors import PolicyError
from qhal.layer_formats import ExpertsFormat
from qhal.plan import Policy
from qhal_engines import EngineError, EngineMissingError
from qhal_engines.kv_plan import cache_layers, resolve_with_caches
from qhal_engines.module_match import ignore_patterns, match_experts, match_modules
from qhal_engines.modules import QhalExperts
from qhal_engines.modules import QhalLinear as QhalLinear
from qhal_schemes.kv_words import parse_kv

try:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]
    from transformers.quantizers import auto as hf_auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from qhal_engines.kv_attach import attach, model_attention
except ImportError as error:
    raise EngineMissingError(
        f"qhal_engines.transformers needs the package transformers, 5.17 or newer ({error}).\n"
        "  do: python -m pip install 'transformers>=5.17'"
    ) from error

POLICIES = ("exact", "error", "allow")
_saved: dict[str, tuple[Any, Any]] = {}  # quant_method -> (quantizer, config class) that install() displaced, or None


class QhalConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A checkpoint's quantization config, kept word for word: qhal_schemes reads it, transformers only carries it.

    QhalConfig(quantize="int4_g32") as `quantization_config` of from_pretrained quantizes a bf16 checkpoint on the way
    in.
    """

    def __init__(self, quant_method: str = "qhal", **values: Any) -> None:
        self.method, self.values = quant_method, values
        self.quant_method = quant_method
        if quant_method == "bitsandbytes":  # transformers looks its quantizer up by width
            four = values.get("load_in_4bit", values.get("_load_in_4bit"))
            self.quant_method += "_4bit" if four else "_8bit"

    def to_dict(self) -> dict[str, Any]:
        """The config as it stood in config.json."""
        return {"quant_method": self.method, **self.values}

    def __repr__(self) -> str:
        return f"QhalConfig({self.method!r})"


class QhalQuantizer(HfQuantizer):  # type: ignore[misc]
    """The hooks transformers calls around loading. `install` makes a subclass that carries backend and policy."""

    requires_calibration = False  # a checkpoint that is not quantized can be, on the way in: QhalConfig(quantize=...)
    is_trainable = False
    is_compileable = False
    backend = "auto"
    policy: Policy = "error"
    kv_format: str | None = None

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._ops = qhal.select(self.backend)
        self._quantize = quantization_config.values.get("quantize")
        self._pending: dict[str, QhalLinear | QhalExperts] = {}

    def is_serializable(self, **_: Any) -> bool:
        """Prepared weights are not written back: the checkpoint on disk is the only source."""
        return False

    def update_device_map(self, device_map: Any) -> Any:
        """The whole model goes to the backend's device; another wish is refused."""
        device = torch.device(self._ops.device)
        if device_map is None:
            return None if device.type == "cpu" else {"": str(device)}
        wanted = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if wanted == {"auto"} or all(_same_device(w, device) for w in wanted):
            return {"": str(device)}
        raise EngineError(
            f"device_map={device_map!r} asks for devices other than {device}, where backend {self.backend!r} keeps "
            "quantized layers.\n  do: leave device_map out, or choose the device with install(backend='<name>:<index>')"
        )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        folder = _folder(kwargs.get("checkpoint_files"), model.config.name_or_path)
        dtype = kwargs.get("dtype") or model.dtype
        checkpoint = qhal_schemes.open_checkpoint(folder, quantize=self._quantize)
        wants_caches = bool(checkpoint.kv_formats()) or self.kv_format not in (None, "auto")
        caches = cache_layers(checkpoint, self.kv_format, model_attention(model), dtype) if wants_caches else []
        experts = [f for f in checkpoint.layer_formats() if isinstance(f, ExpertsFormat)]
        top_k = _top_k(model) if experts else None
        plan = resolve_with_caches(checkpoint, self._ops, self.policy, caches, dtype=dtype, experts_top_k=top_k)
        names = checkpoint.modules(quantized=True)
        inside = tuple(f"{f.name}." for f in experts)
        linears = [checkpoint.format(name) for name in names if not name.startswith(inside)]
        found_experts = match_experts(model, experts, names)
        found = match_modules(model, linears)
        modules = dict(model.named_modules())
        for name, target in found.items():
            linear = modules[target]
            self._pending[name] = QhalLinear(name, linear.in_features, linear.out_features)
            model.set_submodule(target, self._pending[name])
        counts = {f.name: f.experts for f in experts}
        for name, target in found_experts.items():
            self._pending[name] = QhalExperts(name, counts[name])
            model.set_submodule(target, self._pending[name])
        found |= found_experts
        replaced = set(found.values())
        ignored = model._keys_to_ignore_on_load_unexpected  # a set in transformers 5, a list or None in 4
        patterns = ignore_patterns(modules, found) | set(ignored or ())
        patterns |= {rf"^{re.escape(c.format.name)}\.[kv]_(scale|zero_point)$" for c in caches}
        model._keys_to_ignore_on_load_unexpected = patterns if isinstance(ignored, set) else list(patterns)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for key in [k for k in tied if k.rpartition(".")[0] in replaced]:
            del tied[key]
        self._checkpoint, self._plan, self._dtype, self._caches, self._top_k = checkpoint, plan, dtype, caches, top_k
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        device, checkpoint = torch.device(self._ops.device), self._checkpoint
        for name, module in tqdm(self._pending.items(), desc="Preparing quantized layers", disable=not self._pending):
            if isinstance(module, QhalExperts):
                groups = {"groups": "indexed", "top_k": self._top_k}
                module.place(checkpoint.load_experts(name, self._ops, None, self._dtype, **groups), device, self._dtype)
            else:
                module.place(checkpoint.load_linear(name, self._ops, dtype=self._dtype), device, self._dtype)
        if self._caches:
            specs = {c.attention.layer: c.read(checkpoint) for c in self._caches}
            attach(model, self._ops, self._caches, specs, self._dtype)
        model.qhal_plan = self._plan
        del self._checkpoint, self._pending
        return model


def install(backend: str = "auto", policy: Policy = "error", kv_format: str | None = None) -> None:
    """Takes over transformers' table of quantizers for every quant_method of a config.json that qhal_schemes reads.

    backend: as for `qhal.select`; it is selected when a model is loaded. policy: as for `qhal.resolve`; "report" runs
    nothing and is refused here. kv_format: None or "auto" gives every layer the cache that the checkpoint says; a word
    or format, "K,V" if they differ, gives all layers that one (`qhal_schemes.kv_words`). transformers asks no quantizer
    about a checkpoint that is not quantized: such a one needs from_pretrained(quantization_config=QhalConfig()).
    A second call replaces the settings of the first. `uninstall` puts the table back.
    """
    if policy not in POLICIES:
        raise PolicyError(f"policy {policy!r}: an engine runs the model, so it is one of {', '.join(POLICIES)}")
    if kv_format not in (None, "auto"):
        parse_kv(str(kv_format))  # a wrong name is found now, not when a model is loaded
    settings = {"backend": backend, "policy": policy, "kv_format": kv_format}
    quantizer = type("QhalQuantizer", (QhalQuantizer,), settings)
    quantizers, configs = hf_auto.AUTO_QUANTIZER_MAPPING, hf_auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    for method in (key for name in ("qhal", *qhal_schemes.known_methods()) for key in _keys(name)):
        _saved.setdefault(method, (quantizers.get(method), configs.get(method)))
        quantizers[method], configs[method] = quantizer, QhalConfig


def _keys(method: str) -> tuple[str, ...]:
    """The keys under which transformers looks for the quantizer of a method: those of one method say its width.

    None for gguf: it names no section of config.json but transformers' own reading of one file (gguf_file=...), which
    stays what it is.
    """
    if method == "gguf":
        return ()
    return (method, "bitsandbytes_4bit", "bitsandbytes_8bit") if method == "bitsandbytes" else (method,)


def uninstall() -> None:
    """Puts back the quantizers that `install` displaced. Models already loaded keep working."""
    tables = (hf_auto.AUTO_QUANTIZER_MAPPING, hf_auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    for method, entries in _saved.items():
        for table, entry in zip(tables, entries, strict=True):
            if entry is None:
                table.pop(method, None)
            else:
                table[method] = entry
    _saved.clear()


def _folder(files: Any, name: str) -> Path:
    """The one folder that holds the checkpoint's weight files. transformers 4 does not say `files`: there `name` is
    it."""
    folders = {Path(file).parent for file in files or ()}
    if not folders and Path(name).is_dir():
        folders = {Path(name)}
    if len(folders) != 1:
        raise EngineError(
            f"{name!r}: weights come from {len(folders)} folders; qhal reads one checkpoint folder with config.json "
            "and safetensors.\n  do: pass that folder to from_pretrained, and no state_dict"
        )
    return folders.pop()


def _top_k(model: Any) -> int:
    """Experts per token."""
    value = getattr(model.config.get_text_config(decoder=True), "num_experts_per_tok", None)
    if not isinstance(value, int):
        raise EngineError(f"unsupported: {type(model).__name__} has experts, but no num_experts_per_tok in its config")
    return value


def _same_device(wanted: Any, device: torch.device) -> bool:
    try:
        asked = torch.device(wanted)
    except (RuntimeError, TypeError):
        return False  # "disk", "balanced": no device at all
    return asked.type == device.type and asked.index in (None, device.index)
