"""Transforms of compressed-tensors: the online rotations of `transform_config`, as chains of Rotation values.

Locations `weight_input` and `weight_output` are already fused in the weights. `input` gives x' = x T before the
product, `output` y' = y T after it (bias included), T per block of head_dim features. Hadamard matrices are stored
without their factor 1/sqrt(size); `inverse` transposes them, `perm` permutes both axes. Modules that share a transform
share one stored tensor. Source: compressed_tensors/transform, versions 0.19 and 0.20.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qhal.errors import CheckpointError
from qhal.rotations import Dense, Hadamard, Rotation, sylvester
from qhal_schemes import checks
from qhal_schemes.config import CheckpointConfig, names
from qhal_schemes.matching import Patterns
from qhal_schemes.source import TensorIndex

_TYPES = ("hadamard", "random-hadamard", "random-matrix")
_FUSED = ("weight_input", "weight_output")
_MATRIX = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Online:
    """One online transform of one module: matrix tensor, optional permutation tensor, and how it is applied."""

    group: str
    location: str
    weight: str
    perm: str | None
    size: int
    kind: str
    inverse: bool
    sylvester: bool
    """the matrix is the natural-order Hadamard matrix by configuration; reading checks it"""
    fixed: bool
    """it is a Hadamard matrix of some order that was not trained: reading checks that it is one"""

    @property
    def described(self) -> tuple[object, ...]:
        """`Rotation.kind` of what `rotation` will give."""
        return Hadamard(self.size).kind if self.sylvester else ("dense", self.size)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors it reads."""
        return (self.weight,) if self.perm is None else (self.weight, self.perm)

    def rotation(self, index: TensorIndex) -> Rotation:
        """Read and check the matrix."""
        t = index.read_all(self.names)
        matrix = t[self.weight].double()
        checks.finite(index, self.weight, matrix)
        if self.sylvester:
            if not torch.equal(matrix, sylvester(self.size)):
                raise index.bad(self.weight, "the natural-order Hadamard matrix of +1 and -1", "another matrix")
            return Hadamard(self.size)
        if self.fixed and not torch.equal(matrix @ matrix.t(), self.size * torch.eye(self.size, dtype=torch.float64)):
            raise index.bad(self.weight, f"a Hadamard matrix of order {self.size}", "rows that are not orthogonal")
        if self.perm is not None:
            perm = t[self.perm].long()
            if not torch.equal(perm.sort().values, torch.arange(self.size)):
                raise index.bad(self.perm, f"a permutation of {self.size}", "repeated or missing positions")
            matrix = matrix[perm][:, perm]
        if self.kind != "random-matrix":  # its inverse is stored; a Hadamard's is the transpose
            matrix = (matrix.t() if self.inverse else matrix) / math.sqrt(self.size)
        return Dense(matrix.contiguous())


@dataclass(frozen=True)
class _Rule:
    group: str
    kind: str
    location: str
    inverse: bool
    head_dim: int | None
    randomize: bool
    trained: bool
    targets: Patterns
    ignore: Patterns


