"""Runs every checkpoint that qhal_schemes reads inside Hugging Face transformers, through one quantizer class.

    import qhal_engines.transformers
    qhal_engines.transformers.install()                   # before from_pretrained; a wrong plan stops the load
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(model.qhal_plan.explain())

The adapter knows no checkpoint format. It opens the folder with qhal_schemes, resolves the plan before any weight is
read, puts a `QhalLinear` in place of every quantized linear, lets transformers load the rest, then prepares one module
at a time, so that at no time more than one module's packed tensors are held beside the prepared ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qhal
import qhal_schemes
from qhal.errors import PolicyError
from qhal.layer_formats import ExpertsFormat, KVFormat, LayerFormat
from qhal.plan import Policy
from qhal.prepared import PreparedLinear
from qhal_engines import EngineError, EngineMissingError
from qhal_engines.module_match import ignore_patterns, match_modules

try:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]
    from transformers.quantizers import auto as hf_auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise EngineMissingError(
        f"qhal_engines.transformers needs the package transformers, 5.17 or newer ({error}).\n"
        "  do: python -m pip install 'transformers>=5.17'"
    ) from error

_log = logging.getLogger(__name__)
POLICIES = ("exact", "error", "allow")
_saved: dict[str, tuple[Any, Any]] = {}  # quant_method -> (quantizer, config class) that install() displaced, or None


class QhalLinear(nn.Module):
    """A linear layer whose weight lives in a backend. It has no parameters: `layer` holds everything.

    x [..., in] -> [..., out], in the model's dtype; the numbers are those of the plan's entry for `name`.
    """

    def __init__(self, name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features = name, in_features, out_features
        self.layer: Callable[[Tensor], Tensor] = self._not_loaded
        self._prepared: PreparedLinear | None = None
        self._placed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The prepared layer on x."""
        return self.layer(x)

    def place(self, layer: PreparedLinear, device: torch.device, dtype: torch.dtype) -> None:
        """Takes the prepared layer, which serves activations of `dtype` on `device` only."""
        self._prepared, self._placed = layer, torch.empty(0, dtype=dtype, device=device)
        # Few layers quantize their input in another way while decoding; the others are called with nothing in between.
        self.layer = self._by_phase if layer.decode_index else layer

    @property
    def nbytes(self) -> int:
        """Bytes that the prepared layer keeps."""
        return 0 if self._prepared is None else self._prepared.nbytes

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QhalLinear:
        if self._placed is not None:
            moved = fn(self._placed)
            if (moved.device, moved.dtype) != (self._placed.device, self._placed.dtype):
                raise EngineError(
                    f"{self.name}: asked to move a quantized layer from {self._placed.dtype} on {self._placed.device} "
                    f"to {moved.dtype} on {moved.device}; prepared weights stay where they were prepared.\n"
                    "  do: load the model again with install(backend=...) and from_pretrained(dtype=...)"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def _by_phase(self, x: Tensor) -> Tensor:
        """One new token per sequence, [batch, 1, in], is decoding."""
        assert self._prepared is not None
        return self._prepared(x, decode=x.dim() == 3 and x.shape[1] == 1)

    def _not_loaded(self, x: Tensor) -> Tensor:
        raise EngineError(f"{self.name}: called before its weight was loaded")


class QhalConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A checkpoint's quantization config, kept word for word: qhal_schemes reads it, transformers only carries it.

    QhalConfig(quantize="int4_g32") as `quantization_config` of from_pretrained quantizes a bf16 checkpoint on the way
    in.
    """

    def __init__(self, quant_method: str = "qhal", **values: Any) -> None:
        four = values.get("load_in_4bit", values.get("_load_in_4bit"))
        self.method, self.values = quant_method, values
        self.quant_method = _keys(quant_method)[0 if four else -1]  # what transformers looks up

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

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._ops = qhal.select(self.backend)
        self._quantize = quantization_config.values.get("quantize")
        self._pending: dict[str, QhalLinear] = {}

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
        plan = qhal.resolve(checkpoint, self._ops, policy=self.policy, dtype=dtype)
        self._refuse_what_stays_unquantized(folder, checkpoint.layer_formats())
        found = match_modules(model, [checkpoint.format(name) for name in checkpoint.modules(quantized=True)])
        modules = dict(model.named_modules())
        for name, target in found.items():
            linear = modules[target]
            self._pending[name] = QhalLinear(name, linear.in_features, linear.out_features)
            model.set_submodule(target, self._pending[name])
        replaced = set(found.values())
        ignored = model._keys_to_ignore_on_load_unexpected  # a set in transformers 5, a list or None in 4
        patterns = ignore_patterns(modules, found) | set(ignored or ())
        model._keys_to_ignore_on_load_unexpected = patterns if isinstance(ignored, set) else list(patterns)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for key in [k for k in tied if k.rpartition(".")[0] in replaced]:
            del tied[key]
        self._checkpoint, self._plan, self._dtype = checkpoint, plan, dtype
        return model

    def _refuse_what_stays_unquantized(self, folder: Path, layers: list[LayerFormat]) -> None:
        """Nothing that the checkpoint quantizes may run unquantized without a word."""
        experts = [layer.name for layer in layers if isinstance(layer, ExpertsFormat) and _quantized(layer)]
        if experts:
            raise EngineError(
                f"{folder}: {len(experts)} modules of quantized experts (first: {experts[0]!r}); the transformers "
                "adapter does not run quantized experts yet: transformers keeps all experts of a layer in one fused "
                "parameter. Nothing was loaded; qhal's own checkpoint.load_experts(...) runs them"
            )
        caches = [layer for layer in layers if isinstance(layer, KVFormat)]
        if caches:
            text = (
                f"{folder}: the checkpoint quantizes the key-value cache ({caches[0]}), but transformers keeps its own "
                "cache in the model's dtype"
            )
            if self.policy != "allow":
                raise EngineError(f"{text}. Nothing was loaded.\n  do: install(policy='allow') runs it that way")
            _log.warning("%s; policy 'allow' runs it that way", text)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        device = torch.device(self._ops.device)
        for name, module in tqdm(self._pending.items(), desc="Preparing quantized layers"):
            layer = self._checkpoint.load_linear(name, self._ops, dtype=self._dtype)
            module.place(layer, device, self._dtype)
        model.qhal_plan = self._plan
        del self._checkpoint, self._pending
        return model


def install(backend: str = "auto", policy: Policy = "error") -> None:
    """Takes over transformers' table of quantizers for every quant_method that qhal_schemes reads.

    backend: as for `qhal.select`; it is selected when a model is loaded. policy: as for `qhal.resolve`; "report" runs
    nothing and is refused here. A second call replaces the settings of the first. `uninstall` puts the table back.
    """
    if policy not in POLICIES:
        raise PolicyError(f"policy {policy!r}: an engine runs the model, so it is one of {', '.join(POLICIES)}")
    quantizer = type("QhalQuantizer", (QhalQuantizer,), {"backend": backend, "policy": policy})
    quantizers, configs = hf_auto.AUTO_QUANTIZER_MAPPING, hf_auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    for method in (key for name in ("qhal", *qhal_schemes.known_methods()) for key in (name, *_keys(name))):
        _saved.setdefault(method, (quantizers.get(method), configs.get(method)))
        quantizers[method], configs[method] = quantizer, QhalConfig


def _keys(method: str) -> tuple[str, ...]:
    """The keys under which transformers looks for the quantizer of a method: those of one method say its width."""
    return ("bitsandbytes_4bit", "bitsandbytes_8bit") if method == "bitsandbytes" else (method,)


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


def _quantized(experts: ExpertsFormat) -> bool:
    return experts.gate_up.quantized or experts.down.quantized


def _same_device(wanted: Any, device: torch.device) -> bool:
    try:
        asked = torch.device(wanted)
    except (RuntimeError, TypeError):
        return False  # "disk", "balanced": no device at all
    return asked.type == device.type and asked.index in (None, device.index)
