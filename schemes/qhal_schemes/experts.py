"""Experts: those of one layer found in a checkpoint, checked for completeness and read into one ExpertsSpec.

Files hold them in two ways: a module for every expert, found here by name and stacked, or two stacked modules for all,
which a scheme names itself (`SchemeMapping.stacked`) because only it knows their tensors. Gate and up are one module
or two; where they are one, some models alternate their rows (gpt-oss) and all others put the gate's first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhal.codebooks import CodebookTensor
from qhal.errors import CheckpointError, ShardError
from qhal.formats import Format
from qhal.layer_formats import Activation, ExpertsFormat, LinearFormat
from qhal.recoding import recode
from qhal.specs import ExpertsSpec, LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes.config import CheckpointConfig

_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("gate_up_proj",), "down_proj"),
)
"""How the projections of one expert are called: those that read the layer's input, gate first, and down."""

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|gate_up_proj|down_proj|w1|w2|w3)$")
_ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation("silu"),
    "swish": Activation("silu"),
    "gelu": Activation("gelu"),
    "gelu_new": Activation("gelu_tanh"),
    "gelu_pytorch_tanh": Activation("gelu_tanh"),
    "relu2": Activation("relu2"),
}
_GPT_OSS_ALPHA = 1.702
"""The model's code has this number, its configuration does not (transformers, GptOssExperts)."""


@dataclass(frozen=True)
class ExpertGroup:
    """The experts of one layer with modules of their own: `<prefix>.<e>.<name>` for e in 0..count-1.

    inputs  names of the modules that read the layer's input: gate and up, or one that holds both
    output  name of the module that makes the layer's output
    """

    prefix: str
    count: int
    inputs: tuple[str, ...]
    output: str

    def modules(self) -> Sequence[str]:
        """Every module of the group, expert by expert."""
        return [f"{self.prefix}.{e}.{name}" for e in range(self.count) for name in (*self.inputs, self.output)]


@dataclass(frozen=True)
class StackedExperts:
    """The experts of one layer in two modules of the file, each read as [E, N, K].

    gate_up  the module that holds gate and up, [E, 2I, K]
    down     the module [E, K, I]
    """

    prefix: str
    count: int
    gate_up: str
    down: str

    def modules(self) -> Sequence[str]:
        """Both modules."""
        return [self.gate_up, self.down]


Group = ExpertGroup | StackedExperts


@dataclass(frozen=True)
class Source:
    """Where the parts of a group come from: a module's format, its spec, and a range of a stacked module's experts."""

    config: CheckpointConfig
    describe: Callable[[str], LinearFormat]
    read: Callable[[str], LinearSpec]
    read_range: Callable[[str, int, int], LinearSpec]


def find_groups(modules: Iterable[str]) -> dict[str, ExpertGroup]:
    """Every complete group among the modules, by prefix; CheckpointError for a projection that is missing."""
    found: dict[str, dict[int, set[str]]] = {}
    for module in modules:
        match = _EXPERT.match(module)
        if match:
            found.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    groups = {}
    for prefix, experts in found.items():
        present = experts[min(experts)]
        named = [n for n in _NAMES if present & set(n[0])] or [n for n in _NAMES if n[1] in present]
        inputs, output = named[0]
        count = max(experts) + 1
        wanted = (
            f"{prefix}.{e}.{n}" for e in range(count) for n in (*inputs, output) if n not in experts.get(e, set())
        )
        missing = next(wanted, None)
        if missing is not None:
            raise CheckpointError(f"{missing} is missing; {prefix} has experts up to {count - 1}")
        groups[prefix] = ExpertGroup(prefix, count, inputs, output)
    return groups


def activation(config: CheckpointConfig) -> Activation:
    """The function between the two products, from hidden_act and the limits that some models add to it.

    swiglu_limit cuts gate and up before the product; swiglu_alpha, and gpt-oss without naming it, scales the sigmoid's
    argument and adds 1 to up (transformers: GptOssExperts, FP8Experts).
    """
    name = config.value("hidden_act", config.value("hidden_activation", "silu"))
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(
            f"unsupported: {config.folder / 'config.json'}: hidden_act {str(name)[:80]!r} between expert products; "
            f"known: {', '.join(_ACTIVATIONS)}"
        )
    act, limit, alpha = _ACTIVATIONS[name], config.number("swiglu_limit"), config.number("swiglu_alpha")
    alpha = _GPT_OSS_ALPHA if alpha is None and alternates(config) else alpha
    if limit is None and alpha is None:
        return act
    if act.name != "silu":
        raise CheckpointError(
            f"unsupported: {config.folder / 'config.json'}: swiglu_limit or swiglu_alpha with hidden_act {name!r}; "
            "both are defined for silu only"
        )
    return Activation("swiglu", alpha=1.0 if alpha is None else alpha, limit=limit, shift=0.0 if alpha is None else 1.0)


def alternates(config: CheckpointConfig) -> bool:
    """Whether a module that holds gate and up has their rows in turns: gate 0, up 0, gate 1, ..."""
    return bool(config.value("model_type") == "gpt_oss")


def describe_group(group: Group, source: Source) -> ExpertsFormat:
    """The summary of a group; CheckpointError where two experts have different formats."""
    act = activation(source.config)
    if isinstance(group, StackedExperts):
        gate_up, down = source.describe(group.gate_up), source.describe(group.down)
    else:
        gate_up, down = _describe_each(group, source.describe)
    if gate_up.n != 2 * down.k or gate_up.k != down.n:
        raise CheckpointError(
            f"{group.prefix}: gate and up [{gate_up.n}, {gate_up.k}] and down [{down.n}, {down.k}] do not fit: "
            f"expected [2I, K] and [K, I]"
        )
    gate_up, down = replace(gate_up, name=f"{group.prefix}.gate_up"), replace(down, name=f"{group.prefix}.down")
    return ExpertsFormat(group.prefix, group.count, gate_up, down, act)


