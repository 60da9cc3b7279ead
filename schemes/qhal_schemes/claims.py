"""Claims: how a checkpoint is recognized whose config.json has no quantization section.

A claim is an entry point of the group `qhal.claims`. Its name is a pattern of file names (`hf_quant_config.json`,
`*.gguf`, or `config.json` for a key in it); its value is a function that looks at what matched. Only claims whose
pattern matches are imported, so that a broken package cannot get in the way of other formats.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from qhal.errors import CheckpointError
from qhal_schemes.source import TensorIndex
from qhal_schemes.strict_json import is_file, load_json

GROUP = "qhal.claims"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160


@dataclass(frozen=True, eq=False)
class Claimed:
    """What a claim found.

    method   the quant_method whose scheme reads this checkpoint
    section  the JSON object that stands for config.json's quantization section
    file     the name of the file that it came from, for error messages
    model    stands for config.json in formats that have none; None: config.json must be there
    index    opens the tensors, for weights that are not in safetensors files
    """

    method: str
    section: Mapping[str, Any]
    file: str
    model: Mapping[str, Any] | None = None
    index: Callable[[Path], TensorIndex] = TensorIndex.open


Claim = Callable[[Sequence[Path], Mapping[str, Any]], Claimed | None]
"""The files that match the pattern, sorted and at least one, and config.json ({} if there is none) -> what they are, or
None if they are something else. CheckpointError if they are this format, but broken."""


def find(path: Path, model: Mapping[str, Any]) -> Claimed | None:
    """The claim on a folder or a single file; CheckpointError where two methods claim it or a claim is broken."""
    found: dict[str, Claimed] = {}
    for point in sorted(set(entry_points(group=GROUP)), key=lambda p: (p.name, p.value)):
        files = _matching(path, point.name)
        claimed = _load(point)(files, model) if files else None
        if claimed is not None:
            found.setdefault(claimed.method, claimed)
    if len(found) > 1:
        both = " and ".join(f"{c.file} ({c.method})" for c in found.values())
        raise CheckpointError(f"{path}: two files say how it is quantized: {both}; remove the one that is wrong")
    return next(iter(found.values()), None)


def side_files(folder: Path) -> list[str]:
    """The files that any claim looks at, config.json left out: a folder written anew must not keep them."""
    names = {path.name for point in entry_points(group=GROUP) for path in _matching(folder, point.name)}
    return sorted(names - {"config.json"})


def named(path: Path, section: object, key: str = "", default: str | None = None) -> Claimed:
    """A section with its quant_method, checked. path: of its JSON file; key: where in the file it is."""
    where = f"{path}: {key}" if key else f"{path}"
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: expected an object, found {type(section).__name__}")
    method = section.get("quant_method", default)
    if not isinstance(method, str) or not method:
        raise CheckpointError(f"{where}: quant_method: expected the name of a method, found {_SHORT.repr(method)}")
    return Claimed(method, section, path.name)


def quantize_config(files: Sequence[Path], model: Mapping[str, Any]) -> Claimed:
    """quantize_config.json of AutoGPTQ and GPTQModel; some versions of AutoAWQ wrote it too, with a layout `gemm`."""
    section = load_json(files[0])
    awq = str(section.get("version", "")).lower().startswith("gem")
    return named(files[0], section, default="awq" if awq else "gptq")


def quant_config(files: Sequence[Path], model: Mapping[str, Any]) -> Claimed:
    """quant_config.json of AutoAWQ."""
    return named(files[0], load_json(files[0]), default="awq")


def _matching(path: Path, pattern: str) -> list[Path]:
    if is_file(path):
        return [path] if fnmatchcase(path.name, pattern) else []
    return [p for p in sorted(path.glob(pattern)) if is_file(p)]


def _load(point: EntryPoint) -> Claim:
    try:
        claim: Claim = point.load()
    except Exception as bad:
        raise CheckpointError(f"{GROUP}: {point.name} = {point.value} cannot be loaded: {bad}") from bad
    if not callable(claim):
        raise CheckpointError(f"{GROUP}: {point.name} = {point.value} is no claim: it cannot be called")
    return claim
