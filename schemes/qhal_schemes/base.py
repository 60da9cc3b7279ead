"""Scheme and SchemeMapping: what one checkpoint format must answer. Data only: no kernel and no device is in sight.

A format is one file: a class that derives from SchemeMapping, and an object with `open`. `describe` works from the
configuration and the tensor index; only `read` looks at values, and only at those of one module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from qhal.layer_formats import KVFormat, LinearFormat
from qhal.specs import KVSpec, LinearSpec
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family, cache_form, compared_forms, form
from qhal_schemes.experts import StackedExperts
from qhal_schemes.source import TensorIndex


class CheckpointWarning(UserWarning):
    """Something in a checkpoint that is legal, but probably not what its author meant."""


class Caches(Protocol):
    """How the caches of a checkpoint's layers are quantized. layers: layer number -> attention module."""

    @property
    def layers(self) -> Mapping[int, str]:
        """Layers with a quantized cache."""

    def describe(self, layer: int) -> KVFormat:
        """The format of one of `layers`, from the configuration and the index; reads no data."""

    def spec(self, layer: int) -> KVSpec:
        """Format and static scales, checked; its `.format` equals `describe(layer)`."""

    def tensors(self, layer: int) -> Sequence[str]:
        """Every tensor that `spec(layer)` accounts for."""


class SchemeMapping(ABC):
    """One opened checkpoint: which modules are quantized and how each one's tensors become a spec.

    config    the model's and the quantization configuration
    index     names, dtypes and shapes of every tensor
    modules   quantized modules in the order of the file
    excluded  Linear modules that stay plain: name -> the rule that excludes it
    cache     quantized caches, None where the format has none
    """

    cache: Caches | None = None

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        self.config = config
        self.index = index

    @property
    @abstractmethod
    def modules(self) -> Sequence[str]:
        """Quantized modules, in the order of the file."""

    @property
    @abstractmethod
    def excluded(self) -> Mapping[str, str]:
        """Linear modules with a plain weight: module -> the named rule that keeps it plain."""

    @abstractmethod
    def describe(self, module: str) -> LinearFormat:
        """The format of a quantized module from the configuration and the index; reads no data."""

    @abstractmethod
    def read(self, module: str) -> LinearSpec:
        """The spec of a quantized module, its values checked; its `.format` equals `describe(module)`."""

    @abstractmethod
    def tensors(self, module: str) -> Sequence[str]:
        """Every tensor that `read(module)` accounts for."""

    def layout(self, module: str) -> str:
        """How the file stores a quantized module, where a scheme reads more than one way; for `evidence.py`."""
        return ""

    def compared(self, module: str) -> bool:
        """Whether modules of this form were compared with what the form's own tool computes."""
        return form(self.describe(module), self.layout(module)) in compared_forms(self.config.method)

    def cache_compared(self, layer: int) -> bool:
        """Whether caches of this form were."""
        f = self.kv_format(layer)
        return f is not None and cache_form(f) in compared_forms(self.config.method)

    @property
    def stacked(self) -> Mapping[str, StackedExperts]:
        """Experts that the file stores stacked, by prefix. Both modules of each are in `modules`; `describe` answers
        for one expert, and `read_experts` takes the place of `read`."""
        return {}

    def read_experts(self, module: str, first: int, count: int) -> LinearSpec:
        """The spec [count, N, K] of experts first:first+count of a stacked module; reads only their bytes."""
        raise NotImplementedError(f"{type(self).__name__} has no stacked experts")

    @property
    def kv_layers(self) -> Mapping[int, str]:
        """Layers with a quantized cache: layer number -> attention module."""
        return {} if self.cache is None else self.cache.layers

    def kv_format(self, layer: int) -> KVFormat | None:
        """The cache format of a layer, from the configuration and the index."""
        return self.cache.describe(layer) if self.cache is not None and layer in self.cache.layers else None

    def kv(self, layer: int) -> KVSpec | None:
        """How the cache of a layer is quantized; None: it is not."""
        return self.cache.spec(layer) if self.cache is not None and layer in self.cache.layers else None

    def kv_tensors(self, layer: int) -> Sequence[str]:
        """Every tensor that `kv(layer)` accounts for."""
        return () if self.cache is None else self.cache.tensors(layer)


@runtime_checkable
class Scheme(Protocol):
    """A checkpoint format, registered by the entry point that names its quant_method."""

    def open(self, config: CheckpointConfig, index: TensorIndex) -> SchemeMapping:
        """Match the configuration with the tensors; CheckpointError for anything that does not fit."""


@dataclass(frozen=True)
class MappingScheme:
    """The usual scheme: opening is constructing a SchemeMapping. family: its row in the table of formats."""

    mapping: type[SchemeMapping]
    family: Family | None = None

    def open(self, config: CheckpointConfig, index: TensorIndex) -> SchemeMapping:
        """Construct the mapping, which matches the configuration with the tensors."""
        return self.mapping(config, index)