def _describe_each(group: ExpertGroup, describe: Callable[[str], LinearFormat]) -> tuple[LinearFormat, LinearFormat]:
    names = (*group.inputs, group.output)
    firsts = [describe(f"{group.prefix}.0.{name}") for name in names]
    for e in range(1, group.count):
        for name, first in zip(names, firsts, strict=True):
            other = describe(f"{group.prefix}.{e}.{name}")
            if replace(other, name=first.name) != first:
                raise CheckpointError(
                    f"{group.prefix}: experts differ and cannot be stacked: {first.name} is {first.weight} "
                    f"[{first.n}, {first.k}], {other.name} is {other.weight} [{other.n}, {other.k}]"
                )
    gate, *rest, down = firsts
    for up in rest:
        if replace(gate, name=up.name) != up:
            raise CheckpointError(f"{group.prefix}: gate {gate.weight} and up {up.weight} differ and cannot be fused")
    return replace(gate, n=gate.n + sum(up.n for up in rest)), down


def read_group(group: Group, source: Source, first: int, count: int) -> ExpertsSpec:
    """Experts first:first+count, stacked, gate rows before up rows, with a static input scale for each.

    ShardError where gate and up of one expert have different ones: they share a product, hence its quantized input.
    """
    if not (first >= 0 and count >= 1 and first + count <= group.count):
        raise CheckpointError(f"{group.prefix}: no experts {first}:{first + count}; it has {group.count}")
    names = [f"{group.prefix}.{part}" for part in ("gate_up", "down")]
    if isinstance(group, StackedExperts):
        parts = [source.read_range(module, first, count) for module in group.modules()]
        gate_up, down = (replace(part, name=name) for part, name in zip(parts, names, strict=True))
    else:
        inputs, outputs = [], []
        for e in range(first, first + count):
            inputs.append(LinearSpec.concat([source.read(f"{group.prefix}.{e}.{name}") for name in group.inputs]))
            outputs.append(source.read(f"{group.prefix}.{e}.{group.output}"))
        gate_up, down = _stack(inputs, names[0]), _stack(outputs, names[1])
    if alternates(source.config) and (isinstance(group, StackedExperts) or len(group.inputs) == 1):
        gate_up = _gate_first(gate_up)
    return ExpertsSpec(gate_up, down, activation(source.config), group.prefix)


def _gate_first(spec: LinearSpec) -> LinearSpec:
    """Rows gate 0, up 0, gate 1, ... as all of gate, then all of up."""
    n = spec.weight.shape[-2]
    order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)])
    if isinstance(spec.weight, QTensor):
        weight: QTensor | Tensor = spec.weight.permute_rows(order)
    elif isinstance(spec.weight, Tensor):
        weight = spec.weight.index_select(-2, order)
    else:
        raise ShardError(f"{spec.name}: rows of a {spec.format.weight} weight cannot be reordered")
    return replace(spec, weight=weight, bias=None if spec.bias is None else spec.bias.index_select(-1, order))


def _stack(parts: Sequence[LinearSpec], name: str) -> LinearSpec:
    if any(p.rotate_in or p.rotate_out or p.low_rank for p in parts):
        raise ShardError(f"{name}: rotations and low-rank branches inside experts cannot be stacked")
    weights = [p.weight for p in parts]
    vectors = next((w for w in weights if isinstance(w, CodebookTensor)), None)
    if vectors is not None:
        raise ShardError(f"{name}: codebook weights are not stacked ({vectors.format}); load the experts one by one")
    biases = [p.bias for p in parts if p.bias is not None]
    if biases and len(biases) != len(parts):
        raise ShardError(f"{name}: some experts have a bias and some have none")
    joined: QTensor | Tensor
    if all(isinstance(w, QTensor) for w in weights):
        joined = _stack_weights([w for w in weights if isinstance(w, QTensor)])
    else:
        joined = torch.stack([w for w in weights if isinstance(w, Tensor)])
    return replace(
        parts[0],
        weight=joined,
        bias=torch.stack(biases) if biases else None,
        input=_stack_operands([p.input for p in parts], f"{name}: input"),
        decode_input=_stack_operands([p.decode_input for p in parts], f"{name}: decode_input"),
        operand=_stack_operands([p.operand for p in parts], f"{name}: operand"),
        name=name,
    )


def _stack_operands(parts: Sequence[Operand | None], what: str) -> Operand | None:
    given = [o for o in parts if o is not None]
    if given and len(given) != len(parts):
        raise ShardError(f"{what}: some experts quantize it and some do not")
    return Operand.stack(given, what) if given else None


def _stack_weights(weights: Sequence[QTensor]) -> QTensor:
    """Stack; where only some fused halves needed per-row scales, give them to all."""
    formats = {str(w.format): w.format for w in weights}
    if len(formats) > 1:
        rows = [f for f in formats.values() if all(_tensor_free(f, other) for other in formats.values())]
        weights = [recode(w, rows[0]) for w in weights] if rows else weights
    return QTensor.stack(list(weights))


def _tensor_free(f: Format, other: Format) -> bool:
    """Whether `f` is `other` with per-row scales, at any level, for per-tensor ones."""
    if f == other or f.scale is None or other.scale is None:
        return f == other
    same = f.block == other.block or (str(f.block), str(other.block)) == ("row", "tensor")
    return same and _tensor_free(f.scale, other.scale) and replace(f, block=other.block, scale=other.scale) == other
