"""Synthetic modules of every family for `load_speed.py`: random tensors in the family's layout, as its files hold them.

A case writes a folder with one module. Codes are random bits; scales are small positive numbers; where a format knows
values that are no numbers (NaN), codes stay below them. PEERS are the packages that can decode the same tensors here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MODULE = "model.layers.0.mlp.down_proj"
Tensors = dict[str, Tensor]
Peer = Callable[[Tensors], object]
"""The package's decoding of one module to bf16, from the tensors by their last names."""


@dataclass
class Files:
    """What a case writes. tensors: by last name; peer: see `Peer`; read: how another kind of file is read whole.

    target, leaves: the module to measure and the last names of its tensors, where the file holds another one too.
    """

    tensors: Tensors
    section: dict[str, Any] | None = None
    module: str = MODULE
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    peer: Peer | None = None
    join: str = "."
    target: str = ""
    leaves: tuple[str, ...] = ()
    read: Callable[[Path], Tensors] | None = None

    def write(self, folder: Path) -> Path:
        """The path to open."""
        config = {"model_type": "llama", "dtype": "bfloat16", **self.config}
        if self.section is not None:
            config["quantization_config"] = self.section
        for name, text in {"config.json": config, **self.others}.items():
            (folder / name).write_text(json.dumps(text))
        if self.read is None:
            named = {f"{self.module}{self.join}{leaf}": t.contiguous() for leaf, t in self.tensors.items()}
            save_file(named, folder / "model.safetensors", self.metadata)
        return folder

    def get_tensors(self, folder: Path) -> Tensors:
        """The module's tensors as the file's own reader gives them, by last name."""
        if self.read is not None:
            return self.read(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            leaves = self.leaves or self.tensors
            return {leaf: file.get_tensor(f"{self.module}{self.join}{leaf}") for leaf in leaves}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    family: str
    name: str
    make: Callable[[int, int, torch.Generator], Files]

    @property
    def title(self) -> str:
        """Family and name."""
        return f"{self.family} {self.name}"


def words(g: torch.Generator, *shape: int) -> Tensor:
    """Random int32 words."""
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=g).to(torch.int32)


def raw(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Random bytes below 127: no NaN, as an FP8 code or as an exponent."""
    return torch.randint(1, 126, shape, dtype=torch.uint8, generator=g).view(dtype)


def scales(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small positive numbers."""
    return (torch.rand(shape, generator=g) * 0.01 + 0.001).to(dtype)


def all_cases() -> dict[str, Case]:
    """Every case by its title."""
    from load_cases import codebooks, compressed_tensors, gguf_types, groups, rotations, tools

    modules = (compressed_tensors, groups, tools, codebooks, gguf_types, rotations)
    return {case.title: case for module in modules for case in module.CASES}
