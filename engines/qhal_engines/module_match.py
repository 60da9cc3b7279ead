"""Matches every quantized module of a checkpoint to exactly one linear module of a model, or says why not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from torch import nn

from qhal.layer_formats import ExpertsFormat, LinearFormat
from qhal_engines import EngineError


def match_modules(model: nn.Module, layers: Iterable[LinearFormat]) -> dict[str, str]:
    """Checkpoint module name -> model module name, for every layer the model uses.

    A name that is no module path of the model goes through the renamings that transformers itself applies to this
    model's checkpoint keys. Names that the model declares as unused (extra prediction layers, say) are left out.
    Raises EngineError when a name matches nothing, when two match one module, when the module is no plain linear, or
    when its shape or bias is not the checkpoint's.
    """
    modules = dict(model.named_modules())
    rename = _Renamer(model)
    found: dict[str, str] = {}
    owner: dict[str, str] = {}
    lost: list[str] = []
    for layer in layers:
        name = layer.name
        target = name if name in modules else rename(name)
        if target not in modules:
            if not _unused(model, name, target):
                lost.append(name)
            continue
        if target in owner:
            raise EngineError(f"two checkpoint modules, {owner[target]!r} and {name!r}, both belong to {target!r}")
        _check_linear(layer, target, modules[target])
        found[name], owner[target] = target, name
    if lost:
        raise EngineError(_lost_text(type(model).__name__, lost, modules))
    return found


def match_experts(model: nn.Module, experts: Iterable[ExpertsFormat], names: Iterable[str]) -> dict[str, str]:
    """Prefix of experts in the checkpoint -> the model's module that keeps all of them in fused parameters.

    names: the quantized modules of the checkpoint; the first of every group shows where transformers puts them. Names
    that the model declares as unused are left out. Raises EngineError when the module is not one whose numbers are
    act(gate) * up, then down, then the weighted sum.
    """
    formats = {f.name: f for f in experts}
    if not formats:
        return {}
    modules, rename, found = dict(model.named_modules()), _Renamer(model), {}
    for name in names:
        prefix = name.rpartition(".")[0].rpartition(".")[0]
        if prefix in formats and prefix not in found:
            target = rename.fused(name)
            if target in modules:
                _check_experts(formats[prefix], target, modules[target])
                found[prefix] = target
            elif not _unused(model, name, target):
                raise EngineError(_lost_text(type(model).__name__, [prefix], modules))
    return found


def _unused(model: nn.Module, *names: str) -> bool:
    """Whether the model declares that it does not read the weights of one of these modules."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, f"{name}.weight") for pattern in patterns for name in names)


def _check_experts(f: ExpertsFormat, target: str, module: nn.Module) -> None:
    """The flags are those that transformers' own dispatch of experts reads."""
    wanted = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    odd = [
        f"{key}={getattr(module, key, None)}" for key, value in wanted.items() if getattr(module, key, None) != value
    ]
    gate = getattr(type(module), "_apply_gate", None)
    if getattr(module, "has_post_expert_norm", False):
        odd.append("has_post_expert_norm=True")
    if getattr(gate, "__name__", "") != "_default_apply_gate":
        odd.append("a gate of its own")
    if odd or f.gate_up.bias or f.down.bias or not f.activation.gated:
        raise EngineError(
            f"unsupported: {f.name}: quantized experts of a {type(module).__name__} ({', '.join(odd) or 'with bias'}); "
            "the transformers adapter runs gated experts without bias, gate rows first, as in Qwen3-MoE and Mixtral. "
            "Nothing was loaded"
        )
    expected = {"gate_up_proj": [f.experts, f.gate_up.n, f.gate_up.k], "down_proj": [f.experts, f.down.n, f.down.k]}
    for key, stored in expected.items():
        shape = list(getattr(module, key).shape)
        if shape != stored:
            raise EngineError(
                f"module {target!r}: the model has {key} of shape {shape}, the checkpoint {stored}; "
                "config.json and the weights belong to different models"
            )


