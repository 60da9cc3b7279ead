"""Experts: per-expert modules of a checkpoint found, checked for completeness and stacked into one ExpertsSpec."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhal.errors import CheckpointError, ShardError
from qhal.layer_formats import Activation, ExpertsFormat, LinearFormat
from qhal.specs import ExpertsSpec, LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes.config import CheckpointConfig

_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""(gate, up, down) as the projections of one expert are called."""

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)$")
_ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation("silu"),
    "swish": Activation("silu"),
    "gelu": Activation("gelu"),
    "gelu_new": Activation("gelu_tanh"),
    "gelu_pytorch_tanh": Activation("gelu_tanh"),
    "relu2": Activation("relu2"),
}


@dataclass(frozen=True)
class ExpertGroup:
    """The experts of one layer: `<prefix>.<e>.<name>` for e in 0..count-1 and (gate, up, down) names."""

    prefix: str
    count: int
    names: tuple[str, str, str]

    def modules(self) -> Sequence[str]:
        """Every module of the group, expert by expert."""
        return [f"{self.prefix}.{e}.{name}" for e in range(self.count) for name in self.names]


def find_groups(modules: Iterable[str]) -> dict[str, ExpertGroup]:
    """Every complete group among the modules, by prefix; CheckpointError for a projection that is missing."""
    found: dict[str, dict[int, set[str]]] = {}
    for module in modules:
        match = _EXPERT.match(module)
        if match:
            found.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    groups = {}
    for prefix, experts in found.items():
        names = next((n for n in _NAMES if experts[min(experts)] & set(n)), _NAMES[0])
        count = max(experts) + 1
        wanted = (f"{prefix}.{e}.{n}" for e in range(count) for n in names if n not in experts.get(e, set()))
        missing = next(wanted, None)
        if missing is not None:
            raise CheckpointError(f"{missing} is missing; {prefix} has experts up to {count - 1}")
        groups[prefix] = ExpertGroup(prefix, count, names)
    return groups


def activation(config: CheckpointConfig) -> Activation:
    """The function between the two products, from hidden_act."""
    name = config.value("hidden_act", config.value("hidden_activation", "silu"))
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(
            f"unsupported: {config.folder / 'config.json'}: hidden_act {str(name)[:80]!r} between expert products; "
            f"known: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def describe_group(group: ExpertGroup, describe: Callable[[str], LinearFormat], act: Activation) -> ExpertsFormat:
    """The summary of a group; CheckpointError where two experts have different formats."""
    gate, up, down = (describe(f"{group.prefix}.0.{name}") for name in group.names)
    for e in range(1, group.count):
        for name, first in zip(group.names, (gate, up, down), strict=True):
            other = describe(f"{group.prefix}.{e}.{name}")
            if replace(other, name=first.name) != first:
                raise CheckpointError(
                    f"{group.prefix}: experts differ and cannot be stacked: {first.name} is {first.weight} "
                    f"[{first.n}, {first.k}], {other.name} is {other.weight} [{other.n}, {other.k}]"
                )
    if replace(gate, name=up.name) != up:
        raise CheckpointError(f"{group.prefix}: gate {gate.weight} and up {up.weight} differ and cannot be fused")
    gate_up = replace(gate, name=f"{group.prefix}.gate_up", n=gate.n + up.n)
    return ExpertsFormat(group.prefix, group.count, gate_up, replace(down, name=f"{group.prefix}.down"), act)


def read_group(
    group: ExpertGroup, read: Callable[[str], LinearSpec], act: Activation, first: int, count: int
) -> ExpertsSpec:
    """Experts first:first+count, stacked, with a static input scale for each.

    ShardError where gate and up of one expert have different ones: they share a product, hence its quantized input.
    """
    if not (first >= 0 and count >= 1 and first + count <= group.count):
        raise CheckpointError(f"{group.prefix}: no experts {first}:{first + count}; it has {group.count}")
    gate_up, down = [], []
    for e in range(first, first + count):
        gate, up, out = (read(f"{group.prefix}.{e}.{name}") for name in group.names)
        gate_up.append(LinearSpec.concat([gate, up]))
        down.append(out)
    stacked = [_stack(parts, f"{group.prefix}.{n}") for parts, n in ((gate_up, "gate_up"), (down, "down"))]
    return ExpertsSpec(stacked[0], stacked[1], act, group.prefix)


def _stack(parts: Sequence[LinearSpec], name: str) -> LinearSpec:
    if any(p.rotate_in or p.rotate_out or p.low_rank for p in parts):
        raise ShardError(f"{name}: rotations and low-rank branches inside experts cannot be stacked")
    weights = [p.weight for p in parts]
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
    blocks = {str(w.format.block) for w in weights}
    if blocks == {"tensor", "row"}:
        weights = [QTensor.concat([_rows(w)], 0) if str(w.format.block) == "tensor" else w for w in weights]
    return QTensor.stack(list(weights))


def _rows(w: QTensor) -> QTensor:
    """A per-tensor scale as one value per row: the same numbers."""
    fmt = replace(w.format, block=type(w.format.block)("row") if w.format.block is not None else None)
    scale = w.scale
    if not isinstance(scale, Tensor) or w.zero is not None or w.offset is not None:
        raise ShardError(f"{w.format}: experts with per-tensor and per-row scales cannot be stacked")
    return replace(w, format=fmt, scale=scale.expand(*scale.shape[:-2], w.shape[-2], 1).contiguous())