@dataclass
class Transforms:
    """The online transforms of a checkpoint."""

    index: TensorIndex
    rules: list[_Rule] = field(default_factory=list)

    @staticmethod
    def read(config: CheckpointConfig, index: TensorIndex) -> Transforms:
        """Every rule of transform_config that acts at run time."""
        section = config.quantization.get("transform_config")
        if section is not None and not isinstance(section, dict):
            raise config.bad("transform_config", "an object", section)
        groups = (section or {}).get("config_groups") or {}
        if not isinstance(groups, dict):
            raise config.bad("transform_config.config_groups", "an object", groups)
        found = Transforms(index)
        for name, group in groups.items():
            found.rules += _rules(config, name, group)
        return found

    def of(self, module: str, n: int, k: int) -> tuple[tuple[Online, ...], tuple[Online, ...]]:
        """The transforms of a module's input [k] and output [n], in the order of their application."""
        before: list[Online] = []
        after: list[Online] = []
        for rule in self.rules:
            if rule.targets.find(module) is None or rule.ignore.find(module) is not None:
                continue
            size = rule.head_dim or (k if rule.location == "input" else n)
            if (k if rule.location == "input" else n) % size:
                raise CheckpointError(
                    f"{self.index.folder}: {module}: transform {rule.group} of {size} features does not divide "
                    f"its {rule.location} of {k if rule.location == 'input' else n}"
                )
            one = self._online(rule, module, size)
            if rule.location == "input":
                before.insert(0, one)  # every later hook is put in front of the earlier ones
            else:
                after.append(one)
        return tuple(before), tuple(after)

    def is_matrix(self, module: str) -> bool:
        """Whether a name is that of a stored transform (`down_proj.R4_input`), which looks like a Linear in a file."""
        leaf = module.rpartition(".")[2]
        return any(leaf == f"{rule.group}_{rule.location}" for rule in self.rules)

    def finish(self) -> None:
        """CheckpointError for an online transform whose targets match no quantized module."""
        for rule in self.rules:
            if not rule.targets.used:
                raise CheckpointError(
                    f"{self.index.folder}: transform {rule.group} acts on {rule.location} of "
                    f"{', '.join(rule.targets.patterns)}, which match no quantized module"
                )

    def _online(self, rule: _Rule, module: str, size: int) -> Online:
        stem = f"{module}.{rule.group}_{rule.location}"
        if f"{stem}.weight" not in self.index:
            stem = self._shared(rule, size) or stem
        self.index.expect(f"{stem}.weight", _MATRIX, (size, size))
        perm = f"{stem}.perm" if rule.randomize else None
        if perm is not None:
            self.index.expect(perm, ("I64",), (size,))
        plain = rule.kind == "hadamard" and not (rule.randomize or rule.trained) and size & (size - 1) == 0
        weight = f"{stem}.weight"
        fixed = rule.kind != "random-matrix" and not rule.trained
        return Online(rule.group, rule.location, weight, perm, size, rule.kind, rule.inverse, plain, fixed)

    def _shared(self, rule: _Rule, size: int) -> str | None:
        """Where another module's copy of the same transform is stored: same group and size, any online location."""
        same = {r.location for r in self.rules if r.group == rule.group}
        if rule.kind == "random-matrix":  # the inverse is another matrix
            same = {r.location for r in self.rules if r.group == rule.group and r.inverse == rule.inverse}
        pattern = re.compile(rf".*\.{re.escape(rule.group)}_({'|'.join(sorted(map(re.escape, same)))})\.weight$")
        for name, entry in self.index.entries.items():
            if entry.shape == (size, size) and pattern.match(name):
                return name.removesuffix(".weight")
        return None


def _rules(config: CheckpointConfig, name: str, group: object) -> Sequence[_Rule]:
    path = f"transform_config.config_groups.{name}"
    if not isinstance(group, dict):
        raise config.bad(path, "an object", group)
    kind, head_dim = group.get("type"), group.get("head_dim")
    if kind not in _TYPES:
        raise config.bad(f"{path}.type", f"one of {', '.join(_TYPES)}", kind)
    if head_dim is not None and (type(head_dim) is not int or head_dim < 1):
        raise config.bad(f"{path}.head_dim", "a positive integer or null", head_dim)
    rules = []
    apply = group.get("apply", [])
    if not isinstance(apply, list) or not all(isinstance(a, dict) for a in apply):
        raise config.bad(f"{path}.apply", "a list of objects", apply)
    for i, a in enumerate(apply):
        where = f"{path}.apply[{i}]"
        location = a.get("location")
        if location in _FUSED:
            continue
        if location not in ("input", "output"):
            raise CheckpointError(
                f"unsupported: {config.folder / config.file}: {where}.location: online transform at {location!r}; "
                f"input and output can be read, attention locations are planned"
            )
        rules.append(
            _Rule(
                group=name,
                kind=kind,
                location=location,
                inverse=_flag(config, a, "inverse", where),
                head_dim=head_dim,
                randomize=_flag(config, group, "randomize", path),
                trained=_flag(config, group, "requires_grad", path),
                targets=Patterns(f"{where}.targets", names(config, a, "targets", f"{where}.")),
                ignore=Patterns(f"{where}.ignore", names(config, a, "ignore", f"{where}.")),
            )
        )
    return rules


def _flag(config: CheckpointConfig, section: Mapping[str, Any], key: str, path: str) -> bool:
    value = section.get(key)
    if value is not None and not isinstance(value, bool):
        raise config.bad(f"{path}.{key}", "true or false", value)
    return bool(value)