def ignore_patterns(modules: Iterable[str], found: Mapping[str, str]) -> set[str]:
    """Regular expressions for the keys of replaced modules, by their checkpoint names and by their model names.

    modules: all module names of the model; found: checkpoint name -> model name of the replaced ones. A class of
    modules that differ by layer number only ("layers.7.mlp.up_proj") becomes one pattern if all of it is replaced, so
    that ten thousand modules do not become ten thousand alternatives tried on every key.
    """
    replaced = set(found.values())
    kept = {_numberless(name) for name in modules if name not in replaced}
    patterns = set()
    for pair in found.items():
        whole = _numberless(pair[1]) not in kept
        for name in pair:
            body = r"\d+".join(re.escape(part) for part in _numberless(name).split("#")) if whole else re.escape(name)
            patterns.add(rf"^{body}\.")
    return patterns


def _numberless(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def _check_linear(layer: LinearFormat, target: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise EngineError(
            f"the checkpoint quantizes {layer.name!r}, but in this model {target!r} is a {type(module).__name__}, "
            "which this adapter cannot replace: it replaces torch.nn.Linear modules that use torch's own forward"
        )
    expected, stored = [module.out_features, module.in_features], [layer.n, layer.k]
    if expected != stored:
        raise EngineError(
            f"module {target!r}: the model has a weight of shape {expected}, the checkpoint one of {stored}; "
            "config.json and the weights belong to different models"
        )
    if module.bias is not None and not layer.bias:
        raise EngineError(f"module {target!r}: the model adds a bias, the checkpoint has none under {layer.name!r}")


def _lost_text(model: str, lost: list[str], modules: Mapping[str, object]) -> str:
    shown = []
    for name in lost[:5]:
        near = difflib.get_close_matches(name, modules, n=1)
        shown.append(f"  {name}" + (f"  (nearest module of the model: {near[0]})" if near else ""))
    more = f"\n  ... and {len(lost) - 5} more" if len(lost) > 5 else ""
    return (
        f"{len(lost)} quantized modules of the checkpoint are not in {model}:\n" + "\n".join(shown) + more + "\n"
        "  do: load the model class that config.json names under 'architectures'; nothing was loaded, because a module "
        "left out would stay at random weights"
    )


class _Renamer:
    """The renamings that transformers applies to checkpoint keys of one model, on module names."""

    def __init__(self, model: nn.Module) -> None:
        try:
            from transformers import conversion_mapping, core_model_loading
        except ImportError:  # transformers 4 keeps checkpoint names
            self._apply = None
            return
        transforms = conversion_mapping.get_model_conversion_mapping(model)
        renaming, converter = core_model_loading.WeightRenaming, core_model_loading.WeightConverter
        self._renamings = [t for t in transforms if isinstance(t, renaming)]
        self._converters = [t for t in transforms if isinstance(t, converter)]
        self._prefix, self._state = getattr(model, "base_model_prefix", None), model.state_dict()
        self._apply = core_model_loading.rename_source_key

    def __call__(self, name: str) -> str:
        key, fused = self._renamed(name)
        if fused:
            raise EngineError(
                f"the checkpoint quantizes {name!r}, which this transformers version merges with other tensors into "
                f"the parameter {key!r}; of fused parameters the transformers adapter runs those of experts. Nothing "
                "was loaded"
            )
        return key.removesuffix(".weight")

    def fused(self, name: str) -> str:
        """The module whose parameter takes this expert's weight together with the others of its layer."""
        key, fused = self._renamed(name)
        if not fused:
            raise EngineError(
                f"unsupported: {name!r} is an expert of its own in this transformers version; the adapter runs experts "
                "that transformers keeps in one parameter per layer. Nothing was loaded"
            )
        return key.rpartition(".")[0]

    def _renamed(self, name: str) -> tuple[str, bool]:
        if self._apply is None:
            return f"{name}.weight", False
        key, pattern = self._apply(f"{name}.weight", self._renamings, self._converters, self._prefix, self._state)
        return str(key), pattern is not None
