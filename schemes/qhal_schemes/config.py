"""CheckpointConfig: the model's configuration and, found and named, the part that says how it is quantized."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qhal.errors import CheckpointError
from qhal_schemes import claims
from qhal_schemes.source import TensorIndex
from qhal_schemes.strict_json import is_file, load_json

_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160


@dataclass(frozen=True, eq=False)
class CheckpointConfig:
    """What the JSON files of a checkpoint say.

    model         config.json
    quantization  the quantization section, empty for a checkpoint without one
    method        its quant_method, "" without one
    file          the file that the section came from, for error messages
    index         opens the tensors of the folder, or of the single file, that was read
    """

    folder: Path
    model: Mapping[str, Any]
    quantization: Mapping[str, Any]
    method: str
    file: str
    index: Callable[[Path], TensorIndex] = TensorIndex.open

    @staticmethod
    def read(path: Path) -> CheckpointConfig:
        """Read config.json and find the quantization section in it or in a file beside it (`qhal_schemes.claims`).

        path: a folder, or a single file of a format that has no folder
        """
        single = is_file(path)
        if not single and not path.is_dir():
            raise CheckpointError(f"{path}: {'is neither a folder nor a file' if path.exists() else 'does not exist'}")
        stored = None if single or not is_file(path / "config.json") else load_json(path / "config.json")
        claimed = _section(path, stored or {}) or claims.find(path, stored or {})
        model = stored if claimed is None or claimed.model is None else claimed.model
        if model is None:
            what = "is a file, expected a checkpoint folder" if single else "config.json is missing"
            raise CheckpointError(f"{path}: {what}")
        claimed = claimed or claims.Claimed("", {}, "config.json")
        folder = path.parent if single else path
        return CheckpointConfig(folder, model, claimed.section, claimed.method, claimed.file, claimed.index)

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the model's activations; bfloat16 where the configuration names none."""
        name = self.value("dtype", self.value("torch_dtype"))
        if name is None:
            return torch.bfloat16
        dtype = _DTYPES.get(str(name).removeprefix("torch."))
        if dtype is None:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: dtype {_SHORT.repr(name)}: known are {', '.join(_DTYPES)}"
            )
        return dtype

    @property
    def tied(self) -> bool:
        """Whether the output head shares the embedding, so that the file has no lm_head."""
        return bool(self.value("tie_word_embeddings", True))

    def count(self, key: str) -> int | None:
        """A count of config.json (heads, features), None where it names none; CheckpointError if it is no count."""
        value = self.value(key)
        if value is not None and (type(value) is not int or not 0 < value < 1 << 31):
            raise CheckpointError(
                f"{self.folder / 'config.json'}: {key}: expected a positive integer, found {_SHORT.repr(value)}"
            )
        return value

    @property
    def kv_heads(self) -> int:
        """Key-value heads of the model, 0 where config.json does not say."""
        return self.count("num_key_value_heads") or self.count("num_attention_heads") or 0

    @property
    def head_dim(self) -> int:
        """Features of one head, 0 where config.json does not say."""
        hidden, heads = self.count("hidden_size"), self.count("num_attention_heads")
        return self.count("head_dim") or (hidden // heads if hidden and heads else 0)

    def number(self, key: str) -> float | None:
        """A positive number of config.json, None where it names none; CheckpointError if it is something else."""
        value = self.value(key)
        if value is not None and (type(value) not in (int, float) or not 0 < value < float("inf")):
            raise CheckpointError(
                f"{self.folder / 'config.json'}: {key}: expected a positive number, found {_SHORT.repr(value)}"
            )
        return None if value is None else float(value)

    def value(self, key: str, default: Any = None) -> Any:
        """A value of config.json, or of its text_config where a multimodal model keeps the decoder's values."""
        text = self.model.get("text_config")
        for place in (self.model, text if isinstance(text, dict) else {}):
            if place.get(key) is not None:
                return place[key]
        return default

    def bad(self, key: str, expected: str, found: object) -> CheckpointError:
        """The error about a value of the quantization section."""
        return CheckpointError(f"{self.folder / self.file}: {key}: expected {expected}, found {_SHORT.repr(found)}")

    def integer(self, key: str, allowed: Sequence[int] | None = None, default: int | None = None) -> int:
        """An integer of the quantization section, one of `allowed` or positive."""
        return integer(self, self.quantization, key, allowed, default)

    def boolean(self, key: str, default: bool) -> bool:
        """A truth value of the quantization section."""
        value = self.quantization.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.bad(key, "true or false", value)
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of module names or patterns of the quantization section; null is an empty list."""
        return names(self, self.quantization, key)


def integer(
    config: CheckpointConfig,
    section: Mapping[str, Any],
    key: str,
    allowed: Sequence[int] | None = None,
    default: int | None = None,
    path: str = "",
) -> int:
    """An integer of `section`, one of `allowed` or positive; `path` names the section in the error."""
    value = section.get(key, default)
    expected = f"one of {', '.join(map(str, allowed))}" if allowed is not None else "a positive integer"
    if type(value) is not int or (value not in allowed if allowed is not None else value < 1):
        raise config.bad(f"{path}{key}", expected, value)
    return value


def names(config: CheckpointConfig, section: Mapping[str, Any], key: str, path: str = "") -> tuple[str, ...]:
    """A list of strings of `section`."""
    value = section.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise config.bad(f"{path}{key}", "a list of names", value)
    return tuple(value)


def _section(folder: Path, model: Mapping[str, Any]) -> claims.Claimed | None:
    """The quantization section of config.json."""
    text = model.get("text_config")
    for place in (model, text if isinstance(text, dict) else {}):
        for key, default in (("quantization_config", None), ("compression_config", "compressed-tensors")):
            if place.get(key) is not None:
                return claims.named(folder / "config.json", place[key], key, default)
    return None
